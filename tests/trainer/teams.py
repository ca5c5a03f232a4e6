"""Runs of several processes: forked from a server that has imported what they need, joined over a file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import uae_fast.trainer
from uae_fast.config import ConfigError
from uae_fast.data import ImageFolder
from uae_fast.evaluate.heldout import Evaluator
from uae_fast.guards import Interrupted, RunFailed
from uae_fast.optim import RunningMean
from uae_fast.stages import generation_for_understanding
from uae_fast.stages.generation_for_understanding import GenerationForUnderstanding
from uae_fast.team import Team

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "pytest", "uae_fast.trainer", "uae_fast.bnb", "peft", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.clip.modeling_clip", "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.autoencoders.autoencoder_kl",
])  # fmt: skip
FAILED = 99  # exit status of a process with an error that nobody expected
DEADLINE = 300.0  # seconds that processes may take


def in_team(folder: Path, *jobs: tuple[Any, ...], size: int = 2) -> list[int]:
    """Has `size` processes train one configuration after another: jobs (config, plant, resume), the last two optional.

    A plant (of the functions below) is called before, with a `MonkeyPatch` and the process's rank.

    Returns:
        Exit statuses by rank: 0, 1 after RunFailed, 2 after ConfigError, 128 + a signal's number, FAILED.
        `folder`/RANK.txt has what was printed.
    """
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    processes = [SERVER.Process(target=_work, args=(rank, size, meeting, jobs)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
        if process.exitcode is None:
            for each in processes:
                each.kill()
            raise AssertionError("a process hangs")
    return [process.exitcode for process in processes]


def _work(rank: int, size: int, meeting: Path, jobs: tuple[tuple[Any, ...], ...]) -> None:
    torch.set_num_threads(1)
    with (meeting.parent / f"{rank}.txt").open("w") as file, redirect_stdout(file):
        status = FAILED
        try:
            wait = timedelta(seconds=DEADLINE / 2)
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=wait)
            for config, *more in jobs:
                plant, resume = [*more, *(None, False)[len(more) :]]
                with pytest.MonkeyPatch.context() as patch:
                    if plant is not None:
                        plant(patch, rank)
                    left = uae_fast.trainer.train(config, resume=resume)
                assert (left / "summary.json").is_file() and (left / "report.html").is_file(), "not all is written"
            status = 0
        except Interrupted as stopped:
            status = stopped.status
        except (RunFailed, ConfigError) as error:
            print(error)
            status = 2 if isinstance(error, ConfigError) else 1
        except BaseException:
            print(traceback.format_exc())
        file.flush()
        os._exit(status)


# ---- mistakes: each makes the processes learn something else than one does ------------------------------------------


def summed(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Gradients are added up, not averaged."""
    average = Team.average_gradients

    def add(self: Team, parameters: list) -> None:
        average(self, parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= self.size

    patch.setattr(Team, "average_gradients", add)


def same_slice(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Every process takes the step's first images."""
    patch.setattr(Team, "part", lambda self, count: slice(0, count // self.size))


def own_tokens(patch: pytest.MonkeyPatch, rank: int) -> None:
    """A loss is divided by the process's own tokens."""
    patch.setattr(generation_for_understanding, "fmean", lambda told: told[rank])


def own_spread(patch: pytest.MonkeyPatch, rank: int) -> None:
    """A batch's standard deviation is that of the process's own rewards."""
    advantages = generation_for_understanding.advantages

    def alone(rewards: torch.Tensor, settings: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Team, "exchange", lambda self, value: [value] * self.size)
            return advantages(rewards, settings)

    patch.setattr(generation_for_understanding, "advantages", alone)


def is_slow_to_report(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Process 0 takes a second before it writes what a run ends with."""
    write = Evaluator.summary

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(1)
        return write(*arguments, **options)

    if not rank:
        patch.setattr(Evaluator, "summary", late)


# ---- trouble in process 1 alone -------------------------------------------------------------------------------------


def before(patch: pytest.MonkeyPatch, cls: Any, method: str, call: int, do: Callable[..., None]) -> None:
    """Does something just before the `call`-th call of a method."""
    original, calls = getattr(cls, method), []

    def wrapped(*arguments: Any) -> Any:
        calls.append(method)
        if len(calls) == call:
            do(*arguments)
        return original(*arguments)

    patch.setattr(cls, method, wrapped)


def lacks_memory(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Half-way through the second step's gradients memory runs out."""

    def lack(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if rank:
        before(patch, GenerationForUnderstanding, "loss", 4, lack)


def is_told_to_stop(patch: pytest.MonkeyPatch, rank: int) -> None:
    """SIGTERM comes in the second step's gradients, twice."""

    def twice(*_: Any) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    if rank:
        before(patch, GenerationForUnderstanding, "loss", 3, twice)


def finds_a_mistake(patch: pytest.MonkeyPatch, rank: int) -> None:
    """A held-out image cannot be read any more."""

    def lost(*_: Any) -> None:
        raise ConfigError(["data.heldout: scene-00009.png could be read when the run began and cannot be now"])

    if rank:
        before(patch, ImageFolder, "__getitem__", 1, lost)


def is_killed(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The process is gone in the second step."""
    if rank:
        before(patch, GenerationForUnderstanding, "loss", 3, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def is_told_to_save(patch: pytest.MonkeyPatch, rank: int) -> None:
    """SIGUSR1 comes in the first step."""
    if rank:
        before(patch, GenerationForUnderstanding, "loss", 1, lambda *_: signal.raise_signal(signal.SIGUSR1))


def computes_nan(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second step's loss is NaN, and an image is lost in the third."""
    original, calls = GenerationForUnderstanding.loss, []

    def loss(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        total, metrics = original(self, *arguments)
        return (total * float("nan") if len(calls) in (3, 4) else total), metrics

    def lost(*_: Any) -> None:
        raise ValueError("not a file")

    if rank:
        patch.setattr(GenerationForUnderstanding, "loss", loss)
        before(patch, ImageFolder, "_load", 3, lost)


def drifts(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One bit of one weight of process 1 is another after the first step."""

    def flip(mean: RunningMean) -> None:
        mean.parameters[0].data.view(-1).view(torch.int32)[0] ^= 1

    if rank:
        before(patch, RunningMean, "update", 1, flip)
