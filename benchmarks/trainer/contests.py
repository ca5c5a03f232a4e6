"""Cases of the trainer, and contests over them: one set of models at a time, made when it is needed."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch

from uae_fast.config import Config, load_config
from uae_fast.models.memory import CUDA_BYTES, GIB

from ..kernels import harness
from ..kernels.harness import Entry, Results, Step
from .worlds import full_config, noise_world, small_world, tiny_config

TINY = "tiny"
NEEDS_A_GPU = "needs a GPU"


@dataclass(frozen=True)
class Case(harness.Case):
    """N samples of a step of `stage`, with the models of `preset`."""

    preset: str = TINY
    stage: int = 2
    overrides: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        return super().passes if self.preset == TINY else 1  # a step of full size may take half a minute

    def config(self) -> Config:
        if self.preset == TINY:
            return tiny_config(small_world(folder(TINY)), f"device={self.device}", *self.overrides)
        return full_config(noise_world(folder("full")), self.preset, *self.overrides)


@cache
def folder(name: str) -> Path:
    """Lives as long as the process."""
    kept = tempfile.TemporaryDirectory(prefix="uae-fast-bench-")
    _folders.append(kept)
    return Path(kept.name) / name


_folders: list[tempfile.TemporaryDirectory] = []


def cases(
    op: str, stage: int, sizes: dict[bool, tuple[str, ...]], full: dict[str, tuple[str, ...]], device: str, quick: bool
) -> Iterator[Case]:
    """The tiny preset's case, then those of full size, which a CPU only says that it cannot run.

    Args:
        sizes: overrides of the tiny preset, by whether the answer is to be quick.
        full: presets of full size with their overrides.
    """
    make = partial(Case, op=op, device=device, quick=quick, stage=stage)
    tiny = make(variant=f"stage{stage}-{TINY}", dtype=torch.float32, N=0, overrides=sizes[quick])
    yield counted(tiny)
    if not quick:
        for order, (preset, overrides) in enumerate(full.items()):
            large = {"preset": preset, "overrides": overrides, "order": order}
            yield counted(make(variant=f"stage{stage}-{preset}", dtype=torch.bfloat16, N=0, **large))


def counted(case: Case) -> Case:
    """With its number of samples, which the configuration decides."""
    settings = getattr(load_config(case.preset, case.overrides), f"stage{case.stage}")
    return replace(case, N=settings.images * getattr(settings, "group_size", 1))


def clear(device: str, gib: float | None = None) -> None:
    """What earlier cases left goes; a GPU is from now on one of `gib` GiB, of which CUDA itself takes its part."""
    gc.collect()
    if device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - CUDA_BYTES) / whole) if gib else 1.0)


class Contest(harness.Contest):
    """A contest whose full-size cases are rows with a reason where there is no GPU."""

    alone = False

    def __init__(self, op: ModuleType, case: Case):
        clear(case.device)
        if case.preset == TINY or case.device == "cuda":
            super().__init__(op, case)
            return
        self.case, self.inputs = case, None
        self.entries = {str(c): Entry(c, reason=NEEDS_A_GPU) for c in op.contestants(case)}

    def bounds(self, ours: bool) -> tuple[float, float]:
        """In bf16 neither side is exact: two ways to compute one update differ by what rounding does."""
        if self.case.dtype == torch.bfloat16:
            return 2e-2, 0.1
        return super().bounds(ours)


def training_step(update, parameters) -> Step:
    """An update as a contest's step: its loss, and the gradients of all parameters as one."""

    def step() -> Results:
        for parameter in parameters:
            parameter.grad = None
        loss = update()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return {"loss": loss.detach(), "d_parameters": torch.cat([g.flatten() for g in gradients])}

    return step


def update_of(stage, rollout):
    """Our update, without the optimiser's step."""

    def update() -> torch.Tensor:
        total = torch.zeros((), device=stage.models.decoder.device)
        for start in range(0, len(rollout), stage.settings.micro_batch):
            loss, _ = stage.loss(rollout, slice(start, start + stage.settings.micro_batch))
            loss.backward()
            total += loss.detach()
        return total

    return update
