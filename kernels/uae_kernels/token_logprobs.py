"""Log-probabilities of given tokens from logits: one read of them, and one read and write for their gradient."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._common import UNRECORDED, compute_dtype, pack_head, unpack_head
from ._triton import fp64, jit, launch, log1p, tanh, tl, use_triton
from .reference.token_logprobs import check_logits, is_scored

# PyTorch's row tiles
ROWS = 128
CPU_ELEMENTS = 2**18  # a CPU's tiles also stay in its cache
LOWEST = -1e4  # exp() is 0 from here on, and 0·LOWEST is 0 where 0·−inf is NaN

# Triton's programs: one a row, BLOCK logits at a time
BLOCK = 4096
WARPS = 8


@jit()
def _scaled(x, inner, outer, SOFTCAP: tl.constexpr):
    """outer·tanh(inner·x), or inner·x without a softcap; and the slope 1 − tanh², or 1."""
    z = inner * x.to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = tanh(z)
        z = outer * t
        slope = 1 - t * t
    return z, slope


@jit()
def _floored(x):
    """A factor of exp(x): x, but finite where that is 0, since 0·−inf is NaN. Where x is NaN the product is."""
    return tl.maximum(x, -1e4)


@jit("stride")
def _offset(column, stride):
    return column if stride is None else column.to(tl.int64) * stride


@jit()
def _columns(start, vocabulary, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """A block of columns as (lanes, VECTOR) such that a lane is one thread's, and which are inside."""
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    item = tl.arange(0, VECTOR)[None, :]
    if ALIGNED:  # a lane is one vector, inside as a whole
        column = start + VECTOR * lane + item
        inside = start + VECTOR * lane < vocabulary
    else:  # neighboring lanes are neighboring columns
        column = start + lane + BLOCK // VECTOR * item
        inside = column < vocabulary
    return column, inside


