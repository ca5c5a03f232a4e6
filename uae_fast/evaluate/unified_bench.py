"""Unified-Bench (METHOD §4): image → caption → image, and how alike image encoders find source and reconstruction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import Config, ConfigError
from ..data import SUFFIXES, Example, ImageFolder, listed, load_image
from ..logging import ProgressLine
from ..models import Models
from ..models.loading import load_image_encoder, load_image_processor, run_device
from ..models.sources import Source
from ..parquet import ParquetImages
from ..text import printable
from .heldout import draw_examples, picture_names, to_image, write_captions

PREFIX = "recon_"  # may stand before a reconstruction's name
WHOLE = "whole"  # the folder of the drawings of captions that nothing was cut from
BATCH = 16  # images embedded at once

Images = ImageFolder | ParquetImages


def reconstruct(config: Config, models: Models, data: Images, out: Path, tokens: Sequence[int] = ()) -> None:
    """Writes each image's caption and redraws it: `out/captions.jsonl`, `out/whole/NAME.png`.

    With the seeds of the run's own held-out measurements, so that captions and drawings are theirs.

    Args:
        config: the first `evaluate.images` of its held-out images are taken.
        tokens: for each of these numbers `out/NUMBER/NAME.png` are drawings of the captions cut to so many tokens: what
            is said, at one length for all.
    """
    for length in (WHOLE, *map(str, tokens)):
        (out / length).mkdir(parents=True)
    names, rows = picture_names(data.files), []
    with ProgressLine("redrawing", count(config, data)) as progress:
        for examples in batches(config, data):
            captions = write_captions(config, models, examples)
            for most in (None, *tokens):
                texts = [text if most is None else cut(models, text, most) for text, _ in captions]
                folder = out / (WHOLE if most is None else str(most))
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


def count(config: Config, data: Images) -> int:
    return min(config.evaluate.images, len(data))


def batches(config: Config, data: Images) -> Iterator[list[Example]]:
    """The held-out images that are measured, as many at once as are drawn at once."""
    for start in range(0, count(config, data), config.render.batch):
        yield [data[i] for i in range(start, min(start + config.render.batch, count(config, data)))]


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


def compare(config: Config, data: Images, judges: Sequence[Source], folder: Path) -> dict[str, Any]:
    """Cosine similarities of sources and reconstructions, pixels prepared as each encoder's own processor does.

    Returns:
        {"overall": the mean of the encoders' averages, "encoders": {name: {"average", "min", "max", "scores": {file:
        cosine}}}}; the published tables have these numbers times 100.
    """
    names = picture_names(data.files)
    files = [example.file for examples in batches(config, data) for example in examples]
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
            for start in range(0, len(files), BATCH):
                examples = [data[i] for i in range(start, min(start + BATCH, len(files)))]
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
