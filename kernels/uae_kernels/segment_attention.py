"""Attention of all tokens over all tokens, which lie in one or two segments: never joined, never split."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from ._attention import (
    LN2,
    Tiles,
    attend,
    depth_of,
    key_gradient,
    load_rows,
    plan_for,
    query_gradient,
    rows_of,
    store_rows,
    strides,
    unsupported,
)
from ._common import UNRECORDED, pack, unpack
from ._triton import jit, launch, narrow, tl, use_triton
from .reference.segment_attention import check_segments

ROWS = 64  # tokens of one head, a program of the norm kernel


@jit()
def _owner(blocks_a, blocks, heads, tokens_a, tokens_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What a program that owns a block of tokens works on.

    Returns (whether it is of the second segment, sample, head, tokens i, which of them exist, their place in (B, H, S),
    S the tokens of both segments, and in the segment's own (B, N, H, D)).
    """
    program = tl.program_id(0).to(tl.int64)
    block, rest = program % blocks, program // blocks
    sample, head, second = rest // heads, rest % heads, block >= blocks_a
    i = (tl.where(second, block - blocks_a, block) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    tokens = tl.where(second, tokens_b, tokens_a)
    place = rest * (tokens_a + tokens_b) + tl.where(second, tokens_a, 0) + i
    return second, sample, head, i, i < tokens, place, ((sample * tokens + i) * heads + head) * WIDTH


@jit()
def _head_of(second, sample, head, x_a, row_a, head_a, x_b, row_b, head_b):
    """Where the tokens of one head of one sample begin, in x of the first segment or of the second."""
    return tl.where(second, x_b + sample * row_b + head * head_b, x_a + sample * row_a + head * head_a)


@jit()
def _inverse_root(x, eps, WIDTH: tl.constexpr):
    """1/√(mean x² + eps) of each row."""
    return 1 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps)


@jit()
def _channels(weight, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """A norm's weight in fp32, one row, 0 from channel WIDTH on."""
    d = tl.arange(0, DEPTH)
    return tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]


