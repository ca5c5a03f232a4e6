"""Counts of ops and training steps are those of the committed baseline, and a change of one is seen."""

import json
import sys
from pathlib import Path

import pytest
import torch
from uae_kernels import linear_logprobs

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import guard
from benchmarks.guard import Tally

CHANGED = """\
{}
These counts are not those of tests/benchmarks/baseline.json. What rose must be worth it; if it is, or if it fell:
    python -m benchmarks.guard --update
and commit the file with the change that made the difference."""


def test_counts_are_the_baselines(world):
    baseline = guard.read()
    if baseline["versions"] != guard.versions():
        pytest.skip(f"the baseline is of {baseline['versions']}, this is {guard.versions()}")
    found = guard.measured(world)["counts"]
    changed = guard.differences(baseline["counts"], found)
    assert not changed, CHANGED.format("\n".join(changed))


def test_a_tally_by_hand():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    with Tally() as tally:
        c = a @ b
        c.addmm_(a, b)
        c.t().add_(1.0)  # a view, and 21 numbers read and written: once each as operand and as result
        torch.empty(10).zero_()
    assert tally.count() == {
        "launches": 4,
        "flops": 2 * (2 * 3 * 5 * 7),
        "bytes": 4 * (2 * 21 + 2 * 10),
        "allocations": 2,
        "allocated": 4 * (21 + 10),
    }


def test_products_inside_our_ops_and_in_backward_passes_are_counted():
    hidden, weight = torch.randn(128, 32, requires_grad=True), torch.randn(4096, 32)
    targets = torch.zeros(128, dtype=torch.long)
    with Tally() as frozen:
        linear_logprobs(hidden, weight, targets, impl="torch").sum().backward()
    assert frozen.flops == 2 * (2 * 128 * 32 * 4096)
    with Tally() as trained:
        linear_logprobs(hidden, weight.requires_grad_(), targets, impl="torch").sum().backward()
    assert trained.flops == 2 * frozen.flops
    assert trained.launches > frozen.launches > 20


def test_launches_of_triton_are_counted_and_kernels_told_apart():
    sys.path.insert(0, str(guard.ROOT / "tests/kernels"))
    try:
        from launches import recorded
        from small import CASES
    finally:
        sys.path.pop(0)
    make, call = CASES["flow_step"]
    counts = []
    for times in (1, 2):
        given = make("cpu", 64)
        with recorded(90) as launches, Tally(launches) as tally:
            for _ in range(times):
                call("triton", **given)
        counts.append(tally.count())
    once, twice = counts
    assert 0 < once["kernels"] == twice["kernels"]
    assert twice["launches"] == 2 * once["launches"] and twice["bytes"] == 2 * once["bytes"]


def test_every_difference_is_named():
    before = {"op": {"launches": 10, "bytes": 0}, "old": {"launches": 1}}
    after = {"op": {"launches": 12, "bytes": 0}, "added": {"launches": 1}}
    assert guard.differences(before, after) == [
        "added: new", "old: gone", "op: launches rose from 10 to 12 (+20.00%)",
    ]  # fmt: skip
    assert guard.differences({"op": {"bytes": 1000}}, {"op": {"bytes": 999}}) == [
        "op: bytes fell from 1,000 to 999 (-0.10%)"
    ]
    assert guard.differences(before, before) == []
    assert guard.differences({"op": {"launches": 1, "bytes": 2}}, {"op": {"launches": 1, "kernels": 2}}) == [
        "op: bytes gone", "op: kernels new",
    ]  # fmt: skip


def test_the_command_compares_and_updates(tmp_path, monkeypatch, capsys):
    file = tmp_path / "baseline.json"
    counts = {"op": {"launches": 1}}
    monkeypatch.setattr(guard, "BASELINE", file)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["guard", *arguments])
        status = guard.main(lambda world: {"versions": {"torch": "1"}, "counts": counts})
        return status, capsys.readouterr().out

    assert run()[0] == 1 and not file.exists()
    assert run("--update")[0] == 0 and json.loads(file.read_text())["counts"] == counts
    assert run() == (0, "all counts are those of the baseline\n")
    counts["op"]["launches"] = 2
    status, words = run()
    assert status == 1 and "launches rose from 1 to 2" in words
    file.write_text(json.dumps({"versions": {"torch": "0"}, "counts": counts}))
    status, words = run()
    assert status == 0 and "'torch': '0'" in words
