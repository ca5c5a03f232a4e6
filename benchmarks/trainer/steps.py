"""Whole steps of stages 1, 2 and 3, as `uae-fast train` takes them: seconds of each phase, images and tokens a second.

Nothing is reported unless the steps are finite and, in stages 2 and 3, the first update's ratios are exactly 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from uae_fast.guards import RunFailed
from uae_fast.speed import Speed

from ..kernels import harness
from ..kernels.harness import Contestant, Entry, WrongResults, explain, peak_and_flops
from ..rows import OURS, Row
from .contests import NEEDS_A_GPU, TINY, Case, clear
from .contests import cases as make_cases
from .worlds import Steps

OP = "trainer-steps"
NAME = f"{OURS}, uae-fast train"
QUICK = {
    1: ("stage1.images=4", "stage1.micro_batch=4"),
    2: ("stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8", "render.batch=8"),
    3: ("stage3.images=2", "stage3.group_size=4", "stage3.micro_batch=8", "render.batch=8"),
}
PRESETS = {"sd35m_24gb": 24, "sd35l_24gb": 24, "sd35m_16gb": 16, "sd35l_h200": None}
"""With the GiB of the card that each must do with."""


def cases(device: str, quick: bool) -> Iterator[Case]:
    by_stage = [
        list(make_cases(OP, stage, {False: (), True: QUICK[stage]}, dict.fromkeys(PRESETS, ()), device, quick))
        for stage in (2, 3, 1)
    ]
    for of_one_preset in zip(*by_stage, strict=True):  # tiny first, then preset by preset
        yield from of_one_preset


def contestants(case: Case) -> list[Contestant]:
    return [Contestant(f"{NAME}, stage {case.stage}", lambda given: given)]


class Contest(harness.Contest):
    """One contestant: the trainer."""

    def __init__(self, op: ModuleType, case: Case):
        self.case, self.found = case, list[dict[str, float]]()
        (contestant,) = op.contestants(case)
        self.entry = Entry(contestant)
        self.entries = {str(contestant): self.entry}
        if case.preset != TINY and case.device != "cuda":
            self.entry.reason = NEEDS_A_GPU
            return
        clear(case.device, PRESETS.get(case.preset))
        try:
            self.taker = Taker(case)
            self.taker.take()  # what is made once
            self.entry.peak_bytes, self.entry.flops = peak_and_flops(self.taker.take, case.device)
        except (torch.OutOfMemoryError, RunFailed) as error:
            self.entry.reason = explain(error)

    def time(self, key: str, benchmark: Any) -> str | None:
        if self.entry.reason:
            return self.entry.reason
        rounds = 3 if self.case.passes == 1 else 1
        benchmark.pedantic(lambda: self.found.append(self.taker.take()), rounds=rounds)
        self.entry.times += benchmark.stats.stats.data
        return None

    def rows(self, environment: Row) -> list[Row]:
        if not self.found and not self.entry.reason:
            return []

        def median(name: str) -> float | None:
            values = [values[name] for values in self.found if name in values]
            return statistics.median(values) if values else None

        phases = [name for name in (self.found or [{}])[0] if name.startswith("seconds/")]
        own = {
            "preset": self.case.preset,
            "stage": self.case.stage,
            "seconds": {name.removeprefix("seconds/"): median(name) for name in phases},
            "peak_gb": median("memory/peak_gb"),
            **{name: median(name) for name in ("micro_batch", "images_per_second", "tokens_per_second", "mfu")},
        }
        return [self._row(self.entry) | own | environment]


class Taker:
    """Takes the steps of a stage one after another."""

    def __init__(self, case: Case):
        self.steps = Steps(case.stage, case.config())
        self.stage = self.steps.stage
        self.speed = Speed(self.stage, self.steps.config)

    def take(self) -> dict[str, float]:
        """One step's metrics.

        Raises:
            WrongResults: they are not finite, or a first ratio is not 1.
        """
        self.speed.start()
        values, bad = self.steps.take(self.steps.examples())
        self.speed.measure(values)
        values["micro_batch"] = self.stage.settings.micro_batch  # less than configured where memory ran out
        if bad:
            raise WrongResults(f"{self.stage.name}: not finite: {', '.join(bad)}")
        if values.get("ratio/max", 1.0) != 1.0 or values.get("ratio/mean", 1.0) != 1.0:
            raise WrongResults(f"{self.stage.name}: the first update's ratio is {values['ratio/mean']}, not 1")
        return values
