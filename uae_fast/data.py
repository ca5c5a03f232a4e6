"""Folders of images, with captions where there are any."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import ConfigError
from .models.reward import to_tensor
from .seeds import generator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        id: its place among the folder's file names, a seed's name.
        file: its file name.
        image: RGB.
        caption: from `captions.jsonl`, where that has one.
        attributes: the words a complete caption says, where `captions.jsonl` lists them.
    """

    id: int
    file: str
    image: Image.Image
    caption: str | None = None
    attributes: tuple[str, ...] | None = None


class ImageFolder:
    """The images of a folder, every one decoded once at the start; those that cannot be are left out, by name.

    Args:
        folder: with image files, read without subfolders, and perhaps `captions.jsonl`.
        key: the configuration key that names it, for messages.
        captions: whether captions must be there.

    Raises:
        ConfigError: no such folder, no image in it, or captions needed and missing.
    """

    def __init__(self, folder: str | Path, key: str, *, captions: bool = False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError([f"{key}: {folder} is not a folder"])
        files = sorted(path.name for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES)
        self.skipped: dict[str, str] = {}
        self.ids = []
        self.files = files
        for i, file in enumerate(files):
            try:
                load_image(self.folder / file)
                self.ids.append(i)
            except Exception as error:  # whatever a decoder raises on a broken file
                self.skipped[file] = str(error) or type(error).__name__
        if not self.ids:
            raise ConfigError([f"{key}: {folder} has no readable image ({', '.join(sorted(SUFFIXES))})"])
        self.rows = self._read_captions(key)
        missing = [self.files[i] for i in self.ids if "caption" not in self.rows.get(self.files[i], {})]
        self.captioned = not missing
        if captions and missing:
            raise ConfigError(
                [f"{key}: stages 0 and 1 need captions in {folder}/captions.jsonl; {missing[0]} has none"]
            )

    def _read_captions(self, key: str) -> dict[str, dict]:
        path = self.folder / "captions.jsonl"
        if not path.is_file():
            return {}
        rows = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["file"]] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ConfigError([f'{key}: {path}:{number}: not a JSON object with "file" and "caption"']) from None
        return rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Example:
        """The image at a place among the readable ones."""
        i = self.ids[place]
        file = self.files[i]
        row = self.rows.get(file, {})
        attributes = row.get("attributes")
        return Example(
            i,
            file,
            load_image(self.folder / file),
            row.get("caption"),
            tuple(attributes.split()) if isinstance(attributes, str) else attributes and tuple(attributes),
        )

    def batch(self, step: int, size: int, seed: int, stage: str) -> list[Example]:
        """The images of a step: epoch after epoch, each in an order of its own."""
        places = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self))
            places.append(self._order(seed, stage, epoch)[place])
        return [self[place] for place in places]

    def _order(self, seed: int, stage: str, epoch: int) -> Sequence[int]:
        return torch.randperm(len(self), generator=generator(seed, "order", stage, epoch)).tolist()


def load_image(path: Path) -> Image.Image:
    """An image as RGB, upright; transparency lies on white. Raises whatever the decoder raises on a broken file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return image.convert("RGB")


def square(image: Image.Image, resolution: int) -> Tensor:
    """The middle square of an image, resized bicubically: (1, 3, resolution, resolution) in [0, 1]."""
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return to_tensor(image)
