"""A contest of implementations of one op on one case: the same inputs, a gate on the results, then time and memory.

Our results must lie within the promised bounds of an fp64 truth, or nothing of the case is reported. A rival's errors
stand beside its speed; a rival whose results no rounding explains, or that cannot run here, is listed with the reason.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..rows import COMPILED, OURS, Row

# Largest error of a value, and relative error (Frobenius norm) of a gradient, whose name starts with d_
PROMISED = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2.5e-3)}
RELATIVE = ("latents",)  # values whose errors are relative too
# A bf16 logit between 32 and 64 is off by up to 0.125, and so is log Σ e^z: far beyond, an op computes another thing.
TOLERATED = {torch.float32: (1e-2, 1e-2), torch.bfloat16: (0.5, 0.2)}
PASSES = 8  # visits to each contestant, in alternating order, so that drift favours none
SECONDS = {"cpu": 0.25, "cuda": 0.5}  # for the rounds of one visit
CYCLES = 2e9  # of a GPU in a second
ROUNDS = {"cpu": (1, 10), "cuda": (2, 10)}  # of one visit, at least and at most
LONG = 0.05  # seconds of a step that a CPU does not warm up for: what is cold is no part of so long a step
BEHIND = 2.0  # a configuration that takes so many times as long as another of the same contestant is not timed

Results = dict[str, Tensor]
Truth = dict[str, Any]  # a tensor, or (index, tensor) where some of a result's rows are enough
Step = Callable[[], Results]


class Absent(Exception):
    """Why a contestant cannot take part."""


class WrongResults(Exception):
    """Our op broke its promise: no speed of the case is reported."""


class OutOfTime(Exception):
    """The budget leaves no room for what comes next."""


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    device: str
    dtype: torch.dtype
    N: int  # rows: tokens or samples
    H: int | None = None
    V: int | None = None
    B: int | None = None  # N = B·T, where the op knows sequences
    T: int | None = None
    G: int | None = None  # members of a group
    order: int = 0  # cases of a lower one are worth more, and run first
    calls: int = 1  # steps in a timed round: more for ops of microseconds, where one synchronisation would dominate
    quick: bool = False

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def passes(self) -> int:
        return 2 if self.quick else PASSES

    def sizes(self) -> dict[str, int | None]:
        return {size: getattr(self, size) for size in ("N", "H", "V", "B", "T", "G")}

    def __str__(self) -> str:
        more = "".join(f"-{name}{size}" for name in ("V", "G") if (size := getattr(self, name)) is not None)
        return f"{self.op}-{self.variant}-{self.precision}-N{self.N}{more}"


@dataclass(frozen=True)
class Contestant:
    """`build(inputs)` prepares all that is not to be timed and returns the step; it may raise `Absent`."""

    name: str
    build: Callable[[Any], Step]
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.config.values())]).replace(" ", "_")


@dataclass
class Entry:
    contestant: Contestant
    step: Step | None = None
    reason: str | None = None  # for having no speed
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # of one round, for choosing their number
    host_seconds: float | None = None  # on a GPU, what the host takes to issue a step
    peak_bytes: int | None = None
    flops: int | None = None
    times: list[float] = field(default_factory=list)
    visits: list[float] = field(default_factory=list)  # the median of each visit's times
    beside: list[float] = field(default_factory=list)  # visits to ours that are paired with these, if they are


class Contest:
    """`op` is a module with `cases(device, quick)`, `inputs(case)`, `truth(case, inputs)` and `contestants(case)`."""

    alone = True  # on a GPU a step is timed alone, with its launches queued; else as its caller waits for it

    def __init__(self, op: ModuleType, case: Case):
        torch.manual_seed(0)
        torch._dynamo.reset()  # each case has one shape; Dynamo would give up after eight
        self.case, self.inputs = case, op.inputs(case)
        truth = op.truth(case, self.inputs)
        self.entries = {str(c): self._admit(c, truth) for c in op.contestants(case)}
        leave_out(self.entries.values())

    def _admit(self, contestant: Contestant, truth: Truth) -> Entry:
        entry, ours = Entry(contestant), contestant.name.startswith(OURS)
        try:
            entry.step = contestant.build(self.inputs)
            entry.errors, wrong = compare(entry.step(), truth, self.bounds(ours))
            if wrong:
                raise WrongResults(f"{self.case}: {contestant.name}: {wrong}") if ours else Absent(f"wrong: {wrong}")
            entry.host_seconds = host_seconds(entry.step) if self._on_device else None
            entry.seconds = seconds(self.timed(entry))
            entry.times.clear()
            entry.peak_bytes, entry.flops = peak_and_flops(entry.step, self.case.device)
        except Exception as error:
            if ours:
                raise
            entry.step, entry.reason = None, explain(error)
        if self.case.device == "cuda":
            torch.cuda.empty_cache()
        return entry

    def bounds(self, ours: bool) -> tuple[float, float]:
        """Largest error of a value, and of a gradient."""
        return (PROMISED if ours else TOLERATED)[self.case.dtype]

    @property
    def _on_device(self) -> bool:
        return self.alone and self.case.device == "cuda"

    def timed(self, entry: Entry) -> Callable[[], None]:
        """One round: the case's number of steps, and the device done with them. On a GPU it adds to `entry.times`."""

        def run() -> None:
            for _ in range(self.case.calls):
                entry.step()
            if self.case.device == "cuda":
                torch.cuda.synchronize()

        def run_on_device() -> None:
            entry.times.append(device_seconds(entry.step, self.case.calls, entry.host_seconds or 0.0))

        return run_on_device if self._on_device else run

    def time(self, key: str, benchmark: Any) -> str | None:
        """One visit to a contestant; why there is none."""
        entry = self.entries[key]
        if entry.reason:
            return entry.reason
        device = self.case.device
        fewest, most = (1, 3) if self.case.quick else ROUNDS[device]
        rounds = max(fewest, min(most, int(SECONDS[device] / max(entry.seconds, 1e-6))))
        warm_up = int(device == "cuda" or entry.seconds < LONG)
        before = len(entry.times)
        benchmark.pedantic(self.timed(entry), rounds=rounds, warmup_rounds=warm_up)
        if self._on_device:
            del entry.times[before]  # the round that warmed up
        else:
            entry.times += benchmark.stats.stats.data
        entry.visits.append(statistics.median(entry.times[before:]))
        return None

    def rows(self, environment: Row) -> list[Row]:
        """What is known about each contestant that was timed, or could not be."""
        return [self._row(e) | environment for e in self.entries.values() if e.times or e.reason]

    def _row(self, entry: Entry) -> Row:
        return row_of(self.case, entry)


