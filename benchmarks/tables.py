"""Markdown tables from the rows, written where a file has `<!-- table:NAME -->` … `<!-- /table -->`.

    python -m benchmarks.tables [FILE…]      # all that have tables

NAME is OP-KIND, OP-KIND-VARIANT or OP-KIND-VARIANT-DTYPE (linear_logprobs-gpu-frozen), `memory`, `resources`,
`sampler-counted`, `sampler-gpu`, `scaling-cpu`, `trainer-learning-cpu`, `gate-CONFIG` or `performance`, which is
README's section. In an op's table for a GPU, times that have not been measured are predicted for an H200, and marked ≈.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .kernels import predicted, resources
from .kernels.memory import NAME as MEMORY
from .kernels.report import exponents
from .kernels.scaling import OP as SCALING
from .kernels.test_speed import OPS
from .rows import OURS, RESULTS, ROOT, UNJUDGED, Row, case_of, is_ours, label, newest, ratio, read, verdict
from .sampler import counted, denoise
from .trainer import learning

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


def learning_curve(folder: Path) -> str:
    """What each way of training has learned, and when: means over seeds with their standard deviation."""
    rows = learning.newest(read(f"{learning.OP}-cpu.jsonl"))
    if not rows:
        return "Not measured yet."
    lines = []
    for name in learning.WAYS:
        own = [row for row in rows if row["contestant"] == name]
        if not own:
            continue
        times = [[learning.reached(row["heldout"], level) for row in own] for level in learning.LEVELS]
        cells = [name, _spread([row["steps"] for row in own], ".0f"), *map(_seconds, times)]
        cells.append(_spread([row["heldout"][-1][1] for row in own], ".3f"))
        lines.append([f"**{cell}**" for cell in cells] if name == learning.FAST else cells)
    seeds, first = len({row["seed"] for row in rows}), statistics.fmean(row["heldout"][0][1] for row in rows)
    budget = f"{rows[0]['budget_s']:g} s"
    header = ["stage 2, tiny preset", f"steps in {budget}", *(f"s to reward {level}" for level in learning.LEVELS)]
    note = (
        f"Held-out reward against seconds of training, {seeds} seeds, mean ± standard deviation; it starts at "
        f"{first:.3f}. Between measurements, {learning.EVERY:g} s of training apart, times are read off a straight "
        f"line. Measured: {provenance(rows)}."
    )
    shown = markdown([*header, f"reward after {budget}"], lines)
    return "\n\n".join([shown, *_picture(f"{learning.OP}-cpu", "Held-out reward against seconds", folder), note])


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def _seconds(times: list[float | None]) -> str:
    """Of runs of which some may not have got there: their mean is only given where all have."""
    there = [time for time in times if time is not None]
    if len(there) == len(times):
        return _spread(there, ".1f")
    return f"in {len(there)} of {len(times)} seeds" if there else "not reached"


def _picture(name: str, what: str, folder: Path) -> list[str]:
    """A plot for a Markdown file in `folder`, where it has been drawn."""
    file = RESULTS / "plots" / f"{name}.png"
    return [f"![{what}]({os.path.relpath(file, folder)})"] if file.is_file() else []


class Beside(NamedTuple):
    """Ours and the fastest rival of a case."""

    own: Row
    rival: Row
    says: str
    ratio: float

    @property
    def case(self) -> str:
        return f"{self.own['op']}, {self.own['variant']}, {self.own['dtype']}, N {self.own['N']:,}"

    def words(self) -> str:
        """The verdict, how many times ours the rival's time is, and the interval of that where visits were kept."""
        found = ratio(self.own, self.rival)
        between = f" ({found.low:.2f}–{found.high:.2f})" if found else ""
        return f"{self.says}, {self.ratio:.2f}×{between}"


ORDER = ("faster", "equal", "slower", UNJUDGED)
ON = {"gpu": "a GPU", "cpu": "a CPU"}
WHY = (
    "The ops' kernels are Triton's and need a GPU. On a CPU the ops are PyTorch operations, unfused, that sum in fp32 "
    "and take rows in tiles of a fixed size: a row's result depends neither on the rows beside it nor on its place, "
    "which rivals do not promise. Noise is drawn by the kernels' generator, in integer arithmetic."
)


def performance(folder: Path = ROOT) -> str:
    """README's section: in short; the trainer beside its peers; its learning; the ops beside their rivals."""
    rows = [row for row in read() if "median_ms" in row and row["op"] not in (SCALING, denoise.OP)]
    devices = sorted({(row["kind"] == "cpu", row["device"]) for row in rows})  # GPUs first
    parts = {
        (subject, device): beside(row for row in rows if row["device"] == device and (row["op"] in TRAINER) == trainer)
        for subject, trainer in (("The trainer's updates", True), ("Ops", False))
        for _, device in devices
    }
    parts = {key: found for key, found in parts.items() if found}
    predictions = _predictions({row["device"] for row in rows})
    short = [f"- {line}" for (subject, _), found in parts.items() for line in _in_short(subject, found)]
    if predictions:
        short.append("- Ops on an H200 are predicted, not measured: marked ≈.")
    sections = ["\n".join(short)] if short else ["Not measured yet."]
    for subject in ("The trainer's updates", "Learning", "Ops"):
        own = [part for (name, _), found in parts.items() if name == subject for part in _shown(found)]
        own += [learning_curve(folder)] if subject == "Learning" else predictions if subject == "Ops" else []
        sections += [f"### {subject}", *own] if own else []
    return "\n\n".join(sections)


