"""Queries and keys normalised head by head, and the streams of tokens joined for attention, in one launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import with_none, without_none
from .._triton import fp64, jit, launch, narrow, tl, use_triton
from ..reference import mmdit as definitions
from ..reference.mmdit.qk_norm import Projections, check_projections

HEADS = 8  # of one token, a program
WARPS = 2  # 16 bytes of a thread for 8 heads of 64 channels in half precision


@jit()
def _rms_normal(x, width, eps):
    """x/√(mean x² + eps) along the last axis, and 1/√(mean x² + eps)."""
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    return x * rstd[:, None], rstd


@jit()
def _normalised(x, weight, d, width, eps):
    """x/√(mean x² + eps)·weight, or x itself without a weight."""
    if weight is not None:
        normal, _ = _rms_normal(x.to(tl.float32), width, eps)
        w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
        return narrow(normal * w[None, :], x.dtype)
    else:
        return x


@jit()
def _gradient(x, g, weight, d, width, eps):
    """dx = rstd·(u − n·mean(u·n)) with u = weight·g, or g itself without a weight."""
    if weight is not None:
        normal, rstd = _rms_normal(x.to(tl.float32), width, eps)
        u = g.to(tl.float32) * tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        return narrow(rstd[:, None] * (u - normal * (tl.sum(u * normal, 1) / width)[:, None]), x.dtype)
    else:
        return g


@jit()
def _forward_part(
    b, t, at, h, d, inside, q, k, v, q_weight, k_weight, q_out, k_out, v_out, batch_stride, token_stride, width, eps,
):  # fmt: skip
    """HEADS heads of token t of sample b: from a stream's rows to (B, S, H, D)."""
    place = b * batch_stride + t * token_stride + h[:, None] * width + d[None, :]
    x = tl.load(q + place, mask=inside, other=0.0)
    tl.store(q_out + at, _normalised(x, q_weight, d, width, eps), mask=inside)
    x = tl.load(k + place, mask=inside, other=0.0)
    tl.store(k_out + at, _normalised(x, k_weight, d, width, eps), mask=inside)
    if v_out is not None:
        tl.store(v_out + at, tl.load(v + place, mask=inside, other=0.0), mask=inside)


