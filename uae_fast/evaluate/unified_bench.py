"""Unified-Bench (METHOD §4): image → caption → image, and how alike image encoders find source and reconstruction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..config import Config, ConfigError, load_config
from ..data import SUFFIXES, listed, load_image
from ..environment import quiet_libraries
from ..logging import ProgressLine
from ..models import Models
from ..models.loading import load_image_encoder, load_image_processor, load_models, load_run, run_device
from ..models.sources import Source, find_sources
from ..parquet import open_images
from ..text import printable
from .heldout import ImageSet, batches, draw_examples, picture_names, to_image, write_captions

PREFIX = "recon_"  # may stand before a reconstruction's name
WHOLE = "whole"  # the folder of the drawings of captions that nothing was cut from
BATCH = 16  # images embedded at once


def evaluate(
    place: str,
    overrides: Sequence[str],
    out: Path,
    *,
    at: str | None = None,
    tokens: Sequence[int] = (),
    reconstructions: Path | None = None,
) -> None:
    """`uae-fast evaluate`: redraws held-out images into `out`, compares, writes the scores there and prints them.

    Args:
        place: a configuration's file, a preset's name, or a run's folder.
        overrides: of the configuration, "key=value".
        out: a new folder.
        at: the moment of a run; its last one unless given.
        tokens: also with captions cut to each of these numbers of tokens.
        reconstructions: a folder of drawings to compare instead.

    Raises:
        ConfigError: with every mistake, before any model loads.
    """
    is_run = Path(place).is_dir() and (Path(place) / "config.yaml").is_file()
    config = load_config(Path(place) / "config.yaml" if is_run else place, overrides)
    problems = [f"--tokens {k}: must be at least 1" for k in tokens if k < 1]
    if out.exists():
        problems.append(f"--out {out}: exists already; name a new folder")
    if at and not is_run:
        problems.append(f"--at {at}: {place} is no run's folder")
    if reconstructions and (tokens or at):
        problems.append("--reconstructions: is instead of drawing; leave out --tokens and --at")
    if problems:
        raise ConfigError(problems)
    sources = find_sources(config)
    data = open_images(config.data.heldout, "data.heldout", config.data)
    quiet_libraries()
    tokens, drawn = sorted(set(tokens)), reconstructions
    if drawn is None:
        models = load_run(Path(place), at, overrides)[1] if is_run else load_models(config)
        reconstruct(config, models, data, out, tokens)
        del models  # the image encoders need its memory
        drawn = out / WHOLE
    whole = compare(config, data, sources.judges, drawn)
    by_tokens = {k: compare(config, data, sources.judges, out / str(k)) for k in tokens}
    save_scores(out, whole, by_tokens)
    print_scores(whole, by_tokens)
    print(f"wrote {out}")


def reconstruct(config: Config, models: Models, data: ImageSet, out: Path, tokens: Sequence[int] = ()) -> None:
    """Writes each image's caption and redraws it: `out/captions.jsonl`, `out/whole/NAME.png`.

    With the seeds of the run's own held-out measurements, so that captions and drawings are theirs.

    Args:
        config: the first `evaluate.images` of its held-out images are taken.
        tokens: for each of these numbers `out/NUMBER/NAME.png` are drawings of the captions cut to so many tokens: what
            is said, at one length for all.
    """
    for length in (WHOLE, *map(str, tokens)):
        (out / length).mkdir(parents=True)
    names, rows, count = picture_names(data.files), [], min(config.evaluate.images, len(data))
    with ProgressLine("redrawing", count) as progress:
        for examples in batches(data, count, config.render.batch):
            captions = write_captions(config, models, examples)
            for most in (None, *tokens):
                texts = [text if most is None else cut(models, text, most) for text, _ in captions]
                folder = out / str(most or WHOLE)
                for example, image in zip(examples, draw_examples(config, models, examples, texts), strict=True):
                    to_image(image).save(folder / names[example.file])
            rows += [
                {"file": example.file, "caption": text, "tokens": number}
                for example, (text, number) in zip(examples, captions, strict=True)
            ]
            progress.advance(len(examples))
    (out / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(models: Models, caption: str, tokens: int) -> str:
    """The first tokens of a caption, as text."""
    return models.encoder.tokenizer.decode(models.encoder.words(caption)[:tokens]).strip()


def find_reconstructions(names: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """The reconstruction of each source in a folder: of its name, whatever the suffix, perhaps with `recon_` before it.

    Args:
        names: the sources' files, each with the file that `reconstruct` gives its drawing.

    Raises:
        ConfigError: sources without a reconstruction, or with several.
    """
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES:
            stems[path.stem].append(path)
    problems, chosen = [], {}
    for file, name in names.items():
        wanted = dict.fromkeys((Path(name).stem, Path(file).stem))
        paths = [path for stem in wanted for path in (*stems[stem], *stems[PREFIX + stem])]
        if len(paths) == 1:
            chosen[file] = paths[0]
        else:
            had = " and ".join(printable(path.name) for path in paths) or "nothing"
            problems.append(f"{printable(file)} has {had}")
    if problems:
        raise ConfigError([f"{folder}: each source needs one reconstruction of its name", *listed(problems)])
    return chosen


def compare(config: Config, data: ImageSet, judges: Sequence[Source], folder: Path) -> dict[str, Any]:
    """Cosine similarities of sources and reconstructions, pixels prepared as each encoder's own processor does.

    Returns:
        {"overall": the mean of the encoders' averages, "encoders": {name: {"average", "min", "max", "scores": {file:
        cosine}}}}; the published tables have these numbers times 100.
    """
    names = picture_names(data.files)
    files = [data[i].file for i in range(min(config.evaluate.images, len(data)))]
    paths = find_reconstructions({file: names[file] for file in files}, folder)
    device = run_device(config)
    found: dict[str, dict[str, Any]] = {}
    for judge, name in zip(judges, labels(judges), strict=True):
        scores: dict[str, float] = {}
        encoder = load_image_encoder(judge).to(device)
        processor = load_image_processor(judge, encoder.size)

        def embed(images: list[Image.Image], encoder=encoder, processor=processor) -> torch.Tensor:
            pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
            return encoder(torch.cat(pixels).to(device))

        with torch.no_grad(), ProgressLine(f"comparing  {name}", len(files)) as progress:
            for examples in batches(data, len(files), BATCH):
                drawn = embed([load_image(paths[example.file]) for example in examples])
                cosines = (embed([example.image for example in examples]) * drawn).sum(1)
                scores |= dict(zip((example.file for example in examples), cosines.tolist(), strict=True))
                progress.advance(len(examples))
        values = list(scores.values())
        average = sum(values) / len(values)
        found[name] = {"average": average, "min": min(values), "max": max(values), "scores": scores}
    return {"overall": sum(each["average"] for each in found.values()) / len(found), "encoders": found}


def labels(judges: Sequence[Source]) -> list[str]:
    """A short name for each image encoder; the whole one where two would be alike."""
    short = [Path(judge.name).name for judge in judges]
    return [name if short.count(name) == 1 else str(judge) for name, judge in zip(short, judges, strict=True)]


def save_scores(out: Path, whole: dict[str, Any], by_tokens: dict[int, dict[str, Any]]) -> None:
    """Writes `out/scores.json`: what `compare` found; under "by_tokens" the same of shortened captions, plotted too."""
    out.mkdir(parents=True, exist_ok=True)
    found = {**whole, "by_tokens": by_tokens} if by_tokens else whole
    (out / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    if by_tokens:
        rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
        plot(whole, by_tokens, sum(row["tokens"] for row in rows) / len(rows), out / "by_tokens.png")


def print_scores(whole: dict[str, Any], by_tokens: dict[int, dict[str, Any]]) -> None:
    """Mean cosines as the published tables have them, times 100: a row for each length of captions."""
    table = Table("captions", *whole["encoders"], "overall", title="cosine of source and reconstruction × 100")
    for name, found in {"whole": whole, **{f"{k} tokens": found for k, found in by_tokens.items()}}.items():
        averages = [encoder["average"] for encoder in found["encoders"].values()]
        table.add_row(name, *(f"{100 * value:.2f}" for value in (*averages, found["overall"])))
    Console().print(table)


def plot(whole: dict[str, Any], by_tokens: dict[int, dict[str, Any]], mean_tokens: float, out: Path) -> None:
    """Similarity against the length that captions are cut to, a line for each encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in whole["encoders"]:
        values = [found["encoders"][name]["average"] for found in by_tokens.values()]
        (line,) = axis.plot(list(by_tokens), values, marker="o", label=name)
        axis.plot(mean_tokens, whole["encoders"][name]["average"], marker="*", markersize=12, color=line.get_color())
    axis.set_xlabel("caption cut to so many tokens (star: whole captions, at their mean length)")
    axis.set_ylabel("cosine of source and reconstruction")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
