"""Attention over all tokens of all streams, by the backend of one's choice."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..segment_attention import segment_attention

# The package each needs
BACKENDS = {"sdpa": "torch", "segments": "torch", "flash-attn": "flash_attn", "xformers": "xformers"}


@cache
def check_backend(backend: str) -> str:
    """The backend that "auto" stands for, or the one named.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: one whose package is not installed.
    """
    if backend == "auto":
        return "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"joint_attention: backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if find_spec(BACKENDS[backend]) is None:
        raise RuntimeError(f'joint_attention: backend "{backend}" needs the package {BACKENDS[backend]}')
    return backend


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """softmax(q·kᵀ/√D)·v of every token over every token, heads side by side again.

    Args:
        q, k, v: (B, heads, S, D) floats; as views of (B, S, heads, D), as `qk_norm` returns them, nothing is copied.
        backend: "sdpa" is `torch.nn.functional.scaled_dot_product_attention`, which chooses among torch's own kernels;
            "segments" is `uae_kernels.segment_attention`; "flash-attn" (half precision, on a GPU) and "xformers" call
            those packages; "auto" is "sdpa".

    Returns:
        (B, S, heads·D) in q's dtype.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: one whose package is not installed.
    """
    if backend != "sdpa":
        backend = check_backend(backend)
    if backend == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "segments":
        out = segment_attention(q, k, v)
        assert isinstance(out, Tensor)  # of one segment
        return out
    if backend == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v).flatten(2)
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v).flatten(2)