def row_of(case: Case, entry: Entry) -> Row:
    """What is known about one contestant."""
    times = [1e3 * t / case.calls for t in entry.times]
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {
        "op": case.op,
        "variant": case.variant,
        "contestant": entry.contestant.name,
        "config": entry.contestant.config,
        **case.sizes(),
        "dtype": case.precision,
        "median_ms": statistics.median(times) if times else None,
        "p20_ms": fifths[0] if times else None,
        "p80_ms": fifths[3] if times else None,
        "visits_ms": [1e3 * t / case.calls for t in entry.visits],
        "host_ms": entry.host_seconds and 1e3 * entry.host_seconds,
        "rounds": len(times),
        "calls": case.calls,
        "peak_bytes": entry.peak_bytes,
        "flops": entry.flops,
        "errors": entry.errors,
        "reason": entry.reason,
    }


def leave_out(entries: Iterable[Entry]) -> None:
    """Gives a reason to each configuration of a rival that is far behind another of its own."""
    entries = [e for e in entries if e.step and not e.contestant.name.startswith(OURS)]
    for entry in entries:
        same = [e for e in entries if e.contestant.name == entry.contestant.name]
        best = min(same, key=lambda e: e.seconds)
        if entry.seconds > BEHIND * best.seconds:
            words = ", ".join(f"{key} {value}" for key, value in best.contestant.config.items())
            entry.reason = f"takes {entry.seconds / best.seconds:.1f} times as long as with {words}"
    for entry in entries:
        entry.step = None if entry.reason else entry.step


