"""Markdown tables from the rows, written where a file has `<!-- table:NAME -->` … `<!-- /table -->`.

    python -m benchmarks.tables [FILE…]      # all that have tables

NAME is OP-KIND, OP-KIND-VARIANT or OP-KIND-VARIANT-DTYPE (linear_logprobs-gpu-frozen), `memory`, `resources`,
`sampler-counted`, `sampler-gpu`, `scaling-cpu`, `gate-CONFIG` or `performance`, which is README's section. In an op's
table for a GPU, times that have not been measured are predicted for an H200, and marked ≈.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from .kernels import predicted, resources
from .kernels.memory import NAME as MEMORY
from .kernels.report import exponents
from .kernels.scaling import OP as SCALING
from .kernels.test_speed import OPS
from .rows import OURS, RESULTS, ROOT, Row, case_of, is_ours, label, newest, read, verdict
from .sampler import counted, denoise

PLACES = ("README.md", "benchmarks/README.md", "docs/samplers.md")
FILES = [ROOT / place for place in PLACES]
TRAINER = ("trainer-steps", "trainer-stage2", "trainer-stage3")
MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rules = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rules, *lines])


def speed(op: str, kind: str, variant: str | None = None, dtype: str | None = None) -> str:
    rows = newest(row for row in read(f"{op}-{kind}.jsonl"))
    if rows:
        device = max(rows, key=lambda row: row["date"])["device"]
        rows = [row for row in rows if row["device"] == device]
    if kind == "gpu" and (not rows or "H200" in device):
        rows += guesses(rows, op)
    parts = defaultdict(list)
    for row in rows:
        if variant in (None, row["variant"]) and dtype in (None, row["dtype"]):
            parts[row["variant"], row["dtype"]].append(row)
    return "\n\n".join(_part(*key, part) for key, part in parts.items()) or "Not measured yet."


def guesses(rows: list[Row], op: str) -> list[Row]:
    """Predicted rows for what the measured ones lack."""

    def key(row: Row) -> tuple:
        return row["variant"], row["dtype"], row["N"], row["contestant"]

    known = {key(row) for row in rows}
    modules = [module for module in OPS if module.__name__.endswith(f".{op}")]
    predictions = [row for module in modules for case in module.cases("cuda", False) for row in predicted.rows(case)]
    return [row for row in predictions if key(row) not in known]


def _part(variant: str, dtype: str, rows: list[Row]) -> str:
    """One variant in one dtype: a line for each contestant, a column for each N."""
    sizes = sorted({row["N"] for row in rows})
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["contestant"]][row["N"]] = row
    errors = list(dict.fromkeys(name for row in rows for name in row.get("errors", {})))
    at = f" at N {sizes[-1]:,}" if len(sizes) > 1 else ""
    peaks = [f"peak MB{at}"] if any(row.get("peak_bytes") is not None for row in rows) else []
    lines, absent = [], []
    for name, by_size in found.items():
        timed = [row for row in by_size.values() if row["median_ms"] is not None]
        if not timed:
            absent.append(f"{name} ({next(iter(by_size.values()))['reason']})")
            continue
        one_configuration = len({label(row) for row in timed}) == 1
        cells = [label(timed[0]) if one_configuration else name]
        cells += [_cell(by_size.get(n), found.get(OURS, {}).get(n), one_configuration) for n in sizes]
        if peaks:
            peak = by_size.get(sizes[-1], {}).get("peak_bytes")
            cells.append("" if peak is None else f"{peak / 1e6:,.1f}")
        for error in errors:
            seen = [row["errors"][error] for row in timed if error in row.get("errors", {})]
            cells.append(f"{max(seen):.0e}" if seen else "")
        lines.append([f"**{cell}**" if cell and is_ours(timed[0]) else cell for cell in cells])
    header = [f"{variant}, {dtype}", *(f"N {n:,}, ms" for n in sizes), *peaks, *(f"error {name}" for name in errors)]
    return "\n\n".join([markdown(header, lines), *_notes(rows, absent)])


def _cell(row: Row | None, ours: Row | None, one_configuration: bool) -> str:
    """Milliseconds, the ratio to ours where both are measured or both predicted, and the configuration."""
    if row is None or row["median_ms"] is None:
        return row["reason"] if row else ""
    about, details = "≈ " if "predicted" in row else "", []
    if ours and ours["median_ms"] and row is not ours and ("predicted" in row) == ("predicted" in ours):
        details.append(f"{row['median_ms'] / ours['median_ms']:.2f}×")
    if not one_configuration:
        details += [f"{key} {value}" for key, value in row["config"].items()]
    return f"{about}{row['median_ms']:.3g}" + (f" ({', '.join(details)})" if details else "")


def _notes(rows: list[Row], absent: list[str]) -> list[str]:
    notes = []
    measured = [row for row in rows if "date" in row]
    shape = ", ".join(f"{key} {rows[0][key]:,}" for key in ("H", "V") if rows[0][key])
    if measured:
        notes.append(f"Measured{f' at {shape}' if shape else ''}: {provenance(measured)}.")
    if any("predicted" in row for row in rows):
        costs = {row["contestant"]: row["predicted"] for row in rows if "predicted" in row}
        terms = "; ".join(f"{name} {cost['products']}, {cost['bytes']}" for name, cost in costs.items())
        notes.append(
            f"≈ predicted for an H200, not measured, at {shape}: "
            f"products·2NHV / {predicted.PRODUCT / 1e12:.0f} TFLOP/s + bytes·NV / {predicted.COPY / 1e12:.1f} TB/s, "
            f"with (products, bytes a logit): {terms}. Our Triton products are taken to be as fast as the library's."
        )
    if absent:
        notes.append(f"Not run: {'; '.join(absent)}.")
    return notes


def provenance(rows: list[Row]) -> str:
    """Machine, versions and commits of some rows."""
    last = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    threads = f", {last['threads']} threads" if last["kind"] == "cpu" else ""
    machine = f"{last['device']}{threads}, {versions}, Python {last['python']}"
    return f"{machine}, commit {commits(rows)}, {last['date'][:10]}"


def commits(rows: list[Row]) -> str:
    return ", ".join(sorted({(row["commit"] or "unknown")[:10] + " (changed)" * bool(row["dirty"]) for row in rows}))


def memory() -> str:
    rows = {(row["contestant"], row["N"]): row for row in read(f"{MEMORY}.jsonl")}  # the last of each
    if not rows:
        return "Not measured yet."
    lines = [
        [name, f"{n:,}", f"{row['peak_bytes'] / 1e6:,.0f}", f"{2 * n * row['V'] / 1e6:,.0f}"]
        for (name, n), row in sorted(rows.items())
    ]
    row = next(iter(rows.values()))
    header = ["linear_logprobs, frozen head, forward + backward", "N", "peak MB", "logits in bf16 alone, MB"]
    note = f"Measured at H {row['H']:,}, V {row['V']:,}, {row['dtype']}: {provenance(list(rows.values()))}."
    return f"{markdown(header, lines)}\n\n{note}"


def sampler_counts(images: int = 8) -> str:
    """A line for each model, resolution and length of text: diffusers' counts beside ours."""
    rows = [row for row in read(f"{counted.NAME}.jsonl") if row["N"] == images]
    if not rows:
        return "Not counted yet."
    found = {(row["variant"], row["contestant"]): row for row in rows}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        pair = [found[variant, name] for name in (denoise.EAGER, OURS)]
        theirs, ours = (row["predicted"]["image_step_ms"] for row in pair)
        lines.append([
            f"{pair[0]['model']}, {pair[0]['pixels']}², {pair[0]['T']} text tokens",
            " → ".join(f"{row['launches']:,}" for row in pair),
            " → ".join(f"{row['other_bytes'] / images / 1e9:.1f}" for row in pair),
            " → ".join(f"{row['flops'] / images / 1e12:.1f}" for row in pair),
            " → ".join(f"{row['resident_bytes'] / 1e9:.1f}" for row in pair),
            f"≈ {theirs:.1f} → {ours:.1f} ({theirs / ours:.2f}×)",
        ])  # fmt: skip
    header = ["SD3.5", "launches a step", "GB beside products and attention, an image-step"]
    header += ["TFLOP an image-step", "GB of weights on the GPU", "≈ ms an image-step on an H200"]
    rates = " and ".join(f"{rate / 1e12:.0f} ({pixels}²)" for pixels, rate in counted.ATTENTION.items())
    note = (
        f"{denoise.EAGER} → {OURS} with a modulation table, {images} images a batch, bfloat16. Launches, bytes and "
        f"FLOPs are counted, not measured: commit {commits(rows)}. ≈ predicted for an H200, not measured: products at "
        f"{counted.PRODUCT / 1e12:.0f} TFLOP/s, attention at {rates} TFLOP/s for both, all other bytes at "
        f"{counted.COPY / 1e12:.2f} TB/s; launches are taken to cost nothing."
    )
    return f"{markdown(header, lines)}\n\n{note}"


