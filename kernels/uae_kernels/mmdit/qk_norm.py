"""Queries and keys normalised head by head, and the streams of tokens joined for attention, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import mmdit as definitions
from .._triton import fp64, jit, launch, narrow, tl, use_triton
from ..reference.mmdit.qk_norm import Projections, check_projections

HEADS = 8  # of one token, a program
WARPS = 4
TENSORS = 5  # of a stream: q, k, v and the two weights


@jit()
def _rms_normal(x, width, eps):
    """x/√(mean x² + eps) along the last axis, and 1/√(mean x² + eps)."""
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    return x * rstd[:, None], rstd


@jit("token_stride", "batch_stride")
def _forward_part(
    b, t, at, h, d, inside, q, k, v, q_weight, k_weight, q_out, k_out, v_out, batch_stride, token_stride, width, eps,
):  # fmt: skip
    """HEADS heads of token t of sample b: from the streams' rows to (B, S, H, D)."""
    place = b * batch_stride + t * token_stride + h[:, None] * width + d[None, :]
    x = tl.load(q + place, mask=inside, other=0.0)
    if q_weight is not None:
        normal, _ = _rms_normal(x.to(tl.float32), width, eps)
        w = tl.load(q_weight + d, mask=d < width, other=0.0).to(tl.float32)
        x = narrow(normal * w[None, :], q_out.dtype.element_ty)
    tl.store(q_out + at, x, mask=inside)
    x = tl.load(k + place, mask=inside, other=0.0)
    if k_weight is not None:
        normal, _ = _rms_normal(x.to(tl.float32), width, eps)
        w = tl.load(k_weight + d, mask=d < width, other=0.0).to(tl.float32)
        x = narrow(normal * w[None, :], k_out.dtype.element_ty)
    tl.store(k_out + at, x, mask=inside)
    tl.store(v_out + at, tl.load(v + place, mask=inside, other=0.0), mask=inside)


