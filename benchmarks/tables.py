"""Markdown tables from the rows, written where a file has `<!-- table:NAME -->` … `<!-- /table -->`.

    python -m benchmarks.tables [FILE…]      # all that have tables

NAME is `performance`, which is README's section, `ops-KIND` or `trainer-KIND` with KIND cpu or gpu, `sampler-gpu`,
`sampler-counted`, `predicted`, `memory`, `scaling-cpu`, `trainer-learning-cpu` or `gate-CONFIG`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .kernels import predicted
from .kernels.memory import NAME as MEMORY
from .kernels.report import exponents, size
from .kernels.scaling import OP as SCALING
from .kernels.test_speed import OPS
from .rows import (
    COMPILED,
    OURS,
    RESULTS,
    ROOT,
    UNJUDGED,
    Row,
    case_of,
    is_ours,
    label,
    like,
    newest,
    ratio,
    read,
    verdict,
)
from .sampler import counted, denoise
from .trainer import learning

PLACES = ("README.md", "benchmarks/README.md", "docs/samplers.md")
FILES = [ROOT / place for place in PLACES]
TRAINER = ("trainer-steps", "trainer-stage2", "trainer-stage3")
KERNELS = [name for module in OPS if (name := module.__name__.rsplit(".", 1)[1]) != SCALING]
MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
MISSING = "Not measured yet."


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    rules = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rules, *lines])


def bold(cells: Iterable[str], wanted: bool) -> list[str]:
    return [f"**{cell}**" if wanted and cell else cell for cell in cells]


def provenance(rows: list[Row]) -> str:
    """Machine, versions and commits of some rows."""
    last = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    threads = f", {last['threads']} threads" if last["kind"] == "cpu" else ""
    machine = f"{last['device']}{threads}, {versions}, Python {last['python']}"
    return f"{machine}, commit {commits(rows)}, {last['date'][:10]}"


def commits(rows: list[Row]) -> str:
    return ", ".join(sorted({(row["commit"] or "unknown")[:10] + " (changed)" * bool(row["dirty"]) for row in rows}))


def picture(name: str, what: str, folder: Path) -> list[str]:
    """A plot for a Markdown file in `folder`, where it has been drawn."""
    file = RESULTS / "plots" / f"{name}.png"
    return [f"![{what}]({os.path.relpath(file, folder)})"] if file.is_file() else []


# ---- ours beside rivals ---------------------------------------------------------------------------------------------


def is_timed(row: Row) -> bool:
    return row["median_ms"] is not None


def words(ours: Row, rival: Row) -> str:
    """The verdict, how many times ours the rival's time is, and the interval of that."""
    found = ratio(ours, rival)
    if found is None:
        return f"{UNJUDGED}, {rival['median_ms'] / ours['median_ms']:.2f}×"
    return f"{verdict(ours, rival)}, {found.median:.2f}× ({found.low:.2f}–{found.high:.2f})"


def megabytes(row: Row) -> str:
    return "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}"


Columns = dict[str, Callable[[Row, Row], str]]  # a cell of a row beside ours of its case, by its header
TIMES: Columns = {
    "ms": lambda row, _: f"{row['median_ms']:.3g}",
    "ours is": lambda row, ours: "" if is_ours(row) else words(ours, row),
    "peak MB": lambda row, _: megabytes(row),
    "errors": lambda row, _: ", ".join(f"{name} {error:.0e}" for name, error in row["errors"].items()),
}
LOOPS: Columns = {
    "ms an image-step (p20–p80)": lambda row, _: "{:.3g} ({:.3g}–{:.3g})".format(*row["image_step_ms"]),
    "ours is": TIMES["ours is"],
    f"images/s at {denoise.STEPS} steps": lambda row, _: f"{row['images_per_s']:.3g}",
    "peak GB": lambda row, _: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
    "MFU": lambda row, _: f"{row['mfu']:.0%}" if row["mfu"] else "",
    "launches a step": lambda row, _: f"{row['launches']:,}" if row["launches"] else "",
    "error latents": lambda row, _: f"{row['errors']['latents']:.0e}",
}


def compared(rows: list[Row], columns: Columns) -> list[str]:
    """A table with a block for each case and a line for each contestant, ours first; then who has not run, and why."""
    cases, lines, absent = defaultdict(list), [], defaultdict(list)
    for row in rows:
        cases[case_of(row)].append(row)
    for found in cases.values():
        timed = sorted(filter(is_timed, found), key=lambda row: not is_ours(row))
        for row in timed:
            name = f"{row['variant']}, {row['dtype']}, {size(row)}: " if row is timed[0] else ""
            own = like(row, list(filter(is_ours, timed)))
            lines.append(bold([name + label(row), *(cell(row, own) for cell in columns.values())], is_ours(row)))
        for row in found:
            if not is_timed(row):
                absent[f"{row['contestant']} ({row['reason']})"].append(row["variant"])
    notes = [f"{name} in {', '.join(dict.fromkeys(variants))}" for name, variants in absent.items()]
    return [markdown(["", *columns], lines), *([f"Not run: {'; '.join(notes)}."] if notes else [])]


