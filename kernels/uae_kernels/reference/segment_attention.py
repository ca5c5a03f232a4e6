"""Definition of `uae_kernels.segment_attention`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .._common import check_impl, compute_dtype
from .linear_logprobs import FLOATS


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q2_weight: Tensor | None = None,
    k2_weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `uae_kernels.segment_attention`; joins the segments, and is differentiable in the weights too."""
    check_impl("segment_attention", impl)
    check_segments((q, k, v, q_weight, k_weight), (q2, k2, v2, q2_weight, k2_weight), scale)
    tokens = q.shape[1]

    def joined(x: Tensor, weight: Tensor | None, x2: Tensor | None, weight2: Tensor | None) -> Tensor:
        x = _normalised(x, weight, eps)
        return (x if x2 is None else torch.cat([x, _normalised(x2, weight2, eps)], 1)).transpose(1, 2)

    q, k = joined(q, q_weight, q2, q2_weight), joined(k, k_weight, k2, k2_weight)
    out = scaled_dot_product_attention(q, k, joined(v, None, v2, None), scale=scale).transpose(1, 2).flatten(2)
    return out if q2 is None else (out[:, :tokens].contiguous(), out[:, tokens:].contiguous())


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x/√(mean x² + eps)·weight over the channels of a head (RMSNorm, arXiv 1910.07467)."""
    if weight is None:
        return x
    y = x.to(compute_dtype(x))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def check_segments(segment: tuple[Any, ...], second: tuple[Any, ...], scale: float | None) -> None:
    """Each segment is q, k, v and the weights of the norms of q and k."""
    op, q = "segment_attention", segment[0]
    if any(x is None for x in second[:3]) and any(x is not None for x in second):
        raise ValueError(f"{op}: a second segment needs q2, k2 and v2")
    segments = [segment] if second[0] is None else [segment, second]
    for suffix, (*tensors, q_weight, k_weight) in zip(("", "2"), segments, strict=False):
        for name, x in zip("qkv", tensors, strict=True):
            if x is None or x.dtype not in FLOATS or x.dtype != q.dtype:
                raise TypeError(
                    f"{op}: {name}{suffix} must be fp64, fp32, bf16 or fp16 like the others, "
                    f"got {x if x is None else x.dtype}, q {q.dtype}"
                )
            like = (q.shape[0], tensors[0].shape[1], *q.shape[2:])
            if x.dim() != 4 or q.dim() != 4 or 0 in q.shape[2:] or x.shape != like:
                raise ValueError(f"{op}: {name}{suffix} must be (B, N, H, D) like the others, got {tuple(x.shape)}")
        for name, weight in (("q", q_weight), ("k", k_weight)):
            if weight is not None and (weight.shape != q.shape[3:] or weight.dtype not in FLOATS):
                raise ValueError(
                    f"{op}: {name}{suffix}_weight must be ({q.shape[3]},) floats, "
                    f"got {tuple(weight.shape)} of {weight.dtype}"
                )
    weights = [weight for part in segments for weight in part[3:]]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ValueError(f"{op}: the norms' weights are given for all of q, k, q2 and k2, or for none")
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
