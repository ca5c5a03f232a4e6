"""What stands in for a GPU: the runner of `make gpu-check` on tests of its own, and the interpreter's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import chip
import numpy as np
import pytest
import torch
from gpu_check import Report, seconds

HERE = Path(__file__).parent
TESTS = """
import os, pytest, time
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_broken_context(): os._exit(1)
@pytest.mark.skip(reason="elsewhere")
def test_left_out(): pass
@pytest.mark.parametrize("i", range(4))
def test_more(i): time.sleep(0.1)
"""
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gpu_check import Report, run
folder = Path(sys.argv[2])
report = Report(folder / "gpu-check.jsonl", float(sys.argv[3]))
status = run([folder / "test_ours.py"], report, 2)
print(report.summary("a machine"))
sys.exit(status)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, HERE / "gpu_check.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "gpu-check runs the kernels on a GPU; PyTorch finds none here\n")


@pytest.mark.parametrize("budget", [100, 0])
def test_every_result_is_kept_and_failures_come_last(budget, tmp_path):
    (tmp_path / "test_ours.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-c", RUN, HERE, tmp_path, str(budget)], capture_output=True, text=True, cwd=tmp_path
    )
    lines = [json.loads(line) for line in (tmp_path / "gpu-check.jsonl").read_text().splitlines()]
    assert done.returncode != 0
    summary = done.stdout[done.stdout.index("a machine") :].splitlines()
    if not budget:
        assert "stopped: the budget is spent" in summary
        return
    outcomes = {line["test"].split("::")[-1]: line["outcome"] for line in lines}
    assert outcomes == {
        "test_good": "passed", "test_bad": "failed", "test_broken_context": "failed", "test_left_out": "skipped",
        **{f"test_more[{i}]": "passed" for i in range(4)},
    }  # fmt: skip
    assert summary[-1] == "2 failed, 5 passed, 1 skipped"
    assert any("test_bad: AssertionError: one is not two" in line for line in summary)
    assert any("test_broken_context" in line and "crashed" in line for line in summary)


def test_a_summary_fits_what_a_call_shows():
    report = Report(None, None)
    report.failures = [("test_triton_x.py::test_y[" + "z" * 300 + "]", "e" * 300)] * 2000
    assert len(report.summary("a machine")) < 12_000 and "1970 more failures" in report.summary("a machine")


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