def sampler_speed() -> str:
    """A table for each model, resolution and length of text; a line for each number of images and contestant."""
    rows = newest(read(f"{denoise.OP}-gpu.jsonl"))
    parts = defaultdict(list)
    for row in rows:
        parts[row["device"], row["class"], row["variant"]].append(row)
    return "\n\n".join(_sampler_part(*key, part) for key, part in parts.items()) or "Not measured yet."


def _sampler_part(device: str, kind: str, variant: str, rows: list[Row]) -> str:
    lines, absent = [], []
    for row in sorted(rows, key=lambda row: row["N"]):
        if row["median_ms"] is None:
            absent.append(f"{label(row)} at N {row['N']} ({row['reason']})")
            continue
        median, p20, p80 = row["image_step_ms"]
        cells = [f"{label(row)}, N {row['N']}", f"{median:.3g} ({p20:.3g}–{p80:.3g})", f"{row['images_per_s']:.3g}"]
        cells += [f"{row['peak_bytes'] / 1e9:.1f}", f"{row['mfu']:.0%}" if row["mfu"] else ""]
        cells += [f"{row['launches']:,}" if row["launches"] else "", f"{row['errors']['latents']:.0e}"]
        lines.append([f"**{cell}**" if cell and is_ours(row) else cell for cell in cells])
    header = [f"{variant}, {kind}", "ms an image-step (p20–p80)", f"images/s at {denoise.STEPS} steps", "peak GB"]
    header += ["MFU", "launches a step", "error latents"]
    return "\n\n".join([markdown(header, lines), *_notes(rows, absent)])


