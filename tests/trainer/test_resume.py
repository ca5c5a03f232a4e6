"""Going on changes nothing, and going on with something else is refused."""

import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import assert_equal_runs, differing_tensors, rows

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.cli import main
from uae_fast.config import ConfigError, save_config
from uae_fast.logging import RunLog
from uae_fast.models.sources import TINY
from uae_fast.trainer import train

EVERY_STAGE = (
    "stages=[0,1,2,3]", "checkpoint.every=1", "checkpoint.keep=20", "stage2.lr=1e-3", "stage2.updates=2",
    "stage3.beta=0.01", "evaluate.images=2", "optimizer.warmup_steps=1", "render.batch=8", "render.steps=4",
    "stage3.window_end=3",
)  # fmt: skip


def rewind(run: Path, step: int, to: Path) -> Path:
    """A copy of a run with the checkpoints after `step` gone; logs run ahead still, and so do (wrong) measurements."""
    shutil.copytree(run, to)
    for path in checkpoints(to / "checkpoints"):
        state = read_state(path)
        if state["step"] > step:
            shutil.rmtree(path)
            scores = to / "samples" / str(state["moment"]) / "scores.jsonl"
            if scores.is_file():
                scores.write_text(scores.read_text().replace('"reward": 0.', '"reward": 0.9'))
    return to


@pytest.mark.parametrize(
    "mode, optimizer, stops",
    [
        ("full", "adamw8bit", (0, 3, 4, 7)),
        ("lora", "adamw8bit", (5,)),
        ("full", "adamw", (5,)),
        ("lora", "adamw", (1,)),
    ],
)
def test_resuming_changes_nothing(world, small_config, tmp_path, mode, optimizer, stops):
    """Every stage in one go, against a stop in each, or between two of them, and a new process's worth of state."""
    options = (*EVERY_STAGE, f"models.encoder={mode}", f"models.decoder={mode}", f"optimizer.name={optimizer}")
    whole = train(small_config(world, *options, run="whole"))
    for stop in stops:
        parts = rewind(whole, stop, tmp_path / f"parts{stop}")
        (parts / "summary.json").unlink()
        train(small_config(world, *options, run=parts.name), resume=True)
        assert_equal_runs(whole, parts)
        for ours, theirs in zip(checkpoints(whole / "checkpoints"), checkpoints(parts / "checkpoints"), strict=True):
            assert differing_tensors(ours, theirs) == []


def test_training_draws_from_no_hidden_stream(world, small_config):
    """Every draw has a seed of its own: where the global generators stand changes nothing."""
    runs = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        options = (*EVERY_STAGE, "models.encoder=lora", "models.decoder=lora")
        runs.append(train(small_config(world, *options, run=f"run{seed}")))
    assert_equal_runs(*runs)


