"""Several processes: they learn what one learns, and share one another's trouble."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import teams
import torch
from equal_runs import differing_tensors, rows, weights
from safetensors.torch import load_file

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.config import load_config, save_config
from uae_fast.logging import timeless
from uae_fast.team import _indivisible, merged
from uae_fast.trainer import train

SMALL = (
    "models.encoder=lora", "models.decoder=lora", "checkpoint.every=1", "checkpoint.keep=20", "evaluate.images=0",
    "render.batch=8", "render.steps=4", "stage3.window_end=3", "optimizer.name=adamw", "optimizer.max_grad_norm=1e6",
    "optimizer.eps=1",  # a weight moves by its gradient, not by the sign of that
    "stage0.micro_batch=4", "stage1.micro_batch=2", "stage2.micro_batch=2", "stage3.micro_batch=2",
)  # fmt: skip
TOLERANCE = 2e-5  # of a norm; every planted mistake is at least a thousand times as far off


@pytest.fixture
def make(world, small_config):
    return lambda *overrides, run="run": small_config(world, *SMALL, *overrides, run=run)


def learnt(run: Path) -> dict[tuple[int, str], torch.Tensor]:
    """By step, what the optimiser has seen (running means of gradients), and how far adapters have moved (from 0)."""
    found = {}
    for path in checkpoints(run / "checkpoints"):
        for kind in ("exp_avg", "lora_B"):
            values = [value.flatten() for name, value in weights(path).items() if kind in name.split(".", 2)[-1]]
            if values:
                found[read_state(path)["step"], kind] = torch.cat(values).double()
    return found


def furthest(run: Path, expected: Path) -> float:
    """How far that is from another run's, of the latter's norm, at the furthest."""
    ours, theirs = learnt(run), learnt(expected)
    assert ours.keys() == theirs.keys() and {kind for _, kind in theirs} == {"exp_avg", "lora_B"}
    return max(((ours[at] - theirs[at]).norm() / theirs[at].norm()).item() for at in theirs)


def test_two_processes_learn_what_one_learns(make, tmp_path):
    """All stages, rewards and held-out scores; three batches of held-out images for two processes."""
    options = (
        "stages=[0,1,2,3]",
        "evaluate.images=10",
        "render.batch=4",
        "evaluate.gallery=9",
        "stage2.updates=2",
        "stage3.beta=0.01",
    )
    alone = train(make(*options, run="alone"))
    assert teams.in_team(tmp_path, (make(*options, run="both"),)) == [0, 0], (tmp_path / "1.txt").read_text()
    both = tmp_path / "both"
    for ours, theirs in zip(rows(both), rows(alone), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert timeless(ours) == pytest.approx(timeless(theirs), rel=1e-4, abs=5e-6)
    assert furthest(both, alone) < TOLERANCE
    for moment in ("ceiling", "before"):
        for name in sorted(path.name for path in (alone / "samples" / moment).iterdir()):
            assert (both / "samples" / moment / name).read_bytes() == (alone / "samples" / moment / name).read_bytes()
    assert {path.relative_to(both).as_posix() for path in both.rglob("*.png")} == {
        path.relative_to(alone).as_posix() for path in alone.rglob("*.png")
    }
    last = [json.loads((run / "summary.json").read_text())["stage3"]["reward"] for run in (both, alone)]
    assert last[0] == pytest.approx(last[1], abs=1e-3)
    states = [read_state(checkpoints(run / "checkpoints")[-1]) for run in (both, alone)]
    assert (
        states[0]["machine"] == f"{states[1]['machine']}, 2 processes"
        and states[0]["identity"] == states[1]["identity"]
    )


def test_what_belongs_to_the_whole_step_does(make, tmp_path):
    """Tokens that divide a loss, and a batch's spread; each mistake would show, in the gradients of its stage."""
    options = ("stages=[2]", "stage2.steps=2", "stage2.loss_type=dapo", "stage2.scale_advantages=batch")
    alone = train(make(*options, run="alone"))
    mistakes = [teams.summed, teams.same_slice, teams.own_tokens, teams.own_spread]
    jobs = [(make(*options, run=plant.__name__ if plant else "both"), plant) for plant in (None, *mistakes)]
    assert teams.in_team(tmp_path, *jobs) == [0, 0], (tmp_path / "1.txt").read_text()
    assert furthest(tmp_path / "both", alone) < TOLERANCE
    for plant in mistakes:
        assert furthest(tmp_path / plant.__name__, alone) > 1000 * TOLERANCE, plant


