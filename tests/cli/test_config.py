"""Mistakes in a configuration: all of them at once, each with its place and the nearest valid choice."""

import pytest

from uae_fast.config import Config, ConfigError, invariants, leaves, load_config, preset_names, save_config


def problems(path, text, *overrides):
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.yaml"


def test_every_preset_is_sound_and_survives_a_round_trip(file):
    assert "tiny" in preset_names()
    for name in preset_names():
        config = load_config(name)
        save_config(config, file)
        assert load_config(file) == config


def test_all_mistakes_are_reported_at_once(file):
    text = "run: x\nstage2:\n  group_sise: 8\n  lr: fast\nstage3: {kind: flow_sed}\nseed: [1]\n"
    found = problems(file, text, "render.stepz=3", "stage2.lr")
    assert [message.removeprefix(f"{file}:").split(": ")[:2] for message in found] == [
        ["command line", "'stage2.lr' is not key=value"],
        ["3", "stage2.group_sise"],
        ["4", "stage2.lr"],
        ["5", "stage3.kind"],
        ["6", "seed"],
        ["command line", "render.stepz"],
    ]
    assert "did you mean stage2.group_size?" in found[1]
    assert "flow_sde" in found[3] and "dance_sde" in found[3]
    assert "did you mean render.steps?" in found[5]


@pytest.mark.parametrize("key", [key for key, kind in leaves().items() if kind in (int, float)])
def test_numbers_are_numbers(file, key):
    found = problems(file, "", f"{key}=much")
    assert len(found) == 1 and f": {key}: " in found[0] and "'much'" in found[0]


@pytest.mark.parametrize(
    "override, words",
    [
        ("stage2.group_size=1", "at least 2"),
        ("stage2.micro_batch=7", "do not divide"),
        ("stage3.window_end=8", "the last step is never trained on"),
        ("stage3.window=8", "do not fit"),
        ("stage3.noise_level=0", "no log-prob"),
        ("stages=[4]", "there is no stage 4"),
        ("stages=[]", "no stage to run"),
        ("stage1.backprop_last_steps=9", "between 1 and"),
        ("caption.temperature=0", "above 0"),
        ("stage2.steps=-1", "negative"),
        ("reporters=[tensorbord]", "tensorboard"),
    ],
)
def test_contradictions_name_their_key(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    named = f"command line: {override.split('=')[0]}: "
    assert any(problem.startswith(named) and words in problem for problem in caught.value.problems)


def test_scientific_notation_is_a_number(file):
    file.write_text("stage2:\n  lr: 1e-5\n")
    assert load_config(file).stage2.lr == 1e-5


def test_files_that_are_not_configurations(file):
    assert "not valid YAML" in problems(file, "a: [1\nb: 2")[0]
    assert "expected keys and values" in problems(file, "- 1\n- 2\n")[0]
    assert "expected keys and values" in problems(file, "stage2: 3\n")[0]
    assert f"{file}:2: seed: given twice" in problems(file, "seed: 1\nseed: 2\n")[0]
    with pytest.raises(ConfigError, match="did you mean the preset tiny"):
        load_config("tinny")


def test_nothing_in_a_file_is_executed(file):
    found = problems(file, "run: !!python/object/apply:os.system ['touch /tmp/uae-fast-was-here']\n")
    assert "run: could not determine a constructor" in found[0]


def test_the_defaults_contradict_nothing():
    assert invariants(Config()) == []
