"""Static fp8 scales from drawings, and which products had better stay as they are."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..reference.mmdit.fp8 import LARGEST, SMALLEST_SCALE
from .modulation_table import ModulationTable
from .patch import accelerate_sd3, restore_sd3
from .products import Fp8Calibration, Fp8InUse, check_products, fingerprint, products, static

log = logging.getLogger("uae_kernels")


@torch.no_grad()
def calibrate(
    transformer: Any,
    runs: Sequence[dict[str, Any]],
    *,
    margin: float = 1.5,
    threshold: float = 0.02,
    sweep: int = 2,
    modulation_table: ModulationTable | None = None,
    attention: str = "auto",
    progress: Callable[[], None] | None = None,
) -> Fp8Calibration:
    """Measures what `accelerate_sd3(fp8=...)` needs to know of a transformer with the weights and adapters it has.

    Every run is computed as it is, and the largest input of each product that follows an attention or a GELU noted by
    level. Then, at a few of the levels, each product in turn is computed in e4m3: where that alone moves the velocity
    by more than `threshold` of its norm, the product is left as it is. What that leaves is a function of the weights
    and of the runs: a product whose error is near the threshold may be left by one set of captions and kept by another.

    Args:
        transformer: not accelerated; afterwards it is as it was.
        runs: arguments of its forward pass, such as all steps of 32 captions' drawings; each of one timestep.
        margin: how much larger inputs may come than those seen; beyond it they are cut. Numbers with an exponent lose
            nothing by it but the smallest of them.
        threshold: the most that one product may move the velocity, relative to the velocity's norm.
        sweep: at how many of the levels, evenly spread, the products are tried, in the first run of each: a forward
            pass each for each product. Errors differ severalfold between levels, so how many runs there are of each
            must not decide which are tried.
        modulation_table, attention: as of `accelerate_sd3`.
        progress: called after every forward pass; there are `passes(transformer, runs, sweep)` of them.

    Returns:
        An `Fp8Calibration`, on the runs' device.

    Raises:
        ValueError: no runs, a run of several timesteps, and as of `accelerate_sd3`.
        RuntimeError: a GPU older than sm_89; numbers that are not finite.
    """
    if not runs:
        raise ValueError("calibrate: no runs")
    levels = [_level(run["timestep"]) for run in runs]
    check_products(transformer)
    accelerate_sd3(transformer, modulation_table=modulation_table, attention=attention)
    try:
        scales, timesteps = _scales(transformer, runs, levels, margin, progress)
        tried = [runs[i] for i in _spread(levels, sweep)]
        made = Fp8Calibration(timesteps, scales, fingerprint=fingerprint(transformer))
        exact = [_velocity(transformer, run) for run in tried]

        def error(names: list[str]) -> float:
            state = transformer._uae
            state.fp8 = Fp8InUse(transformer, made, names)
            try:
                pairs = [(_velocity(transformer, run), v) for run, v in zip(tried, exact, strict=True)]
            finally:
                state.fp8.put_back(transformer.pos_embed.proj.weight.device)
                state.fp8 = None
            if progress is not None:
                for _ in pairs:
                    progress()
            found = [(v - e).norm() / e.norm().clamp(min=1e-30) for v, e in pairs]
            return torch.stack(found).square().mean().sqrt().item()

        errors = {name: error([name]) for name in products(transformer)}
        fallback = tuple(name for name, found in errors.items() if not found <= threshold)
        together = error([name for name in errors if name not in fallback])
    finally:
        restore_sd3(transformer)
    for name in fallback:
        log.info("fp8: %s stays as it is: alone it moves the velocity by %.1f %%", name, 100 * errors[name])
    return Fp8Calibration(timesteps, scales, fallback, made.fingerprint, errors, together)


def passes(transformer: Any, runs: Sequence[Any], sweep: int = 2) -> int:
    """How many forward passes `calibrate` reports."""
    tried = _spread([_level(run["timestep"]) for run in runs], sweep)
    return len(runs) + len(tried) * (len(products(transformer)) + 1)


def _spread(levels: Sequence[float], count: int) -> list[int]:
    """Indices of the first runs at so many of the levels, evenly spread from the highest to the lowest."""
    order = sorted(set(levels), reverse=True)
    count = min(count, len(order))
    return [levels.index(order[(2 * i + 1) * len(order) // (2 * count)]) for i in range(count)]


def _scales(
    transformer: Any, runs: Sequence[dict[str, Any]], levels: list[float], margin: float, progress: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """By product (S,) scales, and (S,) the levels, descending."""
    order = sorted(set(levels), reverse=True)
    device = runs[0]["hidden_states"].device
    names = static(products(transformer))
    largest = torch.zeros(len(order), len(names), device=device)
    for run, level in zip(runs, levels, strict=True):
        row = largest[order.index(level)]
        with _watched(transformer, names, row):
            _velocity(transformer, run)
        if progress is not None:
            progress()
    if not largest.isfinite().all():
        raise RuntimeError("calibrate: an input of a product is not finite")
    scales = (margin * largest / LARGEST).clamp(min=SMALLEST_SCALE).unbind(1)
    found = {name: scale.contiguous() for name, scale in zip(names, scales, strict=True)}
    return found, torch.tensor(order, dtype=torch.float32, device=device)


@contextmanager
def _watched(transformer: Any, names: list[str], largest: Tensor) -> Iterator[None]:
    """Within, `largest` (P,) takes the largest input of each product."""

    def note(i: int) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            largest[i] = torch.maximum(largest[i], given[0].abs().amax().float())

        return hook

    layers = products(transformer)
    hooks = [layers[name][0].register_forward_pre_hook(note(i)) for i, name in enumerate(names)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _velocity(transformer: Any, run: dict[str, Any]) -> Tensor:
    return transformer(**{**run, "return_dict": False})[0].float()


def _level(timestep: Tensor) -> float:
    levels = timestep.float().unique().tolist()
    if len(levels) != 1:
        raise ValueError(f"calibrate: a run is of one timestep, got {levels}")
    return levels[0]
