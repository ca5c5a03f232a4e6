"""Images in parquet files, as Hugging Face datasets keep them: in a folder, or in a Hub repository at one commit."""

from __future__ import annotations

import glob
import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .config import ConfigError, DataConfig
from .data import Example, ImageFolder, Images, load_image, reason
from .models.sources import named as reading
from .text import unicode_text

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
    root, pattern, named = Path(place), "**/*.parquet", place.endswith(".parquet")
    hub = None if root.exists() else HUB_FILES.fullmatch(place)
    if hub is not None:
        from huggingface_hub import snapshot_download

        pattern, wanted = hub["pattern"] or pattern, hub["pattern"] or "*.parquet"
        where: dict[str, Any] = {"repo_type": "dataset", "revision": hub["revision"], "allow_patterns": [wanted]}
        with reading(key, place):
            root = Path(snapshot_download(hub["name"], **where))
    files = sorted(root.glob(pattern) if root.is_dir() else map(Path, glob.glob(place) if named else ()))
    if files:
        return ParquetImages(files, key, config, captions=captions)
    if "@" in place and hub is None and not root.exists():
        form = "owner/name@commit of a data set on the Hub, where a commit has 40 digits"
        raise ConfigError([f"{key}: {place} is neither on this machine nor {form}"])
    if hub is not None or named:
        raise ConfigError([f"{key}: no parquet file in {place}"])
    return ImageFolder(place, key, captions=captions, max_bad=config.max_bad)


class ParquetImages(Images):
    """Images in the rows of parquet files, read a row group at a time: a data set may be larger than memory.

    The order depends on seed, stage and epoch alone: row groups are shuffled, and the rows of every few groups among
    each other, so that reading goes from group to group. An image that cannot be decoded is left out when its turn
    comes: the next one of the order takes its place, and comes once more in its own.

    Args:
        files: in the order of their rows' numbers.
        key: the configuration key that names them, for messages.
        config: names the column of images, whose cells are encoded: bytes, or {"bytes", "path"} with either of them, as
            `datasets` writes them (a path is taken from the file's folder); that of captions, which need not be there
            unless `captions`; and the share of images that may be left out.
        captions: whether every row must have one.

    Attributes:
        skipped: the rows whose image could not be decoded so far ("row 7"), each with the reason.

    Raises:
        ConfigError: a column is missing or is of another kind, or there is no row.
    """

    def __init__(self, files: list[Path], key: str, config: DataConfig, *, captions: bool = False):
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__()
        self.key, self.max_bad, self.folder, self.skipped = key, config.max_bad, files[0].parent, {}
        self.columns = image_column, caption_column = config.image_column, config.caption_column
        self.groups: list[tuple[Path, int, int]] = []  # file, its row group, that one's first row in the file
        self.captioned, self.table = True, lru_cache(MIXED_GROUPS)(self._table)
        counts, problems = list[int](), list[str]()
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
            binary = kind = schema.field(image_column).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                binary = kind.field("bytes").type
            if not (pa.types.is_binary(binary) or pa.types.is_large_binary(binary)):
                problems.append(f"{key}: {file}: column {image_column} holds {kind}, not encoded images")
            self.captioned &= caption_column in schema.names
            for group in range(opened.num_row_groups):
                if self.captioned:
                    texts = opened.read_row_group(group, columns=[caption_column])[caption_column]
                    self.captioned = texts.null_count == 0
                self.groups.append((file, group, rows))
                counts.append(opened.metadata.row_group(group).num_rows)
                rows += counts[-1]
        self.starts = list(accumulate(counts, initial=0))  # of the groups, and the end of the last
        if not problems and not sum(counts):
            problems.append(f"{key}: {files[0].parent} has parquet files without a row")
        if captions and not self.captioned and not problems:
            where = f"the column {caption_column} (data.caption_column)"
            problems.append(f"{key}: stages 0 and 1 need a caption in every row, in {where}")
        if problems:
            raise ConfigError(problems)

    def __len__(self) -> int:
        return self.starts[-1]

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
            return self._load(row)
        except Exception as error:  # whatever a decoder raises on a broken image
            raise ConfigError([f"{self.key}: {self.folder}: row {row} cannot be read: {reason(error)}"]) from None

    @property
    def count(self) -> int:
        return len(self)

    def _name(self, row: int) -> str:
        return f"row {row}"

    def _place(self, row: int) -> tuple[int, int, str]:
        """A row's group, its place in that, and its image's name."""
        group = bisect_right(self.starts, row) - 1
        file, _, first = self.groups[group]
        place = row - self.starts[group]
        return group, place, f"{file.stem}-{first + place:06d}"

    def _load(self, row: int) -> Example:
        group, place, name = self._place(row)
        cells = self.table(group).slice(place, 1).to_pylist()[0]
        cell, caption = (cells.get(column) for column in self.columns)
        data, path = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path is None:
            raise ValueError("no image in this row")
        encoded: Any = io.BytesIO(data) if data is not None else self.groups[group][0].parent / str(path)
        return Example(row, name, load_image(encoded), unicode_text(caption) if isinstance(caption, str) else None)

    def _shuffled(self, rng: torch.Generator) -> Sequence[int]:
        rows: list[int] = []
        groups = torch.randperm(len(self.groups), generator=rng).tolist()
        for start in range(0, len(groups), MIXED_GROUPS):
            some = groups[start : start + MIXED_GROUPS]
            mixed = [row for group in some for row in range(self.starts[group], self.starts[group + 1])]
            rows += [mixed[i] for i in torch.randperm(len(mixed), generator=rng).tolist()]
        return rows

    def _table(self, group: int) -> Any:
        """A row group's rows; `table` keeps the last few groups in memory."""
        import pyarrow.parquet as pq

        file, inside, _ = self.groups[group]
        opened = pq.ParquetFile(file)
        return opened.read_row_group(inside, columns=sorted({*self.columns} & {*opened.schema_arrow.names}))
