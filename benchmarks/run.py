"""`uae-fast bench`: the suites, what is worth most first and no longer than allowed; then tables, plots, verdicts.

    python -m benchmarks.run [kernels|sampler|trainer|all] [--quick] [--budget 10m] [--out FOLDER] [--again]
    python -m benchmarks.run --predict H200 [--preset NAME]      # floors, without a GPU

Each row that was measured is appended to a file in --out. A case with rows of this commit and device is left out: the
same command goes on where it ran out of time.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import pytest

from .rows import RESULTS, ROOT, Row, case_of, read, verdicts

SUITES = ("kernels", "sampler", "trainer")
NO_TESTS = 5  # pytest's exit status where nothing is left to measure


def seconds(text: str) -> float:
    """Of "10m", "90s", "1.5h" or "600"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0: 10m, 90s, 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="uae-fast bench")
    parser.add_argument("suite", nargs="?", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=seconds)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--predict", metavar="GPU")
    parser.add_argument("--preset", action="append", default=[])
    arguments = parser.parse_args(argv)
    if arguments.predict:
        from .roofline import show

        try:
            show(arguments.predict, arguments.preset)
        except ValueError as error:
            parser.error(str(error))
        return 0
    return measure(arguments)


def measure(arguments: argparse.Namespace) -> int:
    suites = SUITES if arguments.suite == "all" else (arguments.suite,)
    folders = [ROOT / "benchmarks" / suite for suite in suites if (ROOT / "benchmarks" / suite).is_dir()]
    options = [*map(str, folders), f"--rootdir={ROOT}", "--rows", str(arguments.out)]
    options += ["--quick"] * arguments.quick + ["--again"] * arguments.again
    if arguments.preset:
        options += ["-k", " or ".join(arguments.preset)]
    if arguments.budget:
        options += ["--budget", str(arguments.budget)]
    if arguments.commit:
        options += ["--commit", arguments.commit]
    status = int(pytest.main(options))
    if not arguments.quick:
        report(arguments.out)
    return 0 if status == NO_TESTS else status


def report(folder: Path) -> None:
    """Plots of a folder's rows, and whether verdicts repeat; where the rows are the repository's, its tables too."""
    from . import tables
    from .kernels.report import plot

    measured = [row for row in read(folder=folder) if "median_ms" in row]
    for file in plot(measured, folder / "plots"):
        print(f"drew {file}")
    if lines := repeated(measured):
        print("\n".join(lines))
    if folder.resolve() == RESULTS:
        tables.main(tables.FILES)


def repeated(rows: list[Row]) -> list[str]:
    """Whether the last two runs of each case say the same of who is faster; no lines where no case ran twice.

    "faster" and "slower" contradict each other; "equal" and one of them lie side by side.
    """
    runs: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[case_of(row)][row["date"]].append(row)
    compared, contradicted, differing, commits = 0, 0, [], set()
    for dates in runs.values():
        if len(dates) < 2:
            continue
        pair = [dates[date] for date in sorted(dates)[-2:]]
        before, last = (verdicts(found) for found in pair)
        commits |= {tuple((found[0].get("commit") or "unknown")[:10] for found in pair)}
        for key in sorted(before.keys() & last.keys(), key=str):
            compared += 1
            if before[key] != last[key]:
                contradicted += "equal" not in (before[key], last[key])
                case = " ".join(str(part) for part in key[0] if part is not None)
                differing.append(f"  {case}, {key[1]}: {before[key]}, then {last[key]}")
    if not compared:
        return []
    of = "; ".join(f"commit {a}" if a == b else f"commits {a} and {b}" for a, b in sorted(commits))
    near = len(differing) - contradicted
    return [
        f"verdicts of the last two runs ({of}) agree for {compared - len(differing)} of {compared} rivals; "
        f"{near} differ by one step (equal beside faster or slower), {contradicted} contradict each other",
        *differing,
    ]


if __name__ == "__main__":
    raise SystemExit(main())