def growth() -> str:
    """A line for each op and size that grows: our exponents and its rivals'."""
    rows = read(f"{SCALING}-cpu.jsonl")
    found = exponents(rows)
    if not found:
        return "Not measured yet."
    lines = [
        [f"**{cell}**" if item.contestant == OURS else cell for cell in cells]
        for item in found
        if (cells := [f"{item.variant}: {item.contestant}", item.time.text(), item.memory.text()])
    ]
    used = [row for item in found for row in item.rows]
    note = f"p of time and peak memory ∝ size^p, fitted over four sizes. Measured: {provenance(used)}."
    return f"{markdown(['op against size', 'time', 'memory'], lines)}\n\n{note}"


def gates(config: str) -> str:
    """The comparison of samplers in `results/gate-CONFIG.json`."""
    file = RESULTS / f"gate-{config}.json"
    if not file.is_file():
        return "Not measured yet."
    from uae_fast.evaluate.gates import HEADER, cells, notes

    result = json.loads(file.read_text())
    return "\n\n".join([markdown(list(HEADER), [cells(row) for row in result["rows"]]), *notes(result)])


def performance() -> str:
    """README's section: ours beside the fastest rival of each case, then what is not faster, then predictions."""
    rows = [row for row in read() if "median_ms" in row and row["op"] not in (SCALING, denoise.OP)]
    parts = [_beside(kind, [row for row in rows if row["kind"] == kind]) for kind in ("gpu", "cpu")]
    return "\n\n".join([part for part in parts if part] + _predictions({row["device"] for row in rows}))


