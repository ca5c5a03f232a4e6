"""Where the tests run, and how they measure errors."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
OLD_GPU = ON_GPU and torch.cuda.get_device_capability() < (8, 9)
needs_fp8 = pytest.mark.skipif(OLD_GPU, reason="needs a GPU that has e4m3 numbers, sm_89 or newer")


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def peak_bytes(profiler) -> int:
    """The most that was allocated at once while a profiler with `profile_memory` looked on."""
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
