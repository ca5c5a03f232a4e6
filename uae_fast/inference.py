"""A run's networks on anybody's images and texts: what `uae-fast caption`, `reconstruct` and `generate` do."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .config import Config, ConfigError, load_config
from .data import SUFFIXES, load_image
from .evaluate.heldout import sample, to_image
from .models import Models
from .models.loading import load_models, load_run
from .rollout.renders import draw
from .seeds import derive_seed
from .text import printable

PANEL, GAP, LINE, CAPTION_WIDTH = 256, 16, 20, 68  # of a sheet: three in pixels, one in characters


@dataclass
class Captioned:
    """An image file and its caption."""

    path: Path
    image: Image.Image
    caption: str


@dataclass
class Reconstruction(Captioned):
    """With what was drawn from the caption, and how alike image and drawing are."""

    drawn: Image.Image
    reward: float


def open_models(run: Path | None, at: str | None) -> tuple[Config, Models]:
    """Configuration and networks of a run at a moment (its last one unless given), or those of the package.

    Raises:
        ConfigError: a moment without a run, or as `load_run`.
    """
    if run is not None:
        return load_run(run, at)
    if at not in (None, "before"):
        raise ConfigError([f"--at {at}: name the run with --run"])
    config = load_config("tiny")
    return config, load_models(config)


def caption_images(config: Config, models: Models, places: Sequence[Path], seed: int) -> list[Captioned]:
    """Captions of files and of the images in folders; unreadable ones are named and left out.

    Raises:
        ConfigError: there is no readable image.
    """
    paths, images = [], []
    for place in places:
        inside = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
        for path in inside:
            try:
                images.append(load_image(path))
                paths.append(path)
            except Exception as error:  # whatever a decoder raises on a broken file
                print(printable(f"skipped {path}: {error}"), file=sys.stderr)
    if not images:
        raise ConfigError([printable("no readable image among " + ", ".join(map(str, places)))])
    captions: list[str] = []
    for start in range(0, len(images), config.render.batch):
        rows = slice(start, start + config.render.batch)
        seeds = [derive_seed(seed, "caption", path.name) for path in paths[rows]]
        captions += sample(config, models, images[rows], seeds).texts
    return list(map(Captioned, paths, images, captions))


def generate(config: Config, models: Models, text: str, seed: int) -> Image.Image:
    """A drawing of a text."""
    return to_image(draw(config, models, [text], [derive_seed(seed, "draw")])[0])


def reconstruct(config: Config, models: Models, places: Sequence[Path], seed: int) -> list[Reconstruction]:
    """Captions images (as `caption_images`) and redraws them, all from one noise."""
    captioned = caption_images(config, models, places, seed)
    drawn = draw(config, models, [each.caption for each in captioned], [derive_seed(seed, "draw")] * len(captioned))
    rewards = models.reward(drawn, models.reward.embed_sources([each.image for each in captioned])).tolist()
    found = zip(captioned, map(to_image, drawn), rewards, strict=True)
    return [Reconstruction(each.path, each.image, each.caption, picture, reward) for each, picture, reward in found]


def side_by_side(rows: Sequence[Reconstruction]) -> Image.Image:
    """One picture: a row for each source and its reconstruction, with caption and reward beneath."""
    font = ImageFont.load_default(15)
    captions = [textwrap.wrap(f"{row.caption}  (reward {row.reward:.3f})", CAPTION_WIDTH) for row in rows]
    heights = [PANEL + GAP + LINE * len(lines) + GAP for lines in captions]
    sheet = Image.new("RGB", (2 * PANEL + 3 * GAP, sum(heights) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, lines, height in zip(rows, captions, heights, strict=True):
        for column, image in enumerate((row.image, row.drawn)):
            method = Image.Resampling.NEAREST if max(image.size) < PANEL else Image.Resampling.LANCZOS
            shown = ImageOps.contain(image, (PANEL, PANEL), method)
            sheet.paste(shown, (GAP + column * (PANEL + GAP) + (PANEL - shown.width) // 2, top))
        pen.text((GAP, top + PANEL + 6), "\n".join(lines), "black", font)
        top += height
    return sheet
