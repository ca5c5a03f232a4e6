"""Folders of images, with captions where there are any; and reading one step ahead."""

from __future__ import annotations

import json
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import ConfigError, DataConfig
from .models.reward import to_tensor
from .seeds import generator
from .team import Team
from .text import printable, unicode_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Whatever a file is called, it is read as one of these: Pillow would run Ghostscript on PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT = 200  # what Qwen2-VL's image processor takes
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a bomb; it refuses twice as many


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        id: its place among the folder's file names, a seed's name.
        file: its file name.
        image: RGB.
        caption: from `captions.jsonl`, where that has one.
        attributes: the words a complete caption says, where `captions.jsonl` lists them.
        prepared: what a stage makes of the image before its rollout, where that was done ahead.
    """

    id: int
    file: str
    image: Image.Image
    caption: str | None = None
    attributes: tuple[str, ...] | None = None
    prepared: Any = None


@dataclass(frozen=True)
class Row:
    """What `captions.jsonl` says of an image."""

    caption: str | None = None
    attributes: tuple[str, ...] | None = None


NOTHING = Row()


@dataclass(frozen=True)
class Batch:
    """A step's images as they were read.

    Attributes:
        examples: the images; fewer than asked for where too many were lost.
        lost: what could not be read on the way and is not among the skipped yet, each with the reason.
    """

    examples: list[Example]
    lost: dict[str, str]


class Images(ABC):
    """Images with an order for every epoch. Those that cannot be read are left out, by name.

    Attributes:
        key: the configuration key that names them, for messages.
        folder: where they are.
        max_bad: share of the images that may be left out.
        skipped: what was left out so far, each with the reason.
    """

    key: str
    folder: Path
    max_bad: float
    skipped: dict[str, str]

    def __init__(self) -> None:
        self._known: tuple[tuple, Sequence[int]] = ((), [])  # the order used last

    @property
    @abstractmethod
    def count(self) -> int:
        """How many images there are, with those left out."""

    @abstractmethod
    def _name(self, i: int) -> str:
        """What the i-th image is called among the skipped."""

    @abstractmethod
    def _load(self, i: int) -> Example:
        """The i-th image; raises whatever a decoder raises on a broken one."""

    @abstractmethod
    def _shuffled(self, rng: torch.Generator) -> Sequence[int]:
        """All images in a new order."""

    def order(self, seed: int, stage: str, epoch: int) -> Sequence[int]:
        """The images of an epoch."""
        name = (seed, stage, epoch)
        if self._known[0] != name:
            self._known = (name, self._shuffled(generator(seed, "order", stage, epoch)))
        return self._known[1]

    def batch(self, step: int, size: int, seed: int, stage: str) -> list[Example]:
        """This process's images of a step of `size`: epoch after epoch, each in an order of its own.

        In the place of an image that cannot be read comes the next one of the epoch that can; so a batch depends on
        which images are bad, not on when that was found.

        Raises:
            ConfigError: too many cannot be read by now.
        """
        return self.admit(self.read(step, size, seed, stage))

    def read(self, step: int, size: int, seed: int, stage: str) -> Batch:
        """The same before anybody is told what was lost: nothing is printed, counted or raised.

        A thread may call it, if nobody calls it or `admit` meanwhile.
        """
        examples: list[Example] = []
        lost: dict[str, str] = {}
        for position in range(step * size, (step + 1) * size)[Team().part(size)]:
            epoch, place = divmod(position, self.count)
            order = self.order(seed, stage, epoch)
            for i in (order[(place + shift) % self.count] for shift in range(self.count)):
                name = self._name(i)
                if name in self.skipped or name in lost:
                    continue
                try:
                    examples.append(self._load(i))
                    break
                except Exception as error:  # whatever a decoder raises on a broken image
                    lost[name] = reason(error)
                    if too_many(len(self.skipped | lost), self.count, self.max_bad):
                        return Batch(examples, lost)
        return Batch(examples, lost)

    def admit(self, batch: Batch) -> list[Example]:
        """The images of a batch; what was lost with it, in any process, is printed and counted from now on.

        Raises:
            ConfigError: too many cannot be read by now.
        """
        everywhere = Team().exchange(batch.lost)
        for name, why in {name: why for lost in everywhere for name, why in lost.items()}.items():
            self.skipped[name] = why
            print(self._skip_note(name), flush=True)
            check_share(self.key, self.folder, self.skipped, self.count, self.max_bad)
        return batch.examples

    @abstractmethod
    def _skip_note(self, name: str) -> str:
        """Says what was left out, and why."""


class ReadAhead:
    """This process's images of a stage's steps; a thread reads and prepares the next ones while a step computes.

    What is read depends on the step alone, and what it brings with it (a skipped image, an error) comes out where its
    step asks for it. Use as a context manager: the thread ends with it.

    Args:
        images: of the run; nobody else reads them meanwhile.
        size: of a step, over all processes.
        seed: the run's.
        stage: its name.
        steps: how many the stage has.
        prepare: what the stage makes of an image on the host (`Stage.prepare`).

    Attributes:
        waited: seconds that the last `batch` took, which is what reading had not done by then.
    """

    def __init__(
        self, images: Images, size: int, seed: int, stage: str, steps: int, prepare: Callable[[Image.Image], Any]
    ):
        self.images, self.size, self.seed, self.stage, self.steps = images, size, seed, stage, steps
        self.prepare = prepare
        self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, "images")
        self._coming: dict[int, Future[Batch]] = {}  # by step: the next one's

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batch(self, step: int) -> list[Example]:
        """The images of a step, as `Images.batch` gives them, prepared; then the thread turns to the next.

        Raises:
            ConfigError: too many cannot be read by now.
        """
        began = time.monotonic()
        coming = self._coming.pop(step, None) or self._thread.submit(self._read, step)
        examples = self.images.admit(coming.result())
        if step + 1 < self.steps:
            self._coming[step + 1] = self._thread.submit(self._read, step + 1)
        self.waited = time.monotonic() - began
        return examples

    def _read(self, step: int) -> Batch:
        batch = self.images.read(step, self.size, self.seed, self.stage)
        examples = [replace(example, prepared=self.prepare(example.image)) for example in batch.examples]
        return replace(batch, examples=examples)


def small_world(key: str, place: str | Path) -> str:
    """What makes the images of the `tiny` preset, to be said where it is they that are missing; else nothing."""
    split = key.removeprefix("data.")
    made_here = str(place) == getattr(DataConfig, split, None)
    return f"; this makes it: uae-fast tiny export {place} --split {split}" if made_here else ""


class ImageFolder(Images):
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
        super().__init__()
        self.folder, self.key, self.max_bad = Path(folder), key, max_bad
        if not self.folder.is_dir():
            raise ConfigError([f"{key}: {folder} is not a folder{small_world(key, folder)}"])
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
            self.skipped[file] = reason(error)
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

    @property
    def count(self) -> int:
        return len(self.files)

    def _name(self, i: int) -> str:
        return self.files[i]

    def _load(self, i: int) -> Example:
        return self._example(i, load_image(self.folder / self.files[i]))

    def _example(self, i: int, image: Image.Image) -> Example:
        row = self.rows.get(self.files[i], NOTHING)
        return Example(i, self.files[i], image, row.caption, row.attributes)

    def _shuffled(self, rng: torch.Generator) -> Sequence[int]:
        return torch.randperm(len(self.files), generator=rng).tolist()


def reason(error: Exception) -> str:
    """Why an image cannot be read, for a person."""
    return printable(str(error) or type(error).__name__)


def too_many(bad: int, count: int, max_bad: float) -> bool:
    """Whether so many unreadable ones of `count` images are more than a run goes on with."""
    return bad > max_bad * count or bad == count


def check_share(key: str, folder: Path, skipped: dict[str, str], count: int, max_bad: float) -> None:
    """Refuses a folder of `count` images of which more than `max_bad`, or all, could not be read.

    Raises:
        ConfigError: with every one of those, and the reason.
    """
    bad = len(skipped)
    if too_many(bad, count, max_bad):
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
    Pillow's warnings are left as they are: to silence them here would not be safe in a thread.

    Raises:
        Exception: whatever the decoder raises on a broken file; ValueError for what has no defined picture.
    """
    if isinstance(path, Path) and not path.is_file():  # a folder, or a pipe that would never end
        raise ValueError("not a file")
    try:
        file = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image of the formats {', '.join(FORMATS)}") from None
    with file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} × {file.height} pixels, perhaps a decompression bomb")
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
