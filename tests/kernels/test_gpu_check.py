"""What stands in for a GPU: the runner of `make gpu-check` on tests of its own, and the interpreter's arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chip
import gpu_check
import numpy as np
import pytest
import torch
from gpu_check import seconds

HERE = Path(__file__).parent
TESTS = """
import os, pytest, time
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_broken_context(): os._exit(1)
def test_hangs(): time.sleep(1000)
@pytest.mark.skip(reason="elsewhere")
def test_left_out(): pass
@pytest.mark.parametrize("i", range(MORE))
def test_more(i): time.sleep(0.1)
"""
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gpu_check import Report, tests
folder = Path(sys.argv[2])
sys.exit(tests([folder / "test_ours.py"], Report(folder / "gpu-check.jsonl", float(sys.argv[3])), 2, []))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, HERE / "gpu_check.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "gpu-check needs a GPU; PyTorch finds none here\n")


@pytest.mark.parametrize("budget", [100, 0])
def test_every_result_is_kept_and_failures_come_last(budget, tmp_path):
    more = 4 if budget else 40
    (tmp_path / "test_ours.py").write_text(TESTS.replace("MORE", str(more)))
    command = [sys.executable, "-c", RUN, HERE, tmp_path, str(budget)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"WATCHDOG": "3"})
    lines = [json.loads(line) for line in (tmp_path / "gpu-check.jsonl").read_text().splitlines()]
    assert done.returncode == (1 if budget else 2)
    if not budget:
        assert len(lines) < more / 2
        return
    outcomes = {line["test"].split("::")[-1]: line["outcome"] for line in lines}
    assert outcomes == {
        "test_good": "passed", "test_bad": "failed", "test_broken_context": "failed", "test_hangs": "failed",
        "test_left_out": "skipped", **{f"test_more[{i}]": "passed" for i in range(4)},
    }  # fmt: skip
    shown = gpu_check.summary(lines, ["a machine"]).splitlines()
    assert shown[0] == "a machine" and shown[-1] == "3 failed, 5 passed, 1 skipped"
    assert any("test_bad: AssertionError: one is not two" in line for line in shown)
    assert any("test_hangs" in line and "crashed" in line for line in shown)


def test_a_summary_fits_what_a_call_shows():
    line = {"test": "test_triton_x.py::test_y[" + "z" * 300 + "]", "outcome": "failed", "seconds": 1, "text": "e" * 300}
    shown = gpu_check.summary([line] * 2000, ["a machine"])
    assert len(shown) < 12_000 and "1970 more failures" in shown


@pytest.fixture
def begun(monkeypatch):
    """What `check` runs: (part, seconds allowed, seconds told); each takes as long as `took` says."""
    clock, found = SimpleNamespace(now=0.0, took={}), []

    def within(limit, command, log):
        told = float(command[command.index("--budget") + 1][:-1]) if "--budget" in command else None
        part, chosen = command[-1], command[command.index("-k") + 1]
        found.append((f"{part} {chosen}".strip(), limit, told))
        clock.now += clock.took.get(part, 0.0)
        return []

    monkeypatch.setattr(gpu_check, "within", within)
    monkeypatch.setattr(gpu_check, "environment", lambda: "a machine")
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(gpu_check, "missing", lambda names: [])
    return SimpleNamespace(clock=clock, parts=found)


def test_what_a_part_leaves_of_its_share_is_the_next_ones(begun, tmp_path, capsys):
    begun.clock.took = {"kernels": 40.0, "trainer": 200.0, "sizes": 110.0}
    gpu_check.check(list(gpu_check.PARTS), tmp_path, 540.0)
    assert begun.parts == [
        ("kernels", 270.0, 260.0), ("trainer", 200.0, 190.0), ("sizes steps and sd35m_24gb", 240.0, 230.0),
        ("sizes stage3 and 80gb", 130.0, 120.0), ("sizes steps and sd35l_24gb", 20.0, 10.0),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "trainer: nothing ran, see gpu-check.log" in said
    assert "sizes, steps and sd35m_16gb: not begun, the time is spent" in said
    assert "sanitize: not begun, the time is spent" in said


def test_without_a_budget_nothing_is_cut_short(begun, tmp_path):
    gpu_check.check(["kernels", "sanitize", "sizes"], tmp_path, None, "steps and sd35l")
    assert begun.parts == [(f"{part} steps and sd35l", None, None) for part in ("kernels", "sanitize", "sizes")]


def test_what_is_not_installed_is_said_and_left_out(begun, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "missing", lambda names: [name for name in names if name == "peft"])
    assert gpu_check.check(list(gpu_check.PARTS), tmp_path, 540.0) == 1  # nothing ran
    said = capsys.readouterr().out
    assert "kernels: less, for want of peft" in said and "trainer: left out, for want of peft" in said
    assert [part for part, *_ in begun.parts] == ["kernels", "sanitize"]


def test_a_part_that_does_not_end_is_killed_with_all_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'])"
    said = gpu_check.within(2.0, [sys.executable, "-c", child], tmp_path / "log")
    assert said == ["killed after 2 s"]
    said = gpu_check.within(None, [sys.executable, "-c", "import os; print('so far'); os.abort()"], tmp_path / "log")
    assert said == ["ended with status -6, see log"]


def test_rows_are_shown_with_what_they_are_for(tmp_path):
    row = {"variant": "stage3-sd35m_24gb", "contestant": "uae-kernels", "median_ms": 2500.0, "reason": None}
    facts = {"images_per_second": 6.4, "peak_gb": 22.5, "seconds": {"renders": 1.25}, "tokens_per_second": None}
    rows = [row | facts, row | {"median_ms": None, "reason": "out of memory"}]
    (tmp_path / "trainer-steps-gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_check.sizes(tmp_path) == [
        "stage3-sd35m_24gb, uae-kernels: 2.50 s a step, 6.4 images/s, 22.5 GiB, renders 1.25 s",
        "stage3-sd35m_24gb, uae-kernels: out of memory",
    ]


def test_times():
    assert [seconds(text) for text in ("90", "90s", "1.5m", "1h")] == [90, 90, 90, 3600]


@pytest.mark.parametrize(
    "approximate, exact, bound",
    [
        (chip._divide, np.divide, 2.0**-22),
        (lambda a, _: chip._sqrt(a), lambda a, _: np.sqrt(a), 2.0**-23),
        (lambda a, _: chip._exp2(a), lambda a, _: np.exp2(a), 2.0**-22.5),
    ],
)
def test_the_imitated_arithmetic_errs_as_promised(approximate, exact, bound):
    a, b = np.random.default_rng(0).uniform(0.1, 9, (2, 10_000)).astype(np.float32)
    wide = exact(a.astype(np.float64), b.astype(np.float64))
    error = np.abs(approximate(a, b) / wide - 1).max()
    assert bound / 2 < error <= bound + 2.0**-24  # and rounded to fp32


def test_the_imitated_arithmetic_is_exact_where_a_gpu_is():
    ones, odd = np.ones(3, np.float32), np.array([3.0, np.inf, np.nan], np.float32)
    assert np.array_equal(chip._divide(odd, 4 * ones), odd / 4, equal_nan=True)
    assert np.array_equal(chip._exp2(np.array([0, -3, -np.inf, 140], np.float32)), [1, 0.125, 0, np.inf])
    assert np.array_equal(chip._sqrt(np.array([0, np.inf, 1e-40], np.float32)), [0, np.inf, 0])