def measured(kind: str, ops: Iterable[str], folder: Path, columns: Columns = TIMES) -> str:
    """Of each op that has rows a table and a plot, as the machine that measured last has them."""
    found = newest(row for op in ops for row in read(f"{op}-{kind}.jsonl"))
    found = [row for row in found if row["device"] == max(found, key=lambda row: row["date"])["device"]]
    parts = []
    for op in dict.fromkeys(row["op"] for row in found):
        rows = [row for row in found if row["op"] == op]
        parts += [f"### {op}", *compared(rows, columns)]
        parts += picture(f"{op}-{kind}", f"{op}: time and memory", folder)
    return "\n\n".join([*parts, f"Measured: {provenance(found)}."] if found else [MISSING])


# ---- README's section -----------------------------------------------------------------------------------------------

ORDER = ("faster", "equal", "slower", UNJUDGED)
ON = {"gpu": "a GPU", "cpu": "a CPU"}
WHY = (
    "The ops' kernels are Triton's and need a GPU. On a CPU the ops are PyTorch operations that sum in fp32. Log-probs "
    "take rows in tiles of a fixed size: a row's result depends neither on the rows beside it nor on its place, which "
    "rivals do not promise. Noise is drawn by the kernels' generator, in integer arithmetic."
)


class Beside(NamedTuple):
    """Ours and the fastest rival of a case."""

    own: Row
    rival: Row
    says: str
    ratio: float

    def words(self) -> str:
        """The ratio, of what case, and beside whom."""
        own = self.own
        return f"{self.ratio:.2f}× ({own['variant']}, {own['dtype']}, N {own['N']:,}; {label(self.rival)})"


def beside(rows: Iterable[Row]) -> list[Beside]:
    """Each case's, in its order."""
    best = defaultdict(list)
    for row in filter(is_timed, newest(rows)):
        best[case_of(row)].append(row)
    pairs = []
    for found in best.values():
        rivals = [row for row in found if not is_ours(row)]
        if rivals:
            rival = min(rivals, key=lambda row: row["median_ms"])
            own = like(rival, list(filter(is_ours, found)))  # `newest` has no runs without
            paired = ratio(own, rival)
            times = paired.median if paired else rival["median_ms"] / own["median_ms"]
            pairs.append(Beside(own, rival, verdict(own, rival), times))
    return pairs


def performance(folder: Path = ROOT) -> str:
    """The trainer beside its peers; its learning; the ops beside their rivals, a line each."""
    rows = [row for row in read() if "median_ms" in row and row["op"] != SCALING]
    devices = dict.fromkeys(row["device"] for row in sorted(rows, key=lambda row: row["kind"] == "cpu"))  # GPUs first
    found = [pairs for device in devices if (pairs := beside(row for row in rows if row["device"] == device))]
    trainer = [line for pairs in found for line in updates([p for p in pairs if p.own["op"] in TRAINER])]
    ops = [part for pairs in found for part in by_op([p for p in pairs if p.own["op"] not in TRAINER])]
    if not any("H200" in device for device in devices):
        ops.append(in_short())
    how = [
        f"Measured on {ON[pairs[0].own['kind']]}: {provenance([row for pair in pairs for row in pair[:2]])}."
        for pairs in found
    ]
    if how:
        how[-1] += (
            " Ratios are a rival's time over ours: the median of paired visits, and an interval that holds the true "
            "one with 90 % or more; equal: not told apart by more than 5 %. [benchmarks/README.md]"
            "(benchmarks/README.md) has the rules, and every case beside every rival."
        )
    parts = {"The trainer's updates": ["\n".join(trainer)] * bool(trainer), "Learning": [learning_curve(folder)]}
    sections = [part for name, own in (parts | {"Ops": ops}).items() if own for part in (f"### {name}", *own)]
    return "\n\n".join([*how, *sections])


