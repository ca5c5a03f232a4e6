"""Images in parquet files, as Hugging Face datasets keep them: in a folder, or in a Hub repository at one commit."""

from __future__ import annotations

import glob
import io
import re
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .config import ConfigError, DataConfig, printable, unicode_text
from .data import Example, ImageFolder, check_share, load_image
from .seeds import generator

HUB_FILES = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)@(?P<revision>[0-9a-f]{40})(/(?P<pattern>.+\.parquet))?")
MIXED_GROUPS = 8  # row groups whose rows are shuffled among each other, and that are kept in memory


def open_images(place: str, key: str, config: DataConfig, *, captions: bool = False) -> ImageFolder | ParquetImages:
    """The images of a place.

    Args:
        place: a folder of images; a folder with parquet files in it or below; a pattern of parquet files
            ("data/train-*.parquet"); or owner/name@commit of a dataset's repository on the Hub, perhaps with a pattern
            ("owner/name@commit/data/train-*.parquet").
        key: the configuration key that names it, for messages.
        config: the columns of parquet files.
        captions: whether captions must be there.

    Raises:
        ConfigError: nothing there, or nothing of use.
    """
    root, pattern = Path(place), "**/*.parquet"
    hub = None if root.exists() else HUB_FILES.fullmatch(place)
    if hub is not None:
        from huggingface_hub import snapshot_download

        pattern = hub["pattern"] or pattern
        wanted = [hub["pattern"] or "*.parquet"]
        root = Path(
            snapshot_download(hub["name"], repo_type="dataset", revision=hub["revision"], allow_patterns=wanted)
        )
    if root.is_dir():
        files = sorted(root.glob(pattern))
    else:
        files = sorted(map(Path, glob.glob(place))) if place.endswith(".parquet") else []
    if not files and hub is None and not place.endswith(".parquet"):
        return ImageFolder(place, key, captions=captions, max_bad=config.max_bad)
    if not files:
        raise ConfigError([f"{key}: no parquet file in {place}"])
    columns = config.image_column, config.caption_column
    return ParquetImages(files, key, *columns, captions=captions, max_bad=config.max_bad)


