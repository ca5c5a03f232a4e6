"""Text from outside, as it may be shown on a terminal, in a message or in a file."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text that moves no cursor, breaks no line and can be encoded: whatever else there is, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str) -> str:
    """Text in one printable line of at most 80 characters."""
    line = printable(text[:81])
    return line if len(line) <= 80 else f"{line[:77]}..."


def unicode_text(text: str) -> str:
    """Text without halves of surrogate pairs, which no encoding takes: "?" in their place."""
    return text.encode("utf-8", "replace").decode()