@jit()
def _normalised(x, weight, eps, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """n·weight, n = x/√(mean x² + eps) along a row, in x's dtype."""
    values = x.to(tl.float32)
    n = values * _inverse_root(values, eps, WIDTH)[:, None]
    return narrow(n * _channels(weight, WIDTH, DEPTH), x.dtype)


@jit()
def _before_norm(x, weight, gradient, eps, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The gradient of x from that of n·weight: rstd·(u − n·mean(u·n)), u = weight·gradient, n = x·rstd."""
    x = x.to(tl.float32)
    rstd = _inverse_root(x, eps, WIDTH)[:, None]
    u, n = gradient * _channels(weight, WIDTH, DEPTH), x * rstd
    return rstd * (u - n * (tl.sum(u * n, 1) / WIDTH)[:, None])


@jit("blocks_a", "blocks", "heads", "tokens_a", "tokens_b")
def _norm_kernel(
    x_a, weight_a, out_a, x_b, weight_b, out_b, blocks_a, blocks, heads, tokens_a, tokens_b, eps,
    row_a, token_a, head_a, row_b, token_b, head_b,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    second, sample, head, i, inside, _, at = _owner(blocks_a, blocks, heads, tokens_a, tokens_b, WIDTH, ROWS)
    x = _head_of(second, sample, head, x_a, row_a, head_a, x_b, row_b, head_b)
    x = load_rows(x, i.to(tl.int64) * tl.where(second, token_b, token_a), inside, WIDTH, DEPTH)
    weight = tl.where(second, weight_b, weight_a)
    out = tl.where(second, out_b, out_a)
    store_rows(out, at, inside, _normalised(x, weight, eps, WIDTH, DEPTH).to(tl.float32), WIDTH, DEPTH)


@jit("blocks_a", "blocks", "heads", "tokens_a", "tokens_b")
def _forward_kernel(
    q_a, k_a, v_a, q_b, k_b, v_b, weight_a, weight_b, out_a, out_b, lses,
    blocks_a, blocks, heads, tokens_a, tokens_b, scale, eps,
    q_row_a, q_token_a, q_head_a, k_row_a, k_token_a, k_head_a, v_row_a, v_token_a, v_head_a,
    q_row_b, q_token_b, q_head_b, k_row_b, k_token_b, k_head_b, v_row_b, v_token_b, v_head_b,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The result of a block of queries over the keys of all segments; with weights, q is normalised on its way in."""
    second, sample, head, i, inside, place, at = _owner(blocks_a, blocks, heads, tokens_a, tokens_b, WIDTH, ROWS)
    q = _head_of(second, sample, head, q_a, q_row_a, q_head_a, q_b, q_row_b, q_head_b)
    queries = load_rows(q, i.to(tl.int64) * tl.where(second, q_token_b, q_token_a), inside, WIDTH, DEPTH)
    if weight_a is not None:
        queries = _normalised(queries, tl.where(second, weight_b, weight_a), eps, WIDTH, DEPTH)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    mass, top = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    for segment in range(SEGMENTS):
        k = _head_of(segment == 1, sample, head, k_a, k_row_a, k_head_a, k_b, k_row_b, k_head_b)
        v = _head_of(segment == 1, sample, head, v_a, v_row_a, v_head_a, v_b, v_row_b, v_head_b)
        k_token, v_token = tl.where(segment == 1, k_token_b, k_token_a), tl.where(segment == 1, v_token_b, v_token_a)
        tokens = tl.where(segment == 1, tokens_b, tokens_a)
        total, mass, top = attend(
            queries, k, v, total, mass, top, tokens // COLUMNS * COLUMNS, tokens, tokens,
            k_token, v_token, scale, WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    store_rows(tl.where(second, out_b, out_a), at, inside, total / mass[:, None], WIDTH, DEPTH)
    tl.store(lses + place, top + tl.log2(mass), mask=inside)


@jit("blocks_a", "blocks", "heads", "tokens_a", "tokens_b")
def _queries_kernel(
    q_a, k_a, v_a, q_b, k_b, v_b, raw_a, raw_b, weight_a, weight_b, out_a, out_b, lses, grad_a, grad_b, deltas,
    dq_a, dq_b, blocks_a, blocks, heads, tokens_a, tokens_b, scale, eps,
    q_row_a, q_token_a, q_head_a, k_row_a, k_token_a, k_head_a, v_row_a, v_token_a, v_head_a,
    q_row_b, q_token_b, q_head_b, k_row_b, k_token_b, k_head_b, v_row_b, v_token_b, v_head_b,
    raw_row_a, raw_token_a, raw_head_a, raw_row_b, raw_token_b, raw_head_b,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq, and delta = out·grad of each query, which the gradient of the keys needs.

    With weights q and k are normalised; `raw` is q as it came.
    """
    second, sample, head, i, inside, place, at = _owner(blocks_a, blocks, heads, tokens_a, tokens_b, WIDTH, ROWS)
    q = _head_of(second, sample, head, q_a, q_row_a, q_head_a, q_b, q_row_b, q_head_b)
    queries = load_rows(q, i.to(tl.int64) * tl.where(second, q_token_b, q_token_a), inside, WIDTH, DEPTH)
    grads = load_rows(tl.where(second, grad_b, grad_a), at, inside, WIDTH, DEPTH)
    outputs = load_rows(tl.where(second, out_b, out_a), at, inside, WIDTH, DEPTH)
    delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(deltas + place, delta, mask=inside)
    lse = tl.load(lses + place, mask=inside, other=float("inf"))
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for segment in range(SEGMENTS):
        k = _head_of(segment == 1, sample, head, k_a, k_row_a, k_head_a, k_b, k_row_b, k_head_b)
        v = _head_of(segment == 1, sample, head, v_a, v_row_a, v_head_a, v_b, v_row_b, v_head_b)
        k_token, v_token = tl.where(segment == 1, k_token_b, k_token_a), tl.where(segment == 1, v_token_b, v_token_a)
        tokens = tl.where(segment == 1, tokens_b, tokens_a)
        total = query_gradient(
            queries, grads, lse, delta, k, v, total, tokens // COLUMNS * COLUMNS, tokens, tokens,
            k_token, v_token, scale, WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    total *= scale * LN2
    if weight_a is not None:
        raw = _head_of(second, sample, head, raw_a, raw_row_a, raw_head_a, raw_b, raw_row_b, raw_head_b)
        x = load_rows(raw, i.to(tl.int64) * tl.where(second, raw_token_b, raw_token_a), inside, WIDTH, DEPTH)
        total = _before_norm(x, tl.where(second, weight_b, weight_a), total, eps, WIDTH, DEPTH)
    store_rows(tl.where(second, dq_b, dq_a), at, inside, total, WIDTH, DEPTH)


@jit("blocks_a", "blocks", "heads", "tokens_a", "tokens_b")
def _keys_kernel(
    q_a, k_a, v_a, q_b, k_b, v_b, raw_a, raw_b, weight_a, weight_b, lses, grad_a, grad_b, deltas,
    dk_a, dk_b, dv_a, dv_b, blocks_a, blocks, heads, tokens_a, tokens_b, scale, eps,
    q_row_a, q_token_a, q_head_a, k_row_a, k_token_a, k_head_a, v_row_a, v_token_a, v_head_a,
    q_row_b, q_token_b, q_head_b, k_row_b, k_token_b, k_head_b, v_row_b, v_token_b, v_head_b,
    raw_row_a, raw_token_a, raw_head_a, raw_row_b, raw_token_b, raw_head_b,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over the queries of all segments; `raw` is k as it came."""
    second, sample, head, j, inside, _, at = _owner(blocks_a, blocks, heads, tokens_a, tokens_b, WIDTH, COLUMNS)
    k = _head_of(second, sample, head, k_a, k_row_a, k_head_a, k_b, k_row_b, k_head_b)
    v = _head_of(second, sample, head, v_a, v_row_a, v_head_a, v_b, v_row_b, v_head_b)
    keys = load_rows(k, j.to(tl.int64) * tl.where(second, k_token_b, k_token_a), inside, WIDTH, DEPTH)
    values = load_rows(v, j.to(tl.int64) * tl.where(second, v_token_b, v_token_a), inside, WIDTH, DEPTH)
    key_sum, value_sum = tl.zeros((COLUMNS, DEPTH), tl.float32), tl.zeros((COLUMNS, DEPTH), tl.float32)
    for segment in range(SEGMENTS):
        q = _head_of(segment == 1, sample, head, q_a, q_row_a, q_head_a, q_b, q_row_b, q_head_b)
        q_token, tokens = tl.where(segment == 1, q_token_b, q_token_a), tl.where(segment == 1, tokens_b, tokens_a)
        grad = tl.where(segment == 1, grad_b, grad_a) + (sample * tokens * heads + head) * WIDTH
        first = (sample * heads + head) * (tokens_a + tokens_b) + tl.where(segment == 1, tokens_a, 0)
        key_sum, value_sum = key_gradient(
            keys, values, q, grad, lses + first, deltas + first, key_sum, value_sum, 0, tokens, tokens, None,
            q_token, 0, heads * WIDTH, 0, scale, 1, False, WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    key_sum *= scale * LN2
    if weight_a is not None:
        raw = _head_of(second, sample, head, raw_a, raw_row_a, raw_head_a, raw_b, raw_row_b, raw_head_b)
        x = load_rows(raw, j.to(tl.int64) * tl.where(second, raw_token_b, raw_token_a), inside, WIDTH, DEPTH)
        key_sum = _before_norm(x, tl.where(second, weight_b, weight_a), key_sum, eps, WIDTH, DEPTH)
    store_rows(tl.where(second, dk_b, dk_a), at, inside, key_sum, WIDTH, DEPTH)
    store_rows(tl.where(second, dv_b, dv_a), at, inside, value_sum, WIDTH, DEPTH)


class _Segments(NamedTuple):
    """The tensors (B, N, H, D) of a call by kind; a second segment that is not there is the first, with no tokens."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    weights: tuple[list[Any], list[Any]]  # of the norms of q and of k, None for no norms
    tokens: list[int]

    @staticmethod
    def of(first: list[Any], second: list[Any]) -> "_Segments":
        """From q, k, v and the weights of the norms of q and k of each segment."""
        there = second[0] is not None
        q, k, v, *weights = ([x, y if there else x] for x, y in zip(first, second, strict=True))
        return _Segments(q, k, v, (weights[0], weights[1]), [q[0].shape[1], q[1].shape[1] if there else 0])

    def grid(self, block: int) -> tuple[tuple[int], list[int]]:
        """The grid over blocks of tokens, and (blocks_a, blocks, heads, tokens_a, tokens_b)."""
        batch, _, heads, _ = self.q[0].shape
        counts = [-(-tokens // block) for tokens in self.tokens]
        return (sum(counts) * batch * heads,), [counts[0], sum(counts), heads, *self.tokens]

    def options(self, tile: Tiles) -> dict[str, int]:
        return dict(SEGMENTS=1 + (self.tokens[1] > 0), **tile.options(self.q[0].shape[3]))

    def normalised(self, kind: int, eps: float) -> list[Tensor]:
        """q (kind 0) or k (kind 1) of each segment after its norm; as it is without norms."""
        tensors, weights = (self.q, self.k)[kind], self.weights[kind]
        if weights[0] is None:
            return tensors
        outputs = [x.new_empty(x.shape) for x in tensors[: 1 + (self.tokens[1] > 0)]]
        grid, sizes = self.grid(ROWS)
        arguments = [part for row in zip(tensors, weights, [outputs[0], outputs[-1]], strict=True) for part in row]
        width = tensors[0].shape[3]
        launch(
            _norm_kernel, grid, *arguments, *sizes, eps, *strides(*tensors),
            WIDTH=width, DEPTH=depth_of(width), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        return [outputs[0], outputs[-1]]


def _in_turn(*kinds: list[Tensor]) -> list[Tensor]:
    """The first segment's tensors, then the second's."""
    return [x for part in zip(*kinds, strict=True) for x in part]


def _outputs(q: Tensor, q2: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N, H·D) of each segment; no tokens for one that is not there."""
    width = q.shape[2] * q.shape[3]
    return q.new_empty(*q.shape[:2], width), q.new_empty(q.shape[0], 0 if q2 is None else q2.shape[1], width)


INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? q2, Tensor? k2, Tensor? v2, Tensor? q2_weight, Tensor? k2_weight, Tensor packed"
)


@torch.library.custom_op(
    "uae_kernels::segment_attention", mutates_args=(), **UNRECORDED, schema=f"({INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _forward(q, k, v, q_weight, k_weight, q2, k2, v2, q2_weight, k2_weight, packed):
    """Each segment's result, and log₂ Σ 2^score of each query, (B, H, S)."""
    scale, eps = unpack(packed)
    parts = _Segments.of([q, k, v, q_weight, k_weight], [q2, k2, v2, q2_weight, k2_weight])
    outputs, tile = _outputs(q, q2), plan_for(q, q.shape[3]).forward
    lses = torch.empty(q.shape[0], q.shape[2], sum(parts.tokens), device=q.device)
    tensors = _in_turn(parts.q, parts.normalised(1, eps), parts.v)
    grid, sizes = parts.grid(tile.rows)
    launch(
        _forward_kernel, grid, *tensors, *parts.weights[0], *outputs, lses, *sizes, scale, eps, *strides(*tensors),
        **parts.options(tile),
    )  # fmt: skip
    return *outputs, lses


@_forward.register_fake
def _(q, k, v, q_weight, k_weight, q2, *_):
    tokens = q.shape[1] + (0 if q2 is None else q2.shape[1])
    return *_outputs(q, q2), q.new_empty(q.shape[0], q.shape[2], tokens, dtype=torch.float32)


@torch.library.custom_op(
    "uae_kernels::segment_attention_backward",
    mutates_args=(),
    **UNRECORDED,
    schema=f"(Tensor grad, Tensor grad2, {INPUTS}, Tensor out, Tensor out2, Tensor lses) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad, grad2, q, k, v, q_weight, k_weight, q2, k2, v2, q2_weight, k2_weight, packed, out, out2, lses
):  # fmt: skip
    """The gradients of q, k and v of each segment; no elements for one that is not there."""
    scale, eps = unpack(packed)
    parts = _Segments.of([q, k, v, q_weight, k_weight], [q2, k2, v2, q2_weight, k2_weight])
    dq, dk, dv, dq2, dk2, dv2 = results = _gradients(q, k, v, q2, k2, v2)
    deltas, plan = torch.empty_like(lses), plan_for(q, q.shape[3])
    tensors = _in_turn(parts.normalised(0, eps), parts.normalised(1, eps), parts.v)
    grid, sizes = parts.grid(plan.queries.rows)
    launch(
        _queries_kernel, grid, *tensors, *parts.q, *parts.weights[0], out, out2, lses, grad, grad2, deltas, dq, dq2,
        *sizes, scale, eps, *strides(*tensors, *parts.q), **parts.options(plan.queries),
    )  # fmt: skip
    grid, sizes = parts.grid(plan.keys.columns)
    launch(
        _keys_kernel, grid, *tensors, *parts.k, *parts.weights[1], lses, grad, grad2, deltas, dk, dk2, dv, dv2,
        *sizes, scale, eps, *strides(*tensors, *parts.k), **parts.options(plan.keys),
    )  # fmt: skip
    return results


def _gradients(q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v, q2, k2, v2 = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in others)
    return q.new_empty(q.shape), k, v, q2, k2, v2


@_backward.register_fake
def _(grad, grad2, q, k, v, q_weight, k_weight, q2, k2, v2, *_):
    return _gradients(q, k, v, q2, k2, v2)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


@once_differentiable
def _autograd(ctx, *grads):
    *inputs, out, out2, lses = ctx.saved_tensors
    if grads[0] is None and grads[1] is None:
        return (None,) * 11
    given = [torch.zeros_like(o) if g is None else g.contiguous() for o, g in zip((out, out2), grads, strict=False)]
    dq, dk, dv, *second = _backward(*given, *inputs, out, out2, lses)
    if inputs[5] is None:
        second = [None] * 3
    return dq, dk, dv, None, None, *second, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """Attention of every token of both segments over every token of both: softmax(scale·q·kᵀ)·v of the joined sequence.

    In a block of Stable Diffusion 3 (arXiv 2403.03206) the segments are the image's tokens and the text's.

    With norms q and k are first normalised over the channels of a head, x/√(mean x² + eps)·weight (RMSNorm, arXiv
    1910.07467), each segment with its own weights.

    The Triton kernels read the segments where they lie and hold no scores; they save, besides the inputs, the results
    and one number a query. Queries are normalised on their way in; normalised keys (in backward also queries) are
    written to scratch memory, once.

    Args:
        q, k, v: (B, N, H, D) floats of one dtype, any strides: slices of one packed projection, say. Channels that do
            not lie side by side are copied.
        q2, k2, v2: (B, N2, H, D), the second segment, or None.
        q_weight, k_weight, q2_weight, k2_weight: (D,) floats, or None for no norms; all or none.
        eps: number, added to the mean square.
        scale: positive number; None = 1/√D.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64, for D > 128 (64 in fp32) and where a norm's
            weight needs a gradient; "triton" (sm_80 and newer) and "torch" ask for one of them.

    Returns:
        (B, N, H·D) in q's dtype, contiguous; with a second segment also (B, N2, H·D). With Triton a sample's result
        depends, bit for bit, neither on the others nor on its position.

    Raises:
        TypeError: dtypes that differ or are not floats.
        ValueError: shapes that do not fit, norms for a part only, a scale that is not positive.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    check_segments((q, k, v, q_weight, k_weight), (q2, k2, v2, q2_weight, k2_weight), scale)
    weights = [w for w in (q_weight, k_weight, q2_weight, k2_weight) if w is not None]
    missing = unsupported(q, q.shape[3])
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        missing = missing or "gradients of the norms' weights"
    if not use_triton("segment_attention", impl, q, missing):
        return reference.segment_attention(
            q, k, v, q2, k2, v2, q_weight=q_weight, k_weight=k_weight, q2_weight=q2_weight, k2_weight=k2_weight,
            eps=eps, scale=scale,
        )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def ready(*tensors: Tensor | None) -> list[Tensor | None]:
        kinds = [q.dtype] * 3 + [weights[0].dtype if weights else q.dtype] * 2
        return [None if x is None else rows_of(x.to(kind)) for x, kind in zip(tensors, kinds, strict=True)]

    arguments = *ready(q, k, v, q_weight, k_weight), *ready(q2, k2, v2, q2_weight, k2_weight)
    out, out2, _ = _forward(*arguments, pack(scale / math.log(2), eps))  # scores in base 2
    return out if q2 is None else (out, out2)
