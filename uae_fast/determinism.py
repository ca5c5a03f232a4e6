"""Whether PyTorch may use algorithms that do not repeat bit for bit, and how the present process stands to that."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> str:
    """Allows PyTorch only algorithms that repeat, if `wanted`, and says how things stand, in a line.

    An operation that has no such algorithm raises from then on and names itself. cuBLAS repeats only with a workspace
    of its own, which must be asked for before the first use of the GPU. Without `wanted` nothing is changed.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        torch.backends.cudnn.benchmark = False
    return describe_determinism()


def describe_determinism() -> str:
    """What of PyTorch's settings decides whether a run repeats bit for bit on one machine."""
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    facts = [
        "yes" if strict and not warns else "warnings only" if strict else "as PyTorch chooses",
        f"float32 products {torch.get_float32_matmul_precision()}",
        f"{torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        facts.append(f"CUBLAS_WORKSPACE_CONFIG {os.environ.get('CUBLAS_WORKSPACE_CONFIG', 'unset')}")
        facts.append(f"cuDNN benchmark {'on' if torch.backends.cudnn.benchmark else 'off'}")
    return f"deterministic: {', '.join(facts)}"
