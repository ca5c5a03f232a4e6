"""Text from outside, as it may be shown on a terminal, in a message or in a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """Text that moves no cursor, breaks no line and can be encoded: whatever else there is, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str) -> str:
    """Text in one printable line of at most 80 characters."""
    line = printable(text[:81])
    return line if len(line) <= 80 else f"{line[:77]}..."


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that is spelled most like a word; nothing ("") where none is."""
    return next(iter(difflib.get_close_matches(word, list(choices), 1)), "")


def unicode_text(text: str) -> str:
    """Text without halves of surrogate pairs, which no encoding takes: "?" in their place."""
    return text.encode("utf-8", "replace").decode()
