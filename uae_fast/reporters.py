"""Where a run's metrics go besides metrics.jsonl. What a reporter is made of is imported only where it is asked for."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .config import ConfigError
from .config_checks import REPORTERS
from .files import write_whole

PROJECT = "uae-fast"


class Reporter(Protocol):
    """Shows a run elsewhere. Whatever it raises turns it off, never the run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, of a step of the whole run."""

    def pictures(self, step: int, found: dict[str, tuple[Path, str]]) -> None:
        """Picture files with their captions, by name."""

    def close(self) -> None: ...


def check_reporters(names: Sequence[str]) -> None:
    """Refuses reporters whose package is not installed.

    Raises:
        ConfigError: a line for each, with the command that installs it.
    """
    problems = [
        f"reporters: {name} is not installed; pip install 'uae-fast[{REPORTERS[name]}]'"
        for name in names
        if importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ConfigError(problems)


def open_reporter(name: str, run: Path, step: int, config: dict[str, Any]) -> Reporter:
    """A reporter by name ("tensorboard", "wandb", "trackio") for a run that has done so many steps."""
    return TensorBoard(run, step) if name == "tensorboard" else Tracker(name, run, config)


class TensorBoard:
    """Event files in the run's folder; those of an interrupted run's later steps no longer count."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, found: dict[str, tuple[Path, str]]) -> None:
        import numpy as np
        from PIL import Image

        for name, (file, caption) in found.items():
            with Image.open(file) as image:
                self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
            self.writer.add_text(name, caption, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """Weights & Biases, or Trackio, which has the same functions.

    A resumed run goes on as the same one: its id is kept in the run's folder (`run_id`). Neither code, nor the state of
    git, nor the console's output, nor what the process was called with is sent; the configuration is.
    """

    def __init__(self, name: str, run: Path, config: dict[str, Any]):
        self.module = importlib.import_module(name)
        if not (run / "run_id").is_file():
            write_whole(run / "run_id", secrets.token_hex(4) + "\n")
        number = (run / "run_id").read_text().strip()
        options: dict[str, Any] = {"embed": False}
        if name == "wandb":
            private = {"save_code": False, "disable_code": True, "disable_git": True, "x_disable_meta": True}
            options = {"id": number, "dir": str(run), "settings": self.module.Settings(console="off", **private)}
        self.run = self.module.init(
            project=os.environ.get(f"{name.upper()}_PROJECT", PROJECT),
            name=f"{run.resolve().name}-{number}",
            config=config,
            resume="allow",
            **options,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= getattr(self.run, "step", 0):  # W&B has a resumed run's steps that are done again already
            self.run.log(values, step=step)

    def pictures(self, step: int, found: dict[str, tuple[Path, str]]) -> None:
        images = {name: self.module.Image(str(file), caption=caption) for name, (file, caption) in found.items()}
        self.scalars(step, images)

    def close(self) -> None:
        self.module.finish()