def updates(pairs: list[Beside]) -> list[str]:
    """A line for each."""
    lines = []
    for pair in pairs:
        stage, _, preset = pair.own["variant"].partition("-")
        own, its = (f"{row['median_ms']:.3g}" for row in pair[:2])
        peaks = [row["peak_bytes"] for row in pair[:2]]
        memory = f", in {peaks[0] / peaks[1]:.2f}× its peak memory" if all(peaks) else ""
        lines.append(
            f"- {stage.replace('stage', 'Stage ')}'s, preset {preset}, on {ON[pair.own['kind']]}: {own} ms beside "
            f"{its} ms of {label(pair.rival)}: {words(*pair[:2])}{memory}."
        )
    return lines


def by_op(pairs: list[Beside]) -> list[str]:
    """How many cases are faster, equal and slower; of each op the best and the worst."""
    if not pairs:
        return []
    ops: dict[str, list[Beside]] = defaultdict(list)
    for pair in pairs:
        ops[pair.own["op"]].append(pair)
    lines = []
    for op, cases in ops.items():
        cases = sorted(cases, key=lambda pair: pair.ratio)
        lines.append([op, tally(cases), cases[-1].words(), cases[0].words() if len(cases) > 1 else ""])
    kind = pairs[0].own["kind"]
    short = f"On {ON[kind]} the ops are {tally(pairs)} of {len(pairs)} cases, each beside its fastest rival."
    if fused := sorted({pair.own["op"] for pair in pairs if COMPILED in pair.own["contestant"]}):
        short += f" Where that is compiled, so are ours that torch.compile can fuse: {', '.join(fused)}."
    header = [f"on {ON[kind]}", "ours is", "best case: its fastest rival's time over ours", "worst case"]
    return [f"{short} {WHY}" if kind == "cpu" else short, markdown(header, lines), *in_half_precision(pairs)]


def in_half_precision(pairs: list[Beside]) -> list[str]:
    """What bf16 costs: the largest error of a head's log-probs, ours and of the fastest rivals."""
    half = [pair[:2] for pair in pairs if (pair.own["op"], pair.own["dtype"]) == ("linear_logprobs", "bfloat16")]
    if not half:
        return []
    own, theirs = (max(row["errors"]["logprobs"] for row in rows) for rows in zip(*half, strict=True))
    return [
        f"In bf16 rivals form logits in half precision, by the units a machine has for it: their log-probs are off by "
        f"up to {theirs:.0e}. Ours are summed in fp32: off by up to {own:.0e}."
    ]


def tally(pairs: list[Beside]) -> str:
    found = {says: sum(pair.says == says for pair in pairs) for says in ORDER}
    return ", ".join(f"{says} in {n}" for says, n in found.items() if n)


# ---- predictions ----------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """The smallest case of a variant, and what each contestant whose cost is known takes, in ms."""

    case: predicted.Case
    times: dict[str, float]

    def over_ours(self) -> dict[str, float]:
        return {name: ms / self.times[OURS] for name, ms in self.times.items() if name != OURS}


def predictions() -> list[Prediction]:
    cases = [case for module in OPS for case in module.cases("cuda", False)]
    smallest = {(c.op, c.variant): c for c in sorted(cases, key=lambda case: -case.N)}
    return [Prediction(smallest[key], predicted.times(smallest[key])) for key in predicted.COSTS]


def in_short() -> str:
    rivals = [
        (times, f"{each.case.op}, {each.case.variant}; {name}")
        for each in predictions()
        for times, name in [min((t, n) for n, t in each.over_ours().items() if not n.startswith(OURS))]
    ]
    (least, worst), (most, best) = min(rivals), max(rivals)
    return (
        f"On an H200, predicted and not measured: the fastest rival whose cost is known takes ≈ {least:.2f}× ({worst}) "
        f"to ≈ {most:.2f}× our time ({best})."
    )


def predicted_times() -> str:
    """A line for each op and variant."""
    lines, names = [], dict.fromkeys(name for each in predictions() for name in each.times)
    for case, times in predictions():
        costs = predicted.COSTS[case.op, case.variant]
        cells = [
            f"≈ {times[name]:.3g}" + f" ({times[name] / times[OURS]:.2f}×)" * (name != OURS)
            + f" [{costs[name].products}, {costs[name].bytes}]" if name in times else ""
            for name in names
        ]  # fmt: skip
        lines.append([f"{case.op}, {case.variant}, {case.precision}, {size(case.sizes(), 'NHV')}", *cells])
    note = (
        "≈ predicted for an H200, not measured, in ms, with the ratio to ours: products·2NHV / "
        f"{predicted.PRODUCT / 1e12:.0f} TFLOP/s + bytes·NV / {predicted.COPY / 1e12:.1f} TB/s, with [products, bytes "
        "a logit]; ratios are the same at every N. Our Triton products are taken to be as fast as the library's, which "
        "is the best they can hope for."
    )
    return f"{markdown(['op', *names], lines)}\n\n{note}"


