"""Definition of `uae_kernels.mmdit.qk_norm`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._common import check_impl, compute_dtype


class Projections(NamedTuple):
    """Queries, keys and values of one stream, each (B, N, heads·D), and the weights (D,) of the norms, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


def qk_norm(*streams: Projections, heads: int, eps: float = 1e-6, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """See `uae_kernels.mmdit.qk_norm`; differentiable in everything."""
    check_impl("qk_norm", impl)
    check_projections(streams, heads)

    def joined(which: str) -> Tensor:
        parts = []
        for stream in streams:
            x = getattr(stream, which)
            x = x.unflatten(-1, (heads, -1))
            weight = getattr(stream, f"{which}_weight", None)
            parts.append(x if weight is None else _rms_norm(x, weight, eps))
        return parts[0].transpose(1, 2) if len(parts) == 1 else torch.cat(parts, 1).transpose(1, 2)

    return joined("q"), joined("k"), joined("v")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x/√(mean x² + eps)·weight over the last dimension."""
    dtype = compute_dtype(x)
    return torch.nn.functional.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype)


def check_projections(streams: tuple[Projections, ...], heads: int) -> None:
    if not 1 <= len(streams) <= 2:
        raise ValueError(f"qk_norm: expected one or two streams, got {len(streams)}")
    for q, k, v, q_weight, k_weight in streams:
        batch, _, width = streams[0].q.shape
        for name, part in (("q", q), ("k", k), ("v", v)):
            if part.dim() != 3 or part.shape != q.shape or part.shape[0] != batch or part.shape[2] != width:
                raise ValueError(f"qk_norm: {name} must be (B, N, heads·D) like the others, got {tuple(part.shape)}")
            if part.dtype != streams[0].q.dtype:
                raise ValueError(f"qk_norm: q, k and v must have one dtype, got {streams[0].q.dtype} and {part.dtype}")
        if heads < 1 or width % heads:
            raise ValueError(f"qk_norm: a width of {width} does not split into {heads} heads")
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight is not None and weight.shape != (width // heads,):
                raise ValueError(f"qk_norm: {name} must be ({width // heads},), got {tuple(weight.shape)}")
