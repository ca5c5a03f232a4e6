"""Verdicts repeat: on a machine that drifts, two runs say the same of all pairs that are not at the margin."""

import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import rows, run
from benchmarks.kernels.harness import PASSES, Contestant, Entry, leave_out
from benchmarks.rows import OURS

BEYOND = (0.6, 0.8, 0.9, 1.0, 1 / 0.9, 1.25, 1.7)  # true ratios that are not at the margin
RUNS = 400


def a_run(draw, ratio, date="1"):
    """A rival and ours that takes `ratio` as long: visits slowed together by drift, apart by noise and bursts."""
    drift, own, its = draw.uniform(0.7, 1.4), [], []
    for _ in range(PASSES):
        drift *= draw.lognormvariate(0, 0.05)
        for visits, true in ((own, 10 * ratio), (its, 10.0)):
            burst = draw.uniform(1.1, 1.5) if draw.random() < 0.01 else 1.0
            visits.append(true * drift * burst * draw.lognormvariate(0, 0.015))
    return [a_row(OURS, own, date), a_row("rival", its, date)]


def a_row(contestant, visits, date="1"):
    fifths = statistics.quantiles(visits, n=5, method="inclusive")
    return {
        "op": "o", "variant": "v", "device": "d", "dtype": "t", "N": 1, "contestant": contestant, "config": {},
        "date": date, "commit": "c" + date, "visits_ms": visits, "median_ms": statistics.median(visits),
        "p20_ms": fifths[0], "p80_ms": fifths[3],
    }  # fmt: skip


def faults():
    """What is wrong with the rule, by true ratio: two runs that disagree in over 1 %, or say what is not so."""
    draw, found = random.Random(0), []
    for ratio in BEYOND:
        says = [[rows.verdict(*a_run(draw, ratio)) for _ in range(2)] for _ in range(RUNS)]
        right = "equal" if ratio == 1 else "faster" if ratio < 1 else "slower"
        if sum(first != second for first, second in says) > RUNS // 100:
            found.append(f"{ratio:.2f}: runs disagree")
        if sum(said != right for pair in says for said in pair) > 2 * RUNS // 100:
            found.append(f"{ratio:.2f}: not {right}")
    return found


def test_two_runs_agree_and_say_what_is_so():
    assert faults() == []


def unpaired(ours, rival):
    """Of sorted times: a drift's ends meet each other, and so do its bursts."""
    own, its = sorted(ours["visits_ms"]), rival["visits_ms"]
    found = [b / a for a, b in zip(own, its, strict=True)]
    return rows.Ratio(statistics.median(found), *rows.interval(found))


@pytest.mark.parametrize(
    "name, value",
    [
        ("NEAR", 0.0),  # equal ones are told apart
        ("NEAR", 0.12),  # a tenth is called equal
        ("interval", lambda values: (min(values), max(values))),  # one burst hides a tenth
        ("interval", lambda values: (max(values), min(values))),
        ("ratio", unpaired),
        ("ratio", lambda ours, rival: rows.Ratio(*[rival["median_ms"] / ours["median_ms"]] * 3)),  # of medians
    ],
)
def test_other_rules_are_found_out(name, value, monkeypatch):
    monkeypatch.setattr(rows, name, value)
    assert faults()


def test_no_side_is_favoured():
    draw, told = random.Random(1), {"faster": "slower", "slower": "faster", "equal": "equal"}
    for _ in range(500):
        ours, rival = a_run(draw, draw.lognormvariate(0, 0.1))
        assert rows.verdict(rival, ours) == told[rows.verdict(ours, rival)]


@pytest.mark.parametrize("n, cut", [(5, 0), (6, 0), (7, 0), (8, 1), (11, 2), (20, 5)])
def test_the_interval_of_a_median(n, cut):
    """Against a table of the sign test: n, and how many values lie outside on each side."""
    assert rows.interval(list(range(n, 0, -1))) == (cut + 1, n - cut)
    assert rows.interval(list(range(4))) is None


def test_rows_without_visits_enough_are_not_judged():
    ours, rival = ({"median_ms": m, "p20_ms": m - 1, "p80_ms": m + 1} for m in (10.0, 20.0))
    for own, its in (({}, {}), ([10.0] * 8, [20.0] * 7), ([10.0] * 4, [20.0] * 4)):
        pair = ours | {"visits_ms": own or None}, rival | {"visits_ms": its or None}
        assert rows.ratio(*pair) is None and rows.verdict(*pair) == rows.UNJUDGED
    case = dict.fromkeys(rows.CASE) | {"date": "1", "config": {}}
    assert rows.verdicts([case | ours | {"contestant": OURS}, case | rival | {"contestant": "rival"}]) == {}


def test_what_is_compiled_stands_beside_what_is():
    visits = {OURS: 10.0, f"{OURS}, torch.compile": 2.0, "rival": 9.0, "torch.compile of eager": 2.0, "other": 20.0}
    found = [a_row(name, [each] * PASSES) for name, each in visits.items()]
    says = {name: word for (_, name), word in rows.verdicts(found).items()}
    assert says == {"rival": "slower", "torch.compile of eager": "equal", "other": "faster"}
    says = {name: word for (_, name), word in rows.verdicts([found[0], *found[2:]]).items()}
    assert says["torch.compile of eager"] == "slower"  # what is not compiled has nothing else to show


def test_contradictions_and_near_misses_are_told_apart():
    def pair(first, second):
        return [row | {"variant": f"{first} {second}"} for date, ratio in (("1", first), ("2", second))
                for row in (a_row(OURS, [ratio] * 8, date), a_row("rival", [1.0] * 8, date))]  # fmt: skip

    found = run.repeated(pair(0.5, 0.5) + pair(0.5, 1.0) + pair(0.5, 2.0) + pair(1.0, 2.0))
    assert found[0] == (
        "verdicts of the last two runs (commits c1 and c2) agree for 1 of 4 rivals; "
        "2 differ by one step (equal beside faster or slower), 1 contradict each other"
    )
    assert sorted(line.split(": ")[1] for line in found[1:]) == [
        "equal, then slower", "faster, then equal", "faster, then slower",
    ]  # fmt: skip


def test_a_configuration_far_behind_its_own_kind_is_left_out():
    def entry(name, seconds, **config):
        return Entry(Contestant(name, lambda _: None, config), step=lambda: {}, seconds=seconds)

    ours, slow_ours = entry(OURS, 1.0), entry(OURS, 9.0, chunk=3)
    best, near, far = entry("r", 1.0, chunk=1), entry("r", 1.9, chunk=2), entry("r", 2.1, chunk=3)
    other = entry("s", 50.0)
    leave_out([far, best, near, other, ours, slow_ours])
    assert far.reason == "takes 2.1 times as long as with chunk 1" and far.step is None
    assert all(e.reason is None and e.step for e in (ours, slow_ours, best, near, other))


PAGED = """
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from benchmarks.heap import keep_freed
if {keep}:
    print(keep_freed())
x = torch.randn(256, 32768)
def step():
    x.log_softmax(-1)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("keep", [True, False])
def test_kept_memory_is_not_paged_in_again(keep):
    code = PAGED.format(root=str(run.ROOT), keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    *kept, faults = done.stdout.split()
    assert kept == ["True"] * keep
    assert int(faults) < 100 if keep else int(faults) > 5 * 8000  # 32 MiB, and more than glibc keeps unasked
