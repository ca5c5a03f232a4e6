"""Folders of images, with captions where there are any."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import ConfigError, printable, unicode_text
from .models.reward import to_tensor
from .seeds import generator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Whatever a file is called, it is read as one of these: Pillow would run Ghostscript on PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT = 200  # what Qwen2-VL's image processor takes


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


@dataclass(frozen=True)
class Row:
    """What `captions.jsonl` says of an image."""

    caption: str | None = None
    attributes: tuple[str, ...] | None = None


NOTHING = Row()


class ImageFolder:
    """The images of a folder, every one decoded once at the start; those that cannot be are left out, by name.

    Args:
        folder: with image files, read without subfolders, and perhaps `captions.jsonl`.
        key: the configuration key that names it, for messages.
        captions: whether captions must be there.
        max_bad: share of the images that may be left out.

    Attributes:
        files: every image file's name, in order; an image's id is its place here.
        ids: of the images that could be read at the start.
        skipped: the others, each with the reason.
        strangers: names in `captions.jsonl` that no image of the folder has, each with its line.

    Raises:
        ConfigError: no such folder, no image in it, too many unreadable ones, or captions needed and missing.
    """

    def __init__(self, folder: str | Path, key: str, *, captions: bool = False, max_bad: float = 0.01):
        self.folder, self.key, self.max_bad = Path(folder), key, max_bad
        if not self.folder.is_dir():
            raise ConfigError([f"{key}: {folder} is not a folder"])
        self.files = sorted(path.name for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ConfigError([f"{key}: {folder} has no image ({', '.join(sorted(SUFFIXES))})"])
        self.skipped: dict[str, str] = {}
        for file in self.files:
            self._read(file)
        check_share(self.key, self.folder, self.skipped, len(self.files), self.max_bad)
        self.ids = [i for i, file in enumerate(self.files) if file not in self.skipped]
        self.strangers: dict[str, int] = {}
        self.rows = self._read_captions()
        missing = [self.files[i] for i in self.ids if self.rows.get(self.files[i], NOTHING).caption is None]
        self.captioned = not missing
        if captions and missing:
            raise ConfigError(
                [f"{key}: stages 0 and 1 need captions in {folder}/captions.jsonl; {printable(missing[0])} has none"]
            )

    def _read(self, file: str) -> Image.Image | None:
        """An image, or None for one that cannot be read, which is then among the skipped."""
        try:
            return load_image(self.folder / file)
        except Exception as error:  # whatever a decoder raises on a broken file
            self.skipped[file] = printable(str(error) or type(error).__name__)
            return None

    def _read_captions(self) -> dict[str, Row]:
        path = self.folder / "captions.jsonl"
        if not path.is_file():
            return {}
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a caption
        except UnicodeDecodeError as error:
            raise ConfigError([f"{self.key}: {path}: not UTF-8 text: byte {error.start}"]) from None
        names = {unicodedata.normalize("NFC", file): file for file in self.files} | {file: file for file in self.files}
        rows: dict[str, Row] = {}
        seen: dict[str, int] = {}
        problems = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, row = read_row(line)
            except ValueError as error:
                problems.append(f"{self.key}: {path}:{number}: {error}")
                continue
            file = names.get(name) or names.get(unicodedata.normalize("NFC", name))
            if file is None:
                self.strangers.setdefault(name, number)
            elif file in rows:
                problems.append(f"{self.key}: {path}:{number}: {printable(file)} has a row already, line {seen[file]}")
            else:
                rows[file], seen[file] = row, number
        if problems:
            raise ConfigError(listed(problems))
        return rows

    def notes(self) -> list[str]:
        """What of the folder is left out, a line each, for a person."""
        found = [self._skip_note(file) for file in self.skipped]
        names = [f"{printable(name)} (line {number})" for name, number in self.strangers.items()]
        if names:
            found.append(f"{self.folder / 'captions.jsonl'}: no image has the name {', '.join(listed(names, 5))}")
        return found

    def _skip_note(self, file: str) -> str:
        return f"skipped {self.folder / printable(file)}: {self.skipped[file]}"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Example:
        """The image at a place among those that could be read at the start.

        Raises:
            ConfigError: it cannot be read any more.
        """
        i = self.ids[place]
        image = self._read(self.files[i])
        if image is None:
            path, reason = self.folder / printable(self.files[i]), self.skipped[self.files[i]]
            raise ConfigError([f"{self.key}: {path} could be read when the run began and cannot be now: {reason}"])
        return self._example(i, image)

    def _example(self, i: int, image: Image.Image) -> Example:
        row = self.rows.get(self.files[i], NOTHING)
        return Example(i, self.files[i], image, row.caption, row.attributes)

    def batch(self, step: int, size: int, seed: int, stage: str) -> list[Example]:
        """The images of a step: epoch after epoch, each in an order of its own.

        In the place of an image that cannot be read comes the next one of the epoch that can; so a batch depends on
        which files are bad, not on when that was found.

        Raises:
            ConfigError: too many cannot be read by now.
        """
        examples, orders = [], {}
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self.files))
            if epoch not in orders:
                orders[epoch] = self._order(seed, stage, epoch)
            examples.append(self._next_readable(orders[epoch], place))
        return examples

    def _next_readable(self, order: Sequence[int], place: int) -> Example:
        for i in (*order[place:], *order[:place]):
            if self.files[i] in self.skipped:
                continue
            image = self._read(self.files[i])
            if image is not None:
                return self._example(i, image)
            print(self._skip_note(self.files[i]), flush=True)
            check_share(self.key, self.folder, self.skipped, len(self.files), self.max_bad)
        raise AssertionError("check_share raises where no image is left")

    def _order(self, seed: int, stage: str, epoch: int) -> Sequence[int]:
        return torch.randperm(len(self.files), generator=generator(seed, "order", stage, epoch)).tolist()


def check_share(key: str, folder: Path, skipped: dict[str, str], count: int, max_bad: float) -> None:
    """Refuses a folder of `count` images of which more than `max_bad`, or all, could not be read.

    Raises:
        ConfigError: with every one of those, and the reason.
    """
    bad = len(skipped)
    if bad > max_bad * count or bad == count:
        raise ConfigError(
            [
                f"{key}: {bad} of the {count} images in {folder} cannot be read, "
                f"and data.max_bad = {max_bad} allows {int(max_bad * count)}",
                *listed([f"{printable(name)}: {reason}" for name, reason in skipped.items()]),
            ]
        )


def read_row(line: str) -> tuple[str, Row]:
    """A line of `captions.jsonl`: the file's name, and what it says of it.

    Raises:
        ValueError: it is not a JSON object, or a value has the wrong type.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        raise ValueError('not a JSON object with "file" and "caption"')
    caption, attributes = row.get("caption"), row.get("attributes")
    if not isinstance(caption, str | None):
        raise ValueError('"caption" is not a text')
    if isinstance(attributes, str):
        attributes = attributes.split()
    if attributes is not None and not (isinstance(attributes, list) and all(isinstance(a, str) for a in attributes)):
        raise ValueError('"attributes" is not a list of words')
    words = None if attributes is None else tuple(attributes)
    return row["file"], Row(None if caption is None else unicode_text(caption), words)


