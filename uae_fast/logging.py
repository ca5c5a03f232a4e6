"""What a run says while it works: metrics.jsonl, reporters, and progress on the console."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .files import write_whole
from .reporters import Reporter, open_reporter
from .team import Team
from .text import printable

# What the names of readings begin with that are of the machine's making, not of the run's
CLOCKED = ("seconds/", "images_per_second", "tokens_per_second", "mfu", "memory/")
PLAIN_EVERY = 10.0  # seconds between plain progress lines


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without time and memory; what is left is the same however often a run stopped."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCKED)}


class RunLog:
    """Writes the metrics of a run: metrics.jsonl, and what else the reporters ask for; in process 0 alone.

    Args:
        folder: the run's.
        reporters: besides metrics.jsonl: "tensorboard", "wandb", "trackio". One that fails is off from then on.
        step: steps done before; later rows of an interrupted run are dropped, and so is a row cut short.
        config: the run's, for reporters that show it.
    """

    def __init__(self, folder: Path, reporters: Sequence[str], step: int = 0, config: dict[str, Any] | None = None):
        self.path = folder / "metrics.jsonl"
        self.waiting = ""  # rows that a full disk has not taken yet
        self.writes = Team().rank == 0
        if self.writes and self.path.exists():
            kept = takewhile(lambda row: _step_of(row) <= step, self.path.read_text().splitlines())
            write_whole(self.path, "".join(f"{row}\n" for row in kept))
        self.reporters: dict[str, Reporter] = {}
        for name in dict.fromkeys(reporters if self.writes else ()):
            with self._reporting(name):
                self.reporters[name] = open_reporter(name, folder, step, config or {})

    def metrics(self, step: int, stage: str, values: dict[str, float]) -> None:
        """One step's row; `step` counts over the whole run, from 1. NaN and infinities are written as null."""
        if not self.writes:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.waiting += json.dumps({"step": step, "stage": stage, **row}) + "\n"
        try:
            self._write()
        except OSError as error:
            print(f"{self.path} not written: {error}; its rows wait for the next step", flush=True)
        self._report(lambda reporter: reporter.scalars(step, {f"{stage}/{n}": value for n, value in values.items()}))

    def heldout(self, step: int, values: dict[str, float], pictures: dict[str, tuple[Path, str]]) -> None:
        """Shows the reporters a measurement of held-out images, and some of their drawings with captions."""
        if not values:
            return
        self._report(lambda reporter: reporter.scalars(step, {f"heldout/{n}": value for n, value in values.items()}))
        self._report(lambda reporter: reporter.pictures(step, {f"samples/{n}": found for n, found in pictures.items()}))

    def _report(self, tell: Callable[[Reporter], None]) -> None:
        for name, reporter in list(self.reporters.items()):
            with self._reporting(name):
                tell(reporter)

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of somebody else's code, disk or network
            self.reporters.pop(name, None)
            words = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
            print(f"{name} is off from here on: {words}; {self.path} has everything", flush=True)

    def sync(self) -> None:
        """Forces all rows to the disk; raises OSError where it takes no more. Without a row there is no file."""
        if self.waiting or self.path.exists():
            self._write(force=True)

    def _write(self, force: bool = False) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(self.waiting.encode()) < len(self.waiting.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if force:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # no row is left cut short
                raise
        self.waiting = ""

    def close(self) -> None:
        self._report(lambda reporter: reporter.close())


class ProgressLine:
    """A progress bar with time remaining on a terminal, plain lines elsewhere.

    Use as a context manager; `advance` moves it and sets the words behind it.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self.began = self.spoke = time.monotonic()
        self.first = done
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            self.progress = Progress(
                SpinnerColumn(), TextColumn(f"{title:<24}"), BarColumn(24), MofNCompleteColumn(),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[words]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.progress.add_task(title, total=total, completed=done, words="")

    def __enter__(self) -> ProgressLine:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self, amount: int = 1, words: str = "") -> None:
        """Moves by `amount` and shows `words`."""
        self.done += amount
        if self.progress is not None:
            self.progress.update(self.task, advance=amount, words=words)
            return
        now = time.monotonic()
        if now - self.spoke >= PLAIN_EVERY or self.done >= self.total:
            self.spoke = now
            left = (now - self.began) / max(1, self.done - self.first) * (self.total - self.done)
            print(f"{self.title:<24} {self.done:>5}/{self.total}  {left:4.0f} s left  {words}", flush=True)


def progress_words(values: dict[str, float]) -> str:
    """The few numbers a person wants to see beside the bar."""
    words = [f"loss {values['loss']:.4f}"]
    if "reward" in values:
        words = [f"reward {values['reward']:.3f}"]
    if "completions/mean_length" in values:
        words.append(f"caption {values['completions/mean_length']:.1f} tokens")
    return "  ".join([*words, f"{values['images_per_second']:.0f} img/s"])


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):  # cut short when the process was killed
        return math.inf
