"""What a configuration comes to before anything trains: the batches of a step, the sampler, the memory."""

from __future__ import annotations

from glob import glob

import torch
from rich import print as show
from rich.table import Table
from uae_kernels.mmdit.joint_attention import check_backend

from .config import Config, ConfigError, accelerated, cheaper
from .data import small_world
from .environment import quiet_libraries
from .models.loading import records_graphs
from .models.sources import find_sources
from .reporters import check_reporters


def show_check(config: Config, gpu_memory: float | None) -> None:
    """Prints what a sound configuration comes to, and what to change where a stage needs more than `gpu_memory` GiB.

    Raises:
        ConfigError: the models are not there or do not fit together, or a reporter is not installed.
    """
    check_reporters(config.reporters)
    find_sources(config)
    show(batches(config))
    show(f"renders: {config.render.steps} steps at {config.data.resolution}², {config.render.batch} at once")
    show(sampler_line(config))
    for key, place in (("train", config.data.train), ("heldout", config.data.heldout)):
        if "@" not in place and not glob(place):
            print(f"data.{key}: {place} is not there yet{small_world(f'data.{key}', place)}")
    show("the configuration is sound")
    show_memory(config, gpu_memory)


def batches(config: Config) -> Table:
    """How many samples a step of each stage has, and in what portions."""
    table = Table("stage", "steps", "images", "× group", "= samples", "in micro-batches of", "optimiser steps")
    for number in config.stages:
        stage = getattr(config, f"stage{number}")
        group, updates = getattr(stage, "group_size", 1), getattr(stage, "updates", 1)
        samples = stage.images * group
        passes = f"{stage.micro_batch} ({samples // stage.micro_batch})"
        passes += f", at {stage.window} sampler steps" if number == 3 else ""
        row = (number, stage.steps, stage.images, group, samples, passes, stage.steps * updates)
        table.add_row(*map(str, row))
    return table


def sampler_line(config: Config) -> str:
    """How images will be drawn: what computes them, and what makes them another sampler's.

    Raises:
        ConfigError: the attention backend is not installed, or graphs are wanted without a GPU.
    """
    sampler = config.same_sampler
    try:
        attention = check_backend(sampler.attention)
    except RuntimeError as error:
        raise ConfigError([f"same_sampler.attention: {error}"]) from None
    line = f"decoder: accelerated, attention by {attention}" if accelerated(config) else "decoder: by diffusers"
    if sampler.fp8:
        emulated = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
        line += ", products in fp8 where it is frozen" + (" (emulated)" if emulated else "")
    if sampler.accelerate and config.models.offload:
        line += ", because of models.offload"
    line += ", its steps in CUDA graphs" * records_graphs(config)
    changed = ", ".join(f"{key} {value}" for key, value in cheaper(config).items())
    return f"{line}; cheaper sampler: {changed}" if changed else line


def show_memory(config: Config, limit: float | None) -> None:
    """The predicted memory of each stage, and what to change where it is more than `limit` GiB."""
    quiet_libraries()
    from .models.memory import CUDA_BYTES, GIB, advise, predict, worst

    table = Table("stage", "needs most while", "weights and optimiser", "passing", "in all", title="predicted GiB")
    predicted = predict(config)
    for number, phases in predicted.items():
        peak = worst(phases)
        sizes = (peak.resident, peak.passing, peak.total)
        table.add_row(str(number), peak.name, *(f"{size / GIB:.2f}" for size in sizes))
    show(table)
    show(f"every sum has {CUDA_BYTES / GIB:.1f} GiB for CUDA itself; nothing here is measured")
    for number, phases in predicted.items():
        if limit is not None and worst(phases).total > limit * GIB:
            _, changes, needs = advise(config, number, phases, int(limit * GIB))
            verdict = "would need" if needs.total <= limit * GIB else "would still need"
            words = f"with {' '.join(changes)} it {verdict} {needs.total / GIB:.2f}" if changes else "nothing to change"
            show(f"stage {number} does not fit {limit:g} GiB: {words}")


def fill_batches(config: Config, limit: float) -> list[str]:
    """The largest batches that are predicted to fit into `limit` GiB, said and returned as overrides."""
    quiet_libraries()
    from .models.memory import GIB, fill

    changes = fill(config, int(limit * GIB))
    print(f"predicted to fit {limit:g} GiB: {' '.join(changes)}", flush=True)
    return changes