@jit("tokens", "vocabulary", "stride_l", "stride_t", "stride_v", "ignore_index", "inner", "outer")
def _forward_kernel(
    logits, targets, logprobs, tops, log_totals, entropies, tokens, vocabulary, stride_l, stride_t, stride_v,
    ignore_index, inner, outer,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i // tokens * stride_l + i % tokens * stride_t
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    target = tl.load(targets + i)
    scored = (target != ignore_index) & (target >= 0) & (target < vocabulary)
    target = tl.where(scored, target, 0).to(tl.int32)

    # Each lane anchors its sums at its running maximum, finite so that no −inf − −inf arises. The target's own term
    # is left out of them: 1 − p is then a sum, not a difference.
    top = tl.full([BLOCK // VECTOR], -3.4028234663852886e38, tl.float32)
    rest = tl.zeros([BLOCK // VECTOR], tl.float32)  # Σ e^x, x = z − top
    rest_x = tl.zeros([BLOCK // VECTOR], tl.float32)  # Σ e^x·x
    for start in range(0, tl.where(scored, vocabulary, 0), BLOCK):
        column, inside = _columns(start, vocabulary, ALIGNED, BLOCK, VECTOR)
        z, _ = _scaled(tl.load(row + _offset(column, stride_v), mask=inside, other=0), inner, outer, SOFTCAP)
        if (start + BLOCK > vocabulary) | ((start <= target) & (target < start + BLOCK)):
            z = tl.where(inside & (column != target), z, float("-inf"))
        new = tl.maximum(top, tl.max(z, 1))
        x, shift = z - new[:, None], top - new
        shrink, e = tl.exp(shift), tl.exp(x)
        if entropies is not None:
            rest_x = shrink * (rest_x + _floored(shift) * rest) + tl.sum(e * _floored(x), 1)
        rest = shrink * rest + tl.sum(e, 1)
        top = new

    z, _ = _scaled(tl.load(row + _offset(target, stride_v), mask=scored, other=0), inner, outer, SOFTCAP)
    highest = tl.maximum(tl.max(top, 0), z)
    shift = _floored(top - highest)
    shrink = tl.exp(shift)
    rest_x = tl.sum(shrink * (rest_x + shift * rest), 0)
    rest = tl.sum(shrink * rest, 0)
    x = z - highest
    e = tl.exp(x)
    total = rest + e
    dead = total == 0  # every logit is −inf
    log_total = tl.where(dead, float("-inf"), log1p(rest + (e - 1)))
    logprob = tl.where(dead, float("-inf"), x - log_total)
    tl.store(logprobs + i, tl.where(scored, logprob, 0))
    tl.store(tops + i, tl.where(scored, highest, 0))
    tl.store(log_totals + i, tl.where(scored, log_total, 0))
    if entropies is not None:
        entropy = log_total - (rest_x + e * _floored(x)) / total
        tl.store(entropies + i, tl.where(scored & ~dead, entropy, 0))


@jit(
    "tokens", "vocabulary", "stride_l", "stride_t", "stride_v", "out_l", "out_t", "out_v", "ignore_index",
    "inner", "outer",
)  # fmt: skip
def _backward_kernel(
    logits, out, targets, grads, grads_entropy, logprobs, tops, log_totals, entropies, tokens, vocabulary,
    stride_l, stride_t, stride_v, out_l, out_t, out_v, ignore_index, inner, outer,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i // tokens * stride_l + i % tokens * stride_t
    out += i // tokens * out_l + i % tokens * out_t
    if ALIGNED:
        row, out = tl.multiple_of(row, 16), tl.multiple_of(out, 16)
    target = tl.load(targets + i)
    top, log_total, logprob = tl.load(tops + i), tl.load(log_totals + i), tl.load(logprobs + i)
    alive = (target != ignore_index) & (target >= 0) & (target < vocabulary) & (log_total != float("-inf"))

    # dL/dz_v = g·([v = y] − p_v) − g_H·p_v·(log p_v + H)
    g = tl.load(grads + i) * (inner * outer)
    t = tanh(0.5 * logprob)
    at_target = g * (-2 * t / (1 - t))  # 1 − p without cancellation
    if grads_entropy is not None:
        g_entropy = tl.load(grads_entropy + i) * (inner * outer)
        entropy = tl.load(entropies + i)
        at_target -= g_entropy * tl.exp(logprob) * (_floored(logprob) + entropy)
    for start in range(0, vocabulary, BLOCK):
        column, inside = _columns(start, vocabulary, ALIGNED, BLOCK, VECTOR)
        z, slope = _scaled(
            tl.load(row + _offset(column, stride_v), mask=inside & alive, other=0), inner, outer, SOFTCAP
        )
        log_p = z - top - log_total
        factor = g
        if grads_entropy is not None:
            factor = g + g_entropy * (_floored(log_p) + entropy)
        dz = tl.where(column == target, at_target, -tl.exp(log_p) * factor) * slope
        tl.store(out + _offset(column, out_v), tl.where(alive, dz, 0), mask=inside)


def _factors(packed: Tensor) -> tuple[float, float, bool]:
    """z = outer·tanh(inner·logits), or inner·logits without a softcap; and whether there is one."""
    temperature, softcap, logit_scale = unpack_head(packed)
    if softcap is None:
        return logit_scale / temperature, 1.0, False
    return logit_scale / softcap, softcap / temperature, True


def _stacked(tensors: Sequence[Tensor | None], leading: torch.Size) -> Iterator[list[Any]]:
    """Tensors (*leading, ...) as views (L, ...): all at once where strides allow, else piece by piece."""
    try:
        views = [None if x is None else x.view(leading.numel(), *x.shape[len(leading) :]) for x in tensors]
    except RuntimeError:
        for i in range(leading[0]):
            yield from _stacked([None if x is None else x[i] for x in tensors], leading[1:])
    else:
        yield views


def _strides(x: Tensor) -> tuple[int | None, ...]:
    """The last one None if it is 1."""
    return *x.stride()[:-1], None if x.stride(-1) == 1 else x.stride(-1)


def _tiling(*logits: Tensor) -> dict[str, Any]:
    """Launch options for (L, T, V) tensors; aligned rows are read in vectors of 16 bytes.

    For the others ptxas takes fewer registers than it needs and spills, unless it is allowed 128.
    """
    bytes_each = logits[0].element_size()
    aligned = all(
        x.stride(2) == 1
        and x.data_ptr() % 16 == 0
        and all(size * bytes_each % 16 == 0 for size in (x.stride(0), x.stride(1), x.shape[2]))
        for x in logits
    )
    limit = None if aligned else 128
    return {"ALIGNED": aligned, "BLOCK": BLOCK, "VECTOR": 16 // bytes_each, "num_warps": WARPS, "maxnreg": limit}


def _tile_rows(logits: Tensor) -> int:
    rows = ROWS
    if logits.device.type == "cpu":
        rows = max(1, min(ROWS, CPU_ELEMENTS // max(logits.shape[-1], 1)))
    return min(rows, logits.shape[-2])


def _tiles(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices of (at most ROWS, V) pieces of logits (..., T, V), of any strides without a copy."""
    rows = _tile_rows(logits)
    for leading in product(*map(range, logits.shape[:-2])):
        for start in range(0, logits.shape[-2], rows or 1):
            yield *leading, slice(start, start + rows)


def _memory(logits: Tensor, count: int) -> list[Tensor]:
    """`count` tensors of a tile's size: all tiles share them, as new memory would have to be mapped in each time."""
    return [logits.new_empty(_tile_rows(logits), logits.shape[-1], dtype=compute_dtype(logits)) for _ in range(count)]


def _scaled_tile(logits: Tensor, packed: Tensor, memory: Tensor, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """z (rows, V) in fp32, in `memory` or `logits` itself, and if wanted and there is a softcap its slope 1 − tanh²."""
    inner, outer, softcap = _factors(packed)
    if not softcap and inner == 1 and logits.dtype == memory.dtype:
        return logits, None
    z = memory.copy_(logits).mul_(inner)
    if not softcap:
        return z, None
    z.tanh_()
    slopes = z.square().neg_().add_(1) if slope else None
    return z.mul_(outer), slopes


def _row_sum(terms: Tensor) -> Tensor:
    """(rows, V) -> (rows,). One row alone would be summed in parts, one for each thread: two are not."""
    return terms.expand(max(len(terms), 2), -1).sum(1)[: len(terms)]


def _statistics(
    logits: Tensor, targets: Tensor, packed: Tensor, ignore_index: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_forward` in PyTorch, a tile at a time."""
    targets = targets.contiguous()
    scored = is_scored(targets, logits.shape[-1], ignore_index)
    index = torch.where(scored, targets, 0).long()
    # Of x = z − max: the target's own, and Σ e^x and Σ e^x·x over the others. 1 − p is then a sum, not a difference.
    top, own, rest, rest_x = (logits.new_empty(targets.shape, dtype=compute_dtype(logits)) for _ in range(4))
    memory, *more = _memory(logits, 1 + entropy)
    for i in _tiles(logits):
        column = index[i][:, None]
        z, _ = _scaled_tile(logits[i], packed, memory[: len(column)])
        highest = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        x = torch.sub(z, highest, out=memory[: len(column)])
        top[i], own[i] = highest[:, 0], x.gather(1, column)[:, 0]
        x.scatter_(1, column, -torch.inf)
        e = torch.exp(x, out=more[0][: len(column)] if entropy else x)
        rest[i] = _row_sum(e)
        if entropy:
            rest_x[i] = _row_sum(x.clamp_(min=LOWEST).mul_(e))
    e = own.exp()
    total = rest + e
    dead = total == 0  # every logit is −inf
    log_total = torch.log1p(rest + (e - 1)).masked_fill_(dead, -torch.inf)
    found = [(own - log_total).masked_fill_(dead, -torch.inf), top, log_total]
    if entropy:
        mean_x = (rest_x + e * own.clamp(min=LOWEST)) / total
        found.append((log_total - mean_x).masked_fill_(dead, 0))
    else:
        found.append(top.new_empty(0))
    logprobs, top, log_total, entropies = (torch.where(scored, x, 0) if x.numel() else x for x in found)
    return logprobs, top, log_total, entropies


@torch.library.custom_op("uae_kernels::token_logprobs", mutates_args=(), **UNRECORDED)
def _forward(
    logits: Tensor, targets: Tensor, packed: Tensor, ignore_index: int, entropy: bool, inplace: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., T, V), (..., T) -> log p, max z, log Σ e^(z − max), and the entropy (..., T), or (0,) unless wanted.

    A row of nothing but −inf has a log Σ of −inf.
    """
    if not triton:
        return _statistics(logits, targets, packed, ignore_index, entropy)
    results = [logits.new_empty(targets.shape, dtype=compute_dtype(logits)) for _ in range(3 + entropy)]
    inner, outer, softcap = _factors(packed)
    given = [logits, targets.contiguous(), *results, *[None] * (not entropy)]
    for x, *rows in _stacked(given, logits.shape[:-2]):
        launch(
            _forward_kernel, (x.shape[0] * x.shape[1],), x, *rows, *x.shape[1:], *_strides(x),
            ignore_index, inner, outer, SOFTCAP=softcap, **_tiling(x),
        )  # fmt: skip
    if not entropy:
        results.append(logits.new_empty(0, dtype=compute_dtype(logits)))
    return results[0], results[1], results[2], results[3]


@_forward.register_fake
def _(logits, targets, packed, ignore_index, entropy, inplace, triton):
    shapes = targets.shape, targets.shape, targets.shape, targets.shape if entropy else (0,)
    return tuple(logits.new_empty(shape, dtype=compute_dtype(logits)) for shape in shapes)


BACKWARD = """
    Tensor grad, Tensor? grad_entropy, Tensor{} logits, Tensor targets, Tensor packed, Tensor logprobs, Tensor tops,
    Tensor log_totals, Tensor entropies, int ignore_index, bool triton
"""


def _write_gradient(out: Tensor, *inputs: Any) -> None:
    """dL/dlogits into `out`, which may be `logits` itself: each piece is read before it is written."""
    grad, grad_entropy, logits, targets, packed, logprobs, tops, log_totals, entropies, ignore_index, triton = inputs
    inner, outer, softcap = _factors(packed)
    if triton:
        rows = [targets, grad, grad_entropy, logprobs, tops, log_totals, None if grad_entropy is None else entropies]
        given = [logits, out, *(None if x is None else x.contiguous() for x in rows)]
        for x, dx, *rows in _stacked(given, logits.shape[:-2]):
            launch(
                _backward_kernel, (x.shape[0] * x.shape[1],), x, dx, *rows, *x.shape[1:], *_strides(x), *_strides(dx),
                ignore_index, inner, outer, SOFTCAP=softcap, **_tiling(x, dx),
            )  # fmt: skip
        return
    alive = is_scored(targets, logits.shape[-1], ignore_index) & (log_totals != -torch.inf)
    index = torch.where(alive, targets, 0).long()
    grad = torch.where(alive, grad, 0) * (inner * outer)
    at_target = -grad * torch.expm1(logprobs)
    if grad_entropy is not None:
        grad_entropy = torch.where(alive, grad_entropy, 0) * (inner * outer)
        at_target -= grad_entropy * logprobs.exp() * (logprobs.clamp(min=LOWEST) + entropies)
    whole = alive.device.type == "cpu" and bool(alive.all())
    in_place = out.dtype == tops.dtype and grad_entropy is None
    memory = _memory(logits, 0 if in_place else 1 if grad_entropy is None else 2)
    per_total = -grad * torch.exp(-log_totals)
    for i in _tiles(logits):
        column = index[i][:, None]
        room = out[i] if in_place else memory[0][: len(column)]
        z, slope = _scaled_tile(logits[i], packed, room, slope=True)
        x = torch.sub(z, tops[i][:, None], out=room)
        # dL/dz_v = g·([v = y] − p_v) − g_H·p_v·(log p_v + H)
        if grad_entropy is None:
            dz = x.exp_().mul_(per_total[i][:, None])
        else:
            log_p = x.sub_(log_totals[i][:, None])
            p = torch.exp(log_p, out=memory[1][: len(column)])
            factor = log_p.clamp_(min=LOWEST).add_(entropies[i][:, None]).mul_(grad_entropy[i][:, None])
            dz = factor.add_(grad[i][:, None]).mul_(p).neg_()
        dz.scatter_(1, column, at_target[i][:, None])
        if slope is not None:
            dz.mul_(slope)
        if not whole:
            dz.masked_fill_(~alive[i][:, None], 0)
        if not in_place:
            out[i] = dz


@torch.library.custom_op(
    "uae_kernels::token_logprobs_backward", mutates_args=(), schema=f"({BACKWARD.format('')}) -> Tensor", **UNRECORDED
)
def _backward(*inputs):
    out = torch.empty_like(inputs[2])
    _write_gradient(out, *inputs)
    return out


@_backward.register_fake
def _(grad, grad_entropy, logits, *options):
    return torch.empty_like(logits)


@torch.library.custom_op(
    "uae_kernels::token_logprobs_backward_",
    mutates_args=("logits",),
    schema=f"({BACKWARD.format('(a!)')}) -> ()",
    **UNRECORDED,
)
def _backward_(*inputs):
    _write_gradient(inputs[2], *inputs)


@_backward_.register_fake
def _(*inputs):
    return None


def _setup_context(ctx, inputs, output):
    logits, targets, packed, ctx.ignore_index, entropy, ctx.inplace, ctx.triton = inputs
    ctx.mark_non_differentiable(*output[1 : 3 if entropy else 4])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, packed, *output)


def _autograd(ctx, grad, _, __, grad_entropy):
    logits, targets, packed, logprobs, *saved = ctx.saved_tensors
    none = (None,) * 6
    if grad is None and grad_entropy is None:
        return None, *none
    given = torch.zeros_like(logprobs) if grad is None else grad, grad_entropy
    logits = logits.detach() if ctx.inplace else logits
    inputs = *given, logits, targets, packed, logprobs, *saved, ctx.ignore_index, ctx.triton
    if ctx.inplace:
        _backward_(*inputs)
        return logits, *none
    return _backward(*inputs), *none


_forward.register_autograd(_autograd, setup_context=_setup_context)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, from logits.

    z = softcap·tanh(logit_scale·logits/softcap)/temperature, log p = z[target] − log Σ_v e^{z_v}.

    Computes in fp32 and allocates nothing of the logits' size but their gradient. Triton reads the logits
    once, and once more for their gradient; PyTorch works on 128 rows at a time.

    Args:
        logits: (..., V) floats of any strides; a slice such as logits[:, :-1] is not copied.
        targets: (...) int64 or int32 token ids. `ignore_index` and ids outside [0, V) are ignored:
            log-probability, entropy and gradients are 0, whatever their logits hold.
        temperature: positive number, divides the logits.
        softcap: positive number or None.
        logit_scale: number, multiplies the logits before the softcap.
        return_entropy: also return −Σ p log p, in nats.
        entropy_grad: whether gradients flow through the entropy.
        inplace_backward: the backward pass overwrites `logits` with their gradient, which saves a tensor of
            their size; nothing else may read them afterwards. Has no effect under torch.compile, which plans
            memory itself.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere and for fp64 logits; "triton" and "torch" ask
            for one of them.

    Returns:
        fp32 (fp64 for fp64 logits) (...) log-probabilities, or (log-probabilities, entropies). −inf logits
        are tokens of probability 0; a row of nothing else gives −inf, entropy 0 and no gradient. A row's
        result depends neither on the rows beside it nor on its position, bit for bit.

    Raises:
        ValueError: shapes that do not fit, temperature or softcap not positive, `inplace_backward` on logits
            that overlap themselves in memory (expanded).
        TypeError: targets of another dtype.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    check_logits(logits, targets, temperature, softcap)
    triton = use_triton("token_logprobs", impl, logits, fp64(logits))
    if inplace_backward and any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError("token_logprobs: inplace_backward cannot write to expanded logits")
    rows = logits.dim() == 1  # a single distribution
    logprobs, _, _, entropy = _forward(
        logits[None] if rows else logits,
        targets[None] if rows else targets,
        pack_head(temperature, softcap, logit_scale),
        ignore_index,
        return_entropy,
        inplace_backward and not torch.compiler.is_compiling(),
        triton,
    )
    if rows:
        logprobs, entropy = logprobs[0], entropy[0] if return_entropy else entropy
    if not return_entropy:
        return logprobs
    return logprobs, entropy if entropy_grad else entropy.detach()
