"""What a GPU alone can tell, what is worth most first and within a time: `make gpu-check`.

    python3 tests/kernels/gpu_check.py [--out FOLDER] [--budget 9m] [-k EXPRESSION] [PART ...]

The parts, in this order:
    kernels   every kernel's tests, compiled: each op once, between canaries; then accuracy and bits; random inputs last
    trainer   steps of every stage on the small world, as `test_pretend_gpu.py` takes them without a GPU
    sizes     steps of full-size presets with random weights, each under the memory of its card, and stage 3's update
              beside a plain Flow-GRPO: rows as `uae-fast bench trainer` has them; -k "steps and sd35l" chooses
    sanitize  the kernels under NVIDIA's compute-sanitizer

Needs PyTorch, Triton, NumPy, pytest, pytest-xdist and hypothesis, and nothing of this repository installed; what other
packages are missing is said first, with what is left out for it. Each result is a line of FOLDER/gpu-check.jsonl as
soon as it is known, whatever becomes of the rest, and a short summary comes last. A part runs in processes of its own
and has a share of what is left of the time: where a kernel breaks the device's context, or hangs, its process is
replaced and the tests go on; a part that does not end is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = 8  # each takes half a gigabyte of the GPU, and compiles for itself
SHOWN = 30  # failures
LINE = 160  # characters of one
MARGIN = 10.0  # seconds between a part's last new test and its end by force
NEEDED = ("triton", "numpy", "pytest", "xdist", "hypothesis")
PRESETS = ("sd35l_24gb", "sd35m_16gb", "sd35l_h200")
MODELS = ("diffusers", "peft", "transformers", "accelerate", "omegaconf", "rich", "safetensors", "PIL")


@dataclass(frozen=True)
class Part:
    """Attributes:
    share: of the time that is left when it begins.
    needs: modules without which nothing of it runs.
    wants: modules without which some of its tests are skipped.
    chosen: pytest's -k of each process of it, one after the other.
    """

    share: float
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ("",)


PARTS = {
    "kernels": Part(0.5, wants=("diffusers", "peft")),
    "trainer": Part(0.4, MODELS, wants=("bitsandbytes",)),
    "sizes": Part(
        0.8,
        (*MODELS, "bitsandbytes", "pytest_benchmark"),
        chosen=("steps and sd35m_24gb", "stage3 and 80gb", *(f"steps and {preset}" for preset in PRESETS)),
    ),
    "sanitize": Part(1.0),
}


def seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    return float(text[:-1]) * unit if unit else float(text)


class Report:
    """A line for each test; no test begins when the budget is spent."""

    def __init__(self, file: Path, budget: float | None):
        self.file, self.budget, self.start = file, budget, time.monotonic()
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        # pytest-xdist asks its own plugin, and nobody asks pytest's session
        self.session = session.config.pluginmanager.getplugin("dsession") or session

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._keep(report, "failed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            self._keep(report, report.outcome)
        if self.budget is not None and time.monotonic() - self.start > self.budget:
            self.session.shouldstop = "the budget is spent"

    def _keep(self, report: Any, outcome: str) -> None:
        text = str(report.longrepr) if outcome == "failed" else ""
        keep(self.file, report.nodeid, outcome, getattr(report, "duration", 0.0), text)


def keep(file: Path, test: str, outcome: str, took: float, text: str = "") -> None:
    line = {"test": test, "outcome": outcome, "seconds": round(took, 2)}
    with file.open("a") as lines:
        lines.write(json.dumps(line | ({"text": text[-6000:]} if text else {})) + "\n")


def summary(lines: list[dict[str, Any]], notes: list[str]) -> str:
    """What is worth a reader's time of the results, failures after counts and the total last."""
    outcomes: dict[str, Counter[str]] = {}
    took: Counter[str] = Counter()
    for line in lines:
        name = line["test"].split("::")[0].rsplit("/")[-1]
        outcomes.setdefault(name, Counter())[line["outcome"]] += 1
        took[name] += line["seconds"]
    shown = list(notes)
    for name, found in sorted(outcomes.items()):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
        shown.append(f"{name:45} {counts}, {took[name]:.0f} s")
    failures = [line for line in lines if line["outcome"] == "failed"]
    shown += [f"{line['test']}: {_reason(line.get('text', ''))}"[: 2 * LINE] for line in failures[:SHOWN]]
    if len(failures) > SHOWN:
        shown.append(f"and {len(failures) - SHOWN} more failures, in gpu-check.jsonl")
    total: Counter[str] = sum(outcomes.values(), Counter())
    shown.append(", ".join(f"{count} {outcome}" for outcome, count in sorted(total.items())) or "nothing ran")
    return "\n".join(shown)


