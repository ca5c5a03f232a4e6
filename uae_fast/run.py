"""A run under way: its parts, where it stands, and its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from .checkpoint import last_words, prune_checkpoints, remedy, save_checkpoint
from .config import Config
from .data import Example, ImageFolder
from .files import write_whole
from .guards import RunFailed, StopRequest, first_non_finite, first_unequal, saved_tensors
from .identity import machine
from .logging import RunLog
from .models import Models
from .parquet import ParquetImages
from .stages import Stage
from .team import Team


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        place: index into the configured stages.
        stage_step: steps done of that stage.
        step: steps done of the whole run.
        moment: the stage that has just ended, if one has.
        trained: parts trained so far.
        seconds: time spent so far.
        taken: steps of the stage that were not skipped, by which its learning rate warms up.
        skipped: steps of the run that were skipped because a number was not finite.
        skipped_in_row: how many of them came last, one after the other.
        micro_batch: the stage's, where memory ran out; 0: as configured.
    """

    place: int = 0
    stage_step: int = 0
    step: int = 0
    moment: str | None = None
    trained: tuple[str, ...] = ()
    seconds: float = 0.0
    taken: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    micro_batch: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """The position in a checkpoint's state."""
        return cls(**{item.name: state[item.name] for item in fields(cls)})


@dataclass
class Run:
    """A run under way.

    Attributes:
        identity: what it is made of, kept in every checkpoint.
        start: the checkpoint it goes on from, if it does.
        began: when it would have begun had it never stopped, by the monotonic clock.
        tensors: gives the present stage's optimiser state and running mean, by file.
        scores: `checkpoint.keep_best` of every step since the last checkpoint.
        saved: step and stage of the last checkpoint.
    """

    config: Config
    models: Models
    data: ImageFolder | ParquetImages
    folder: Path
    identity: dict[str, Any]
    start: Path | None
    position: Position
    log: RunLog
    stop: StopRequest
    began: float
    tensors: Callable[[], dict[str, dict[str, Tensor]]] = dict
    scores: list[float] = field(default_factory=list)
    saved: tuple[int, int] | None = field(init=False)

    def __post_init__(self) -> None:
        self.saved = None if self.start is None else (self.position.step, self.position.place)

    def save(self, *, must: bool = False) -> None:
        """Publishes a checkpoint of the last completed step.

        Process 0 writes it. Where the disk refuses, training goes on with the checkpoints there are, unless one `must`
        be written.

        Raises:
            RunFailed: a weight or moment is not finite or not the same in all processes, or the disk refuses what must
                be written.
        """
        position, folder = self.position, self.folder / "checkpoints"
        if self.saved == (position.step, position.place):
            return
        position.seconds = time.monotonic() - self.began
        tensors = self.tensors()
        named, device = saved_tensors(self.models, position.trained, tensors), self.models.decoder.device
        for find, wrong in ((first_non_finite, "is not finite"), (first_unequal, "differs between processes")):
            if (name := find(named, device)) is not None:
                raise RunFailed(f"step {position.step}: {name} {wrong}, nothing is saved; {self.last_words()}")
        state = {**asdict(position), "score": fmean(self.scores) if self.scores else None}
        state |= {"identity": self.identity, "machine": machine(self.config)}
        refused = ("", "")
        if Team().rank == 0:
            try:
                self.log.sync()
                save_checkpoint(folder, self.models, state, tensors)
                prune_checkpoints(folder, self.config.checkpoint)
            except OSError as error:
                refused = (str(error), remedy(error, self.folder))
        why, helps = Team().exchange(refused)[0]
        if why and must:
            raise RunFailed(f"step {position.step} cannot be saved: {why}; {helps}; {self.last_words()}")
        if why:
            print(f"step {position.step} not saved: {why}; training goes on, {self.last_words()}", flush=True)
            return
        self.saved = (position.step, position.place)
        self.scores.clear()

    def report_bad_step(self, stage: Stage, examples: Sequence[Example], bad: dict[str, str]) -> None:
        """Says that the last step was skipped, and leaves `bad_step_N.json`: what it was drawn from, and what was bad.

        Raises:
            RunFailed: it was one too many in a row (`optimizer.max_skipped`).
        """
        position = self.position
        everywhere = Team().exchange([{"id": example.id, "file": example.file} for example in examples])
        found: dict[str, Any] = {
            "step": position.step,
            "stage": stage.name,
            "stage_step": position.stage_step - 1,  # as seeds count it
            "seed": self.config.seed,
            "images": [image for images in everywhere for image in images],
            "not_finite": bad,
        }
        path = self.folder / f"bad_step_{position.step}.json"
        print(f"step {position.step} skipped: {', '.join(bad)} not finite; see {path}", flush=True)
        try:
            if Team().rank == 0:
                write_whole(path, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            print(f"{path} not written: {error}", flush=True)
        if position.skipped_in_row >= self.config.optimizer.max_skipped:
            raise RunFailed(
                f"{position.skipped_in_row} steps in a row were not finite (optimizer.max_skipped); {self.last_words()}"
            )

    def last_words(self) -> str:
        """Which checkpoint there is to go back to."""
        return last_words(self.folder)
