"""Whole runs of a few steps: what they leave, how they stop, and that going on changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.config import ConfigError, save_config
from uae_fast.models.loading import load_run
from uae_fast.trainer import train


def weights(checkpoint):
    """Every tensor of a checkpoint, by file and name."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{f.relative_to(checkpoint)}:{k}": v for f in files for k, v in load_file(f).items()}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith("seconds/") and k != "images_per_second"}


def assert_equal_runs(first, second):
    assert list(map(timeless, rows(first))) == list(map(timeless, rows(second)))
    ours, theirs = weights(checkpoints(first / "checkpoints")[-1]), weights(checkpoints(second / "checkpoints")[-1])
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_leaves_what_it_promises(world, small_config):
    config = small_config(world, "stages=[0,1,2,3]", "reporters=[tensorboard]", "stage2.lr=1e-2")
    run = train(config)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"seed", "minutes", "ceiling", "before", "stage0", "stage1", "stage2", "stage3"}
    keys = "reward reward_stderr reward_gain_stderr attribute_recall attribute_precision caption_tokens accuracy"
    assert set(summary["stage2"]) == set(keys.split())
    assert summary["before"]["reward_gain_stderr"] is None and summary["stage2"]["reward_gain_stderr"] > 0
    samples = [json.loads(line) for line in (run / "samples/before/scores.jsonl").read_text().splitlines()]
    mean = sum(row["reward"] for row in samples) / 8
    assert summary["before"]["reward"] == pytest.approx(mean) and len(samples) == 8
    for moment in ("source", "ceiling", "before", "stage3"):
        assert len(list((run / "samples" / moment).glob("*.png"))) == 2
    moments = [read_state(path)["moment"] for path in checkpoints(run / "checkpoints")]
    assert moments == ["stage0", "stage1", "stage2", "stage3"]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_resuming_changes_nothing(world, small_config, mode, optimizer):
    """Six steps of every stage in one go, against a stop after the fourth and a new process's worth of state."""
    options = (
        "stages=[1,2,3]", *(f"stage{i}.steps=3" for i in (1, 2, 3)), f"models.encoder={mode}", f"models.decoder={mode}",
        f"optimizer.name={optimizer}", "checkpoint.every=1", "checkpoint.keep=20", "stage2.lr=1e-3", "stage3.beta=0.01",
    )  # fmt: skip
    whole = train(small_config(world, *options, run="whole"))
    for stop in (2, 5, 7):
        config = small_config(world, *options, run=f"parts{stop}")
        train(config)
        parts = type(whole)(config.run)
        for path in checkpoints(parts / "checkpoints")[stop:]:
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
        kept = read_state(checkpoints(parts / "checkpoints")[-1])
        for place, moment in enumerate(("stage1", "stage2", "stage3")):
            if place >= kept["place"]:
                (parts / "samples" / moment / "scores.jsonl").unlink()
        train(config, resume=True)
        assert_equal_runs(whole, parts)
        before, after = (json.loads((run / "summary.json").read_text()) for run in (whole, parts))
        assert {**before, "minutes": 0} == {**after, "minutes": 0}


def test_ctrl_c_saves_and_resume_goes_on(world, small_config, tmp_path):
    options = ("stages=[2]", "stage2.steps=40", "checkpoint.every=1000", "evaluate.images=2")
    config = small_config(world, *options)
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "uae_fast.cli", "train", str(tmp_path / "config.yaml")]
    run = tmp_path / "run"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (run / "metrics.jsonl").exists() or not rows(run):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume" in output
    done = read_state(checkpoints(run / "checkpoints")[-1])["step"]
    assert 1 <= done < 40 and len(rows(run)) == done
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    whole = train(small_config(world, *options, run="whole"))
    assert_equal_runs(whole, run)


def test_stages_2_and_3_need_no_captions(own_world, world, small_config):
    """Without captions.jsonl they train, and train the same."""
    for split in ("train", "heldout"):
        (own_world / split / "captions.jsonl").unlink()
    blind = train(small_config(own_world, "stages=[2,3]", run="blind"))
    seeing = train(small_config(world, "stages=[2,3]", run="seeing"))
    assert_equal_runs(blind, seeing)
    summary = json.loads((blind / "summary.json").read_text())
    assert summary["ceiling"] is None and summary["stage3"]["attribute_recall"] is None
    with pytest.raises(ConfigError, match=r"captions\.jsonl"):
        train(small_config(own_world, "stages=[1]", run="needs"))


def test_broken_images_are_named_skipped_and_counted(own_world, small_config, capsys):
    (own_world / "train" / "scene-00007.png").write_bytes(b"not a picture")
    (own_world / "train" / "scene-00009.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="2 of the 64 images"):
        train(small_config(own_world, "stages=[2]"))
    run = train(small_config(own_world, "stages=[2]", "data.max_bad=0.05"))
    output = capsys.readouterr().out
    assert "scene-00007.png" in output and "scene-00009.png" in output
    assert {row["skipped_images"] for row in rows(run)} == {2}


def test_a_run_is_not_overwritten(world, small_config):
    config = small_config(world, "stages=[2]", "evaluate.images=0")
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        train(config, resume=True)
    train(config)
    with pytest.raises(ConfigError, match="--resume"):
        train(config)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_moments_of_a_run_can_be_loaded(world, small_config, mode):
    config = small_config(world, f"models.encoder={mode}", f"models.decoder={mode}", "stage2.lr=1e-2", "stage3.lr=1e-2")
    run = train(config)
    caption = "a red circle top-left on white"
    found = {}
    for moment in ("before", "stage1", "stage2", "stage3"):
        _, models = load_run(run, moment)
        context = models.condition([caption])
        latents = torch.ones(1, *models.decoder.latent_shape(32))
        with torch.no_grad():
            found[moment] = (
                models.encoder.read([caption], "policy")[0],
                context,
                models.decoder.velocity(latents, torch.tensor(0.5), context),
            )
    moves = (("before", "stage1", (1, 1, 1)), ("stage1", "stage2", (1, 0, 0)), ("stage2", "stage3", (0, 0, 1)))
    for earlier, later, moved in moves:
        changed = [not torch.equal(a, b) for a, b in zip(found[earlier], found[later], strict=True)]
        assert changed == list(map(bool, moved)), (earlier, later)
    with pytest.raises(ConfigError, match="stage0"):
        load_run(run, "stage0")


def test_pruning_keeps_the_ends_of_stages_and_the_last_few(world, small_config):
    config = small_config(
        world, "stages=[2,3]", "stage2.steps=6", "stage3.steps=5", "checkpoint.every=1", "checkpoint.keep=2",
        "evaluate.images=0",
    )  # fmt: skip
    run = train(config)
    left = [(read_state(path)["step"], read_state(path)["moment"]) for path in checkpoints(run / "checkpoints")]
    assert [step for step, moment in left if moment] == [6, 11]
    assert [step for step, moment in left if not moment] == [10]  # two are kept with the newest, an end itself


def test_half_a_checkpoint_is_none(world, small_config):
    config = small_config(world, "stages=[2]", "evaluate.images=0")
    run = train(config)
    (run / "checkpoints" / ".step-000009.part").mkdir()
    (run / "checkpoints" / "step-000009").mkdir()
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000002"]
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".step-000002")]
