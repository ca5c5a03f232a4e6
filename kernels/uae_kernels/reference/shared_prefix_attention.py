"""Definition of `uae_kernels.shared_prefix_attention`."""

import torch
from torch import Tensor

from .._common import check_impl, compute_dtype
from .linear_logprobs import FLOATS


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    group_size: int,
    lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """See `uae_kernels.shared_prefix_attention`; holds every score, but no copy of the prefix or of a head."""
    check_impl("shared_prefix_attention", impl)
    check_shared_prefix(q, k, v, prefix_k, prefix_v, group_size, lengths, prefix_lengths, scale)
    rows, tokens, heads, width = q.shape
    batch, prefix, kv_heads, _ = prefix_k.shape
    dtype, result = compute_dtype(q), q.dtype
    scale = width**-0.5 if scale is None else scale
    # Groups (B, G, ...) beside the prefixes (B, ...); query heads (Hkv, Hq/Hkv) beside those of keys and values.
    q, k, v = (kept(x, lengths).to(dtype).unflatten(0, (batch, group_size)) for x in (q, k, v))
    q = q.unflatten(3, (kv_heads, heads // kv_heads))
    prefix_k, prefix_v = (kept(x, prefix_lengths).to(dtype) for x in (prefix_k, prefix_v))

    shared = torch.einsum("bgthrd,bphd->bghrtp", q, prefix_k) * scale
    own = torch.einsum("bgthrd,bgshd->bghrts", q, k) * scale
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    own = own.masked_fill(~causal, -torch.inf)  # a row within its length sees no key beyond it
    if prefix_lengths is not None:
        seen = torch.arange(prefix, device=q.device) < prefix_lengths[:, None]
        shared = shared.masked_fill(~seen[:, None, None, None, None], -torch.inf)
    p, p_own = torch.softmax(torch.cat([shared, own], -1), -1).split([prefix, tokens], -1)
    out = torch.einsum("bghrtp,bphd->bgthrd", p, prefix_v) + torch.einsum("bghrts,bgshd->bgthrd", p_own, v)
    return kept(out.reshape(rows, tokens, heads, width), lengths).to(result)


def kept(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (rows, T, H, D) with zeros from each row's length on, whatever stood there."""
    if lengths is None:
        return x
    kept = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(kept[:, :, None, None], x, 0)


def check_shared_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    group_size: int,
    lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    scale: float | None,
) -> None:
    op = "shared_prefix_attention"
    tensors = dict(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
    for name, x in tensors.items():
        if x.dtype not in FLOATS or x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be fp64, fp32, bf16 or fp16 like q, got {x.dtype}, q {q.dtype}")
    if group_size < 1:
        raise ValueError(f"{op}: group_size must be at least 1, got {group_size}")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    fits = all(x.dim() == 4 for x in tensors.values()) and q.shape[3] > 0
    fits = fits and k.shape == v.shape and prefix_k.shape == prefix_v.shape and k.shape[:2] == q.shape[:2]
    if not (fits and k.shape[2:] == prefix_k.shape[2:] and k.shape[3] == q.shape[3]):
        raise ValueError(
            f"{op}: expected q (B·G, T, Hq, D), k, v (B·G, T, Hkv, D), prefix_k, prefix_v (B, P, Hkv, D), got {shapes}"
        )
    if q.shape[0] != prefix_k.shape[0] * group_size:
        raise ValueError(f"{op}: {q.shape[0]} rows are not {prefix_k.shape[0]} prefixes × group_size {group_size}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} query heads do not share {k.shape[2]} heads of keys and values")
    for name, counts, x in (("lengths", lengths, q), ("prefix_lengths", prefix_lengths, prefix_k)):
        if counts is None:
            continue
        if counts.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {name} must be int64 or int32, got {counts.dtype}")
        if counts.shape != x.shape[:1] or counts.device != x.device:
            raise ValueError(
                f"{op}: {name} must be ({x.shape[0]},) on {x.device}, got {tuple(counts.shape)} on {counts.device}"
            )
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