def beside(rows: Iterable[Row]) -> list[Beside]:
    """Each case's, what is faster first."""
    best = defaultdict(list)
    for row in newest(rows):
        if row["median_ms"] is not None:
            best[case_of(row)].append(row)
    pairs = []
    for found in best.values():
        own = next(row for row in found if is_ours(row))  # `newest` has no runs without
        rivals = [row for row in found if not is_ours(row)]
        if rivals:
            rival = min(rivals, key=lambda row: row["median_ms"])
            paired = ratio(own, rival)
            times = paired.median if paired else rival["median_ms"] / own["median_ms"]
            pairs.append(Beside(own, rival, verdict(own, rival), times))
    return sorted(pairs, key=lambda pair: ORDER.index(pair.says))


def _in_short(subject: str, pairs: list[Beside]) -> list[str]:
    """Measured pairs of a device in a line; of the trainer's each by name."""
    kind = pairs[0].own["kind"]
    where = pairs[0].own["device"] + (f", {pairs[0].own['threads']} threads" if kind == "cpu" else "")
    measured = f"measured on {ON[kind]} ({where})"
    if subject == "Ops":
        found = {says: sum(pair.says == says for pair in pairs) for says in ORDER}
        counts = ", ".join(f"{says} in {n}" for says, n in found.items() if n or says != UNJUDGED)
        without = "" if kind == "gpu" else ", without their kernels, which need a GPU"
        return [f"Ops, {measured}{without}: {counts} of {len(pairs)} cases, each beside its fastest rival."]
    lines = []
    for pair in pairs:
        name, times = label(pair.rival), f"{pair.ratio:.2f}×"
        says = f"as fast as {name} ({times})" if pair.says == "equal" else f"{pair.says} than {name} ({times} as fast)"
        peaks = [row["peak_bytes"] for row in (pair.own, pair.rival)]
        memory = f", in {peaks[0] / peaks[1]:.2f}× its peak memory" if all(peaks) else ""
        stage, _, preset = pair.own["variant"].partition("-")
        lines.append(f"{stage.replace('stage', 'Stage ')}'s update, preset {preset}, {measured}: {says}{memory}.")
    return lines


def _shown(pairs: list[Beside]) -> list[str]:
    """The table of a device's pairs, where it was measured, and what is not faster."""
    kind, lines = pairs[0].own["kind"], []
    ops: dict[str, list[Beside]] = defaultdict(list)
    for pair in pairs:
        times = [f"{row['median_ms']:.3g}" for row in (pair.own, pair.rival)]
        cells = [pair.case, times[0], f"{times[1]} ({label(pair.rival)})", pair.words()]
        cells.append(" / ".join(_megabytes(row["peak_bytes"]) for row in (pair.own, pair.rival)))
        lines.append([f"**{cell}**" for cell in cells] if pair.says == "faster" else cells)
        ops[pair.own["op"]].append(pair)
    used = [row for pair in pairs for row in (pair.own, pair.rival)]
    header = ["case", "ours, ms", "fastest rival, ms", "ours is", "peak MB, ours / its"]
    notes = [
        f"Measured on {ON[kind]}: {provenance(used)}. Equal: not told apart by more than 5 % (benchmarks/README.md, "
        "Verdicts)."
    ]
    equal = sum(pair.says == "equal" for pair in pairs)
    slower = [f"equal in {equal} of {len(pairs)} cases"] if equal else []
    for op, cases in ops.items():
        if lost := sorted((case for case in cases if case.says == "slower"), key=lambda case: case.ratio):
            slower.append(
                f"slower in {op}, {len(lost)} of {len(cases)} cases ({label(lost[0].rival)} takes as little as "
                f"{lost[0].ratio:.2f}× our time)"
            )
    if slower:
        notes.append(f"Not faster on {ON[kind]}: {'; '.join(slower)}.")
    if kind == "cpu" and any(op not in TRAINER for op in ops):
        notes.append(WHY)
    return [markdown(header, lines), *notes, *_errors(used)]


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


def table(name: str, folder: Path = ROOT) -> str:
    """What stands in a Markdown file of `folder` under a name."""
    if name == "performance":
        return performance(folder)
    if name == f"{SCALING}-cpu":
        return "\n\n".join([growth(), *_picture(name, "Time and memory against one size", folder)])
    if name == f"{learning.OP}-cpu":
        return learning_curve(folder)
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
    return "\n\n".join([speed(*found.groups()), *_picture(name, f"{found[1]}: time and memory", folder)])


def written(text: str, folder: Path) -> str:
    """A Markdown file's text, which stands in `folder`, with its tables as the rows have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2], folder)}\n\n{found[3]}", text)


def main(files: list[Path]) -> None:
    for file in files:
        old = file.read_text()
        new = written(old, file.parent)
        if new != old:
            file.write_text(new)
            print(f"updated {file}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or FILES)