def listed(lines: list[str], most: int = 50) -> list[str]:
    """The first `most` of many lines, and how many more there are."""
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def load_image(path: Path | BinaryIO) -> Image.Image:
    """An image as RGB, upright, its first frame if it moves; transparency lies on white.

    Of 16-bit pixels the high byte is taken. Colour profiles are not applied: CMYK is converted by the plain formula.

    Raises:
        Exception: whatever the decoder raises on a broken file; ValueError for what has no defined picture.
    """
    if isinstance(path, Path) and not path.is_file():  # a folder, or a pipe that would never end
        raise ValueError("not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            file = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"no image of the formats {', '.join(FORMATS)}") from None
        with file:
            packed = str([tile.args for tile in file.tile])
            image = ImageOps.exif_transpose(file)
    if "I;12" in packed or ("RGB;16" in packed and "transparency" in image.info):
        raise ValueError("12-bit grey, or 16-bit colours with a transparent one, which Pillow reads wrongly")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} × {image.height} pixels: more than {MAX_ASPECT} times as long as wide")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, of which none is white")
    if image.mode.startswith("I;16"):
        image = high_bytes(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def high_bytes(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in 8; a grey that is declared transparent becomes so."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def square(image: Image.Image, resolution: int) -> Tensor:
    """The middle square of an image, resized bicubically: (1, 3, resolution, resolution) in [0, 1]."""
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return to_tensor(image)