def failed(case: Case, contestant: Contestant, error: Exception) -> Row:
    """The row of a case that was not timed because ours, `contestant`, is wrong or cannot run."""
    return row_of(case, Entry(contestant, reason=explain(error)))


def compare(results: Results, truth: Truth, bounds: tuple[float, float]) -> tuple[dict[str, float], str | None]:
    """The error of each result, and what is wrong with them, if anything."""
    errors, wrong = {}, []
    if results.keys() != truth.keys():
        return {}, f"returned {', '.join(results)} instead of {', '.join(truth)}"
    for name, exact in truth.items():
        index, exact = exact if isinstance(exact, tuple) else (..., exact)
        result = results[name][index]
        if result.shape != exact.shape:
            wrong.append(f"{name} has shape {tuple(result.shape)} instead of {tuple(exact.shape)}")
            continue
        gradient, difference = name.startswith("d_"), result.double() - exact
        relative = gradient or name in RELATIVE
        error = difference.norm() / exact.norm().clamp(min=1e-30) if relative else difference.abs().max()
        errors[name] = error.item()
        if not errors[name] <= bounds[gradient]:
            wrong.append(f"{name} is off by {errors[name]:.1e}, allowed are {bounds[gradient]:.1e}")
    return errors, "; ".join(wrong) or None


def explain(error: Exception) -> str:
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_seconds(step: Step) -> float:
    """What the host takes to issue a step, its device idle before."""
    spans = []
    for _ in range(3):
        torch.cuda.synchronize()
        spans.append(seconds(step))
    return min(spans)


def device_seconds(step: Step, calls: int, ahead: float) -> float:
    """Seconds of `calls` steps on a GPU, each between events of its own.

    None finds its inputs in the L2 cache, which is written over before. The device is kept busy meanwhile for `ahead`
    seconds and half as long again, until the host has issued the step: the host's time is no part of it, unless the
    step waits for the device.
    """
    spans = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _cache().zero_()
        torch.cuda._sleep(int(1.5 * CYCLES * ahead))
        start.record()
        step()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in spans) / 1e3


@functools.cache
def _cache() -> Tensor:
    """Twice the size of the L2 cache."""
    return torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")


def peak_and_flops(step: Step, device: str) -> tuple[int, int | None]:
    """Memory that a step allocates at its peak, results included, and the FLOPs of its matrix products (CPU only)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        del results
        return torch.cuda.max_memory_allocated() - before, None
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        step()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, sum(map(_flops, profiler.events())) or None


def _flops(event: Any) -> int:
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}.get(event.name)
    if first is None:
        return 0
    (*batch, rows, inner), (*_, columns) = event.input_shapes[first : first + 2]
    return 2 * rows * inner * columns * (batch[0] if batch else 1)


def training_step(name: str, function: Callable[[], Tensor], leaves: Results, upstream: Tensor | None = None) -> Step:
    """A value and its gradients; `upstream` is the gradient of the value, None for a scalar."""

    def step() -> Results:
        value = function()
        grads = torch.autograd.grad(
            value, list(leaves.values()), None if upstream is None else upstream.to(value.dtype)
        )
        return {name: value.detach(), **{f"d_{leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}}

    return step


def compiled(case: Case, function: Callable, **options: Any) -> Callable:
    if case.quick:
        raise Absent("compiling takes too long for --quick")
    return torch.compile(function, dynamic=False, **options)


def ours(
    case: Case, build: Callable[[Any, str], Step], compiled: Callable[[Any], Step] | None = None
) -> list[Contestant]:
    """What `impl="auto"` runs, and on a GPU the PyTorch path too; on a CPU that under torch.compile, where given."""
    contestants = [Contestant(OURS, lambda inputs: build(inputs, "auto"))]
    if case.device == "cuda":
        contestants.append(Contestant(f"{OURS}, PyTorch", lambda inputs: build(inputs, "torch")))
    elif compiled is not None:
        contestants.append(Contestant(f"{OURS}, {COMPILED}", compiled))
    return contestants
