"""The benchmark command: order, budget, going on, failures as rows, verdicts and fitted exponents."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import conftest, run
from benchmarks.kernels import report, scaling
from benchmarks.kernels.harness import Case, Contest, Contestant, OutOfTime, training_step
from benchmarks.rows import OURS, append, case_of, read, verdict, verdicts
from uae_fast.cli import main

HERE = {"device": "a CPU", "kind": "cpu", "commit": "abc", "dirty": False, "threads": 2, "date": "1"}
BENCHMARK = SimpleNamespace(
    pedantic=lambda step, **_: step(), stats=SimpleNamespace(stats=SimpleNamespace(data=[0.5, 1.0, 1.5]))
)


def op(wrong=0.0):
    """Ours and a rival compute Σ x²; ours is off by a share."""

    def contestants(case):
        def right(x):
            return training_step("loss", lambda: x.square().sum(), {"x": x})

        def ours(x):
            return lambda: {name: r * (1 + wrong) for name, r in right(x)().items()}

        return [Contestant(OURS, ours), Contestant("rival", right, {"chunk": 1})]

    return SimpleNamespace(
        inputs=lambda case: torch.ones(case.N).requires_grad_(),
        truth=lambda case, x: {"loss": x.detach().double().square().sum(), "d_x": 2 * x.detach().double()},
        contestants=contestants,
    )


def a_case(n, **more):
    return Case("square", "only", "cpu", torch.float32, N=n, **more)


class Clock:
    """Seconds pass when a step of the contest is visited."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(conftest.time, "monotonic", lambda: self.now)

    def benchmark(self, seconds):
        def pedantic(step, **_):
            self.now += seconds

        return SimpleNamespace(pedantic=pedantic, stats=BENCHMARK.stats)


