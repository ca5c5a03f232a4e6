"""Mistakes in a configuration: all of them at once, each with its place and the nearest valid choice."""

from itertools import pairwise

import pytest

from uae_fast.config import Config, ConfigError, leaves, load_config, preset_names, save_config
from uae_fast.config_checks import invariants


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
        ("caption.temperature=-1", "negative"),
        ("stage2.steps=-1", "negative"),
        ("reporters=[tensorbord]", "tensorboard"),
        ("stages=[2,3,2]", "stage 2 is listed twice"),
        ("stage3.micro_batch=256", "128 samples a step do not divide"),
        ("stage2.updates=0", "at least 1"),
        ("run=", "names no folder"),
        ("data.train= ", "names no folder"),
        ("device=gpu", "choose auto, cpu, cuda, cuda:N or mps"),
        ("data.max_bad=1", "below 1"),
        ("data.resolution=0", "at least 1"),
        ("condition.length=0", "at least 1"),
        ("models.lora_alpha=0", "adds nothing"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("optimizer.betas=[0.9,1.0]", "below 1"),
        ("optimizer.eps=0", "above 0"),
        ("stage3.ema_decay=1", "below 1"),
    ],
)
def test_contradictions_name_their_key(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    named = f"command line: {override.split('=')[0]}: "
    assert any(problem.startswith(named) and words in problem for problem in caught.value.problems)


def test_keys_that_contradict_each_other_are_both_named():
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", ["stage3.kind=cps", "stage3.noise_level=1.5"])
    assert caught.value.problems == [
        "command line: stage3.noise_level: of stage3.kind = cps is a fraction of a quarter turn: at most 1"
    ]


@pytest.mark.parametrize(
    "text, value",
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("3", 3.0), (".5", 0.5), ("-1", "negative"), ("1:30", "not a number"),
     (".nan", "not a number"), ("nan", "not a finite number"), ("-inf", "not a finite number"), ("", "nothing")],
)  # fmt: skip
def test_numbers_as_people_write_them(file, text, value):
    if isinstance(value, float):
        file.write_text(f"stage2:\n  lr: {text}\n")
        assert load_config(file).stage2.lr == load_config("tiny", [f"stage2.lr={text}"]).stage2.lr == value
    else:
        (problem,) = problems(file, f"stage2:\n  lr: {text}\n")
        assert problem.startswith(f"{file}:2: stage2.lr: ") and value in problem


@pytest.mark.parametrize("text", ["${seed}", "${oc.env:HOME}", "???", "a: b", "2024-01-01", "no", "1e-5", "#1", "ż 🐝"])
def test_text_is_taken_as_it_stands(file, text):
    """No value refers to another one, to the environment or to anything else."""
    assert load_config("tiny", [f"caption.prompt={text}"]).caption.prompt == text
    file.write_text(f"caption:\n  prompt: '{text}'\n", encoding="utf-8")
    assert load_config(file).caption.prompt == text
    save_config(load_config(file), file)
    assert load_config(file).caption.prompt == text


def test_text_that_is_no_unicode_text(file):
    for text in ('"a\\0b"', '"\\ud800"'):
        assert "no Unicode text" in problems(file, f"caption:\n  prompt: {text}\n")[0]
    assert "no Unicode text" in problems(file, "", "run=\udcff")[0]


def test_bombs_are_refused_at_once(file):
    assert "nested too deeply" in problems(file, "run: " + "[" * 100_000)[0]
    laughs = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghijk"))
    found = problems(file, f"a: &a [ha]\n{laughs}seed: *k\nstages: *k\n")
    assert len(found) == 13 and all(len(problem) < 400 for problem in found)
    assert "whole number" in problems(file, f"seed: {'9' * 10_000}\n")[0]


def test_a_group_without_keys_is_as_if_it_were_absent(file):
    file.write_text("seed: 1\nstage2:\n  # lr: 1\nstage3: ~\n")
    assert load_config(file) == load_config(file, ["stage2.lr=1e-5"])


def test_files_that_are_not_configurations(file):
    assert "not valid YAML" in problems(file, "a: [1\nb: 2")[0]
    assert "expected keys and values" in problems(file, "- 1\n- 2\n")[0]
    assert "expected keys and values" in problems(file, "stage2: 3\n")[0]
    assert f"{file}:2: seed: given twice, first at {file}:1" in problems(file, "seed: 1\nseed: 2\n")[0]
    assert "stage2.lr: given twice" in problems(file, "stage2: {lr: 1}\nstage2.lr: 2\n")[0]
    assert "a key must be a word" in problems(file, "[a, b]: 1\n")[0]
    assert "unknown key; there are run, seed, stages" in problems(file, "zzz: 1\n")[0]
    with pytest.raises(ConfigError, match="did you mean the preset tiny"):
        load_config("tinny")


def test_nothing_in_a_file_is_executed(file):
    marker = file.with_name("executed")
    call = f"!!python/object/apply:os.system ['touch {marker}']"
    for text in (
        f"run: {call}",
        f"stage2: {{lr: {call}}}",
        f"stage2: {call}",
        f"? {call}\n: 1",
        f"stages: [{call}]",
        call,
    ):
        assert problems(file, text)
    for key in ("seed", "stages", "stage2.lr", "reporters"):
        assert "could not determine a constructor" in problems(file, "", f"{key}={call}")[0]
    assert load_config("tiny", [f"run={call}"]).run == call
    assert not marker.exists()


def test_the_defaults_contradict_nothing():
    assert invariants(Config()) == []
