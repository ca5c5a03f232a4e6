"""How long the phases of a step take. Nothing waits for a GPU: its phases end with events, which are read later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_running: list[Stopwatch] = []  # the one that phases report to comes last


class Stopwatch:
    """Sums the seconds that named phases take on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []  # name, start and end: seconds, or events of a GPU
        self._open = False

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Within, every `phase` is timed; and so is the whole, as `name`."""
        start = self._now()
        _running.append(self)
        try:
            yield
        finally:
            _running.remove(self)
            self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each phase so far. On a GPU to be called where the host has waited for what came after them."""
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            took = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            sums[name] = sums.get(name, 0.0) + took
        return sums

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what happens within (or in a function, as its decorator) for a running stopwatch; a phase in a phase is
    part of the outer one."""
    watch = _running[-1] if _running else None
    if watch is None or watch._open:
        yield
        return
    watch._open, start = True, watch._now()
    try:
        yield
    finally:
        watch._open = False
        watch._spans.append((name, start, watch._now()))
