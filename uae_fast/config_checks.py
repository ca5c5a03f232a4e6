"""What a configuration contradicts itself in, told from its keys alone: before any file is read or model loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter

from .config import Config, leaves
from .text import short

DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")
REPORTERS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}  # package, and its extra of uae-fast
FOLDERS = ("run", "data.train", "data.heldout", "models.path")  # the last may be empty
AT_LEAST = {
    1: (
        "data.resolution", "caption.max_new_tokens", "condition.length", "render.batch", "models.lora_rank",
        "stage0.micro_batch", "stage1.micro_batch", "stage2.micro_batch", "stage3.micro_batch",
        "stage2.updates", "stage3.updates", "stage1.sampler_steps", "stage3.window",
        "optimizer.max_skipped", "checkpoint.every", "checkpoint.keep",
    ),
    2: ("render.steps",),
}  # fmt: skip
ABOVE_0 = ("stage2.temperature", "optimizer.eps", "optimizer.max_grad_norm")

Faults = Iterator[tuple[str, str]]
"""Pairs of a key and what is wrong with its value."""


def invariants(config: Config) -> list[tuple[str, str]]:
    """Every fault of a configuration, as (key, message)."""
    checks = (_ranges, _run, _stages, _same_sampler, _cheaper_sampler, _models, _reward)
    return [fault for check in checks for fault in check(config)]


def _ranges(c: Config) -> Faults:
    """Of single values."""
    given = {key: attrgetter(key)(c) for key in leaves()}
    for key, value in given.items():
        if isinstance(value, int | float) and value < 0 and key != "seed":
            yield key, f"{value} is negative"
    for least, keys in AT_LEAST.items():
        for key in keys:
            if given[key] < least:
                yield key, f"at least {least}"
    for key in ABOVE_0:
        if given[key] <= 0:
            yield key, "must be above 0"
    for key in FOLDERS:
        if not given[key].strip() and (given[key] or key != "models.path"):
            yield key, "names no folder"
    if c.data.max_bad >= 1:
        yield "data.max_bad", "is a share: below 1"
    if c.models.lora_alpha < 1:
        yield "models.lora_alpha", "at least 1: at 0 an adapter adds nothing"
    if c.stage3.ema_decay >= 1:
        yield "stage3.ema_decay", "must be below 1"


def _run(c: Config) -> Faults:
    if not DEVICE.fullmatch(c.device):
        yield "device", f"no device {short(c.device)!r}; choose auto, cpu, cuda, cuda:N or mps"
    if not c.stages:
        yield "stages", "no stage to run; choose from 0, 1, 2, 3"
    for stage in dict.fromkeys(c.stages):
        if stage not in (0, 1, 2, 3):
            yield "stages", f"there is no stage {stage}; choose from 0, 1, 2, 3"
        if c.stages.count(stage) > 1:
            yield "stages", f"stage {stage} is listed twice"
    for reporter in c.reporters:
        if reporter not in REPORTERS:
            yield "reporters", f"no reporter {short(reporter)!r}; choose from {', '.join(REPORTERS)}"
    betas = c.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield "optimizer.betas", "two numbers of at least 0 and below 1 are needed"
    if not _ascend(c.condition.buckets, c.condition.length):
        yield "condition.buckets", f"must ascend and lie below condition.length = {c.condition.length}"


def _stages(c: Config) -> Faults:
    for name in ("stage0", "stage1", "stage2", "stage3"):
        stage = getattr(c, name)
        rows = stage.images * getattr(stage, "group_size", 1)
        if stage.images < 1:
            yield f"{name}.images", "at least 1 image a step"
        if hasattr(stage, "group_size") and stage.group_size < 2:
            yield f"{name}.group_size", "a group of 1 has no advantage: at least 2"
        if stage.micro_batch >= 1 and rows % stage.micro_batch:
            portions = f"micro-batches of {stage.micro_batch}"
            yield f"{name}.micro_batch", f"{rows} samples a step do not divide into {portions}"
    if not 1 <= c.stage1.backprop_last_steps <= c.stage1.sampler_steps:
        yield "stage1.backprop_last_steps", f"must lie between 1 and stage1.sampler_steps = {c.stage1.sampler_steps}"
    sde = c.stage3
    if sde.window > sde.window_end:
        yield "stage3.window", f"{sde.window} steps do not fit into the first {sde.window_end} (stage3.window_end)"
    if sde.window_end >= c.render.steps:
        yield "stage3.window_end", f"must be below render.steps = {c.render.steps}: the last step is never trained on"
    if sde.noise_level <= 0:
        yield "stage3.noise_level", "must be above 0: a path without noise has no log-prob"
    if sde.kind == "cps" and sde.noise_level > 1:
        yield "stage3.noise_level", "of stage3.kind = cps is a fraction of a quarter turn: at most 1"


def _same_sampler(c: Config) -> Faults:
    sampler, quantization = c.same_sampler, c.models.decoder_quantization
    kept = f"models.decoder_quantization is {quantization}"
    unaccelerated = "" if sampler.accelerate else "same_sampler.accelerate is false"
    if c.models.offload:
        unaccelerated = "models.offload is true"
    if unaccelerated and sampler.attention != "auto":
        yield "same_sampler.attention", f"chooses for the accelerated decoder alone; {unaccelerated}"
    if sampler.graph:
        key = "same_sampler.graph"
        if c.device != "auto" and not c.device.startswith("cuda"):
            yield key, f"records CUDA graphs, but device = {short(c.device)}: choose a CUDA device, or false"
        if c.models.offload:
            yield key, "a graph reads weights where they were recorded, but models.offload moves them: choose false"
        if quantization != "none":
            yield key, f"quantised layers are not recorded: {kept}, choose none, or false here"
    if sampler.fp8:
        key = "same_sampler.fp8"
        if unaccelerated:
            yield key, f"is of the accelerated decoder alone; {unaccelerated}"
        if quantization != "none":
            other = ", which keeps them in e4m3 and multiplies in models.dtype: choose one of the two"
            yield key, f"takes weights as they are; {kept}{other * (quantization == 'fp8')}"
        if c.device.partition(":")[0] not in ("auto", "cuda", "cpu"):
            yield key, f"runs on a GPU by CUDA, or emulated on a CPU; device is {c.device}"


def _cheaper_sampler(c: Config) -> Faults:
    cheap, steps = c.cheaper_sampler, c.cheaper_sampler.steps or c.render.steps
    if cheap.steps >= c.render.steps:
        key = "cheaper_sampler.steps"
        yield key, f"{cheap.steps} are no fewer than render.steps = {c.render.steps}; 0 takes as many"
    if not 0 < cheap.guided_part <= 1:
        yield "cheaper_sampler.guided_part", "is a share: above 0, and at most 1"
    if cheap.guided_part != 1 and c.render.guidance_scale == 1:
        yield "cheaper_sampler.guided_part", "chooses guided steps, but there are none: render.guidance_scale is 1"
    if not _ascend(cheap.reuse, steps):
        last = f"{'cheaper_sampler' if cheap.steps else 'render'}.steps = {steps}"
        yield "cheaper_sampler.reuse", f"must ascend and lie between 1 and {steps - 1}, the last step: {last}"


def _models(c: Config) -> Faults:
    for part in ("encoder", "decoder"):
        trains, quantization = getattr(c.models, part), getattr(c.models, f"{part}_quantization")
        key = f"models.{part}_quantization"
        if quantization != "none" and trains == "full":
            yield key, f"quantised weights do not train in full: set models.{part} to lora"
        if quantization == "int8" and c.models.offload:
            yield key, "int8 weights cannot be moved by models.offload: choose nf4 or fp8"
        if quantization == "fp8" and c.device == "mps":
            yield key, "keeps e4m3 numbers, which mps does not have: choose none, or another device"
        if trains == "full" and c.models.offload:
            yield f"models.{part}", "what trains in full keeps copies that models.offload cannot move: choose lora"


def _reward(c: Config) -> Faults:
    encoders, weights = c.reward.encoders or [""], c.reward.weights
    if len(weights) not in (0, len(encoders)):
        yield "reward.weights", f"{len(weights)} weights for {len(encoders)} encoders (reward.encoders)"
    if any(weight < 0 for weight in weights) or (weights and sum(weights) <= 0):
        yield "reward.weights", "must not be negative, nor all 0"


def _ascend(numbers: list[int], end: int) -> bool:
    """Whether numbers ascend, from 1 on and below `end`."""
    return numbers == sorted(set(numbers)) and all(1 <= number < end for number in numbers)