def _beside(kind: str, rows: list[Row]) -> str:
    best = defaultdict(list)
    for row in newest(rows):
        if row["median_ms"] is not None:
            best[case_of(row)].append(row)
    lines, used = [], []
    ops: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for found in best.values():
        own = next(row for row in found if is_ours(row))  # `newest` has no runs without
        rivals = sorted((row for row in found if not is_ours(row)), key=lambda row: row["median_ms"])
        if not rivals:
            continue
        rival, case = rivals[0], f"{own['op']}, {own['variant']}, {own['dtype']}, N {own['N']:,}"
        says, ratio = verdict(own, rival), rival["median_ms"] / own["median_ms"]
        cells = [case, f"{own['median_ms']:.3g}", f"{rival['median_ms']:.3g} ({label(rival)})", f"{says}, {ratio:.2f}×"]
        cells.append(" / ".join(_megabytes(row["peak_bytes"]) for row in (own, rival)))
        lines.append([f"**{cell}**" if says == "faster" else cell for cell in cells])
        used += found
        ops[own["op"]].append((ratio, label(rival), says))
    if not lines:
        return ""
    header = ["op and case", "uae-kernels, ms", "fastest rival, ms", "we are", "peak MB, ours / its"]
    where = "a GPU" if kind == "gpu" else "a CPU"
    notes = [f"Measured on {where}: {provenance(used)}. Equal: medians within 5 %, or overlapping p20–p80."]
    slower = []
    for op, cases in ops.items():
        lost = sorted(case for case in cases if case[2] == "slower")
        if lost:
            ratio, rival, _ = lost[0]
            slower.append(
                f"{op} in {len(lost)} of {len(cases)} cases ({rival} takes as little as {ratio:.2f}× our time)"
            )
    if slower:
        notes.append(f"Not faster on {where}: {'; '.join(slower)}.")
    return "\n\n".join([markdown(header, lines), *notes, *_errors(used)])


def _errors(rows: list[Row]) -> list[str]:
    """What bf16 costs: the largest error of a head's log-probs, ours and of rivals that are faster."""
    half = [r for r in rows if r["op"] == "linear_logprobs" and r["dtype"] == "bfloat16" and "logprobs" in r["errors"]]
    ours = [row for row in half if row["contestant"] == OURS]
    if not ours:
        return []
    own, theirs = (max(row["errors"]["logprobs"] for row in some) for some in (ours, half))
    return [
        f"In bf16 rivals form logits in half precision, by the units a machine has for it: their log-probs are off by "
        f"up to {theirs:.0e}. Ours are summed in fp32: off by up to {own:.0e}."
    ]


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}"


def _predictions(devices: set[str]) -> list[str]:
    if any("H200" in device for device in devices):
        return []
    lines = []
    for module in OPS:
        cases = [case for case in module.cases("cuda", False) if (case.op, case.variant) in predicted.COSTS]
        for case in cases:
            if min(other.N for other in cases if other.variant == case.variant) != case.N:
                continue
            found = {row["contestant"]: row["median_ms"] for row in predicted.rows(case)}
            ours = found[OURS]
            rival, name = min((ms, name) for name, ms in found.items() if not name.startswith(OURS))
            lines.append([
                f"{case.op}, {case.variant}, {case.precision}, N {case.N:,}",
                f"≈ {ours:.3g}", f"≈ {rival:.3g} ({name})", f"≈ {rival / ours:.2f}×",
            ])  # fmt: skip
    note = (
        "≈ Predicted for an H200, not measured: arithmetic on products and bytes (benchmarks/README.md). Our Triton "
        "products are taken to be as fast as the library's, which is the best they can hope for."
    )
    return [markdown(["op and case", "uae-kernels, ms", "fastest rival, ms", "ratio"], lines), note]


def table(name: str) -> str:
    if name == "performance":
        return performance()
    if name == f"{SCALING}-cpu":
        return growth()
    if name.startswith("gate-"):
        return gates(name.removeprefix("gate-"))
    if name == counted.NAME:
        return sampler_counts()
    if name == f"{denoise.OP}-gpu":
        return sampler_speed()
    if name == "memory":
        return memory()
    if name == resources.NAME:
        return resources.table(read(f"{resources.NAME}.jsonl"))
    known = [*(module.__name__.rsplit(".", 1)[1] for module in OPS), *TRAINER]
    found = re.fullmatch(rf"({'|'.join(known)})-(cpu|gpu)(?:-([^-]+))?(?:-([^-]+))?", name)
    if not found:
        raise SystemExit(f"no table is called {name!r}: OP-cpu or OP-gpu, with -VARIANT or -VARIANT-DTYPE; OP {known}")
    return speed(*found.groups())


def main(files: list[Path]) -> None:
    for file in files:
        old = file.read_text()
        new = MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", old)
        if new != old:
            file.write_text(new)
            print(f"updated {file}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or FILES)
