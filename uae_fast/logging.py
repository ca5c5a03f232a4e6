"""What a run says while it works: metrics.jsonl, TensorBoard, and progress on the console."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0  # seconds between plain progress lines


class RunLog:
    """Writes the metrics of a run and shows its progress.

    Args:
        folder: the run's.
        reporters: besides metrics.jsonl: "tensorboard".
        step: steps done before; later rows of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, reporters: Sequence[str], step: int = 0):
        self.path = folder / "metrics.jsonl"
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [row for row in rows if json.loads(row)["step"] <= step]
        self.path.write_text("".join(f"{row}\n" for row in kept))
        self.writer = None
        if "tensorboard" in reporters:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def metrics(self, step: int, stage: str, values: dict[str, float]) -> None:
        """One step's row; `step` counts over the whole run, from 1."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


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