def visit(contests, module, case, benchmark=BENCHMARK):
    return [contests.visit(contests.enter(module, case), name, benchmark) for name in (OURS, "rival-1")]


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_no_case_begins_that_would_end_too_late(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    contests = conftest.Contests(HERE, tmp_path, budget=100.0)
    slow, fast = clock.benchmark(20.0), clock.benchmark(1.0)
    visit(contests, op(), a_case(1), slow)  # ends at 40
    visit(contests, op(), a_case(2), fast)  # begins at 40: 80 would be in time
    visit(contests, op(), a_case(3), slow)  # begins at 42, ends at 82
    with pytest.raises(OutOfTime):
        contests.enter(op(), a_case(4))  # 82 + 40 > 100
    contests.leave()
    assert [row["N"] for row in read(folder=tmp_path)] == [1, 1, 2, 2, 3, 3]
    assert contests.left_out == [a_case(4)]
    unlimited = conftest.Contests(HERE, tmp_path / "all")
    for n in range(5):
        visit(unlimited, op(), a_case(n), slow)
    assert unlimited.left_out == []


def test_a_contest_of_single_visits_ends_between_them(tmp_path, monkeypatch):
    class Once(Case):
        passes = 1

    clock = Clock(monkeypatch)
    contests, case = conftest.Contests(HERE, tmp_path, budget=100.0), Once("square", "only", "cpu", torch.float32, N=1)
    contest = contests.enter(op(), case)
    contests.visit(contest, OURS, clock.benchmark(60.0))
    with pytest.raises(OutOfTime):
        contests.visit(contests.enter(op(), case), "rival-1", clock.benchmark(60.0))
    contests.leave()
    assert [row["contestant"] for row in read(folder=tmp_path)] == [OURS]
    assert contests.left_out == [case]


@pytest.mark.parametrize("text, expected", [("10m", 600), ("90s", 90), ("1.5h", 5400), ("45", 45)])
def test_times(text, expected):
    assert run.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0m", "ten", "-5m", "5 days"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(run.argparse.ArgumentTypeError, match="no time above 0"):
        run.seconds(text)


# ---- what is run ----------------------------------------------------------------------------------------------------


def collect(tmp_path, rows, here=HERE, **options):
    """The cases left to run of three, in their order, by pytest's hook."""
    given = {"again": False, "quick": False, "rows": tmp_path} | options
    append(tmp_path / "square-cpu.jsonl", rows)
    cases = [a_case(1, order=1), a_case(2), a_case(3, order=2)]
    items = [SimpleNamespace(callspec=SimpleNamespace(params={"turn": (op(), case, OURS, 0)})) for case in cases]
    config = SimpleNamespace(
        option=SimpleNamespace(**given),
        stash={conftest.CONTESTS: SimpleNamespace(environment=here), conftest.DONE: []},
        hook=SimpleNamespace(pytest_deselected=lambda items: None),
    )
    conftest.pytest_collection_modifyitems(config, items)
    return [item.callspec.params["turn"][1].N for item in items]


def rows_of(n, here=HERE):
    contest = Contest(op(), a_case(n))
    for key in contest.entries:
        contest.time(key, BENCHMARK)
    return contest.rows(here)


def test_what_is_worth_most_comes_first(tmp_path):
    assert collect(tmp_path, []) == [2, 1, 3]


def test_a_run_goes_on_where_the_one_before_ended(tmp_path):
    assert collect(tmp_path, rows_of(2)) == [1, 3]


@pytest.mark.parametrize("key, value", [("commit", "other"), ("device", "another"), ("threads", 4), ("dirty", True)])
def test_rows_of_something_else_do_not_count(tmp_path, key, value):
    assert collect(tmp_path, rows_of(2, HERE | {key: value})) == [2, 1, 3]


def test_rows_that_are_no_contest_are_passed_over(tmp_path):
    assert collect(tmp_path, [*rows_of(2), HERE | {"op": "trainer-learning", "contestant": OURS, "seed": 0}]) == [1, 3]


def test_everything_runs_if_asked_to_or_if_the_tree_is_changed(tmp_path):
    assert collect(tmp_path, rows_of(2), again=True) == [2, 1, 3]
    changed = HERE | {"dirty": True}
    assert collect(tmp_path / "changed", rows_of(2, changed), here=changed) == [2, 1, 3]


def test_a_case_without_all_its_contestants_is_not_done(tmp_path):
    assert collect(tmp_path, rows_of(2)[:1]) == [2, 1, 3]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_case_that_fails_is_a_row_that_says_so(tmp_path):
    contests = conftest.Contests(HERE, tmp_path)
    for _ in range(2):  # at every visit, but one row
        with pytest.raises(Exception, match="d_x is off by"):
            visit(contests, op(wrong=0.1), a_case(1))
    visit(contests, op(), a_case(2))
    contests.leave()
    first, *others = read(folder=tmp_path)
    assert (first["contestant"], first["median_ms"], first["N"]) == (OURS, None, 1)
    assert "d_x is off by" in first["reason"] and first["commit"] == "abc"
    assert [row["median_ms"] for row in others] == [1000.0, 1000.0]


def test_a_failure_keeps_nothing_of_its_case(tmp_path):
    """A contest that fails has its inputs in its frames, on a GPU gigabytes."""
    contests, failing, given = conftest.Contests(HERE, tmp_path), op(wrong=0.1), []
    make = failing.inputs
    failing.inputs = lambda case: given.append(weakref.ref(x := make(case))) or x
    with pytest.raises(Exception, match="d_x is off by"):
        visit(contests, failing, a_case(1))
    gc.collect()
    assert contests.failure and len(given) == 1 and given[0]() is None


def timed(contestant, median, date="1", **more):
    row = {"op": "o", "variant": "v", "device": "d", "dtype": "t", "contestant": contestant, "config": {}, "N": 1}
    return row | {"median_ms": median, "visits_ms": [median] * 8, "date": date, "peak_bytes": 8} | more


def test_verdicts():
    ours = timed(OURS, 10.0)
    for times, says in ((20.0, "faster"), (10.6, "faster"), (10.4, "equal"), (9.6, "equal"), (9.4, "slower")):
        assert verdict(ours, timed("a", times)) == says
    uneven = [12.0] * 6 + [10.0] * 2  # the second smallest of eight decides
    assert verdict(ours, timed("a", 12.0, visits_ms=uneven)) == "equal"
    assert verdict(ours, timed("a", 12.0, visits_ms=[12.0, *uneven[:-1]])) == "faster"
    found = verdicts(
        [ours, timed("a", 5.0, config={"chunk": 1}), timed("a", 4.0, config={"chunk": 2}), timed("b", 30.0)]
    )
    assert {name: says for (_, name), says in found.items()} == {"a": "slower", "b": "faster"}
    assert {case for case, _ in found} == {case_of(ours)}


def test_two_runs_are_compared():
    before = [timed(OURS, 10.0), timed("a", 20.0), timed("b", 5.0), timed("gone", 1.0)]
    after = [timed(OURS, 10.0, date="2"), timed("a", 21.0, date="2"), timed("b", 30.0, date="2")]
    older = [timed(OURS, 10.0, date="0"), timed("a", 1.0, date="0")]
    assert run.repeated(before) == []
    first, second = run.repeated(older + before + after)
    assert first.startswith("verdicts of the last two runs (commit unknown) agree for 1 of 2 rivals; 0 differ")
    assert second.endswith("b: slower, then faster")


# ---- growth ---------------------------------------------------------------------------------------------------------


def test_exponents_of_known_powers():
    rows = []
    for n in (64, 128, 256, 512):
        row = timed(OURS, 3e-4 * n**1.5, variant="square against N", op=scaling.OP, N=n, peak_bytes=7 * n)
        rows += [row, row | {"contestant": "flat", "median_ms": 2.0, "peak_bytes": 0}]
    rows.append(timed("once", 1.0, variant="square against N", op=scaling.OP, N=64))
    ours, flat = report.exponents(rows)
    assert ours.time.value == pytest.approx(1.5) and ours.memory.value == pytest.approx(1)
    assert ours.time.stderr == pytest.approx(0, abs=1e-9)
    assert flat.time.value == pytest.approx(0, abs=1e-12) and flat.memory.text() == "–"
    noisy = report.fit([1, 2, 4, 8], [1, 2 * 1.1, 4 / 1.1, 8])
    assert noisy.value == pytest.approx(1 - 0.1 * torch.log2(torch.tensor(1.21)).item(), abs=1e-5)
    assert noisy.stderr > 0.05


def test_only_one_size_grows():
    variants = {}
    for case in scaling.cases("cpu", quick=False):
        variants.setdefault(case.variant, []).append(case)
    assert {scaling.growing(name) for name in variants} == {"N", "V", "G"}
    for name, cases in variants.items():
        size = scaling.growing(name)
        values = [getattr(case, size) for case in cases]
        assert values == sorted(set(values)) and len(values) == 4
        others = [name for name in ("N", "H", "V", "G") if name != size]
        if name.startswith("shared_prefix"):
            others.remove("N")  # it is G·T
            assert len({case.N // case.G for case in cases}) == 1
        for other in others:
            assert len({getattr(case, other) for case in cases}) == 1, (name, other)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_real_run_appends_goes_on_and_draws(tmp_path):
    """group_advantages alone, as the command would run it, twice."""
    command = [
        sys.executable, "-m", "pytest", "benchmarks/kernels", "-k", "group_advantages-forward and N256",
        "--rows", str(tmp_path), "--commit", "abc",
    ]  # fmt: skip
    outputs = []
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for _ in range(2):
        done = subprocess.run(command, cwd=run.ROOT, env=alone, capture_output=True, text=True, timeout=300)
        outputs.append(done.stdout)
        assert done.returncode in (0, run.NO_TESTS), done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "group_advantages-cpu.jsonl").read_text().splitlines()]
    assert {row["contestant"] for row in rows if row["median_ms"]} >= {OURS, "eager, TRL's formula"}
    assert {(row["commit"], row["dirty"], row["G"]) for row in rows} == {("abc", False, 8)}
    assert len(rows) == len({row["contestant"] for row in rows})  # the second run left them alone
    assert "1 cases have rows of this commit" in outputs[1]
    run.report(tmp_path)
    assert (tmp_path / "plots" / "group_advantages-cpu.png").stat().st_size > 2000


def test_mistakes_of_the_command(capsys, monkeypatch, tmp_path):
    assert main(["bench", "kernels", "tiny"]) == 2
    assert "tiny is for --gate" in capsys.readouterr().err
    assert main(["bench", "kernels", "--gate"]) == 2 and main(["bench", "--gate"]) == 2
    assert "bench sampler CONFIG --gate" in capsys.readouterr().err
    monkeypatch.setattr("uae_fast.cli.__file__", str(tmp_path / "uae_fast" / "cli.py"))
    assert main(["bench"]) == 2
    assert f"{tmp_path} is none: get the repository" in capsys.readouterr().err