class ParquetImages:
    """Images in the rows of parquet files, read a row group at a time: a data set may be larger than memory.

    The order depends on seed, stage and epoch alone: row groups are shuffled, and the rows of every few groups among
    each other, so that reading goes from group to group. An image that cannot be decoded is left out when its turn
    comes: the next one of the order takes its place, and comes once more in its own.

    Args:
        files: in the order of their rows' numbers.
        key: the configuration key that names them, for messages.
        image_column: its cells hold an encoded image: bytes, or {"bytes", "path"} with either of them, as `datasets`
            writes them; a path is taken from the file's folder.
        caption_column: of text; need not be there unless `captions`.
        captions: whether every row must have one.
        max_bad: share of the images that may be left out.

    Attributes:
        skipped: the rows whose image could not be decoded so far ("row 7"), each with the reason.

    Raises:
        ConfigError: a column is missing or is of another kind, or there is no row.
    """

    def __init__(
        self,
        files: list[Path],
        key: str,
        image_column: str,
        caption_column: str,
        *,
        captions: bool = False,
        max_bad: float = 0.01,
    ):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.key, self.max_bad = key, max_bad
        self.folder, self.image_column, self.caption_column = files[0].parent, image_column, caption_column
        self.groups: list[tuple[Path, int, int]] = []  # file, its row group, that one's first row in the file
        counts: list[int] = []
        problems: list[str] = []
        self.captioned = True
        for file in files:
            try:
                opened = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as error:
                problems.append(f"{key}: {file}: {error}")
                continue
            schema, rows = opened.schema_arrow, 0
            if image_column not in schema.names:
                problems.append(f"{key}: {file} has no column {image_column} (data.image_column), but {schema.names}")
                continue
            kind = schema.field(image_column).type
            binary = (
                kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            )
            if not (pa.types.is_binary(binary) or pa.types.is_large_binary(binary)):
                problems.append(f"{key}: {file}: column {image_column} holds {kind}, not encoded images")
            self.captioned &= caption_column in schema.names and _complete(opened, caption_column)
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                self.groups.append((file, group, rows))
                counts.append(count)
                rows += count
        self.ends = list(accumulate(counts))
        if not problems and not sum(counts):
            problems.append(f"{key}: {files[0].parent} has parquet files without a row")
        if captions and not self.captioned and not problems:
            where = f"the column {caption_column} (data.caption_column)"
            problems.append(f"{key}: stages 0 and 1 need a caption in every row, in {where}")
        if problems:
            raise ConfigError(problems)
        self.skipped: dict[str, str] = {}
        self.tables: OrderedDict[int, Any] = OrderedDict()
        self.known: tuple[tuple, list[int]] = ((), [])

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def files(self) -> list[str]:
        """A name for every row's image: the file's, and the row's number in it."""
        return [self._place(row)[-1] for row in range(len(self))]

    def notes(self) -> list[str]:
        """What is left out so far, a line each, for a person."""
        return [self._skip_note(name) for name in self.skipped]

    def _skip_note(self, name: str) -> str:
        return f"skipped {self.folder}: {name}: {self.skipped[name]}"

    def __getitem__(self, row: int) -> Example:
        """The image of a row.

        Raises:
            ConfigError: it cannot be decoded.
        """
        try:
            return self._read(row)
        except Exception as error:  # whatever a decoder raises on a broken image
            reason = printable(str(error) or type(error).__name__)
            raise ConfigError([f"{self.key}: {self.folder}: row {row} cannot be read: {reason}"]) from None

    def _place(self, row: int) -> tuple[int, int, str]:
        """A row's group, its place in that, and its image's name."""
        group = bisect_right(self.ends, row)
        file, _, first = self.groups[group]
        place = row - (self.ends[group - 1] if group else 0)
        return group, place, f"{file.stem}-{first + place:06d}"

    def _read(self, row: int) -> Example:
        group, place, name = self._place(row)
        cells = self._table(group).slice(place, 1).to_pylist()[0]
        cell = cells[self.image_column]
        data, path = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path is None:
            raise ValueError("no image in this row")
        encoded: Any = io.BytesIO(data) if data is not None else self.groups[group][0].parent / str(path)
        caption = cells.get(self.caption_column)
        return Example(row, name, load_image(encoded), unicode_text(caption) if isinstance(caption, str) else None)

    def batch(self, step: int, size: int, seed: int, stage: str) -> list[Example]:
        """The images of a step: epoch after epoch, each in an order of its own.

        Raises:
            ConfigError: too many cannot be decoded by now.
        """
        examples: list[Example] = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self))
            order = self.order(seed, stage, epoch)
            for row in (order[(place + shift) % len(order)] for shift in range(len(order))):
                try:
                    examples.append(self._read(row))
                    break
                except Exception as error:  # whatever a decoder raises on a broken image
                    self._skip(row, error)
        return examples

    def _skip(self, row: int, error: Exception) -> None:
        name = f"row {row}"
        if name not in self.skipped:
            self.skipped[name] = printable(str(error) or type(error).__name__)
            print(self._skip_note(name), flush=True)
        check_share(self.key, self.folder, self.skipped, len(self), self.max_bad)

    def order(self, seed: int, stage: str, epoch: int) -> list[int]:
        """The rows of an epoch."""
        name = (seed, stage, epoch)
        if self.known[0] != name:
            rng, rows = generator(seed, "order", stage, epoch), []
            groups = torch.randperm(len(self.groups), generator=rng).tolist()
            for start in range(0, len(groups), MIXED_GROUPS):
                mixed = [
                    row
                    for group in groups[start : start + MIXED_GROUPS]
                    for row in range(self.ends[group - 1] if group else 0, self.ends[group])
                ]
                rows += [mixed[i] for i in torch.randperm(len(mixed), generator=rng).tolist()]
            self.known = (name, rows)
        return self.known[1]

    def _table(self, group: int) -> Any:
        """A row group's rows; the last few groups stay in memory."""
        import pyarrow.parquet as pq

        if group not in self.tables:
            file, inside, _ = self.groups[group]
            opened = pq.ParquetFile(file)
            columns = {self.image_column, self.caption_column} & set(opened.schema_arrow.names)
            self.tables[group] = opened.read_row_group(inside, columns=sorted(columns))
            if len(self.tables) > MIXED_GROUPS:
                self.tables.popitem(last=False)
        self.tables.move_to_end(group)
        return self.tables[group]


def _complete(opened: Any, column: str) -> bool:
    """Whether a text column has a value in every row."""
    return all(
        opened.read_row_group(group, columns=[column])[column].null_count == 0 for group in range(opened.num_row_groups)
    )