@jit("tokens_a", "tokens_b")
def _qk_norm_kernel(
    q_a, k_a, v_a, q_weight_a, k_weight_a, tokens_a, batch_stride_a, token_stride_a,
    q_b, k_b, v_b, q_weight_b, k_weight_b, tokens_b, batch_stride_b, token_stride_b,
    q_out, k_out, v_out, heads, width, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tokens = tokens_a + tokens_b
    b = (program.to(tl.int32) // tokens).to(tl.int64)  # a division of 64-bit numbers is a call
    t = program - b * tokens
    h, d = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (h < heads)[:, None] & (d < width)[None, :]
    at = (program * heads + h[:, None]) * width + d[None, :]
    if t < tokens_a:
        _forward_part(
            b, t, at, h, d, inside, q_a, k_a, v_a, q_weight_a, k_weight_a, q_out, k_out, v_out,
            batch_stride_a, token_stride_a, width, eps,
        )  # fmt: skip
    else:
        if q_b is not None:
            _forward_part(
                b, t - tokens_a, at, h, d, inside, q_b, k_b, v_b, q_weight_b, k_weight_b, q_out, k_out, v_out,
                batch_stride_b, token_stride_b, width, eps,
            )  # fmt: skip


@jit("tokens")
def _backward_part(
    b, t, at, h, d, inside, q, k, q_weight, k_weight, d_q, d_k, d_v, d_q_out, d_k_out, d_v_out, tokens, heads,
    batch_stride, token_stride, width, eps,
):  # fmt: skip
    """HEADS heads of token t of sample b: from (B, S, H, D) to a stream's rows."""
    place = b * batch_stride + t * token_stride + h[:, None] * width + d[None, :]
    to = ((b * tokens + t) * heads + h[:, None]) * width + d[None, :]
    x, g = tl.load(q + place, mask=inside, other=0.0), tl.load(d_q_out + at, mask=inside, other=0.0)
    tl.store(d_q + to, _gradient(x, g, q_weight, d, width, eps), mask=inside)
    x, g = tl.load(k + place, mask=inside, other=0.0), tl.load(d_k_out + at, mask=inside, other=0.0)
    tl.store(d_k + to, _gradient(x, g, k_weight, d, width, eps), mask=inside)
    if d_v is not None:
        tl.store(d_v + to, tl.load(d_v_out + at, mask=inside, other=0.0), mask=inside)


@jit("tokens_a", "tokens_b")
def _qk_norm_backward_kernel(
    q_a, k_a, q_weight_a, k_weight_a, d_q_a, d_k_a, d_v_a, tokens_a, batch_stride_a, token_stride_a,
    q_b, k_b, q_weight_b, k_weight_b, d_q_b, d_k_b, d_v_b, tokens_b, batch_stride_b, token_stride_b,
    d_q_out, d_k_out, d_v_out, heads, width, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tokens = tokens_a + tokens_b
    b = (program.to(tl.int32) // tokens).to(tl.int64)  # a division of 64-bit numbers is a call
    t = program - b * tokens
    h, d = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (h < heads)[:, None] & (d < width)[None, :]
    at = (program * heads + h[:, None]) * width + d[None, :]
    if t < tokens_a:
        _backward_part(
            b, t, at, h, d, inside, q_a, k_a, q_weight_a, k_weight_a, d_q_a, d_k_a, d_v_a, d_q_out, d_k_out, d_v_out,
            tokens_a, heads, batch_stride_a, token_stride_a, width, eps,
        )  # fmt: skip
    else:
        if q_b is not None:
            _backward_part(
                b, t - tokens_a, at, h, d, inside, q_b, k_b, q_weight_b, k_weight_b, d_q_b, d_k_b, d_v_b,
                d_q_out, d_k_out, d_v_out, tokens_b, heads, batch_stride_b, token_stride_b, width, eps,
            )  # fmt: skip


def _streams(flat: Sequence[Tensor | None]) -> list[list[Any]]:
    """(q, k, v, q_weight, k_weight) of each stream; v is None where there is one stream alone."""
    return [list(flat[start : start + 5]) for start in range(0, len(flat), 5)]


def _run(kernel: Any, streams: list[tuple[list[Any], Tensor]], joined: list[Any], heads: int, eps: float) -> None:
    """Launches `kernel` with each stream's tensors and its q, which gives the sizes; `joined` are (B, S, H, D)."""
    arguments: list[Any] = []
    for tensors, q in streams:
        arguments += [*tensors, q.shape[1], q.stride(0), q.stride(1)]
    if len(streams) == 1:
        arguments += [None] * len(streams[0][0]) + [0, 0, 0]
    batch, total, _, width = joined[0].shape
    block = 1 << max(width - 1, 1).bit_length()
    launch(
        kernel, (batch * total, -(-heads // HEADS)), *arguments, *joined, *[None] * (3 - len(joined)), heads, width,
        eps, HEADS=HEADS, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op(
    "uae_kernels::qk_norm",
    mutates_args=(),
    schema="(Tensor[] tensors, bool[] present, SymInt heads, float eps) -> Tensor[]",
)
def _forward(tensors: Sequence[Tensor], present: Sequence[bool], heads: int, eps: float) -> list[Tensor]:
    """Joined q and k (B, S, H, D), and v where there are two streams."""
    streams, joined = _streams(with_none(tensors, present)), _empty(tensors, present, heads)
    _run(_qk_norm_kernel, [(stream, stream[0]) for stream in streams], joined, heads, eps)
    return joined


@_forward.register_fake
def _empty(tensors, present, heads, eps=None):
    streams = _streams(with_none(tensors, present))
    q = streams[0][0]
    shape = q.shape[0], sum(stream[0].shape[1] for stream in streams), heads, q.shape[2] // heads
    return [q.new_empty(shape) for _ in range(2 if len(streams) == 1 else 3)]


@torch.library.custom_op(
    "uae_kernels::qk_norm_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor?[] flat, SymInt heads, float eps) -> Tensor[]",
)
def _backward(grads: Sequence[Tensor], flat: Sequence[Tensor | None], heads: int, eps: float) -> list[Tensor]:
    """dq, dk and (of two streams) dv of each stream, each (B, N, H·D)."""
    streams, results = [], []
    for q, k, _, q_weight, k_weight in _streams(flat):
        made = [q.new_empty(q.shape) for _ in grads]
        streams.append(([q, k, q_weight, k_weight, *made, *[None] * (3 - len(made))], q))
        results += made
    _run(_qk_norm_backward_kernel, streams, list(grads), heads, eps)
    return results


@_backward.register_fake
def _(grads, flat, heads, eps):
    return [q.new_empty(q.shape) for q, *_ in _streams(flat) for _ in grads]


def _setup_context(ctx, inputs, output):
    tensors, ctx.present, ctx.heads, ctx.eps = inputs
    streams = _streams(with_none(tensors, ctx.present))
    ctx.save_for_backward(*(x for q, k, _, *weights in streams for x in (q, k, None, *weights)))


def _autograd(ctx, grads):
    flat = ctx.saved_tensors
    results = iter(_backward([grad.contiguous() for grad in grads], flat, ctx.heads, ctx.eps))
    found: list[Tensor | None] = []
    for _ in _streams(flat):
        made = [next(results) for _ in grads]
        found += [*made, *[None] * (5 - len(made))]
    return [grad for grad, there in zip(found, ctx.present, strict=True) if there], None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def qk_norm(*streams: Projections, heads: int, eps: float = 1e-6, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Splits the projections of one or two streams into heads, normalises queries and keys and joins the streams.

    q/√(mean q² + eps)·weight over a head's D channels (RMSNorm, arXiv 1910.07467), the same for k; v as it is. The
    second stream's tokens follow the first's.

    Args:
        streams: Projections(q, k, v, q_weight, k_weight): q, k, v (B, N, heads·D) floats, which may be slices of one
            packed projection; the weights (D,), or None for no norm.
        heads: their number.
        eps: added to the mean square.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64 and where a weight needs a gradient; "triton"
            and "torch" ask for one of them.

    Returns:
        q, k, v as (B, heads, S, D) views of (B, S, heads, D), S the tokens of all streams, in the streams' dtype;
        computed in fp32 (fp64 for fp64), rounded once. Of one stream alone, v is a view of what was given.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    check_projections(streams, heads)
    unsupported = fp64(*(stream.q for stream in streams))
    weights = [w for stream in streams for w in (stream.q_weight, stream.k_weight)]
    if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights):
        unsupported = unsupported or "gradients of the norms' weights"
    if not use_triton("qk_norm", impl, streams[0].q, unsupported):
        return definitions.qk_norm(*streams, heads=heads, eps=eps)
    flat: list[Tensor | None] = []
    for q, k, v, *norms in streams:
        if not (q.stride() == k.stride() == v.stride() and q.stride(-1) == 1):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        flat += [q, k, v if len(streams) > 1 else None, *norms]
    joined = _forward(*without_none(flat), heads, eps)
    if len(streams) == 1:
        joined = [*joined, streams[0].v.unflatten(-1, (heads, -1))]
    q, k, v = (x.transpose(1, 2) for x in joined)
    return q, k, v
