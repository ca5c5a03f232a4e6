"""A run's report: one HTML file with its numbers, its pictures and its curves, readable without a network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from .config import MOMENTS, ConfigError
from .files import write_whole
from .text import unicode_text

STAGES = {
    "stage0": "Decoder pre-training",
    "stage1": "Cold start",
    "stage2": "Generation for understanding",
    "stage3": "Understanding for generation",
}
CURVES = [  # title, unit, {key of metrics.jsonl: name of the line}, factor
    ("Reward", "cosine similarity", {"reward": ""}, 1),
    ("Velocity error", "mean square", {"velocity_mse": ""}, 1),
    ("KL to the reference", "nats", {"kl": ""}, 1),
    ("Clipped", "% of ratios", {"clip_ratio/low": "from below", "clip_ratio/high": "from above"}, 100),
    ("Caption length", "tokens", {"completions/mean_length": ""}, 1),
]
SMALLEST_GAP = 0.001  # in reward; there is no telling the share of a smaller one
THUMBNAIL = 256  # pixels of an embedded picture's longer side, at most
PIXEL_ART = 128  # pictures up to this size are enlarged with hard edges
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 260, 170, 40, 8, 24, 34  # of a chart and its margins
TABLE_NOTE = """Reward: similarity of a redrawn image to its source. Gain: against the line above, paired
image by image. ±: standard error. Recall: share of an image’s attributes that its caption says.
Precision: share of the attributes it says that are true. Accuracy: share of the attributes that a classifier
finds in the redrawn image. Ceiling: images redrawn from complete captions before training."""
GALLERY_NOTE = """Held-out images: what the encoder wrote about each and what the decoder drew from those
words alone. <mark>Marked</mark> words were not in the caption before. Small numbers: the reward’s change."""
PHASES = ("captions", "conditions", "renders", "rewards", "rest of the rollout", "update", "data")
CURVES_NOTE = """Dots are single steps on training images, lines their running mean; zero charts are left out. Bars:
where the seconds of the median step go."""
Points = list[tuple[float, float]]


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder from what the run has left there so far.

    Raises:
        ConfigError: the folder is not a run's, or what it has is broken.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError([f"{run} is not the folder of a run: it has no config.yaml"])
    config = (run / "config.yaml").read_text(encoding="utf-8")
    summary_file = run / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    scores = {m: read_rows(run / "samples" / m / "scores.jsonl") for m in (*MOMENTS, "ceiling")}
    steps = read_rows(run / "metrics.jsonl")
    moments = measured(summary, scores)
    name = escape(run.resolve().name)
    sections = [
        title(name, config, summary, moments, steps, max(map(len, scores.values()))),
        headline(moments) if moments else "",
        table(moments) if moments else "",
        gallery(run / "samples", scores),
        curves(steps),
        f"<details><summary>Resolved configuration</summary><pre>{escape(config)}</pre></details>",
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} · training report</title>
<style>
{style}</style>
<main>
{"".join(sections)}
</main>
</html>
"""
    report = run / "report.html"
    write_whole(report, unicode_text(page))  # a file's name need not be Unicode
    return report


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if it is absent. A last line still being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if i < len(lines):
                raise ConfigError([f"{path}:{i}: not a line of JSON"]) from None
    return rows


