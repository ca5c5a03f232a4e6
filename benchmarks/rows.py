"""Measured rows: JSON objects, one a line, in one file per op and kind of device."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "uae-kernels"  # what the names of our implementations begin with
COMPILED = "torch.compile"  # in the names of implementations that are compiled as a whole
PACKAGES = ("torch", "triton", "trl", "liger-kernel")
SIZES = ("N", "H", "V", "B", "T", "G")
CASE = ("op", "variant", "device", "dtype", *SIZES)
NEAR = 0.05  # times that differ by no more are called equal
SURE = 0.9  # what an interval covers at least
UNJUDGED = "not judged"  # for want of visits

Row = dict[str, Any]


def is_ours(row: Row) -> bool:
    return row["contestant"].startswith(OURS)


def like(rival: Row, own: list[Row]) -> Row:
    """Which of ours stands beside a rival: under torch.compile where the rival is and we are, else what `auto` runs."""
    compiled = [row for row in own if COMPILED in row["contestant"] and COMPILED in rival["contestant"]]
    return (compiled or own)[0]


def append(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(pattern: str = "*.jsonl", folder: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


def environment(device: str, commit: str | None = None) -> Row:
    """What a measurement depends on. `commit` is for a copy without .git: a hash, with -dirty behind it where it is."""
    if commit is None:
        commit = _git("rev-parse", "HEAD")
        changed = commit and _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        commit = f"{commit}-dirty" if changed else commit
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "kind": "gpu" if device == "cuda" else "cpu",
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each case the newest run that timed our op, and of each contestant there its fastest configuration."""
    runs: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[case_of(row)][row["date"]].append(row)
    chosen = []
    for dates in runs.values():
        timed = [date for date, run in dates.items() if any(is_ours(r) and r["median_ms"] is not None for r in run)]
        best: dict[str, Row] = {}
        for row in dates[max(timed)] if timed else []:
            other = best.setdefault(row["contestant"], row)
            if row["median_ms"] is not None and (other["median_ms"] is None or row["median_ms"] < other["median_ms"]):
                best[row["contestant"]] = row
        chosen += best.values()
    return chosen


def case_of(row: Row) -> tuple:
    """The case a row is of; a size that it does not name is one its op does not have."""
    return tuple(row.get(key) for key in CASE)


class Ratio(NamedTuple):
    """Of a rival's time to ours: the median of the visits' ratios, and an interval that covers the true median."""

    median: float
    low: float
    high: float


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """What covers the median of independent values, whatever their distribution, with a probability of at least SURE.

    Between the k-th smallest and the k-th largest, k as large as it may be; None for fewer than five values. Of eight
    it is the second and the seventh, and covers 93 %.
    """
    n = len(values)
    outside = [2 * sum(math.comb(n, j) for j in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = sum(share <= 1 - SURE for share in outside)
    return (sorted(values)[k - 1], sorted(values)[n - k]) if k else None


def ratio(ours: Row, rival: Row) -> Ratio | None:
    """Of two rows of one run, visit by visit: what slows the machine for a while slows both.

    None without visits enough for an interval.
    """
    own, its = visits(ours), visits(rival)
    found = [b / a for a, b in zip(own, its, strict=True)] if len(own) == len(its) else []
    within = interval(found)
    return Ratio(statistics.median(found), *within) if within else None


def visits(row: Row) -> list[float]:
    """A row's visits; of those that were paired with another's (`beside_ms`), in times of that one's."""
    own = row.get("visits_ms") or []
    return [a / b for a, b in zip(own, row["beside_ms"], strict=True)] if "beside_ms" in row else own


def verdict(ours: Row, rival: Row) -> str:
    """What ours is: "faster" or "slower" where the ratio's whole interval is beyond 5 %, else "equal"."""
    found = ratio(ours, rival)
    if found is None:
        return UNJUDGED
    if found.low > 1 + NEAR:
        return "faster"
    return "slower" if found.high < 1 / (1 + NEAR) else "equal"


def verdicts(rows: Iterable[Row]) -> dict[tuple, str]:
    """Of one run's rows: ours against each rival in its fastest configuration, by (case, rival), where it is judged."""
    timed = [row for row in newest(rows) if row["median_ms"] is not None]
    own = defaultdict(list)
    for row in filter(is_ours, timed):
        own[case_of(row)].append(row)
    found = {
        (case_of(row), row["contestant"]): verdict(like(row, own[case_of(row)]), row)
        for row in timed
        if not is_ours(row) and case_of(row) in own
    }
    return {key: says for key, says in found.items() if says != UNJUDGED}


def label(row: Row) -> str:
    """The contestant with its configuration."""
    return ", ".join([row["contestant"], *(f"{key} {value}" for key, value in row["config"].items())])


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