@jit("tokens_a", "batch_stride_a", "token_stride_a", "tokens_b", "batch_stride_b", "token_stride_b")
def _forward_kernel(
    q_a, k_a, v_a, q_weight_a, k_weight_a, tokens_a, batch_stride_a, token_stride_a,
    q_b, k_b, v_b, q_weight_b, k_weight_b, tokens_b, batch_stride_b, token_stride_b,
    q_out, k_out, v_out, heads, width, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tokens = tokens_a + tokens_b
    b, t = program // tokens, program % tokens
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


@jit()
def _gradient(x, g, weight, d, width, eps):
    """dx = rstd·(u − n·mean(u·n)) with u = weight·dn, or dn itself without a weight."""
    if weight is not None:
        normal, rstd = _rms_normal(x.to(tl.float32), width, eps)
        u = g.to(tl.float32) * tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        g = rstd[:, None] * (u - normal * (tl.sum(u * normal, 1) / width)[:, None])
    return g.to(tl.float32)


@jit("token_stride", "batch_stride", "tokens")
def _backward_part(
    b, t, at, h, d, inside, q, k, q_weight, k_weight, d_q_out, d_k_out, d_v_out, d_q, d_k, d_v, tokens, heads,
    batch_stride, token_stride, width, eps,
):  # fmt: skip
    place = b * batch_stride + t * token_stride + h[:, None] * width + d[None, :]
    to = ((b * tokens + t) * heads + h[:, None]) * width + d[None, :]
    g, x = tl.load(d_q_out + at, mask=inside, other=0.0), tl.load(q + place, mask=inside, other=0.0)
    tl.store(d_q + to, narrow(_gradient(x, g, q_weight, d, width, eps), d_q.dtype.element_ty), mask=inside)
    g, x = tl.load(d_k_out + at, mask=inside, other=0.0), tl.load(k + place, mask=inside, other=0.0)
    tl.store(d_k + to, narrow(_gradient(x, g, k_weight, d, width, eps), d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + to, tl.load(d_v_out + at, mask=inside, other=0.0), mask=inside)


@jit("tokens_a", "batch_stride_a", "token_stride_a", "tokens_b", "batch_stride_b", "token_stride_b")
def _backward_kernel(
    q_a, k_a, q_weight_a, k_weight_a, d_q_a, d_k_a, d_v_a, tokens_a, batch_stride_a, token_stride_a,
    q_b, k_b, q_weight_b, k_weight_b, d_q_b, d_k_b, d_v_b, tokens_b, batch_stride_b, token_stride_b,
    d_q_out, d_k_out, d_v_out, heads, width, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tokens = tokens_a + tokens_b
    b, t = program // tokens, program % tokens
    h, d = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (h < heads)[:, None] & (d < width)[None, :]
    at = (program * heads + h[:, None]) * width + d[None, :]
    if t < tokens_a:
        _backward_part(
            b, t, at, h, d, inside, q_a, k_a, q_weight_a, k_weight_a, d_q_out, d_k_out, d_v_out, d_q_a, d_k_a, d_v_a,
            tokens_a, heads, batch_stride_a, token_stride_a, width, eps,
        )  # fmt: skip
    else:
        if q_b is not None:
            _backward_part(
                b, t - tokens_a, at, h, d, inside, q_b, k_b, q_weight_b, k_weight_b, d_q_out, d_k_out, d_v_out,
                d_q_b, d_k_b, d_v_b, tokens_b, heads, batch_stride_b, token_stride_b, width, eps,
            )  # fmt: skip


def _parts(inputs: Sequence[Tensor | None]) -> list[list]:
    return [list(inputs[start : start + TENSORS]) for start in range(0, len(inputs), TENSORS)]


def _run(kernel, streams: list[tuple[list, Tensor]], outputs: Sequence[Tensor], eps: float) -> None:
    """Launches `kernel` with each stream's tensors and its q, which gives the sizes; `outputs` are (B, S, H, D)."""
    batch, total, heads, width = outputs[0].shape
    arguments: list = []
    for tensors, q in streams:
        arguments += [*tensors, q.shape[1], q.stride(0), q.stride(1)]
    if len(streams) == 1:
        arguments += [None] * len(streams[0][0]) + [0, 0, 0]
    block = 1 << max(width - 1, 1).bit_length()
    launch(
        kernel, (batch * total, -(-heads // HEADS)), *arguments, *outputs, heads, width, eps,
        HEADS=HEADS, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op("uae_kernels::qk_norm", mutates_args=())
def _forward(inputs: Sequence[Tensor | None], heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Joined q, k, v (B, S, H, D)."""
    outputs = _empty(inputs, heads)
    _run(_forward_kernel, [(part, part[0]) for part in _parts(inputs)], outputs, eps)
    return outputs


def _empty(inputs: Sequence[Tensor | None], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    qs = [part[0] for part in _parts(inputs)]
    batch, _, width = qs[0].shape
    shape = batch, sum(q.shape[1] for q in qs), heads, width // heads
    return qs[0].new_empty(shape), qs[0].new_empty(shape), qs[0].new_empty(shape)


@_forward.register_fake
def _(inputs, heads, eps):
    return _empty(inputs, heads)


@torch.library.custom_op("uae_kernels::qk_norm_backward", mutates_args=())
def _backward(grads: Sequence[Tensor], inputs: Sequence[Tensor | None], eps: float) -> list[Tensor]:
    """dq, dk and dv of each stream, each (B, N, H·D)."""
    streams, results = [], []
    for q, k, _, q_weight, k_weight in _parts(inputs):
        made = [q.new_empty(q.shape) for _ in range(3)]
        streams.append(([q, k, q_weight, k_weight, *made], q))
        results += made
    _run(_backward_kernel, streams, grads, eps)
    return results


@_backward.register_fake
def _(grads, inputs, eps):
    return [part[0].new_empty(part[0].shape) for part in _parts(inputs) for _ in range(3)]


def _setup_context(ctx, inputs, output):
    tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, *grads):
    inputs = ctx.saved_tensors
    results = iter(_backward([grad.contiguous() for grad in grads], inputs, ctx.eps))
    found = [grad for _ in _parts(inputs) for grad in (next(results), next(results), next(results), None, None)]
    return found, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def qk_norm(
    *streams: Projections, heads: int, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the projections of one or two streams into heads, normalises queries and keys and joins the streams.

    q/√(mean q² + eps)·weight over a head's D channels (RMSNorm, arXiv 1910.07467), the same for k; v as it is. The second
    stream's tokens follow the first's.

    Args:
        streams: Projections(q, k, v, q_weight, k_weight): q, k, v (B, N, heads·D) floats, which may be slices of one
            packed projection; the weights (D,), or None for no norm.
        heads: their number.
        eps: added to the mean square.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64 and where a weight needs a gradient; "triton" and
            "torch" ask for one of them.

    Returns:
        q, k, v as (B, heads, S, D) views of (B, S, heads, D), S the tokens of all streams, in the streams' dtype;
        computed in fp32 (fp64 for fp64), rounded once.

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
    inputs: list[Tensor | None] = []
    for q, k, v, *norms in streams:
        alike = q.stride() == k.stride() == v.stride() and q.stride(-1) == 1
        inputs += [*((q, k, v) if alike else (q.contiguous(), k.contiguous(), v.contiguous())), *norms]
    q, k, v = _forward(inputs, heads, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
