"""The one training loop, for every stage: rollout → update → log → save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from .config import Config, ConfigError, save_config
from .data import ImageFolder
from .evaluate.heldout import Evaluator
from .logging import ProgressLine, RunLog
from .models.loading import load_models
from .models.sources import find_sources
from .optim import RunningMean, build_optimizer, optimizer_tensors, restore_optimizer, warm_up
from .parquet import ParquetImages, open_images
from .report import write_report
from .stages import Metrics, Stage
from .stages.cold_start import ColdStart
from .stages.decoder_pretrain import DecoderPretrain
from .stages.generation_for_understanding import GenerationForUnderstanding
from .stages.understanding_for_generation import UnderstandingForGeneration

STAGES: tuple[Any, ...] = (DecoderPretrain, ColdStart, GenerationForUnderstanding, UnderstandingForGeneration)


class Interrupted(Exception):
    """Ctrl-C was pressed, and a checkpoint saved."""


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
    """

    place: int = 0
    stage_step: int = 0
    step: int = 0
    moment: str | None = None
    trained: tuple[str, ...] = ()
    seconds: float = 0.0


def train(config: Config, *, resume: bool = False) -> Path:
    """Runs the configured stages, each from the end of the one before, and measures held-out images in between.

    Args:
        config: the run.
        resume: go on from the run folder's last checkpoint instead of starting anew.

    Returns:
        The run's folder: config.yaml, metrics.jsonl, tensorboard/, samples/, checkpoints/, summary.json, report.html.

    Raises:
        ConfigError: a folder is missing, or the run folder has a run already (with `resume`: has none).
        Interrupted: after Ctrl-C, with a checkpoint saved.
    """
    folder = Path(config.run)
    saved = checkpoints(folder / "checkpoints")
    if resume and not saved:
        raise ConfigError([f"run: {folder} has no checkpoint to resume from"])
    if not resume and (folder / "metrics.jsonl").exists():
        raise ConfigError([f"run: {folder} has a run already; go on with --resume, or name another folder (run=…)"])
    find_sources(config)
    stages = [STAGES[number] for number in config.stages]
    captions = any(stage.needs_captions for stage in stages)
    data = open_images(config.data.train, "data.train", config.data, captions=captions)
    heldout = open_images(config.data.heldout, "data.heldout", config.data)
    for images in (data, heldout):
        for file, reason in images.skipped.items():
            print(f"skipped {images.folder / file}: {reason}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    models = load_models(config)
    models.encoder.freeze_reader()
    position = Position()
    if resume:
        position = Position(**load_checkpoint(saved[-1], models))
        print(f"resuming from {saved[-1]}", flush=True)
    began = time.monotonic() - position.seconds
    log = RunLog(folder, config.reporters, position.step)
    evaluator = Evaluator(config, models, heldout, folder)
    if not resume:
        evaluator.ceiling()
        evaluator.measure("before")
    elif position.moment:
        evaluator.measure(position.moment)

    with stop_requests() as stop:
        while position.place < len(stages):
            position.seconds = time.monotonic() - began
            stage = stages[position.place](config, models)
            run_stage(stage, config, data, position, folder, log, stop, began)
            evaluator.measure(stage.name)
    log.close()
    evaluator.summary(minutes=(time.monotonic() - began) / 60)
    write_report(folder)
    return folder


def run_stage(
    stage: Stage,
    config: Config,
    data: ImageFolder | ParquetImages,
    position: Position,
    folder: Path,
    log: RunLog,
    stop: StopRequest,
    began: float,
) -> None:
    """One stage from `position` to its end; `position` moves along."""
    settings, models = stage.settings, stage.models
    position.trained = tuple(sorted({*position.trained, *stage.trains}))
    position.moment = None
    groups = stage.groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, config.optimizer)
    mean = RunningMean(parameters, getattr(settings, "ema_decay", 0.0))
    if position.stage_step:
        saved = checkpoints(folder / "checkpoints")[-1]
        restore_optimizer(optimizer, load_file(saved / "optimizer.safetensors"))
        mean.restore(load_file(saved / "mean.safetensors"))
        if models.decoder.reference_copy is not None:
            models.decoder.reference_copy.load_state_dict(load_file(saved / "reference.safetensors"))

    def save() -> None:
        position.seconds = time.monotonic() - began
        tensors = {"optimizer": optimizer_tensors(optimizer), "mean": mean.tensors()}
        if models.decoder.reference_copy is not None:
            tensors["reference"] = models.decoder.reference_copy.state_dict()
        save_checkpoint(folder / "checkpoints", models, asdict(position), {} if position.moment else tensors)
        prune_checkpoints(folder / "checkpoints", config.checkpoint.keep)

    with ProgressLine(f"{stage.name}  {stage.title}", settings.steps, position.stage_step) as progress:
        for step in range(position.stage_step, settings.steps):
            start = time.monotonic()
            rollout = stage.rollout(data.batch(step, settings.images, config.seed, stage.name), step)
            rolled_out = time.monotonic()

            warm_up(optimizer, step, config.optimizer.warmup_steps)
            updates = []
            for _ in range(getattr(settings, "updates", 1)):
                updates.append(update(stage, rollout, optimizer, parameters, config.optimizer.max_grad_norm))
                mean.update()
            position.stage_step, position.step = step + 1, position.step + 1
            values = {name: float(value) for name, value in {**rollout.metrics, **updates[0]}.items()}
            done = time.monotonic()

            values["lr"] = optimizer.param_groups[0]["lr"]
            values["seconds/rollout"], values["seconds/update"] = rolled_out - start, done - rolled_out
            values["images_per_second"] = settings.images * getattr(settings, "group_size", 1) / (done - start)
            values["skipped_images"] = len(data.skipped)
            log.metrics(position.step, stage.name, values)
            progress.advance(words=progress_words(values))

            if stop.requested:
                save()
                raise Interrupted(f"stopped after step {step + 1} of {stage.name} and saved; go on with --resume")
            if position.stage_step % config.checkpoint.every == 0 and position.stage_step < settings.steps:
                save()

    mean.adopt()
    models.freeze()
    if "decoder" in stage.trains and stage.reads_as_policy:
        models.encoder.freeze_reader()  # the decoder now knows this encoder's conditions
    position.place, position.stage_step, position.moment = position.place + 1, 0, stage.name
    save()


