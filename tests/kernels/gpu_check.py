"""Every kernel's tests, compiled, on a GPU: `make gpu-check`.

    python3 tests/kernels/gpu_check.py [--out FOLDER] [--budget 9m] [-k EXPRESSION]

Needs PyTorch, Triton, NumPy, pytest, pytest-xdist and hypothesis (diffusers for `mmdit`'s), and nothing of this
repository installed. What is worth most runs first: each op once, between canaries; then accuracy and bits; at random
inputs last. Each result is a line of FOLDER/gpu-check.jsonl as soon as it is known, whatever becomes of the rest, and a
short summary comes last. Where a kernel breaks the device's context, its process is replaced and the tests go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = 8  # each takes half a gigabyte of the GPU, and compiles for itself
SHOWN = 30  # failures
LINE = 160  # characters of one


def seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    return float(text[:-1]) * unit if unit else float(text)


class Report:
    """A line for each test, and the end's summary."""

    def __init__(self, file: Path | None, budget: float | None):
        self.file, self.budget, self.start = file, budget, time.monotonic()
        self.outcomes: dict[str, Counter[str]] = {}  # by test file
        self.seconds: Counter[str] = Counter()
        self.failures: list[tuple[str, str]] = []
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._keep(report, "failed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[_file(report)] += report.duration
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            self._keep(report, report.outcome)
        if self.budget is not None and time.monotonic() - self.start > self.budget:
            self.session.shouldstop = "the budget is spent"

    def _keep(self, report: Any, outcome: str) -> None:
        self.outcomes.setdefault(_file(report), Counter())[outcome] += 1
        text = str(report.longrepr) if outcome == "failed" else ""
        if outcome == "failed":
            self.failures.append((report.nodeid, _reason(text)))
        if self.file is not None:
            line = {"test": report.nodeid, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 2)}
            with self.file.open("a") as lines:
                lines.write(json.dumps(line | ({"text": text[-6000:]} if text else {})) + "\n")

    def summary(self, environment: str) -> str:
        lines = [environment]
        for name, found in sorted(self.outcomes.items()):
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
            lines.append(f"{name:45} {counts}, {self.seconds[name]:.0f} s")
        lines += [f"{test}: {reason}"[: 2 * LINE] for test, reason in self.failures[:SHOWN]]
        if len(self.failures) > SHOWN:
            lines.append(f"and {len(self.failures) - SHOWN} more failures, in {self.file or '--out'}")
        if self.session is not None and self.session.shouldstop:
            lines.append(f"stopped: {self.session.shouldstop}")
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        lines.append(", ".join(f"{count} {outcome}" for outcome, count in sorted(total.items())) or "nothing ran")
        return "\n".join(lines)


def _file(report: Any) -> str:
    return report.nodeid.split("::")[0].rsplit("/")[-1]


def _reason(text: str) -> str:
    """The line of a traceback that says what was wrong."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = errors or [line for line in text.strip().splitlines() if line.strip()][-1:]
    return lines[0][:LINE] if lines else ""


def environment() -> str:
    import torch
    import triton

    device = torch.cuda.get_device_properties(0)
    return (
        f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py")
    parser.add_argument("--out", type=Path, help="folder of gpu-check.jsonl")
    parser.add_argument("--budget", type=seconds, help="begin no test later: 9m, 540s")
    parser.add_argument("-k", dest="expression", default="", help="tests to choose, as pytest's -k")
    arguments = parser.parse_args(argv)
    paths = [str(ROOT), str(ROOT / "kernels")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check runs the kernels on a GPU; PyTorch finds none here", file=sys.stderr)
        return 1
    file = None
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / "gpu-check.jsonl"
        file.unlink(missing_ok=True)
    report, here = Report(file, arguments.budget), environment()
    print(here, flush=True)
    status = run(sorted(HERE.glob("test_triton_*.py")), report, min(WORKERS, os.cpu_count() or 1), arguments.expression)
    print(report.summary(here), flush=True)
    return status


def run(files: list[Path], report: Report, workers: int, expression: str = "") -> int:
    """Pytest's exit status; `workers` processes take one test after the other, in order."""
    import pytest

    options = ["-q", "--tb=short", "--no-header", "--no-summary", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "1000"]
    options += ["-k", expression] if expression else []
    return int(pytest.main([*map(str, files), *options], plugins=[report]))


if __name__ == "__main__":
    raise SystemExit(main())
