"""No speed without right results: what the benchmarks' gate lets through."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.kernels import harness
from benchmarks.kernels.harness import Absent, Case, Contest, Contestant, Entry, WrongResults, training_step
from benchmarks.rows import newest


def contest(dtype=torch.float32, **functions):
    """Contestants that compute Σ x² by the given functions of x; `ours` is what must be right."""

    def contestants(case):
        names = {name: "uae-kernels" if name == "ours" else name for name in functions}
        return [Contestant(names[name], lambda x, f=f: f(x)) for name, f in functions.items()]

    op = SimpleNamespace(
        inputs=lambda case: torch.randn(100, dtype=dtype).requires_grad_(),
        truth=lambda case, x: {"loss": x.detach().double().square().sum(), "d_x": 2 * x.detach().double()},
        contestants=contestants,
    )
    return Contest(op, Case("square", "only", "cpu", dtype, N=100))


def right(x):
    return training_step("loss", lambda: x.square().sum(), {"x": x})


def scaled_gradient(by):
    """The right value with a gradient that is off by a factor."""
    return lambda x: lambda: {name: r * by if name == "d_x" else r for name, r in right(x)().items()}


def reason(function, **more):
    entry = contest(ours=right, rival=function, **more).entries["rival"]
    assert (entry.step is None) == (entry.reason is not None)
    return entry.reason


def test_a_rival_with_a_wrong_gradient_is_refused():
    assert reason(scaled_gradient(1.001)) is None
    assert "d_x is off by 2.0e+00" in reason(scaled_gradient(-1))
    assert "d_x is off by" in reason(scaled_gradient(1.02))
    assert "d_x is off by nan" in reason(scaled_gradient(torch.nan))


def test_a_rival_that_computes_something_else_is_refused():
    assert "loss has shape (1,)" in reason(lambda x: lambda: right(x)() | {"loss": x.square().sum(0, keepdim=True)})
    assert "returned loss instead of loss, d_x" in reason(lambda x: lambda: {"loss": x.square().sum()})


def test_a_rival_that_cannot_run_is_listed_with_the_reason():
    def missing(x):
        import no_such_package  # noqa: F401

    def fails(x):
        return lambda: 1 / 0

    def absent(x):
        raise Absent("needs a GPU")

    assert reason(missing) == "no_such_package is not installed"
    assert reason(fails) == "ZeroDivisionError: division by zero"
    found = contest(ours=right, rival=absent)
    rows = found.rows({"device": "here", "date": "now"})
    assert [(row["contestant"], row["reason"], row["median_ms"]) for row in rows] == [("rival", "needs a GPU", None)]


@pytest.mark.parametrize("dtype, fine, wrong", [(torch.float32, 1e-6, 2e-5), (torch.bfloat16, 1e-3, 1e-2)])
def test_nothing_is_reported_if_ours_breaks_its_promise(dtype, fine, wrong):
    def off(by):
        def build(x):
            exact = {"loss": x.detach().double().square().sum(), "d_x": 2 * x.detach().double()}
            return lambda: exact | {"d_x": exact["d_x"] * (1 + by)}

        return build

    assert contest(ours=off(fine), dtype=dtype).entries["uae-kernels"].reason is None
    with pytest.raises(WrongResults, match="d_x is off by"):
        contest(ours=off(wrong), dtype=dtype)


def test_a_run_without_ours_does_not_replace_one_with_it():
    def row(contestant, date, ms, **config):
        sizes = dict.fromkeys(("N", "H", "V", "B", "T"))
        names = dict(op="o", variant="v", device="d", dtype="t", contestant=contestant)
        return names | sizes | {"date": date, "median_ms": ms, "config": config}

    old = [row("uae-kernels", "1", 5.0), row("rival", "1", 4.0, chunk=1), row("rival", "1", 3.0, chunk=2)]
    later = [row("uae-kernels", "2", None), row("rival", "2", 1.0)]
    assert newest(old + later) == [old[0], old[2]]


def test_on_a_gpu_each_step_is_timed_alone(monkeypatch):
    """Between events of its own, its inputs out of the cache, and its launches queued behind a busy device."""
    done, clock = [], iter(range(0, 1000, 10))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)
            done.append("event")

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"busy {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(harness, "_cache", lambda: SimpleNamespace(zero_=lambda: done.append("emptied")))
    made = contest(ours=right)
    made.case = replace(made.case, device="cuda", calls=2)
    entry = Entry(Contestant("ours", right), step=lambda: done.append("step"), host_seconds=1e-3, seconds=0.5)
    made.entries = {"ours": entry}

    def pedantic(run, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            run()

    made.time("ours", SimpleNamespace(pedantic=pedantic))
    one = ["emptied", "busy 3000000", "event", "step", "event"]
    assert done[:11] == [*one, *one, "wait"]
    assert entry.times == [0.02] * (len(done) // 11 - 1)  # without the round that warmed up
    row = harness.row_of(made.case, entry)
    assert (row["median_ms"], row["host_ms"]) == (10, 1)
