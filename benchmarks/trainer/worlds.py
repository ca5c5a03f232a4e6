"""A stage on the small world, ready for a step: its configuration, images, models and parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from uae_fast.config import Config, load_config
from uae_fast.data import Example, ImageFolder
from uae_fast.guards import StopRequest
from uae_fast.models.loading import load_models
from uae_fast.optim import RunningMean, build_optimizer, warm_up
from uae_fast.run import Position
from uae_fast.tiny.export import export
from uae_fast.trainer import STAGES, take_step


@dataclass
class Prepared:
    """A stage with what it trains, and the images of its first step."""

    stage: Any
    parameters: list[nn.Parameter]
    data: ImageFolder
    examples: Sequence[Example]


def small_world(folder: Path, scenes: int = 64) -> Path:
    """`folder` with that many training scenes in it, and as many held-out ones, made unless they are there."""
    for split in ("train", "heldout"):
        if not (folder / split / "captions.jsonl").is_file():
            export(folder / split, split, scenes, seed=0)
    return folder


def noise_world(folder: Path, side: int = 504, count: int = 8, words: int = 300) -> Path:
    """`folder` with images of noise and captions of words that a random model's tokenizer knows."""
    for split in ("train", "heldout"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.frombytes("RGB", (side, side), pixels.numpy().tobytes()).save(folder / split / f"{i}.png")
            caption = " ".join(f"w{20 + (7 * i + j) % 1000}" for j in range(words))
            rows.append(json.dumps({"file": f"{i}.png", "caption": caption}) + "\n")
        (folder / split / "captions.jsonl").write_text("".join(rows))
    return folder


def full_config(world: Path, preset: str, *overrides: str) -> Config:
    """A preset of full-size models with random weights, on a world of `noise_world`."""
    paths = [f"data.{split}={world / split}" for split in ("train", "heldout")]
    return load_config(preset, [*paths, f"run={world / 'run'}", "reporters=[]", "models.load=dummy", *overrides])


def tiny_config(world: Path, *overrides: str) -> Config:
    """The tiny preset on a world of `small_world`."""
    paths = [f"data.{split}={world / split}" for split in ("train", "heldout")]
    return load_config("tiny", [*paths, f"run={world / 'run'}", "reporters=[]", *overrides])


def prepare(number: int, config: Config, data: ImageFolder | None = None) -> Prepared:
    """Stage `number` of a configuration, as a run that starts with it would have it."""
    data = data or ImageFolder(config.data.train, "data.train")
    models = load_models(config)
    models.encoder.freeze_reader()
    stage = STAGES[number](config, models)
    parameters = [parameter for group in stage.groups() for parameter in group["params"]]
    return Prepared(stage, parameters, data, data.batch(0, stage.settings.images, config.seed, stage.name))


class Steps:
    """A stage's steps one after another, as `uae-fast train` takes them: data by hand, then all the rest."""

    def __init__(self, number: int, config: Config):
        ready = prepare(number, config)
        self.stage, self.data, self.config, self.step = ready.stage, ready.data, config, 0
        groups = self.stage.groups()
        self.stage.models.bring(self.stage.trains)
        self.optimizer = build_optimizer(groups, config.optimizer)
        self.mean = RunningMean(ready.parameters, getattr(self.stage.settings, "ema_decay", 0.0))
        self.run: Any = SimpleNamespace(
            config=config, models=self.stage.models, stop=StopRequest(), position=Position(), data=self.data
        )

    def examples(self) -> Sequence[Example]:
        """Of the next step."""
        return self.data.batch(self.step, self.stage.settings.images, self.config.seed, self.stage.name)

    def take(self, examples: Sequence[Example]) -> tuple[dict[str, float], dict[str, str]]:
        """The next step's metrics, and what is not finite."""
        warm_up(self.optimizer, self.step, self.config.optimizer.warmup_steps)
        found = take_step(self.stage, examples, self.step, self.optimizer, self.mean, self.run)
        self.step += 1
        return found


def gradients(stage: Any, rollout: Any, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a rollout's update, before any clipping."""
    size, total = stage.settings.micro_batch, torch.zeros(())
    for parameter in parameters:
        parameter.grad = None
    for start in range(0, len(rollout), size):
        loss, _ = stage.loss(rollout, slice(start, start + size))
        loss.backward()
        total = total + loss.detach()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
