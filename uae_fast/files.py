"""Files that are there in full or not at all, and errors of the disk that name them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error of the disk is an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, words = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number or errno.EIO, words or str(error), str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there in full or, if the process is killed or the disk full, as it was before."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