@pytest.fixture(scope="module")
def started(tmp_path_factory, world):
    """A run of two steps, with data and models of its own: (folder, overrides)."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(world, folder / "world")
    shutil.copytree(TINY, folder / "models")
    options = ["stages=[2]", "evaluate.images=0", "checkpoint.every=1", f"models.path={folder / 'models'}"]
    return folder, options


@pytest.fixture
def began(started, small_config, tmp_path):
    """``began(*overrides)`` gives the configuration of a run that has one of its two steps done."""
    folder, options = started
    if not (folder / "run").exists():
        config = small_config(folder / "world", *options, f"run={folder / 'run'}")
        train(config)
    rewind(folder / "run", 1, tmp_path / "run")
    return lambda *overrides: small_config(folder / "world", *options, *overrides)


def refusals(config, force=()):
    with pytest.raises(ConfigError) as caught:
        train(config, resume=True, force=force)
    return caught.value.problems


def test_another_configuration_is_refused_by_name(began):
    found = refusals(began("stage2.lr=0.5", "render.steps=9", "evaluate.images=1", "stage2.images=4"))
    assert [line.split(":")[0] for line in found] == ["render.steps", "stage2.images", "stage2.lr", "evaluate.images"]
    assert found[2] == (
        "stage2.lr: the run began with 0.0001, not 0.5; to go on all the same: --force-resume stage2.lr"
    )
    left = refusals(began("stage2.lr=0.5", "render.steps=9"), force=["render.steps"])
    assert [line.split(":")[0] for line in left] == ["stage2.lr"]


def test_what_changes_no_number_may_change(began, started, tmp_path, capsys):
    moved = Path(shutil.copytree(started[0] / "models", tmp_path / "moved"))
    elsewhere = Path(shutil.copytree(started[0] / "world", tmp_path / "elsewhere"))
    config = began(
        "device=cpu", "reporters=[tensorboard]", "checkpoint.every=2", "checkpoint.keep_every=5",
        f"models.path={moved}", f"data.train={elsewhere / 'train'}", f"data.heldout={elsewhere / 'heldout'}",
    )  # fmt: skip
    run = train(config, resume=True)
    assert "resuming from" in capsys.readouterr().out
    assert differing_tensors(*(checkpoints(r / "checkpoints")[-1] for r in (run, started[0] / "run"))) == []


@pytest.mark.parametrize("key", ["models.path", "data.train", "data.heldout", "precision"])
def test_other_models_data_or_precision_are_refused_by_name(began, started, tmp_path, key, monkeypatch):
    if key == "precision":
        monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
        config, words = began(), "highest float32 products on cpu"
    else:
        source = {"models.path": "models", "data.train": "world/train", "data.heldout": "world/heldout"}[key]
        other = Path(shutil.copytree(started[0] / source, tmp_path / "other"))
        changed = other / ("projector.safetensors" if key == "models.path" else "scene-00003.png")
        content = bytearray(changed.read_bytes())
        if key == "models.path":
            content[-1] ^= 1  # one bit of one weight
        changed.write_bytes(bytes(content) if key == "models.path" else (other / "scene-00004.png").read_bytes())
        config, words = began(f"{key}={other}"), "projector" if key == "models.path" else "files are not those"
    found = refusals(config)
    assert len(found) == 1 and found[0].startswith(f"{key}: ") and words in found[0]
    assert found[0].endswith(f"--force-resume {key}")
    run = train(config, resume=True, force=[key])
    state = read_state(checkpoints(run / "checkpoints")[-1])
    assert state["step"] == 2
    monkeypatch.undo()
    if key == "precision":
        assert refusals(began())  # from now on the run is of the new precision


def test_the_command_takes_keys_to_force_and_names_wrong_ones(began, tmp_path, capsys):
    save_config(began("stage2.lr=0.5", "stage2.beta=0.1"), tmp_path / "config.yaml")
    command = ["train", str(tmp_path / "config.yaml")]
    assert main([*command, "--resume", "--force-resume", "stage2.ls"]) == 2
    assert capsys.readouterr().err == "--force-resume stage2.ls: no such key; did you mean stage2.lr?\n"
    assert main([*command, "--force-resume", "stage2.lr"]) == 2
    assert capsys.readouterr().err.startswith("stage2.beta: the run began with 0.04, not 0.1")
    assert main([*command, "--force-resume", "stage2.lr", "--force-resume", "stage2.beta"]) == 0
    assert rows(tmp_path / "run")[-1]["lr"] == pytest.approx(0.5 * 2 / 6)


def test_a_run_killed_before_its_first_checkpoint_can_begin_anew(world, small_config, monkeypatch):
    """There is no moment at which a run can neither be resumed nor started."""
    config = small_config(world, "stages=[2]", "stage2.steps=1", "evaluate.images=0")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uae_fast.run.save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert rows(train(config))[0]["step"] == 1


def test_rows_beyond_the_checkpoint_and_a_row_cut_short_are_dropped(tmp_path):
    log = RunLog(tmp_path, [])
    for step in (1, 2, 3):
        log.metrics(step, "stage2", {"reward": step / 10})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "sta')
    RunLog(tmp_path, [], step=9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    RunLog(tmp_path, [], step=2).metrics(3, "stage2", {"reward": 0.3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_rows_wait_on_a_full_disk_and_none_is_cut_short(tmp_path, capsys):
    """The third row does not fit any more: it waits, and follows with the fourth when there is room again."""
    log, plain = RunLog(tmp_path, []), RunLog(tmp_path / "plain", [])
    (tmp_path / "plain").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3, 4):
        plain.metrics(step, "stage2", {"reward": step / 10})
        size = (tmp_path / "metrics.jsonl").stat().st_size if step > 1 else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20 if step == 3 else soft, hard))
        log.metrics(step, "stage2", {"reward": step / 10})
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if step == 3:
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
            assert "its rows wait for the next step" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
