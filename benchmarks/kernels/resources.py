"""Registers, shared memory and occupancy of every kernel on every architecture, compiled ahead of time without a GPU.

python -m benchmarks.kernels.resources [OP…]     # writes results/resources.jsonl and results/resources.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

from ..rows import RESULTS, ROOT, Row, environment, read

NAME = "resources"
TESTS = ROOT / "tests" / "kernels"  # where launches.py and test_aot.py stand


def measure(op: str, capability: int) -> list[Row]:
    """What the kernels need that the calls of an op compile: `binaries` of them alike, `case` one of these."""
    from launches import variants

    rows: dict[tuple, Row] = {}
    for name, launch in variants(op, capability):
        row = {"op": op, "kernel": launch.name, "capability": capability, **launch.resources}
        rows.setdefault(tuple(row.values()), row | {"case": name, "binaries": 0})["binaries"] += 1
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The most registers and shared memory, and the least occupancy, of each kernel's variants on each architecture."""
    if not rows:
        return "Not compiled yet."
    capabilities = sorted({row["capability"] for row in rows})
    kernels = defaultdict(list)
    for row in rows:
        kernels[row["op"], row["kernel"]].append(row)
    lines = [
        "| op | kernel | " + " | ".join(f"sm_{c}" for c in capabilities) + " |",
        "|---|---|" + "---|" * len(capabilities),
    ]
    for (op, kernel), found in kernels.items():
        cells = []
        for capability in capabilities:
            here = [row for row in found if row["capability"] == capability]
            registers, shared = (max((row[key] for row in here), default=0) for key in ("registers", "shared"))
            occupancy = min((row["occupancy_percent"] for row in here), default=0)
            cells.append(f"{registers} / {shared / 1024:.0f} / {occupancy} %" if here else "")
        lines.append(f"| {op} | `{kernel.strip('_')}` | " + " | ".join(cells) + " |")
    binaries, spills = (sum(r["binaries"] for r in rows if r["stack"] >= least) for least in (0, 1))
    lines += [
        "",
        "Registers a thread / shared memory in KiB / occupancy, the worst of a kernel's variants; "
        f"{binaries} binaries by triton {rows[0]['triton']}, {spills} of them spill.",
    ]
    return "\n".join(lines)


def main(ops: list[str]) -> None:
    sys.path.insert(0, str(TESTS))
    from test_aot import CASES, OPS

    ops = ops or OPS
    where = environment("cpu")
    kept = {key: where[key] for key in ("commit", "dirty", "date")} | {"triton": where["versions"]["triton"]}
    file = RESULTS / f"{NAME}.jsonl"
    rows = [row for row in read(file.name, RESULTS) if row["op"] not in ops]
    for op, capability in CASES:
        if op in ops:
            rows += [row | kept for row in measure(op, capability)]
            print(f"{op}, sm_{capability}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.with_suffix(".md").write_text(f"# Resources of the Triton kernels\n\n{table(rows)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