def measured(summary: dict, scores: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
    """What was measured at each moment, in order: from the scores, and where it is written, the summary."""
    moments = {}
    previous: list[dict] = []
    for moment, rows in scores.items():
        found = (summarise(rows, previous) if rows else {}) | (summary.get(moment) or {})
        if found:
            moments[moment] = found
        previous = rows or previous
    return moments


def summarise(rows: Sequence[dict], previous: Sequence[dict] = ()) -> dict[str, float | None]:
    """Means over a moment's rows; the gain's standard error is paired, image by image, with the moment before."""
    names = {"reward": "reward", "accuracy": "accuracy", "caption_tokens": "tokens"}
    names |= {"attribute_recall": "recall", "attribute_precision": "precision"}
    names |= {"heldout_reward": "heldout_reward"} if "heldout_reward" in rows[0] else {}
    columns = {name: [x for row in rows if isinstance(x := row.get(key), int | float)] for name, key in names.items()}
    before = {row["file"]: row.get("reward") for row in previous}
    changes = [difference(row.get("reward"), before.get(row["file"])) for row in rows]
    gains = [change for change in changes if change is not None]
    means = {name: statistics.fmean(values) if values else None for name, values in columns.items()}
    return means | {"reward_stderr": stderr(columns["reward"]), "reward_gain_stderr": stderr(gains)}


def stderr(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, form: str = ".3f") -> str:
    """A number as people write it, with a true minus sign; "–" where there is none."""
    return format(value, form).replace("-", "−") if is_number(value) else "–"


def with_error(value: Any, error: Any, form: str = ".3f") -> str:
    spread = f" <small>± {number(error)}</small>" if is_number(error) else ""
    return number(value, form) + spread


def difference(after: Any, before: Any) -> float | None:
    return after - before if is_number(after) and is_number(before) else None


def label(moment: str) -> str:
    """A moment's name in the table and the gallery."""
    return f"After stage {moment[5:]}" if moment in STAGES else moment.capitalize()


def title(name: str, config: str, summary: dict, moments: dict, steps: list[dict], images: int) -> str:
    """The run's name and what kind of run it was."""
    seed = re.search(r"^seed: *(\S+)", config, re.MULTILINE)
    seen = {*moments, *(row.get("stage") for row in steps)}
    facts = [
        f"seed {escape(str(summary.get('seed', seed[1] if seed else '–')))}",
        f"{number(summary.get('minutes'), '.1f')} minutes" if summary else "unfinished, numbers so far",
        f"{len(steps):,} steps",
        f"{images:,} held-out images",
    ]
    stages = "".join(f"<li><b>{stage[5:]}</b> {STAGES[stage]}</li>" for stage in STAGES if stage in seen)
    return f"""<header><p class="eyebrow">Training report</p><h1>{name}</h1>
<p class="facts">{" · ".join(facts)}</p><ol class="stages">{stages}</ol></header>
"""


def headline(moments: dict[str, dict]) -> str:
    """The few numbers that say whether the run did anything."""
    trained = [moments[m] for m in MOMENTS[1:] if m in moments]
    before, after = moments.get("before", {}), trained[-1] if trained else {}
    ceiling = moments.get("ceiling", {}).get("reward")
    gap, gain = (difference(end, before.get("reward")) for end in (ceiling, after.get("reward")))
    share = gain / gap if gain is not None and gap is not None and gap >= SMALLEST_GAP else None
    filled = 100 * min(1, max(0, share or 0))
    meter = f'<div class="meter" aria-hidden="true"><i style="width:{filled:.1f}%"></i></div>'

    def change(key: str, form: str) -> str:
        old, new = number(before.get(key), form), number(after.get(key), form)
        return f'<span class="old">{old} →</span> {new}'

    cards = [
        ("Reward", change("reward", ".3f"), "how alike redrawn and source images are; 1 is the same"),
        ("Gap closed", number(share, ".0%") + meter, f"of the way up to the ceiling, {number(ceiling)}"),
        ("Attributes said", change("attribute_recall", ".0%"), "of an image’s attributes are in its caption"),
        ("Caption length", change("caption_tokens", ".1f"), "tokens in a caption"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{big}<p>{words}</p></dd></div>" for name, big, words in cards)
    return f'<dl class="headline">{items}</dl>\n'


def table(moments: dict[str, dict]) -> str:
    """A line for every moment."""
    lines, previous = [], None
    for moment, values in moments.items():
        reward = values.get("reward")
        gain = None if moment == "ceiling" else difference(reward, previous)
        cells = [
            with_error(reward, values.get("reward_stderr")),
            "" if gain is None else with_error(gain, values.get("reward_gain_stderr"), "+z.3f"),
            *(number(values.get(f"attribute_{key}"), ".1%") for key in ("recall", "precision")),
            number(values.get("caption_tokens"), ".1f"),
            number(values.get("accuracy"), ".1%"),
        ]
        name = label(moment) + f" <small>{STAGES.get(moment, '').lower()}</small>"
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="{moment}"><th scope="row">{name}</th>{data}</tr>')
        previous = reward
    names = ("Moment", "Reward", "Gain", "Recall", "Precision", "Tokens", "Accuracy")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<section><h2>On held-out images</h2>
<div class="scroll" role="region" aria-label="Measurements" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div><p class="note">{TABLE_NOTE}</p></section>
"""


def gallery(samples: Path, scores: dict[str, list[dict]]) -> str:
    """A row for each held-out image with pictures: the source, then what was written and drawn."""
    shown = [moment for moment in MOMENTS if scores[moment]]
    by_file = {moment: {row["file"]: row for row in rows} for moment, rows in scores.items()}
    pictures = {}
    for row in (row for moment in shown for row in scores[moment]):
        name = Path(row.get("picture") or f"{Path(row['file']).stem}.png").name  # and never a path out of the folder
        if any((samples / moment / name).is_file() for moment in shown):
            pictures[row["file"]] = name
    if not pictures:
        return ""
    lines = []
    for file, name in pictures.items():
        truth = by_file["ceiling"].get(file, {}).get("caption") or ""
        picture = embed(samples / "source" / name, f"{file}, the source")
        cells = [cell(picture, "Source", f'<p class="truth">{escape(truth)}</p>')]
        previous: dict | None = None
        for moment in shown:
            row = by_file[moment].get(file, {})
            picture = embed(samples / moment / name, f"{file}, redrawn {label(moment).lower()}")
            cells.append(cell(picture, label(moment), captioned(row, previous)))
            previous = row or previous
        lines.append(f'<div class="row">{"".join(cells)}</div>\n')
    heads = "".join(f"<span>{name}</span>" for name in ("Source", *map(label, shown)))
    return f"""<section><h2>Seen, said, redrawn</h2><p class="note">{GALLERY_NOTE}</p>
<div class="gallery" style="--columns:{len(shown) + 1}">
<div class="heads" aria-hidden="true">{heads}</div>
{"".join(lines)}</div></section>
"""


def cell(picture: str, name: str, words: str) -> str:
    """One picture of the gallery with what stands beneath it."""
    return f"<figure>{picture}<figcaption><b>{name}</b>{words}</figcaption></figure>"


def captioned(row: dict, previous: dict | None) -> str:
    """A caption with its new words marked, and its reward."""
    text = str(row.get("caption") or "–")
    known = {bare(word) for word in str((previous or {"caption": text}).get("caption") or "").split()} | {""}
    words = [escape(w) if bare(w) in known else f"<mark>{escape(w)}</mark>" for w in text.split()]
    change = number(difference(row.get("reward"), (previous or {}).get("reward")), "+z.3f")
    reward = number(row.get("reward")) + (f" <small>{change}</small>" if previous and change != "–" else "")
    same = ' class="same"' if previous and text == previous.get("caption") else ""
    joined = " ".join(words).replace("</mark> <mark>", " ")
    return f'<p class="reward" title="reward">{reward}</p><p{same}>{joined}</p>'


def bare(word: str) -> str:
    """A word without case and punctuation, for comparison."""
    return re.sub(r"^\W+|\W+$", "", word).casefold()


def embed(path: Path, alt: str) -> str:
    """A picture inside the page: small ones as they are, larger ones as thumbnails."""
    try:
        image: Image.Image = Image.open(path)
        kind = (image.format or "png").lower()
        image.load()
    except OSError:
        return '<div class="missing">no picture</div>'
    data = path.read_bytes()
    if max(image.size) > THUMBNAIL:
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    style = ' class="pixels"' if max(image.size) <= PIXEL_ART else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img{style} src="{source}" alt="{escape(alt)}" width="{image.width}" height="{image.height}">'


def curves(steps: list[dict]) -> str:
    """Small charts of what was logged, a row for each stage."""
    groups = []
    for stage in dict.fromkeys(str(row.get("stage")) for row in steps):
        rows = [row for row in steps if str(row.get("stage")) == stage]
        charts = []
        for name, unit, keys, factor in CURVES:
            lines = {
                line: [(row["step"], factor * row[key]) for row in rows if is_number(row.get(key))]
                for key, line in keys.items()
            }
            if any(y != 0 for points in lines.values() for _, y in points):
                charts.append(f"<figure><figcaption>{name}</figcaption>{chart(name, unit, lines)}</figure>")
        if charts:
            heading = f"Stage {stage[5:]}: {STAGES[stage]}" if stage in STAGES else escape(stage)
            groups.append(f'<h3>{heading}</h3>{phases(rows)}<div class="charts">{"".join(charts)}</div>\n')
    if not groups:
        return ""
    return f"""<section><h2>During training</h2><p class="note">{CURVES_NOTE}</p>{"".join(groups)}</section>
"""


def phases(rows: list[dict]) -> str:
    """A bar of the median step's seconds, phase by phase; nothing where they were not logged."""
    logged = []
    for row in rows:
        took = {key[8:]: value for key, value in row.items() if key.startswith("seconds/") and is_number(value)}
        if {"rollout", "update"} <= took.keys():
            took["rest of the rollout"] = max(0.0, took["rollout"] - sum(took.get(name, 0.0) for name in PHASES[:4]))
            logged.append([took.get(name, 0.0) for name in PHASES])
    seconds = [statistics.median(values) for values in zip(*logged, strict=True)]
    whole, bar, names = sum(seconds), "", ""
    for i, (name, median) in enumerate(zip(PHASES, seconds, strict=False)):
        if median >= 0.005 * whole > 0:
            bar += f'<i class="phase{i}" style="flex-grow:{median / whole:.4f}"></i>'
            names += f'<li class="phase{i}">{name} <small>{number(median, ".3g")} s</small></li>'
    return f'<div class="phases" aria-hidden="true">{bar}</div><ul class="phases">{names}</ul>' if bar else ""


def chart(name: str, unit: str, lines: dict[str, Points]) -> str:
    """An SVG line chart: dots, running means, axes with round ticks."""
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    low, high = min(ys), max(ys)
    flat = abs(high) / 10 if high - low <= 1e-5 * abs(high) else 0.0
    y_ticks = ticks(low - flat, high + flat)
    x_first, x_last = min(xs), max(max(xs), min(xs) + 1)
    y_first, y_last = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x_at(x: float) -> float:
        return LEFT + (x - x_first) / (x_last - x_first) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_first) / (y_last - y_first) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="0" y="10">{escape(unit)}</text>']
    for y, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y_at(y) + 3.5:.1f}">{text}</text>')
    for x in (x for x in ticks(x_first, x_last) if x == int(x) and x_first <= x <= x_last):
        parts.append(f'<text class="mid" x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 15}">{x:.0f}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">step</text>')
    for i, (line, points) in enumerate(lines.items()):
        dots, mean = ([f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in some] for some in (points, smoothed(points)))
        parts.append(f'<g class="line{i}"><path class="dots" d="{"".join(f"M{place}h0" for place in dots)}"/>')
        parts.append(f'<path class="mean" d="M{"L".join(mean) or "0 0"}"/>')
        if line:
            right = WIDTH - RIGHT - 68 * (len(lines) - 1 - i)
            parts.append(f'<text class="end" x="{right}" y="10">{line}</text>')
        parts.append("</g>")
    spoken = escape(f"{name} in {unit} by step, between {number(low, '.3g')} and {number(high, '.3g')}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'


def smoothed(points: Points) -> Points:
    """A centred running mean over about a sixth of the points."""
    reach, ys = max(1, len(points) // 12), [y for _, y in points]
    windows = [ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys))]
    return [(x, statistics.fmean(window)) for (x, _), window in zip(points, windows, strict=True)]


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers around a range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Ticks in as few digits as tell them apart."""
    place = math.floor(math.log10(values[1] - values[0]) + 1e-9)
    largest = max(map(abs, values))
    scientific = f".{max(0, math.floor(math.log10(largest)) - place)}e"
    form = scientific if largest < 1e-3 else f".{max(0, -place)}f"
    return [number(value, form).replace("e−0", "e−") if value else "0" for value in values]
