"""The one training loop, for every stage: rollout → update → log → save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import checkpoints, clear_leftovers, last_words, load_checkpoint, newest_checkpoint, read_state
from .config import Config, ConfigError, save_config
from .data import Example, ReadAhead
from .determinism import set_deterministic
from .evaluate.heldout import Evaluator
from .guards import (
    Interrupted,
    RunFailed,
    disk_failures,
    fetch,
    fitting,
    is_out_of_memory,
    non_finite,
    shrink_micro_batch,
    stop_requests,
)
from .identity import differences, machine, run_identity
from .logging import ProgressLine, RunLog, progress_words
from .models.fp8 import NAME as FP8_NAME
from .models.loading import load_models
from .models.sources import find_sources, pooled_file
from .optim import RunningMean, build_optimizer, optimizer_tensors, restore_optimizer, warm_up
from .parquet import open_images
from .phases import Stopwatch
from .report import write_report
from .reporters import check_reporters
from .run import Position, Run
from .speed import Speed
from .stages import Metrics, Stage
from .stages.cold_start import ColdStart
from .stages.decoder_pretrain import DecoderPretrain
from .stages.generation_for_understanding import GenerationForUnderstanding
from .stages.understanding_for_generation import UnderstandingForGeneration
from .team import Lost, Team, joined, merged

STAGES: tuple[Any, ...] = (DecoderPretrain, ColdStart, GenerationForUnderstanding, UnderstandingForGeneration)


def train(config: Config, *, resume: bool = False, force: Sequence[str] = ()) -> Path:
    """Runs the configured stages, each from the end of the one before, and measures held-out images in between.

    The processes that a launcher started share every step (`team`); process 0 writes.

    Args:
        config: the run.
        resume: go on from the run folder's last checkpoint instead of starting anew.
        force: keys of `identity.run_identity` that may differ from what they were.

    Returns:
        The run's folder: config.yaml, metrics.jsonl, tensorboard/, samples/, checkpoints/, summary.json, report.html.

    Raises:
        ConfigError: a folder is missing, the run folder has a run already (with `resume`: has none, or has one of
            another identity), or a step does not divide among the processes.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
        RunFailed: too many steps in a row were not finite, memory or disk does not suffice, another process has ended.
    """
    folder = Path(config.run)
    try:
        with joined(config) as team, disk_failures(folder):
            run_all(config, folder, resume, force, team)
    except Lost as error:
        raise RunFailed(f"{error}; {last_words(folder)}") from error
    return folder


def run_all(config: Config, folder: Path, resume: bool, force: Sequence[str], team: Team) -> None:
    """What `train` does, where an error of the disk is still one."""
    first = team.rank == 0
    if first:
        clear_leftovers(folder / "checkpoints")
    newest = newest_checkpoint(folder / "checkpoints") if first and resume else None
    found = team.exchange(str(newest or ""))[0]
    start = Path(found) if found else None
    if resume and start is None:
        raise ConfigError([f"run: {folder} has no checkpoint to resume from"])
    if not resume and (checkpoints(folder / "checkpoints") or (folder / "metrics.jsonl").exists()):
        raise ConfigError([f"run: {folder} has a run already; go on with --resume, or name another folder (run=…)"])
    find_sources(config)
    check_reporters(config.reporters)
    torch.set_float32_matmul_precision(config.float32_products)
    torch.backends.cudnn.allow_tf32 = config.float32_products != "highest"  # convolutions have a switch of their own
    print(set_deterministic(config.deterministic), flush=True)
    kinds = [STAGES[number] for number in config.stages]
    captions = any(kind.needs_captions for kind in kinds)
    data = open_images(config.data.train, "data.train", config.data, captions=captions)
    heldout = open_images(config.data.heldout, "data.heldout", config.data)
    for note in (*data.notes(), *heldout.notes()):
        print(note, flush=True)
    identity, position = run_identity(config), Position()
    everywhere = team.exchange(identity)
    if unequal := [key for key in identity if any(other[key] != everywhere[0][key] for other in everywhere)]:
        raise ConfigError([f"{key}: is not the same in all processes" for key in unequal])
    if start is not None:
        state = read_state(start)
        if changed := differences(state["identity"], identity, force):
            raise ConfigError(changed)
        position = Position.of(state)
        print(f"resuming from {start}", flush=True)
        if state["machine"] != machine(config):
            print(f"it was written by {state['machine']}; bits may differ on {machine(config)}", flush=True)

    if first:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    with team.first(lambda: not pooled_file(config, find_sources(config).decoder).is_file()):
        models = load_models(config)
    models.decoder.fp8_file = folder / FP8_NAME
    models.encoder.freeze_reader()
    if start is not None:
        load_checkpoint(start, models)
    evaluator = Evaluator(config, models, heldout, folder)
    log = RunLog(folder, config.reporters, position.step, asdict(config))
    began = time.monotonic() - position.seconds
    with stop_requests(models) as stop:
        run = Run(config, models, data, folder, identity, start, position, log, stop, began)
        try:
            run.save(must=True)  # of step 0: a run can be resumed from its first moment on
            run_stages(run, kinds, evaluator)
        finally:
            log.close()
    if first:
        evaluator.summary(minutes=(time.monotonic() - began) / 60)
        write_report(folder)
    team.exchange()  # nobody returns before that is written


def run_stages(run: Run, kinds: Sequence[Any], evaluator: Evaluator) -> None:
    """The stages from where the run stands on, and the measurements between them; each is made once."""
    position = run.position

    def measure(moment: str) -> None:
        with run.stop.heeded():
            evaluator.measure(moment)
        run.log.heldout(position.step, *evaluator.shown(moment))

    for kind in kinds[position.place :]:
        if kind not in kinds[: position.place]:
            evaluator.forget(kind.name)
    try:
        if position.step == 0:
            with run.stop.heeded():
                evaluator.ceiling()
            measure("before")
        if position.moment:
            measure(position.moment)
        while position.place < len(kinds):
            stage = kinds[position.place](run.config, run.models)
            run_stage(stage, run)
            measure(stage.name)
    except Interrupted:
        run.save(must=True)
        raise
    run.save(must=True)


def run_stage(stage: Stage, run: Run) -> None:
    """One stage from the run's position to its end; the position moves along."""
    config, models, settings, position = run.config, run.models, stage.settings, run.position
    settings.micro_batch = fitting(settings, position.micro_batch or settings.micro_batch)
    groups = stage.groups()
    models.bring(stage.trains)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, config.optimizer)
    mean = RunningMean(parameters, getattr(settings, "ema_decay", 0.0))
    reference = models.decoder.reference_copy
    speed = Speed(stage, config)
    if position.stage_step and run.start is not None:
        restore_optimizer(optimizer, load_file(run.start / "optimizer.safetensors"))
        mean.restore(load_file(run.start / "mean.safetensors"))
        if reference is not None:
            reference.load_state_dict(load_file(run.start / "reference.safetensors"))

    def tensors() -> dict[str, dict[str, Tensor]]:
        found = {"optimizer": optimizer_tensors(optimizer), "mean": mean.tensors()}
        return found if reference is None else {**found, "reference": reference.state_dict()}

    images = ReadAhead(run.data, settings.images, config.seed, stage.name, settings.steps, stage.prepare)
    with images, ProgressLine(f"{stage.name}  {stage.title}", settings.steps, position.stage_step) as progress:
        for step in range(position.stage_step, settings.steps):
            speed.start()
            examples = images.batch(step)
            warm_up(optimizer, position.taken, config.optimizer.warmup_steps)
            values, bad = take_step(stage, examples, step, optimizer, mean, run)
            position.stage_step, position.step, position.moment = step + 1, position.step + 1, None
            position.trained = tuple(sorted({*position.trained, *stage.trains}))
            position.taken += not bad
            position.skipped += bool(bad)
            position.skipped_in_row = position.skipped_in_row + 1 if bad else 0
            run.tensors = tensors

            values["lr"] = optimizer.param_groups[0]["lr"]
            values["micro_batch"] = settings.micro_batch
            values["skipped_steps"], values["skipped_images"] = position.skipped, len(run.data.skipped)
            speed.measure(values, images.waited)
            if models.decoder.loops is not None:
                values["memory/graphs_gb"] = models.decoder.loops.recorder.bytes / 2**30
            run.log.metrics(position.step, stage.name, values)
            progress.advance(words=progress_words(values))
            if bad:
                run.report_bad_step(stage, examples, bad)
            elif config.checkpoint.keep_best in values:
                run.scores.append(values[config.checkpoint.keep_best])
            due = position.stage_step % config.checkpoint.every == 0 or any(Team().exchange(run.stop.save))
            if due and position.stage_step < settings.steps:
                run.save()
            run.stop.save = False

    mean.adopt()
    models.freeze()
    if "decoder" in stage.trains and stage.reads_as_policy:
        models.encoder.freeze_reader()  # the decoder now knows this encoder's conditions
    position.place, position.stage_step, position.moment = position.place + 1, 0, stage.name
    position.taken, position.micro_batch, run.tensors = 0, 0, dict
    run.save()