def test_trouble_of_one_is_everybodys(make, tmp_path):
    """Too little memory, a NaN, a lost image, and a request to save, in process 1 alone."""
    options = ("stages=[2]", "stage2.steps=3", "stage2.lr=1e-3", "checkpoint.every=9", "data.max_bad=0.1")
    jobs = {
        "memory": teams.lacks_memory, "nan": teams.computes_nan, "save": teams.is_told_to_save, "plain": None,
    }  # fmt: skip
    configs = [(make(*options, "checkpoint.every=1" if name == "nan" else "checkpoint.every=9", run=name), plant)
               for name, plant in jobs.items()]  # fmt: skip
    assert teams.in_team(tmp_path, *configs) == [0, 0], (tmp_path / "1.txt").read_text()
    plain = checkpoints(tmp_path / "plain/checkpoints")[-1]

    assert [row["micro_batch"] for row in rows(tmp_path / "memory")] == [2, 1, 1]
    assert [row["reward"] for row in rows(tmp_path / "memory")] == pytest.approx(
        [row["reward"] for row in rows(tmp_path / "plain")], abs=1e-4
    )
    assert read_state(checkpoints(tmp_path / "memory/checkpoints")[-1])["step"] == 3

    first, second = checkpoints(tmp_path / "nan/checkpoints")[1:3]
    assert [row["skipped_steps"] for row in rows(tmp_path / "nan")] == [0, 1, 1]
    assert [row["skipped_images"] for row in rows(tmp_path / "nan")] == [0, 0, 1]
    assert differing_tensors(first, second) == [] and rows(tmp_path / "nan")[1]["loss"] is None
    assert len(json.loads((tmp_path / "nan/bad_step_2.json").read_text())["images"]) == 2

    assert [read_state(path)["step"] for path in checkpoints(tmp_path / "save/checkpoints")] == [0, 1, 3]
    assert differing_tensors(checkpoints(tmp_path / "save/checkpoints")[-1], plain) == []


def test_a_signal_to_one_stops_all_and_they_go_on_as_if_it_had_not(make, tmp_path):
    options = ("stages=[2]", "stage2.steps=3", "stage2.lr=1e-3", "checkpoint.every=9")
    config = make(*options, run="stopped")
    assert teams.in_team(tmp_path, (config, teams.is_told_to_stop)) == [143, 143]
    assert [read_state(path)["step"] for path in checkpoints(tmp_path / "stopped/checkpoints")] == [0, 1]
    assert teams.in_team(tmp_path, (config, None, True), (make(*options, run="whole"),)) == [0, 0]
    last = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("stopped", "whole")]
    assert differing_tensors(*last) == [] and read_state(last[0])["step"] == 3
    assert [timeless(row) for row in rows(tmp_path / "stopped")] == [timeless(row) for row in rows(tmp_path / "whole")]


def test_weights_that_differ_are_never_published(make, tmp_path):
    options = ("stages=[2]", "stage2.steps=2")
    assert teams.in_team(tmp_path, (make(*options), teams.drifts)) == [1, 1]
    said = (tmp_path / "0.txt").read_text()
    assert "step 1: encoder." in said and "differs between processes, nothing is saved; the last checkpoint is" in said
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-000000"]


