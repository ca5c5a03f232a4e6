"""Attention for G continuations of one prompt: its keys and values are held and read once, not G times."""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._attention import (
    LN2,
    Tiles,
    attend,
    key_gradient,
    load_rows,
    plan_for,
    query_gradient,
    rows_of,
    store_rows,
    strides,
    unsupported,
)
from ._common import UNRECORDED, compute_dtype, pack, unpack
from ._triton import jit, launch, narrow, tl, use_triton
from .reference.shared_prefix_attention import check_shared_prefix, kept

# Parts of a group whose gradients of the prefix are summed side by side, in fp32: too few programs own a prefix block
SPLITS = 4
BLOCK = 1024  # elements of those sums, a program
GROUPED_HEADS = "2.9"  # PyTorch from here on: its flash attention of a CPU takes heads of keys that queries share


@jit()
def _length(lengths, row, tokens):
    """How many of a row's tokens count."""
    length = tokens
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), tokens).to(tl.int32)
    return length


@jit()
def _queries(
    q, lengths, prefix_lengths, blocks, group, kv_heads, tokens, prefix_tokens, q_row, q_token, q_head,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a program that owns a block of queries works on.

    Row i of the queries that share a head of keys is head i % SHARE of token i // SHARE: a block is whole whatever the
    number of tokens, and few keys are hidden from some of its rows only. The longest blocks come first.

    Returns (row of the batch, prefix, head, query rows, their tokens, which of them exist and which also count, their
    places in (B·G, Hkv, T·SHARE) and in (B·G, T, Hq), prefix keys, own keys, and how many of each every row of the
    block sees, in whole blocks of keys).
    """
    program = tl.program_id(0).to(tl.int64)
    block, rest = blocks - 1 - program % blocks, program // blocks
    head, row = rest % kv_heads, rest // kv_heads
    sample = row // group
    length = _length(lengths, row, tokens)
    first = (block * ROWS).to(tl.int32)
    i = first + tl.arange(0, ROWS)
    token, size = i // SHARE, length * SHARE
    place = (row * kv_heads + head) * tokens * SHARE + i
    at = ((row * tokens + token) * kv_heads + head) * SHARE + i % SHARE
    prefix = tl.where(first < size, _length(prefix_lengths, sample, prefix_tokens), 0)
    own = tl.where(first < size, tl.minimum((first + ROWS - 1) // SHARE + 1, length), 0)
    full = tl.minimum((first // SHARE + 1) // COLUMNS * COLUMNS, own)
    q += row * q_row + head * SHARE * q_head
    queries = load_rows(q, token.to(tl.int64) * q_token + (i % SHARE).to(tl.int64) * q_head, i < size, WIDTH, DEPTH)
    return (
        row, sample, head, queries, token, i < tokens * SHARE, i < size, place, at,
        prefix, prefix // COLUMNS * COLUMNS, own, full,
    )  # fmt: skip


@jit()
def _keys(
    part, row, sample, head, token, prefix, prefix_full, own, own_full, k, v, prefix_k, prefix_v,
    k_row, k_token, k_head, v_row, v_token, v_head,
    prefix_k_row, prefix_k_token, prefix_k_head, prefix_v_row, prefix_v_token, prefix_v_head,
):  # fmt: skip
    """The prefix's keys and values (part 0), or the continuation's own.

    Returns (where they begin, how far tokens lie apart, how many every row sees, how many there are, and the first that
    a row does not see).
    """
    ours = part == 1
    keys = tl.where(ours, k + row * k_row + head * k_head, prefix_k + sample * prefix_k_row + head * prefix_k_head)
    values = tl.where(ours, v + row * v_row + head * v_head, prefix_v + sample * prefix_v_row + head * prefix_v_head)
    key_token, value_token = tl.where(ours, k_token, prefix_k_token), tl.where(ours, v_token, prefix_v_token)
    size = tl.where(ours, own, prefix)
    limit = tl.where(ours, token + 1, size)[:, None]
    return keys, values, key_token, value_token, tl.where(ours, own_full, prefix_full), size, limit


@jit("blocks", "group", "tokens", "prefix_tokens")
def _forward_kernel(
    q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, out, lses,
    blocks, group, kv_heads, tokens, prefix_tokens, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    prefix_k_row, prefix_k_token, prefix_k_head, prefix_v_row, prefix_v_token, prefix_v_head,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, sample, head, queries, token, there, inside, place, at, prefix, prefix_full, own, own_full = _queries(
        q, lengths, prefix_lengths, blocks, group, kv_heads, tokens, prefix_tokens, q_row, q_token, q_head,
        SHARE, WIDTH, DEPTH, ROWS, COLUMNS,
    )  # fmt: skip
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    mass, top = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    for part in range(2):
        keys, values, key_token, value_token, full, size, limit = _keys(
            part, row, sample, head, token, prefix, prefix_full, own, own_full, k, v, prefix_k, prefix_v,
            k_row, k_token, k_head, v_row, v_token, v_head,
            prefix_k_row, prefix_k_token, prefix_k_head, prefix_v_row, prefix_v_token, prefix_v_head,
        )  # fmt: skip
        total, mass, top = attend(
            queries, keys, values, total, mass, top, full, size, limit, key_token, value_token, scale,
            WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    store_rows(out, at * WIDTH, there, tl.where(inside[:, None], total / mass[:, None], 0.0), WIDTH, DEPTH)
    tl.store(lses + place, tl.where(inside, top + tl.log2(mass), float("inf")), mask=there)


@jit("blocks", "group", "tokens", "prefix_tokens")
def _queries_kernel(
    q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, out, lses, grad, deltas, dq,
    blocks, group, kv_heads, tokens, prefix_tokens, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    prefix_k_row, prefix_k_token, prefix_k_head, prefix_v_row, prefix_v_token, prefix_v_head,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq, and delta = out·grad of each query, which the gradient of the keys needs."""
    row, sample, head, queries, token, there, inside, place, at, prefix, prefix_full, own, own_full = _queries(
        q, lengths, prefix_lengths, blocks, group, kv_heads, tokens, prefix_tokens, q_row, q_token, q_head,
        SHARE, WIDTH, DEPTH, ROWS, COLUMNS,
    )  # fmt: skip
    grads = load_rows(grad, at * WIDTH, inside, WIDTH, DEPTH)
    outputs = load_rows(out, at * WIDTH, inside, WIDTH, DEPTH)
    delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(deltas + place, delta, mask=inside)
    lse = tl.load(lses + place, mask=inside, other=float("inf"))
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for part in range(2):
        keys, values, key_token, value_token, full, size, limit = _keys(
            part, row, sample, head, token, prefix, prefix_full, own, own_full, k, v, prefix_k, prefix_v,
            k_row, k_token, k_head, v_row, v_token, v_head,
            prefix_k_row, prefix_k_token, prefix_k_head, prefix_v_row, prefix_v_token, prefix_v_head,
        )  # fmt: skip
        total = query_gradient(
            queries, grads, lse, delta, keys, values, total, full, size, limit, key_token, value_token, scale,
            WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    total = tl.where(inside[:, None], total * (scale * LN2), 0.0)
    store_rows(dq, at * WIDTH, there, total, WIDTH, DEPTH)


@jit("blocks", "tokens")
def _keys_kernel(
    q, k, v, lengths, lses, grad, deltas, dk, dv, blocks, kv_heads, tokens, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of a continuation's own keys, over the queries from there on."""
    program = tl.program_id(0).to(tl.int64)
    block, rest = program % blocks, program // blocks
    head, row = rest % kv_heads, rest // kv_heads
    length = _length(lengths, row, tokens)
    first = (block * COLUMNS).to(tl.int32)
    j = first + tl.arange(0, COLUMNS)
    inside, size = j < length, length * SHARE
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    keys = load_rows(k, j.to(tl.int64) * k_token, inside, WIDTH, DEPTH)
    values = load_rows(v, j.to(tl.int64) * v_token, inside, WIDTH, DEPTH)
    q += row * q_row + head * SHARE * q_head
    grad += (row * tokens * kv_heads + head) * SHARE * WIDTH
    lses += (row * kv_heads + head) * tokens * SHARE
    deltas += (row * kv_heads + head) * tokens * SHARE

    stop = tl.where(first < length, size, 0)
    start = first * SHARE // ROWS * ROWS
    edge = tl.minimum(tl.cdiv((first + COLUMNS) * SHARE, ROWS) * ROWS, stop)  # queries from here on see the whole block
    key_sum, value_sum = tl.zeros((COLUMNS, DEPTH), tl.float32), tl.zeros((COLUMNS, DEPTH), tl.float32)
    key_sum, value_sum = key_gradient(
        keys, values, q, grad, lses, deltas, key_sum, value_sum, start, edge, size, j,
        q_token, q_head, kv_heads * SHARE * WIDTH, WIDTH, scale, SHARE, True, WIDTH, DEPTH, ROWS, COLUMNS,
    )  # fmt: skip
    key_sum, value_sum = key_gradient(
        keys, values, q, grad, lses, deltas, key_sum, value_sum, edge, stop, size, j,
        q_token, q_head, kv_heads * SHARE * WIDTH, WIDTH, scale, SHARE, False, WIDTH, DEPTH, ROWS, COLUMNS,
    )  # fmt: skip
    at = ((row * tokens + j) * kv_heads + head) * WIDTH
    store_rows(dk, at, j < tokens, tl.where(inside[:, None], key_sum * (scale * LN2), 0.0), WIDTH, DEPTH)
    store_rows(dv, at, j < tokens, tl.where(inside[:, None], value_sum, 0.0), WIDTH, DEPTH)


@jit("blocks", "batch", "group", "part", "tokens", "prefix_tokens")
def _prefix_keys_kernel(
    q, prefix_k, prefix_v, lengths, prefix_lengths, lses, grad, deltas, dk, dv,
    blocks, batch, group, part, kv_heads, tokens, prefix_tokens, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of a prefix, over all queries of `part` of its continuations."""
    program = tl.program_id(0).to(tl.int64)
    block, rest = program % blocks, program // blocks
    head, rest = rest % kv_heads, rest // kv_heads
    sample, split = rest % batch, rest // batch
    length = _length(prefix_lengths, sample, prefix_tokens)
    first = (block * COLUMNS).to(tl.int32)
    j = first + tl.arange(0, COLUMNS)
    inside = j < length
    prefix_k += sample * k_row + head * k_head
    prefix_v += sample * v_row + head * v_head
    keys = load_rows(prefix_k, j.to(tl.int64) * k_token, inside, WIDTH, DEPTH)
    values = load_rows(prefix_v, j.to(tl.int64) * v_token, inside, WIDTH, DEPTH)

    key_sum, value_sum = tl.zeros((COLUMNS, DEPTH), tl.float32), tl.zeros((COLUMNS, DEPTH), tl.float32)
    for member in range(split * part, tl.minimum((split + 1) * part, group)):
        row = sample * group + member
        size = tl.where(first < length, _length(lengths, row, tokens) * SHARE, 0)
        key_sum, value_sum = key_gradient(
            keys, values, q + row * q_row + head * SHARE * q_head,
            grad + (row * tokens * kv_heads + head) * SHARE * WIDTH, lses + (row * kv_heads + head) * tokens * SHARE,
            deltas + (row * kv_heads + head) * tokens * SHARE, key_sum, value_sum, 0, size, size, j,
            q_token, q_head, kv_heads * SHARE * WIDTH, WIDTH, scale, SHARE, False, WIDTH, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
    at = (((split * batch + sample) * prefix_tokens + j) * kv_heads + head) * WIDTH
    store_rows(dk, at, j < prefix_tokens, tl.where(inside[:, None], key_sum * (scale * LN2), 0.0), WIDTH, DEPTH)
    store_rows(dv, at, j < prefix_tokens, tl.where(inside[:, None], value_sum, 0.0), WIDTH, DEPTH)


@jit()
def _sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = Σ parts (SPLITS, size), in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=at < size)


def _options(tile: Tiles, q: Tensor, k: Tensor) -> dict[str, int]:
    return dict(SHARE=q.shape[2] // k.shape[2], **tile.options(q.shape[3]))


def _sizes(q: Tensor, k: Tensor, prefix_k: Tensor, group_size: int, tile: Tiles) -> tuple[tuple[int], list[int]]:
    """The grid over blocks of queries, and (blocks, group, kv_heads, tokens, prefix_tokens)."""
    rows, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    blocks = -(-tokens * (heads // kv_heads) // tile.rows)
    return (rows * kv_heads * blocks,), [blocks, group_size, kv_heads, tokens, prefix_k.shape[1]]


def _triton_forward(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale):
    out, lses = _results(q)
    tile = plan_for(q, q.shape[3], shared=True).forward
    grid, sizes = _sizes(q, k, prefix_k, group_size, tile)
    launch(
        _forward_kernel, grid, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, out, lses, *sizes,
        scale / math.log(2), *strides(q, k, v, prefix_k, prefix_v), **_options(tile, q, k),
    )  # fmt: skip
    return out, lses


def _triton_backward(grad, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale, out, lses):
    dq, dk, dv, prefix_dk, prefix_dv = (x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))
    deltas, plan = torch.empty_like(lses), plan_for(q, q.shape[3], shared=True)
    scale /= math.log(2)  # scores in base 2
    grid, sizes = _sizes(q, k, prefix_k, group_size, plan.queries)
    launch(
        _queries_kernel, grid, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, out, lses, grad, deltas, dq,
        *sizes, scale, *strides(q, k, v, prefix_k, prefix_v), **_options(plan.queries, q, k),
    )  # fmt: skip

    (rows, tokens), (batch, prefix, kv_heads, _), tile = q.shape[:2], prefix_k.shape, plan.keys
    blocks = -(-tokens // tile.columns)
    launch(
        _keys_kernel, (blocks * kv_heads * rows,), q, k, v, lengths, lses, grad, deltas, dk, dv,
        blocks, kv_heads, tokens, scale, *strides(q, k, v), **_options(tile, q, k),
    )  # fmt: skip

    splits, blocks = min(group_size, SPLITS), -(-prefix // tile.columns)
    parts = [torch.empty(splits, prefix_k.numel(), device=q.device) for _ in range(2)]
    launch(
        _prefix_keys_kernel, (blocks * kv_heads * batch * splits,), q, prefix_k, prefix_v, lengths, prefix_lengths,
        lses, grad, deltas, *parts, blocks, batch, group_size, -(-group_size // splits), kv_heads, tokens, prefix,
        scale, *strides(q, prefix_k, prefix_v), **_options(tile, q, k),
    )  # fmt: skip
    for part, total in zip(parts, (prefix_dk, prefix_dv), strict=True):
        grid = (-(-total.numel() // BLOCK),)
        launch(_sum_kernel, grid, part, total, total.numel(), SPLITS=splits, BLOCK=BLOCK, num_warps=4)
    return dq, dk, dv, prefix_dk, prefix_dv


# ---- On a CPU: PyTorch's own flash attention of the prefix and of the continuation, joined by their log Σ e^score ----


def _flash_forward(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (kept(x, lengths).to(compute_dtype(q)) for x in (q, k, v))
    out, lses = map(_heads, flash(*map(_heads, (q, k, v)), is_causal=True, scale=scale))
    for rows, samples in _runs(prefix_lengths, prefix_k, group_size):
        keys, values = (_heads(x[samples].to(q.dtype)) for x in (prefix_k, prefix_v))
        shared, lse = map(_heads, flash(_joined(q[rows], len(keys)), keys, values, scale=scale))
        shared, lse = shared.reshape(out[rows].shape), lse.reshape(lses[rows].shape)
        out[rows].lerp_(shared, torch.sigmoid(lse - lses[rows]).unsqueeze(-1))
        lses[rows] = torch.logaddexp(lse, lses[rows])
    return kept(out, lengths), lses


def _flash_backward(grad, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale, out, lses):
    """Each part's gradients, from the whole's result and log Σ e^score, which hold the other part's share."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad, q, k, v, out = (kept(x, lengths).to(compute_dtype(q)) for x in (grad, q, k, v, out))
    lses = lses.view(q.shape[:3])
    dq, dk, dv = map(_heads, flash(*map(_heads, (grad, q, k, v, out, lses)), 0.0, True, scale=scale))
    prefix_dk, prefix_dv = (x.new_zeros(x.shape, dtype=q.dtype) for x in (prefix_k, prefix_v))
    for rows, samples in _runs(prefix_lengths, prefix_k, group_size):
        keys, values = (_heads(x[samples].to(q.dtype)) for x in (prefix_k, prefix_v))
        given, queries, result, lse = (_joined(x[rows], len(keys)) for x in (grad, q, out, lses))
        more, dkeys, dvalues = map(_heads, flash(given, queries, keys, values, result, lse, 0.0, False, scale=scale))
        dq[rows] += more.reshape(q[rows].shape)
        prefix_dk[samples], prefix_dv[samples] = dkeys, dvalues
    return dq, dk, dv, prefix_dk, prefix_dv


def _heads(x: Tensor) -> Tensor:
    """(rows, tokens, heads, …) as (rows, heads, tokens, …), or back."""
    return x.transpose(1, 2)


def _joined(x: Tensor, batch: int) -> Tensor:
    """(B·G, T, heads, …) as (B, heads, G·T, …)."""
    return _heads(x.unflatten(0, (batch, -1)).flatten(1, 2))


def _runs(lengths: Tensor | None, prefix: Tensor, group_size: int) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Neighbouring prefixes of one length that is not 0: rows of their continuations, and where their tokens are."""
    batch, tokens = prefix.shape[:2]
    start = 0
    for length, run in groupby([tokens] * batch if lengths is None else lengths.clamp(0, tokens).tolist()):
        stop = start + len(list(run))
        if length:
            yield slice(start * group_size, stop * group_size), (slice(start, stop), slice(length))
        start = stop


# ---- Anywhere else: one continuation's scores at a time, in backward anew --------------------------------------------


def _rows_forward(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale):
    out, lses = _results(q)
    for row, _, _, values, p in _each(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale):
        out[row] = torch.einsum("hrts,shd->thrd", p, values).flatten(1, 2)
    return kept(out, lengths), lses.zero_()  # backward does without


def _rows_backward(grad, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale, *_):
    grad = kept(grad, lengths).to(compute_dtype(q)).unflatten(2, (k.shape[2], -1))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    prefix_dk, prefix_dv = (x.new_zeros(x.shape, dtype=grad.dtype) for x in (prefix_k, prefix_v))
    prefix = prefix_k.shape[1]
    for row, queries, keys, values, p in _each(
        q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale
    ):  # fmt: skip
        dvalues = torch.einsum("hrts,thrd->shd", p, grad[row])
        ds = torch.einsum("thrd,shd->hrts", grad[row], values)
        ds = p * (ds - (p * ds).sum(-1, keepdim=True)) * scale
        dkeys = torch.einsum("hrts,thrd->shd", ds, queries)
        dq[row] = torch.einsum("hrts,shd->thrd", ds, keys).flatten(1, 2)
        for own, shared, both in ((dk, prefix_dk, dkeys), (dv, prefix_dv, dvalues)):
            own[row] = both[prefix:]
            shared[row // group_size] += both[:prefix]
    return dq, dk, dv, prefix_dk, prefix_dv


def _each(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, scale):
    """Of each continuation: its row, q (T, Hkv, Hq/Hkv, D), all keys and values (P + T, Hkv, D), and the softmax."""
    q, k, v = (kept(x, lengths).to(compute_dtype(q)) for x in (q, k, v))
    prefix_k, prefix_v = (kept(x, prefix_lengths).to(q.dtype) for x in (prefix_k, prefix_v))
    prefix, tokens = prefix_k.shape[1], k.shape[1]
    place = torch.arange(prefix + tokens, device=q.device)
    causal = torch.ones(tokens, prefix + tokens, dtype=torch.bool, device=q.device).tril(prefix)
    for row in range(len(q)):
        sample, seen = row // group_size, causal
        if prefix_lengths is not None:
            seen = causal & ((place < prefix_lengths[sample]) | (place >= prefix))
        queries = q[row].unflatten(1, (k.shape[2], -1))
        keys, values = torch.cat([prefix_k[sample], k[row]]), torch.cat([prefix_v[sample], v[row]])
        scores = torch.einsum("thrd,shd->hrts", queries, keys) * scale
        yield row, queries, keys, values, torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)


# ---- The op ----------------------------------------------------------------------------------------------------------

INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? lengths, Tensor? prefix_lengths, "
    "Tensor packed, int group_size, bool triton"
)


def _implementation(q: Tensor, triton: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What serves a call forward and backward."""
    if triton:
        return _triton_forward, _triton_backward
    if q.device.type == "cpu" and q.numel() and torch.__version__ >= GROUPED_HEADS:
        return _flash_forward, _flash_backward
    return _rows_forward, _rows_backward


@torch.library.custom_op(
    "uae_kernels::shared_prefix_attention", mutates_args=(), **UNRECORDED, schema=f"({INPUTS}) -> (Tensor, Tensor)"
)
def _forward(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, packed, group_size, triton):
    """The attention's result, and for backward a number a query, (B·G, T·Hq): log Σ e^score, with Triton to base 2."""
    forward, _ = _implementation(q, triton)
    out, lses = forward(q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, *unpack(packed))
    return out.to(q.dtype).contiguous(), lses.flatten(1)


@_forward.register_fake
def _(q, *_):
    return _results(q)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1] * q.shape[2], dtype=compute_dtype(q))


@torch.library.custom_op(
    "uae_kernels::shared_prefix_attention_backward",
    mutates_args=(),
    **UNRECORDED,
    schema=f"(Tensor grad, {INPUTS}, Tensor out, Tensor lses) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, packed, group_size, triton, out, lses
):  # fmt: skip
    """The gradients of q, k, v, prefix_k and prefix_v."""
    _, backward = _implementation(q, triton)
    gradients = backward(
        grad, q, k, v, prefix_k, prefix_v, lengths, prefix_lengths, group_size, *unpack(packed), out, lses
    )
    return tuple(x.to(q.dtype).contiguous() for x in gradients)


@_backward.register_fake
def _(grad, q, k, v, prefix_k, prefix_v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.group_size, ctx.triton = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    *tensors, out, lses = ctx.saved_tensors
    return *_backward(grad.contiguous(), *tensors, ctx.group_size, ctx.triton, out, lses), *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """Attention of G continuations over one prefix, which all of them see whole, and causally over themselves.

    softmax(scale·q·[prefix_k, k]ᵀ)·[prefix_v, v], as if each continuation stood in a row of its own behind a copy of
    its prefix. The prefix's own queries are not part of it.

    Saved for backward are, besides the inputs, the result and one number a query. The Triton kernels, and PyTorch on a
    CPU (2.9 and newer), hold a block of scores at a time and no copy of the prefix; PyTorch elsewhere holds the scores
    and the keys and values of one continuation. The prefix's gradient is summed over the G continuations and the query
    heads in a fixed order.

    Args:
        q: (B·G, T, Hq, D) floats, the G continuations of a prefix in a row.
        k, v: (B·G, T, Hkv, D), like q in dtype. Hq is a multiple of Hkv; query head h uses head h // (Hq / Hkv).
        prefix_k, prefix_v: (B, P, Hkv, D), like q in dtype. P may be 0. Any strides, for all five; channels that do not
            lie side by side are copied.
        group_size: G.
        lengths: (B·G,) int64 or int32 on the same device: tokens of each continuation that count. The others get zeros
            and no gradient, whatever they hold. None: all T.
        prefix_lengths: (B,), the same for prefixes.
        scale: positive number; None = 1/√D.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64 and for D > 128 (64 in fp32); "triton" (sm_80
            and newer) and "torch" ask for one of them.

    Returns:
        (B·G, T, Hq, D) in q's dtype. With Triton a continuation's result depends, bit for bit, on itself and its prefix
        alone: neither on the others, nor on its position, nor on the padding of T or P. Elsewhere it does not depend on
        what the others hold.

    Raises:
        TypeError: dtypes that differ or are not floats; lengths that are not integers.
        ValueError: shapes that do not fit, a scale that is not positive.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    check_shared_prefix(q, k, v, prefix_k, prefix_v, group_size, lengths, prefix_lengths, scale)
    triton = use_triton("shared_prefix_attention", impl, q, unsupported(q, q.shape[3]))
    lengths, prefix_lengths = (None if x is None else x.contiguous() for x in (lengths, prefix_lengths))
    tensors = [rows_of(x) for x in (q, k, v, prefix_k, prefix_v)]
    packed = pack(q.shape[3] ** -0.5 if scale is None else scale)
    return _forward(*tensors, lengths, prefix_lengths, packed, group_size, triton)[0]
