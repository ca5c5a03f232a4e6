"""Guards of the loop: requests to stop, numbers that are not finite, memory that runs out, a disk that refuses."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import last_words, remedy
from .models import Models
from .stages import Metrics, Stage
from .team import MISTAKE, OUT_OF_MEMORY, Team, Trouble

STOPS = (signal.SIGINT, signal.SIGTERM)


class RunFailed(Exception):
    """The run cannot go on, through no mistake of the user's; its last checkpoint stays as it is."""


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the run; `train` raises it when a checkpoint is saved.

    Attributes:
        number: the signal's.
        status: 128 + its number, the exit status of the command.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} and saved; go on with --resume")
        self.number, self.status = number, 128 + number


# ---- signals --------------------------------------------------------------------------------------------------------


class StopRequest:
    """What signals have asked for.

    Attributes:
        signal: SIGINT or SIGTERM once one has come; 0 before.
        save: whether SIGUSR1 wants a checkpoint after the present step.
    """

    def __init__(self) -> None:
        self.signal, self.save = 0, False
        self._heeding = False

    @contextmanager
    def heeded(self, now: bool = True) -> Iterator[None]:
        """Within, if `now`, a request to stop raises `Interrupted` at the next forward pass of encoder or decoder.

        That, or memory that runs out, in one process is raised in all of them, the worst of what befell them: the
        others learn it when they next exchange something.
        """
        self._heeding = now
        try:
            with in_all_processes():
                yield
        finally:
            self._heeding = False

    def check(self) -> None:
        """Raises `Interrupted` where a request has come and is heeded."""
        if self._heeding and self.signal:
            raise Interrupted(self.signal)


@contextmanager
def in_all_processes() -> Iterator[None]:
    """Within, `Interrupted` or a lack of memory in one process is raised in all of them."""
    team, code = Team(), 0
    try:
        try:
            yield
        except Interrupted as stopped:
            code = stopped.number
        except RuntimeError as error:
            if team.size == 1 or not is_out_of_memory(error):
                raise
            code = OUT_OF_MEMORY
        if code:  # told where the traceback, which holds tensors, is gone
            team.exchange(code=code)
    except Trouble as trouble:
        if trouble.code == MISTAKE:
            raise
        if trouble.code == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("out of memory in one of the processes") from None
        raise Interrupted(trouble.code) from None


@contextmanager
def stop_requests(models: Models) -> Iterator[StopRequest]:
    """Within, SIGINT and SIGTERM ask the run to save and stop, SIGUSR1 to save and go on.

    The handlers only take note. What stops the run is a forward pass of one of `models`, and only where the loop heeds
    requests: a rollout of minutes is left within one pass, an optimiser's step or a save never in its middle. A second
    SIGINT or SIGTERM ends the process at once; but not one of several, which may get one request twice: from its
    launcher, and from whoever told both.
    """
    stop, team = StopRequest(), Team()

    def on_stop(number: int, _: object) -> None:
        stop.signal = number
        if team.size == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if team.rank == 0:  # not by print, which may have been what was interrupted
            os.write(2, b"\nsaving and stopping" + b"; once more stops at once" * (team.size == 1) + b"\n")

    def on_save(*_: object) -> None:
        stop.save = True

    before = {number: signal.signal(number, on_stop) for number in STOPS}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, on_save)
    networks = (models.encoder.model.model.language_model, models.decoder.transformer)
    hooks = [network.register_forward_pre_hook(lambda *_: stop.check()) for network in networks]
    try:
        yield stop
    finally:
        for hook in hooks:
            hook.remove()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ---- numbers that are not finite ------------------------------------------------------------------------------------


def fetch(metrics: Metrics) -> dict[str, float]:
    """0-d tensors as numbers, in one transfer: the only time that an update waits for the device."""
    device = metrics["loss"].device
    values = [value.detach().to(device, torch.float32, non_blocking=True) for value in metrics.values()]
    return dict(zip(metrics, torch.stack(values).tolist(), strict=True))


def non_finite(values: dict[str, float]) -> dict[str, str]:
    """Those of some numbers that are NaN or infinite, as "nan", "inf" or "-inf"."""
    return {name: str(value) for name, value in values.items() if not math.isfinite(value)}


def saved_tensors(models: Models, trained: tuple[str, ...], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a checkpoint would hold, by name.

    Args:
        models: the networks.
        trained: the parts of them that it would hold.
        tensors: what else it would hold, by file.
    """
    parts = {part: dict(getattr(models, part).named_parameters()) for part in trained}
    return {f"{where}.{name}": value for where, held in (parts | tensors).items() for name, value in held.items()}


def first_non_finite(named: dict[str, Tensor], device: torch.device) -> str | None:
    """The name of a tensor that must not be saved because it holds NaN or infinity, if there is one."""
    flags = [value.detach().isfinite().all().to(device) for value in named.values()]
    finite = torch.stack(flags).tolist() if flags else []
    return next((name for name, good in zip(named, finite, strict=True) if not good), None)


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def first_unequal(named: dict[str, Tensor], device: torch.device) -> str | None:
    """The name of a tensor that is not the same in all processes, told by the sum of its bits, if there is one."""
    team = Team()
    if team.size == 1 or not named:
        return None
    bits = [value.detach().flatten().view(INTEGERS[value.element_size()]) for value in named.values()]
    told = team.exchange(torch.stack([each.sum(dtype=torch.long).to(device) for each in bits]).tolist())
    return next((name for name, *sums in zip(named, *told, strict=True) if len(set(sums)) > 1), None)


# ---- memory that runs out -------------------------------------------------------------------------------------------


ALLOCATIONS = (
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",  # as where a kernel is loaded
)  # fmt: skip


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory of the device ran out: PyTorch's, a library's, or while a CUDA graph was being recorded, whose end
    then raises another error."""
    if error is None:
        return False
    known = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ALLOCATIONS)
    return known or is_out_of_memory(error.__context__)


def fitting(settings: Any, most: int) -> int:
    """The largest micro-batch of at most so many samples that divides a process's samples of a step."""
    samples = settings.images // Team().size * getattr(settings, "group_size", 1)
    return max(size for size in range(1, most + 1) if samples % size == 0)


def shrink_micro_batch(stage: Stage) -> int:
    """Makes the micro-batch at most half as large, still a divisor of the step's samples, and frees cached memory.

    Groups stay whole: their size decides the advantages, the micro-batch only how many samples are computed at once.

    Raises:
        RunFailed: it is 1 already.
    """
    settings, size = stage.settings, stage.settings.micro_batch
    if size == 1:
        raise RunFailed(
            f"out of memory in {stage.name} with a micro-batch of 1; lower render.batch, data.resolution, "
            f"caption.max_new_tokens or {stage.name}.images"
        )
    settings.micro_batch = fitting(settings, size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"out of memory: {stage.name}.micro_batch goes from {size} to {settings.micro_batch}", flush=True)
    return settings.micro_batch


# ---- a disk that refuses --------------------------------------------------------------------------------------------


@contextmanager
def disk_failures(run: Path) -> Iterator[None]:
    """Within, an OSError about a file of the run's folder ends the run: `RunFailed` names the file and what helps."""
    try:
        yield
    except OSError as error:
        file, folder = Path(os.path.abspath(str(error.filename))), Path(os.path.abspath(run))
        if error.filename is None or not (file.is_relative_to(folder) or folder.is_relative_to(file)):
            raise
        words = f"{error.strerror}; {remedy(error, run)}; {last_words(run)}"
        raise RunFailed(f"{error.filename} cannot be written: {words}") from error