def update(
    stage: Stage, rollout, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_grad_norm: float
) -> Metrics:
    """One optimiser step on a rollout, micro-batch by micro-batch; their losses are shares that add up."""
    collected: dict[str, list[Tensor]] = {}
    size = stage.settings.micro_batch
    for start in range(0, len(rollout), size):
        loss, metrics = stage.loss(rollout, slice(start, start + size))
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            collected.setdefault(name, []).append(value)
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    merged = {name: torch.stack(values) for name, values in collected.items()}
    means = {name: values.amax() if name.endswith("max") else values.mean() for name, values in merged.items()}
    return {**means, "loss": merged["loss"].sum(), "grad_norm": grad_norm.detach()}


def progress_words(values: dict[str, float]) -> str:
    """The few numbers a person wants to see beside the bar."""
    words = [f"loss {values['loss']:.4f}"]
    if "reward" in values:
        words = [f"reward {values['reward']:.3f}"]
    if "completions/mean_length" in values:
        words.append(f"caption {values['completions/mean_length']:.1f} tokens")
    return "  ".join([*words, f"{values['images_per_second']:.0f} img/s"])


class StopRequest:
    """Whether Ctrl-C has been pressed."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within, the first Ctrl-C asks the loop to save and stop after the present step; the second stops at once."""
    stop = StopRequest()

    def on_interrupt(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nsaving after this step; press Ctrl-C again to stop at once", flush=True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