# ---- others ---------------------------------------------------------------------------------------------------------


def memory() -> str:
    rows = {(row["contestant"], row["N"]): row for row in read(f"{MEMORY}.jsonl")}  # the last of each
    if not rows:
        return MISSING
    lines = [
        [name, f"{n:,}", megabytes(row), f"{2 * n * row['V'] / 1e6:,.1f}"] for (name, n), row in sorted(rows.items())
    ]
    row = next(iter(rows.values()))
    header = ["linear_logprobs, frozen head, forward + backward", "N", "peak MB", "logits in bf16 alone, MB"]
    note = f"Measured at {size(row, 'HV')}, {row['dtype']}: {provenance(list(rows.values()))}."
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


def growth(folder: Path) -> str:
    """A line for each op and size that grows: our exponents and its rivals'."""
    found = exponents(read(f"{SCALING}-cpu.jsonl"))
    if not found:
        return MISSING
    lines = [
        bold([f"{item.variant}: {item.contestant}", item.time.text(), item.memory.text()], item.contestant == OURS)
        for item in found
    ]
    used = [row for item in found for row in item.rows]
    note = f"p of time and peak memory ∝ size^p, fitted over four sizes. Measured: {provenance(used)}."
    shown = picture(f"{SCALING}-cpu", "Time and memory against one size", folder)
    return "\n\n".join([markdown(["op against size", "time", "memory"], lines), note, *shown])


def gates(config: str) -> str:
    """The comparison of samplers in `results/gate-CONFIG.json`."""
    file = RESULTS / f"gate-{config}.json"
    if not file.is_file():
        return MISSING
    from uae_fast.evaluate.gates import HEADER, cells, notes

    result = json.loads(file.read_text())
    return "\n\n".join([markdown(HEADER, [cells(row) for row in result["rows"]]), *notes(result)])


def learning_curve(folder: Path) -> str:
    """What each way of training has learned, and when: means over seeds with their standard deviation."""
    rows = learning.newest(read(f"{learning.OP}-cpu.jsonl"))
    if not rows:
        return MISSING
    lines = []
    for name in learning.WAYS:
        own = [row for row in rows if row["contestant"] == name]
        if not own:
            continue
        times = [[learning.reached(row["heldout"], level) for row in own] for level in learning.LEVELS]
        cells = [name, _spread([row["steps"] for row in own], ".0f"), *map(_seconds, times)]
        cells.append(_spread([row["heldout"][-1][1] for row in own], ".3f"))
        lines.append(bold(cells, name == learning.FAST))
    seeds, first = len({row["seed"] for row in rows}), statistics.fmean(row["heldout"][0][1] for row in rows)
    budget = f"{rows[0]['budget_s']:g} s"
    header = ["stage 2, tiny preset", f"steps in {budget}", *(f"s to reward {level}" for level in learning.LEVELS)]
    note = (
        f"Held-out reward against seconds of training, {seeds} seeds, mean ± standard deviation; it starts at "
        f"{first:.3f}. Between measurements, {learning.EVERY:g} s of training apart, times are read off a straight "
        f"line. Measured: {provenance(rows)}."
    )
    shown = markdown([*header, f"reward after {budget}"], lines)
    return "\n\n".join([shown, *picture(f"{learning.OP}-cpu", "Held-out reward against seconds", folder), note])


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def _seconds(times: list[float | None]) -> str:
    """Of runs of which some may not have got there: their mean is only given where all have."""
    there = [time for time in times if time is not None]
    if len(there) == len(times):
        return _spread(there, ".1f")
    return f"in {len(there)} of {len(times)} seeds" if there else "not reached"


TABLES: dict[str, Callable[[Path], str]] = {
    "performance": performance,
    **{f"ops-{kind}": partial(measured, kind, KERNELS) for kind in ON},
    **{f"trainer-{kind}": partial(measured, kind, TRAINER) for kind in ON},
    f"{denoise.OP}-gpu": partial(measured, "gpu", [denoise.OP], columns=LOOPS),
    counted.NAME: lambda _: sampler_counts(),
    "predicted": lambda _: predicted_times(),
    "memory": lambda _: memory(),
    f"{SCALING}-cpu": growth,
    f"{learning.OP}-cpu": learning_curve,
}


def table(name: str, folder: Path = ROOT) -> str:
    """What stands in a Markdown file of `folder` under a name."""
    if name.startswith("gate-"):
        return gates(name.removeprefix("gate-"))
    if name not in TABLES:
        raise SystemExit(f"no table is called {name!r}: {', '.join(TABLES)} or gate-CONFIG")
    return TABLES[name](folder)


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
