"""A decoder's fp8 calibration: made from what is being drawn, kept beside the run's checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import writing

if TYPE_CHECKING:
    from uae_kernels.mmdit import Fp8Calibration, ModulationTable

NAME = "fp8.safetensors"
CAPTIONS = 32  # whose drawings a calibration sees


def calibrate_transformer(
    transformer: Any, runs: Sequence[dict[str, Any]], table: ModulationTable | None, attention: str
) -> Fp8Calibration:
    """`uae_kernels.mmdit.calibrate` with a progress line; `runs` are arguments of the transformer's forward pass."""
    from uae_kernels.mmdit import calibrate
    from uae_kernels.mmdit.calibration import passes

    from ..logging import ProgressLine

    with ProgressLine("fp8  calibration", passes(transformer, runs)) as progress:
        made = calibrate(transformer, runs, modulation_table=table, attention=attention, progress=progress.advance)
    kept = len(made.errors) - len(made.fallback)
    print(f"fp8: {kept} of {len(made.errors)} products; they move the velocity by {made.error:.2%}", flush=True)
    return made


def save_calibration(file: Path, made: Fp8Calibration) -> None:
    """Writes tensors as safetensors, and everything else as JSON in its metadata; whole or not at all."""
    words = {
        "fingerprint": made.fingerprint,
        "fallback": json.dumps(made.fallback),
        "errors": json.dumps(made.errors),
        "error": json.dumps(made.error),
    }
    tensors = {"timesteps": made.timesteps, **{f"scales.{name}": scales for name, scales in made.scales.items()}}
    part = file.with_suffix(".part")
    with writing(file):
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, metadata=words)
        os.replace(part, file)


def load_calibration(file: Path, transformer: Any, timesteps: torch.Tensor) -> Fp8Calibration:
    """A calibration for this transformer, as its weights are now, at these levels.

    Raises:
        ValueError: the file cannot be read, or was made for other weights or another schedule; it is named.
    """
    from uae_kernels.mmdit import Fp8Calibration

    try:
        with safe_open(file, "pt") as content:
            words = content.metadata()
            tensors = {name: content.get_tensor(name).to(timesteps.device) for name in content.keys()}  # noqa: SIM118
        made = Fp8Calibration(
            tensors.pop("timesteps"),
            {name.removeprefix("scales."): scales for name, scales in tensors.items()},
            tuple(json.loads(words["fallback"])),
            words["fingerprint"],
            json.loads(words["errors"]),
            json.loads(words["error"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a calibration: {error!r}") from None
    if not torch.equal(made.timesteps, timesteps.float()):
        raise ValueError(f"{file} is of another schedule")
    try:
        made.check(transformer)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return made
