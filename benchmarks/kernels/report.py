"""Tables on the terminal and plots, from the measured rows: `python -m benchmarks.kernels.report [FOLDER]`."""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..rows import OURS, RESULTS, Row, is_ours, label, newest, read
from .scaling import OP as SCALING
from .scaling import growing

# Okabe and Ito's colours, which the colour-blind can tell apart; vermilion and blue are ours.
OWN = ("#D55E00", "#0072B2")
OTHERS = ("#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800", "#5B3A8E")
MARKERS = "osD^vPX*"


def cases(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[tuple(row[key] for key in keys)].append(row)
    return grouped


def size(row: Row, keys: str = "NHVBTG") -> str:
    return ", ".join(f"{key} {row[key]:,}" for key in keys if row.get(key) is not None)


def show(rows: Iterable[Row]) -> None:
    """One table a case, every configuration a line; of what was measured at growing sizes, the exponents."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = list(rows)
    if found := exponents(row for row in rows if row["op"] == SCALING):
        table = Table(title="growth: exponents with a standard error", title_justify="left")
        for name in ("op", "contestant", "time", "memory"):
            table.add_column(name, justify="right" if name in ("time", "memory") else "left")
        for item in found:
            table.add_row(item.variant, item.contestant, item.time.text(), item.memory.text())
        console.print(table)
    rows = [row for row in rows if row["op"] != SCALING]
    for (op, variant, dtype, *_), found in cases(rows, "op", "variant", "dtype", "N", "device", "date").items():
        table = Table(title=f"{op}, {variant}: {size(found[0])}, {dtype}", title_justify="left")
        errors = list(dict.fromkeys(name for row in found for name in row["errors"]))
        table.add_column("contestant", overflow="fold")
        for name in ("ms (p20–p80)", "× ours", "peak MB", "GFLOP", *(f"error {name}" for name in errors)):
            table.add_column(name, justify="right")
        base = next((row["median_ms"] for row in found if is_ours(row)), None)
        timed = [row for row in found if row["median_ms"] is not None]
        for row in sorted(timed, key=lambda row: row["median_ms"]):
            table.add_row(
                label(row),
                f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}–{row['p80_ms']:.3g})",
                f"{row['median_ms'] / base:.2f}" if base else "",
                f"{row['peak_bytes'] / 1e6:,.1f}",
                f"{row['flops'] / 1e9:,.1f}" if row["flops"] else "",
                *(f"{row['errors'][name]:.1e}" if name in row["errors"] else "" for name in errors),
                style="bold" if is_ours(row) else None,
            )
        if timed:
            console.print(table)
        for row in found:
            if row["reason"]:
                console.print(f"  [dim]not run: {label(row)}: {row['reason']}", highlight=False)
        console.print()


class Exponent(NamedTuple):
    """p of y ∝ x^p, by least squares of the logarithms."""

    value: float
    stderr: float | None

    def text(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.2f}" + ("" if self.stderr is None else f" ± {self.stderr:.2f}")


class Growth(NamedTuple):
    """How a contestant's time and peak memory grow in a variant "op against size"; `rows` by growing size."""

    variant: str
    contestant: str
    time: Exponent
    memory: Exponent
    rows: list[Row]


def exponents(rows: Iterable[Row]) -> list[Growth]:
    """Of the newest rows of the scaling cases; a contestant with fewer than three sizes has none."""
    timed = [row for row in newest(rows) if row["median_ms"] is not None]
    found = []
    for (variant, contestant), series in cases(timed, "variant", "contestant").items():
        size = growing(variant)
        series = sorted(series, key=lambda row: row[size])
        if len(series) >= 3:
            x = [row[size] for row in series]
            time, memory = (fit(x, [row[key] for row in series]) for key in ("median_ms", "peak_bytes"))
            found.append(Growth(variant, contestant, time, memory, series))
    return found


def fit(x: list[float], y: list[float]) -> Exponent:
    if min(y) <= 0:  # a compiled op may allocate nothing
        return Exponent(math.nan, None)
    xs, ys = ([math.log(value) for value in values] for values in (x, y))
    slope, offset = statistics.linear_regression(xs, ys)
    spread = sum((a - statistics.fmean(xs)) ** 2 for a in xs)
    left = sum((b - offset - slope * a) ** 2 for a, b in zip(xs, ys, strict=True))
    return Exponent(slope, math.sqrt(left / (len(xs) - 2) / spread) if len(xs) > 2 else None)


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """One picture for each op and device: a line of panels for each variant and dtype, time and peak memory."""
    plt, files = pyplot(), []
    for (op, kind, _), found in cases(newest(rows), "op", "kind", "device").items():
        timed = [row for row in found if row["median_ms"] is not None]
        panels = cases(timed, "variant", "dtype")
        names = sorted({row["contestant"] for row in timed}, key=lambda name: (not name.startswith(OURS), name))
        if op == SCALING:
            panels = {key: panel for key, panel in panels.items() if exponents(panel)}
            draw, keys, width, height = _growth, "", 12, 2.4
        elif any(len({row["N"] for row in panel}) > 1 for panel in panels.values()):
            draw, keys, width, height = _curves, "HV", 9, 2.6
        else:
            draw, keys, width, height = _bars, "NHVBT", 9, 0.7 + 0.24 * len(names)
        if not panels:
            continue
        figure, axes = plt.subplots(
            len(panels), 2, figsize=(width, height * len(panels) + 0.5), squeeze=False, layout="constrained"
        )
        for line, ((variant, dtype), panel) in zip(axes, panels.items(), strict=True):
            line[0].set_title(f"{variant}, {dtype}", loc="left", fontweight="bold")
            line[1].set_title(" / ".join({size(row, keys) for row in panel}), loc="right")
            draw(line[0], panel, names, "median_ms", 1, "time, ms")
            draw(line[1], panel, names, "peak_bytes", 1e-6, "peak extra memory, MB")
            if draw is _bars:
                line[1].set_yticklabels([])
        if draw is _curves:
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        last = max(timed, key=lambda row: row["date"])  # what, where, when, and that it was measured
        threads = f", {last['threads']} threads" if last["kind"] == "cpu" else ""
        where = f"measured on {last['device']}{threads}, torch {last['versions']['torch']}, {last['date'][:10]}"
        figure.suptitle(f"{'growth' if op == SCALING else op}: {where}", x=0.01, ha="left", fontsize=10)
        files.append(folder / f"{op}-{kind}.png")
        save(figure, files[-1])
    return files


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    return pyplot


def save(figure: Any, file: Path) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot().close(figure)
    with Image.open(file) as picture:  # a palette makes the file a third as large
        smaller = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    smaller.save(file, optimize=True)


def _logarithmic(axis, size: str, values: Iterable[int]) -> None:
    """Both axes by factors: below, the sizes that were measured; beside, 1, 2 and 5 of every decade."""
    from matplotlib.ticker import LogLocator

    axis.set(xscale="log", yscale="log", xlabel=size)
    axis.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _growth(axis: Any, panel: list[Row], _: list[str], key: str, scale: float, unit: str) -> None:
    """A line for each contestant; the legend has the exponents."""
    grown = sorted(exponents(panel), key=lambda growth: growth.contestant != OURS)
    varying = growing(panel[0]["variant"])
    for growth, style in zip(grown, _styles([growth.contestant for growth in grown]), strict=True):
        exponent = growth.time if key == "median_ms" else growth.memory
        _line(axis, growth.rows, varying, key, scale, style, f"{growth.contestant}\n∝ {varying}^{exponent.text()}")
    axis.set_ylabel(unit)
    _logarithmic(axis, varying, {row[varying] for growth in grown for row in growth.rows})
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _curves(axis: Any, panel: list[Row], names: list[str], key: str, scale: float, unit: str) -> None:
    for name, style in zip(names, _styles(names), strict=True):
        rows = sorted((row for row in panel if row["contestant"] == name), key=lambda row: row["N"])
        _line(axis, rows, "N", key, scale, style, name)
    axis.set_ylabel(unit)
    _logarithmic(axis, "rows N", {row["N"] for row in panel})


def _styles(names: list[str]) -> list[dict[str, Any]]:
    own, others = iter(OWN), iter(OTHERS)
    return [
        {"color": next(own), "marker": marker, "linewidth": 2.6, "zorder": 3}
        if name.startswith(OURS)
        else {"color": next(others), "marker": marker, "linewidth": 1.2, "zorder": 2}
        for name, marker in zip(names, cycle(MARKERS), strict=False)
    ]


def _line(axis: Any, rows: list[Row], x: str, y: str, scale: float, style: dict[str, Any], label: str) -> None:
    axis.plot([row[x] for row in rows], [row[y] * scale for row in rows], label=label, **style)


def _bars(axis: Any, panel: list[Row], names: list[str], key: str, scale: float, unit: str) -> None:
    rows = {row["contestant"]: row for row in panel}
    shown = [name for name in reversed(names) if name in rows]
    values = [rows[name][key] * scale for name in shown]
    axis.barh(shown, values, color=[OWN[0] if name.startswith(OURS) else "#9A9A9A" for name in shown])
    for y, (name, value) in enumerate(zip(shown, values, strict=True)):
        axis.annotate(
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", (value, y), (3, 0), textcoords="offset points",
            va="center", fontweight="bold" if name.startswith(OURS) else None,
        )  # fmt: skip
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(unit)


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    measured = [row for row in read(folder=results) if "median_ms" in row]
    show(newest(measured))
    for file in plot(measured, results / "plots"):
        print(file)