def _reason(text: str) -> str:
    """The line of a traceback that says what was wrong."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = errors or [line for line in text.strip().splitlines() if line.strip()][-1:]
    return lines[0][:LINE] if lines else ""


def sizes(folder: Path) -> list[str]:
    """The rows of full-size steps, a line each."""
    shown = []
    for file in sorted(folder.glob("trainer-*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            said = f"{row['variant']}, {row['contestant']}: "
            if row["median_ms"] is None:
                shown.append(said + row["reason"])
                continue
            facts = [f"{row['median_ms'] / 1e3:.2f} s a step"]
            units = {"images_per_second": "images/s", "tokens_per_second": "tokens/s", "peak_gb": "GiB", "mfu": "MFU"}
            facts += [f"{row[key]:.3g} {unit}" for key, unit in units.items() if row.get(key) is not None]
            facts += [f"{name} {took:.2f} s" for name, took in row.get("seconds", {}).items()]
            shown.append(said + ", ".join(facts))
    return shown


def environment() -> str:
    import torch
    import triton

    device = torch.cuda.get_device_properties(0)
    return (
        f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    )


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, help="folder of gpu-check.jsonl, gpu-check.log and the rows")
    parser.add_argument("--budget", type=seconds, help="begin no test later: 9m, 540s")
    parser.add_argument("-k", dest="expression", default="", help="tests to choose, as pytest's -k")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the part, in this process
    arguments = parser.parse_args(argv)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    paths = [str(ROOT), str(ROOT / "kernels"), str(HERE)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a GPU; PyTorch finds none here", file=sys.stderr)
        return 1
    if arguments.here:
        return run(arguments.parts[0], arguments.out, arguments.budget, arguments.expression)
    if absent := missing(NEEDED):
        print(f"gpu-check needs {', '.join(absent)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        return check(
            arguments.parts or list(PARTS), arguments.out or Path(folder), arguments.budget, arguments.expression
        )


def check(parts: list[str], folder: Path, budget: float | None, expression: str = "") -> int:
    """Runs the parts one after the other, each in processes of its own; 0 where every test has passed."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu-check.jsonl"
    file.unlink(missing_ok=True)
    file.touch()
    notes = [environment()]
    print(notes[0], flush=True)
    command = [sys.executable, str(HERE / "gpu_check.py"), "--here", "--out", str(folder)]
    for name in parts:
        part = PARTS[name]
        if absent := missing(part.needs):
            notes.append(f"{name}: left out, for want of {', '.join(absent)}")
            continue
        if absent := missing(part.wants):
            notes.append(f"{name}: less, for want of {', '.join(absent)}")
        now = time.monotonic()
        end = None if budget is None else now + (start + budget - now) * (1.0 if name == parts[-1] else part.share)
        for chosen in (expression,) if expression else part.chosen:
            said = name if chosen == expression else f"{name}, {chosen}"
            left = None if end is None else end - time.monotonic()
            if left is not None and left < 2 * MARGIN:
                notes.append(f"{said}: not begun, the time is spent")
                continue
            until, before = [] if left is None else ["--budget", f"{left - MARGIN}s"], file.stat().st_size
            found = within(left, [*command, "-k", chosen, *until, name], folder / "gpu-check.log")
            if not found and file.stat().st_size == before:
                found = ["nothing ran, see gpu-check.log"]
            notes += [f"{said}: {what}" for what in found]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    print(summary(lines, [*notes, *sizes(folder)]), flush=True)
    return int(not lines or any(line["outcome"] == "failed" for line in lines))


def within(limit: float | None, command: list[str], log: Path) -> list[str]:
    """Runs a command, and ends it and all it has started when the time is over; what is to be said of it."""
    with log.open("a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
    if status is None:
        return [f"killed after {limit:.0f} s"]
    if status == 2:  # pytest's, where a session was stopped
        return ["stopped, the budget is spent"]
    return [] if status in (0, 1, 5) else [f"ended with status {status}, see {log.name}"]


def run(part: str, folder: Path, budget: float | None, expression: str = "") -> int:
    """One part, in this process and its workers."""
    file = folder / "gpu-check.jsonl"
    if part == "sanitize":
        from sanitize import SANITIZER, TOOLS, under

        for tool in TOOLS if SANITIZER else ():
            began = time.monotonic()
            status, text = under(tool)
            keep(file, f"sanitize.py::{tool}", "failed" if status else "passed", time.monotonic() - began, text)
        if not SANITIZER:
            keep(file, "sanitize.py", "skipped", 0.0)
        return 0
    report = Report(file, budget)
    if part == "sizes":
        rows = ["--rows", str(folder), "-k", expression]
        rows += [] if budget is None else ["--budget", str(budget)]
        return tests([ROOT / "benchmarks" / "trainer" / "test_speed.py"], report, 0, rows)
    files = {"kernels": sorted(HERE.glob("test_triton_*.py")), "trainer": [HERE.parent / "trainer" / "test_gpu.py"]}
    chosen = ["-k", expression] if expression else []
    return tests(files[part], report, min(WORKERS, os.cpu_count() or 1), chosen)


def tests(files: list[Path], report: Report, workers: int, options: list[str]) -> int:
    """Pytest's exit status; `workers` processes take one test after the other, in order."""
    import pytest

    options += ["-q", "--tb=short", "--no-header", "--no-summary", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    if workers:
        options += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "1000"]
        options += ["-p", "watchdog"]
    return int(pytest.main([*map(str, files), *options], plugins=[report]))


if __name__ == "__main__":
    raise SystemExit(main())