def test_a_process_that_is_killed_ends_the_others(make, tmp_path):
    began = time.monotonic()
    assert teams.in_team(tmp_path, (make("stages=[2]", "stage2.steps=2"), teams.is_killed)) == [1, -signal.SIGKILL]
    assert "another process of the run has ended or does not answer" in (tmp_path / "0.txt").read_text()
    assert time.monotonic() - began < teams.DEADLINE / 2


def test_nobody_returns_before_all_is_written(make, tmp_path):
    job = (make("stages=[2]", "stage2.steps=1"), teams.is_slow_to_report)
    assert teams.in_team(tmp_path, job) == [0, 0], (tmp_path / "1.txt").read_text()


def test_batches_that_do_not_divide_are_refused_before_anything_loads(make, tmp_path):
    options = ("stages=[0,2]", "stage0.images=9", "stage0.micro_batch=3", "stage2.micro_batch=8")
    assert teams.in_team(tmp_path, (make(*options),)) == [2, 2]
    said = (tmp_path / "1.txt").read_text()
    assert "stage0.images: 9 images do not divide among 2 processes\n" in said
    assert "stage2.micro_batch: the 4 samples of each of 2 processes do not divide into micro-batches of 8\n" in said
    assert not (tmp_path / "run").exists()


def test_presets_divide_as_the_documentation_says():
    for name in ("sd35m_80gb", "sd35l_80gb", "sd35l_h200"):
        assert [_indivisible(load_config(name), size) for size in (2, 4, 8)] == [[], [], []], name
    assert _indivisible(load_config("tiny", ["stage1.micro_batch=16", "stage2.micro_batch=32"]), 2) == []


def test_a_mistake_that_one_finds_is_said_by_all(make, tmp_path):
    config = make("stages=[2]", "evaluate.images=16")
    assert teams.in_team(tmp_path, (config, teams.finds_a_mistake)) == [2, 2]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all("data.heldout: scene-00009.png could be read when the run began and cannot be now\n" in e for e in said)


def test_fp8_is_calibrated_by_one_for_all(make, tmp_path):
    """Held-out images are drawn with the scales that one process fits to the first batch of them."""
    options = ("stages=[2]", "stage2.steps=1", "evaluate.images=12", "same_sampler.fp8=true")
    alone = train(make(*options, run="alone"))
    assert teams.in_team(tmp_path, (make(*options, run="both"),)) == [0, 0], (tmp_path / "1.txt").read_text()
    scales = [load_file(run / "fp8.safetensors") for run in (tmp_path / "both", alone)]
    assert scales[0].keys() == scales[1].keys() and all(
        torch.equal(scales[0][name], scales[1][name]) for name in scales[0]
    )
    for moment in ("ceiling", "before"):
        scores = [(run / "samples" / moment / "scores.jsonl").read_bytes() for run in (tmp_path / "both", alone)]
        assert scores[0] == scores[1]


def test_a_nan_of_one_process_is_everybodys():
    values = torch.tensor([1.0, float("nan")])
    for name in ("ratio/max", "completions/min_length", "loss"):
        assert merged(name, values).isnan() and merged(name, values.flip(0)).isnan()
    names = {"ratio/max": 3, "completions/max_length": 3, "completions/min_length": 1, "ratio/mean": 2, "kl": 2}
    assert {name: merged(name, torch.tensor([1.0, 3.0])).item() for name in names} == names


def test_a_launcher_starts_them_and_one_that_is_killed_ends_all(make, world, tmp_path):
    """By torchrun, as a user does it: process 0 alone speaks, and the command fails soon after a kill."""
    save_config(make("stages=[2]", "stage2.steps=1000", "checkpoint.every=1000"), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "uae_fast.cli", "train", str(tmp_path / "config.yaml")]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "run"
    while not (run / "metrics.jsonl").exists() or not rows(run):
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.02)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    [second] = [int(pid) for pid in workers if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert output.count("deterministic: as PyTorch chooses") == 1
    assert "another process of the run has ended or does not answer" in output