def take_step(
    stage: Stage, examples: Sequence[Example], step: int, optimizer: torch.optim.Optimizer, mean: RunningMean, run: Run
) -> tuple[dict[str, float], dict[str, str]]:
    """A rollout and its updates.

    Until the first update nothing has changed. So far, a request to stop is heeded at every forward pass, and a step
    that runs out of memory begins anew in smaller micro-batches: it is the step of a run that was configured with them.
    A number that is not finite, in the metrics of rollout or update, ends the step before the optimiser moves.

    Returns:
        The metrics of the first update (of the one that was not finite) with the seconds of rollout and its phases, and
        those of them that are not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values: dict[str, float] = {}
    bad: dict[str, str] = {}
    rollout, done, watch = None, 0, Stopwatch(run.models.decoder.device)
    while done < getattr(stage.settings, "updates", 1) and not bad:
        found = None
        try:
            with run.stop.heeded(done == 0):
                if rollout is None:
                    with watch.running("rollout"):
                        rollout = stage.rollout(examples, step)
                metrics = accumulate(stage, rollout, parameters, run.config.optimizer.max_grad_norm)
                found = Team().merge(fetch({**rollout.metrics, **metrics}))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Dealt with below, where its traceback holds no tensors any more
        if found is None:
            optimizer.zero_grad()
            rollout = rollout if done else None
            run.position.micro_batch = shrink_micro_batch(stage)
            continue
        bad = non_finite(found)
        if not bad:
            optimizer.step()
            mean.update()
        optimizer.zero_grad()
        values = found if bad or not done else values
        done += 1
    return {**values, **{f"seconds/{name}": took for name, took in watch.seconds().items()}}, bad


def accumulate(stage: Stage, rollout: Any, parameters: list[nn.Parameter], max_grad_norm: float) -> Metrics:
    """Gradients of a rollout, micro-batch by micro-batch, averaged over the processes and clipped.

    The losses are shares that add up; each process has those of its own samples, of which all have equally many.
    """
    collected: dict[str, list[Tensor]] = {}
    size = stage.settings.micro_batch
    for start in range(0, len(rollout), size):
        loss, metrics = stage.loss(rollout, slice(start, start + size))
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            collected.setdefault(name, []).append(value)
    Team().average_gradients(parameters)
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    stacked = {name: torch.stack(values) for name, values in collected.items()}
    means = {name: merged(name, values) for name, values in stacked.items()}
    return {**means, "loss": stacked["loss"].sum(), "grad_norm": grad_norm.detach()}
