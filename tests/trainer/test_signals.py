"""Signals: what is saved, what is said, and that going on afterwards ends in the same weights."""

import signal
import subprocess
import sys
import time

import pytest
from equal_runs import assert_equal_runs, rows

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.cli import main
from uae_fast.config import load_config, save_config
from uae_fast.optim import RunningMean
from uae_fast.stages.generation_for_understanding import GenerationForUnderstanding
from uae_fast.stages.understanding_for_generation import UnderstandingForGeneration
from uae_fast.trainer import train


def configuration(world, folder, *overrides):
    """Two steps of stage 2, two of stage 3, in two micro-batches each; nothing is saved but the ends of stages."""
    return load_config("tiny", [
        f"run={folder / 'run'}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}",
        "stages=[2,3]", "models.encoder=lora", "models.decoder=lora", "checkpoint.every=1000", "checkpoint.keep=9",
        "stage2.steps=2", "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=4",
        "stage3.steps=2", "stage3.images=2", "stage3.group_size=4", "stage3.micro_batch=4",
        "evaluate.images=2", "render.batch=8", "render.steps=4", "stage3.window_end=3", "reporters=[]", *overrides,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world):
    """The run that is never stopped."""
    return train(configuration(world, tmp_path_factory.mktemp("whole")))


def signal_at(monkeypatch, number, cls, method, call):
    """A signal arrives just before the `call`-th call of a method; gives the list of calls."""
    original, calls = getattr(cls, method), []

    def wrapped(*arguments):
        calls.append(method)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(cls, method, wrapped)
    return calls


@pytest.mark.parametrize(
    "number, status, cls, method, call, done",
    [
        (signal.SIGINT, 130, GenerationForUnderstanding, "rollout", 2, 1),
        (signal.SIGTERM, 143, GenerationForUnderstanding, "loss", 4, 1),  # in the second half of step 2's gradients
        (signal.SIGINT, 130, UnderstandingForGeneration, "loss", 1, 2),
        (signal.SIGTERM, 143, RunningMean, "update", 2, 2),  # step 2's weights have just moved
    ],
)
def test_a_signal_saves_the_last_completed_step_and_stops(
    whole, world, tmp_path, monkeypatch, capfd, number, status, cls, method, call, done
):
    save_config(configuration(world, tmp_path), tmp_path / "config.yaml")
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(each) for each in signals]
    with monkeypatch.context() as patch:
        calls = signal_at(patch, number, cls, method, call)
        assert main(["train", str(tmp_path / "config.yaml")]) == status
    assert len(calls) == call  # it stopped there, and did not first finish the step's work
    captured = capfd.readouterr()
    assert f"stopped by {signal.Signals(number).name} and saved; go on with --resume" in captured.out
    assert "once more stops at once" in captured.err
    assert read_state(checkpoints(tmp_path / "run/checkpoints")[-1])["step"] == done
    assert [signal.getsignal(each) for each in signals] == handlers
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    assert_equal_runs(whole, tmp_path / "run")


def test_between_the_updates_of_a_rollout_a_signal_waits_for_the_last(world, tmp_path, monkeypatch):
    """The rollout is not saved, so a step whose weights have moved once is completed."""
    options = ("stages=[2]", "stage2.updates=2", "stage2.steps=3", "evaluate.images=0")
    config = configuration(world, tmp_path, *options)
    save_config(config, tmp_path / "config.yaml")
    with monkeypatch.context() as patch:
        calls = signal_at(patch, signal.SIGTERM, RunningMean, "update", 3)
        assert main(["train", str(tmp_path / "config.yaml")]) == 143
    assert len(calls) == 4
    assert read_state(checkpoints(tmp_path / "run/checkpoints")[-1])["step"] == 2
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    again = configuration(
        world, tmp_path / "again", "stages=[2]", "stage2.updates=2", "evaluate.images=0", "stage2.steps=3"
    )
    assert_equal_runs(train(again), tmp_path / "run")


def test_sigusr1_saves_and_goes_on(whole, world, tmp_path, monkeypatch):
    signal_at(monkeypatch, signal.SIGUSR1, GenerationForUnderstanding, "loss", 1)
    run = train(configuration(world, tmp_path))
    assert [read_state(path)["step"] for path in checkpoints(run / "checkpoints")] == [0, 1, 2, 4]
    assert_equal_runs(whole, run)


SECOND = """
import os, signal, sys
from types import SimpleNamespace as Space
from torch import nn
from uae_fast.guards import stop_requests

network = nn.Linear(1, 1)
models = Space(encoder=Space(model=Space(model=Space(language_model=network))), decoder=Space(transformer=network))
for number in (signal.SIGTERM, signal.SIGINT):
    child = os.fork()
    if not child:
        with stop_requests(models) as stop:
            signal.raise_signal(number)
            assert stop.signal == number
            print("once", flush=True)
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                os._exit(130)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["once", "-15", "once", "130"], done.stderr


def test_a_process_that_is_told_to_stop_goes_on_later(world, tmp_path):
    """From outside, as a cluster does it."""
    config = configuration(world, tmp_path, "stages=[2]", "stage2.steps=12", "evaluate.images=0")
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "uae_fast.cli", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "run"
    while not (run / "metrics.jsonl").exists() or not rows(run):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    done = read_state(checkpoints(run / "checkpoints")[-1])["step"]
    assert 1 <= done < 12 and len(rows(run)) == done
    train(config, resume=True)
    whole = configuration(world, tmp_path / "whole", "stages=[2]", "stage2.steps=12", "evaluate.images=0")
    assert_equal_runs(train(whole), run)
