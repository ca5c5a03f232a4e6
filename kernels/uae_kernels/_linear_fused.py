"""`linear_logprobs` by kernels of its own: a GPU's path for 16-bit weights."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._common import unpack_head
from ._triton import dot, jit, launch, log1p, narrow, tanh, tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

UNSEEN = tl.constexpr(-(2.0**100))  # the exponent of a tile of −inf logits: finite, so that no −inf − −inf arises
LOWEST = tl.constexpr(-1e4)  # 2^x is 0 from here on, and 0·LOWEST is 0 where 0·−inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SCRATCH = 160_000_000  # bytes of e^z that exist at a time: 512 rows of a vocabulary of 151,936 in bf16


class Tiles(NamedTuple):
    """The block sizes of a product A·B: rows, columns and depth; B's tile of the first product spans the vocabulary."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """What a launch takes of them."""
        return dict(
            ROWS=self.rows, COLUMNS=self.columns, DEPTH=self.depth, num_warps=self.warps, num_stages=self.stages
        )


# By compute capability, bytes of an element, and whether much stands in registers beside the accumulator (a softcap, an
# entropy's gradient, a sum to add to). An entry serves the chips above it up to the next one.
TILES = {
    (0, 2, False): Tiles(16, 32, 16, 4, 1),  # the interpreter
    (0, 4, False): Tiles(16, 32, 16, 4, 1),
    (80, 2, False): Tiles(128, 128, 32, 8, 4),
    (80, 4, False): Tiles(64, 64, 16, 4, 2),
    (80, 4, True): Tiles(64, 32, 16, 4, 2),
    (90, 2, False): Tiles(128, 256, 64, 8, 3),
    (90, 2, True): Tiles(128, 128, 64, 8, 3),
    (100, 2, False): Tiles(128, 128, 64, 8, 3),
    (100, 2, True): Tiles(128, 64, 64, 8, 3),
    (120, 2, False): Tiles(128, 128, 32, 8, 3),
    (120, 2, True): Tiles(64, 128, 32, 8, 3),
}
# Parts of the vocabulary that are summed side by side: 4·(512/128)·(2048/256) programs for 132 multiprocessors
SPLITS = 4


def tiles_for(tensor: Tensor, crowded: bool = False) -> Tiles:
    chip, size = _triton.capability(tensor), 4 if tensor.dtype == torch.float32 else 2
    return TILES[max(key for key in TILES if key[0] <= chip and key[1] == size and key[2] <= crowded)]


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """A tensor-memory descriptor of x (rows, columns) tiles, or None where the chip or the strides want pointers."""
    apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1]  # rows that share memory are no descriptor's
    fits = apart and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if TensorDescriptor is None or not fits or not 90 <= _triton.capability(x) < 120:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@jit()
def _load(
    x, descriptor, row, column, rows, columns, stride_row, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The (ROWS, COLUMNS) tile of x (rows, columns) at (row, column), 0 outside."""
    if descriptor is not None:
        return descriptor.load([tl.cast(row, tl.int32), tl.cast(column, tl.int32)])
    i, j = row + tl.arange(0, ROWS).to(tl.int64), column + tl.arange(0, COLUMNS).to(tl.int64)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(x + i[:, None] * stride_row + j[None, :] * stride_column, mask=inside, other=0.0)


@jit()
def _exp2_of_integer(k):
    """Exactly 2^k for an integer k ≤ 0, 0 below 2^−126."""
    return ((tl.maximum(k, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@jit()
def _scores(
    hidden, hidden_descriptor, weight, weight_descriptor, bias, row, token, rows, vocabulary, width, pitch,
    stride_token, stride_width, pre, post, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z·log₂e of a (ROWS, COLUMNS) tile, and the softcap's slope 1 − tanh² (1 without one)."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, width, DEPTH):
        h = _load(hidden, hidden_descriptor, row, k, rows, width, pitch, 1, ROWS, DEPTH)
        w = _load(weight, weight_descriptor, token, k, vocabulary, width, stride_token, stride_width, COLUMNS, DEPTH)
        z = dot(h, tl.trans(w), z)
    if bias is not None:
        tokens = token + tl.arange(0, COLUMNS)
        z += tl.load(bias + tokens, mask=tokens < vocabulary, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = tanh(z * pre)
        return z * post, 1 - z * z
    return z * post, tl.full((ROWS, COLUMNS), 1.0, tl.float32)


@jit("first", "row_tiles", "pre", "post")
def _exponentials_kernel(
    hidden, hidden_descriptor, weight, weight_descriptor, bias, targets, counts, peaks, totals, moments, e, ex,
    first, row_tiles, rows, vocabulary, width, pitch, stride_token, stride_width, stride_e, pre, post,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of e = 2^(z·log₂e − k) with k = ⌈the row's largest z·log₂e in the tile⌉, without the target's own.

    k is an integer: to rescale e from one anchor to another loses nothing, and nothing can overflow. Per tile and
    row: k, Σ e and, in base 2, Σ e·x, x = z·log₂e − k. e·s and e·x·ln 2·s (s the softcap's slope) go to the scratch.
    """
    program = tl.program_id(0).to(tl.int64)
    row, token = (program % row_tiles) * ROWS, (program // row_tiles) * COLUMNS
    if first + row >= tl.load(counts + 1):
        return
    z, slope = _scores(
        hidden, hidden_descriptor, weight, weight_descriptor, bias, row, token, rows, vocabulary, width, pitch,
        stride_token, stride_width, pre, post, SOFTCAP, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    i, tokens = row + tl.arange(0, ROWS), token + tl.arange(0, COLUMNS)
    target = tl.load(targets + i)
    z = tl.where((tokens < vocabulary)[None, :] & (tokens[None, :] != target[:, None]), z, -float("inf"))
    peak = tl.max(z, 1)
    peak = tl.where(peak == -float("inf"), UNSEEN, tl.ceil(peak))
    x = z - peak[:, None]
    p = tl.exp2(x)
    at = (program // row_tiles) * rows + i
    tl.store(peaks + at, peak)
    tl.store(totals + at, tl.sum(p, 1))
    x = p * tl.where(x < LOWEST, LOWEST, x)
    if moments is not None:
        tl.store(moments + at, tl.sum(x, 1))
    place = i[:, None] * stride_e + tokens[None, :]
    if e is not None:
        tl.store(e + place, narrow(p * slope, e.dtype.element_ty))
    if ex is not None:
        tl.store(ex + place, narrow(x * (slope * LN2), ex.dtype.element_ty))


@jit("first", "n", "pre", "post", "scale")
def _finish_kernel(
    hidden, weight, bias, targets, index, counts, peaks, totals, moments, logprobs, entropies, lses, top, coefficients,
    first, n, rows, tiles, width, pitch, stride_token, stride_width, pre, post, scale,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """log p, entropy and log Σ e^z of ROWS rows from their tiles, and what `_jacobian_kernel` needs.

    The target's logit, on which log p depends most, is taken in fp64. Its term was left out of the sums: 1 − p is
    then a sum and not a difference.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = (i < rows) & (first + i < n)
    place = tl.load(index + first + i, mask=known, other=0)
    scored = known & (first + i < tl.load(counts + 1))
    target = tl.load(targets + i, mask=scored, other=0)

    z = tl.zeros((ROWS,), tl.float64)
    for k in range(0, width, DEPTH):
        column = k + tl.arange(0, DEPTH)
        inside = scored[:, None] & (column < width)[None, :]
        h = tl.load(hidden + i[:, None] * pitch + column[None, :], mask=inside, other=0.0)
        at = target[:, None] * stride_token + column[None, :].to(tl.int64) * stride_width
        w = tl.load(weight + at, mask=inside, other=0.0)
        z += tl.sum(h.to(tl.float32).to(tl.float64) * w.to(tl.float32).to(tl.float64), 1)
    if bias is not None:
        z += tl.load(bias + target, mask=scored, other=0.0).to(tl.float32).to(tl.float64)
    slope = tl.full((ROWS,), 1.0, tl.float32)
    if SOFTCAP:
        capped = tanh(z.to(tl.float32) * pre)
        slope = 1 - capped * capped
        z = capped.to(tl.float64)
    z *= post

    peak = tl.full((ROWS,), UNSEEN, tl.float32)
    for t in range(0, tiles):
        peak = tl.maximum(peak, tl.load(peaks + t * rows + i, mask=scored, other=UNSEEN))
    rest, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for t in range(0, tiles):
        shift = tl.load(peaks + t * rows + i, mask=scored, other=UNSEEN) - peak
        total = tl.load(totals + t * rows + i, mask=scored, other=0.0)
        rest += _exp2_of_integer(shift) * total
        if moments is not None:
            part = tl.load(moments + t * rows + i, mask=scored, other=0.0)
            moment += _exp2_of_integer(shift) * (part + tl.maximum(shift, LOWEST) * total)

    # From here on relative to the larger of the peak and the target's own logit, and in base e.
    largest = tl.maximum(peak.to(tl.float64), tl.where(z == -float("inf"), UNSEEN, z))
    x = ((z - largest) * LN2).to(tl.float32)
    shift = (peak.to(tl.float64) - largest).to(tl.float32)
    shrink = tl.exp2(shift)
    moment = shrink * (moment + tl.maximum(shift, LOWEST) * rest) * LN2
    rest *= shrink
    own = tl.exp(x)
    dead = (rest == 0) & (z <= UNSEEN)  # every logit is −inf; a maximum would have dropped a NaN
    total = tl.where(dead, 1.0, rest + own)
    log_total = tl.where(x == 0, log1p(rest), tl.log(total))
    logp = tl.where(dead, -float("inf"), x - log_total)
    logp = tl.where(logp > 0, 0.0, logp)
    x = tl.where(x < LOWEST, LOWEST, x)
    entropy = tl.where(dead, 0.0, log_total - (moment + own * x) / total)
    tl.store(logprobs + place, tl.where(scored, logp, 0.0), mask=known)
    tl.store(entropies + place, tl.where(scored, entropy, 0.0), mask=known)
    lse = tl.where(dead, -float("inf"), (largest * LN2).to(tl.float32) + log_total)
    tl.store(lses + place, tl.where(scored, lse, 0.0), mask=known)
    if top is not None:
        tl.store(top + i, peak, mask=i < rows)
        scale = tl.where(scored & ~dead, scale, 0.0)
        # d log p/dh = scale·[(1 − p_y)·s_y·W_y − Σ_{v≠y} p_v·s_v·W_v]
        tl.store(coefficients + i, scale * slope * rest / total, mask=i < rows)
        tl.store(coefficients + rows + i, -scale * shrink / total, mask=i < rows)
        # dH/dh = −scale·Σ_v p_v·s_v·(log p_v + H)·W_v, with log p_v + H = x_v + mean
        mean = entropy - log_total
        tl.store(coefficients + 2 * rows + i, -scale * slope * own * (x + mean) / total, mask=i < rows)
        tl.store(coefficients + 3 * rows + i, -scale * shrink / total * (shift * LN2 + mean), mask=i < rows)


@jit("row_tiles", "first", "depth", "rows")
def _product_kernel(
    a, a_descriptor, ax, b, b_descriptor, out, peaks, top, count,
    first, row_tiles, rows, columns, depth, part, pitch_a, stride_b, stride_b_column, stride_part, stride_out,
    ADD: tl.constexpr, TRANSPOSED: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[s] = Σ_{k in part s} a_k·b_k (or += with ADD), one (ROWS, COLUMNS) tile of one part a program.

    With `peaks`, a's columns k are first brought from the anchor of their tile of SPAN columns to the row's, `top`:
    a times 2^(peak − top), exact in a's dtype; with `ax` as well, what is summed is Σ e·x with x relative to that
    anchor.
    Rows of a lie pitch_a apart, whole tiles. TRANSPOSED: a is (depth, rows) in memory, and only its tiles of SPAN rows
    up to `count` are filled.
    """
    program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row, rest = (program % row_tiles) * ROWS, program // row_tiles
    column, s = (rest % column_tiles) * COLUMNS, rest // column_tiles
    start = s * part
    stop = tl.minimum(start + part, depth)
    if TRANSPOSED:
        stop = tl.minimum(stop, tl.cdiv(tl.load(count), SPAN) * SPAN)
    elif count is not None:  # noqa: SIM102 (`and` would load from no pointer)
        if first + row >= tl.load(count):
            return
    i = row + tl.arange(0, ROWS)
    if peaks is not None:
        anchor = tl.load(top + i)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(start, stop, DEPTH):
        if TRANSPOSED:
            x = tl.trans(_load(a, a_descriptor, k, row, depth, pitch_a, pitch_a, 1, DEPTH, ROWS))
        else:
            x = _load(a, a_descriptor, row, k, rows, pitch_a, pitch_a, 1, ROWS, DEPTH)
        if peaks is not None:
            shift = tl.load(peaks + (k // SPAN) * rows + i) - anchor
            scale = _exp2_of_integer(shift)[:, None]
            if ax is not None:
                y = _load(ax, None, row, k, rows, pitch_a, pitch_a, 1, ROWS, DEPTH).to(tl.float32)
                x = narrow((y + tl.maximum(shift, LOWEST)[:, None] * LN2 * x.to(tl.float32)) * scale, x.dtype)
            else:
                x = (x.to(tl.float32) * scale).to(x.dtype)  # exact
        y = _load(b, b_descriptor, k, column, depth, columns, stride_b, stride_b_column, DEPTH, COLUMNS)
        total = dot(x, y, total)
    j = column + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    place = out + s * stride_part + i[:, None] * stride_out + j[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, narrow(total, out.dtype.element_ty), mask=inside)


@jit("first", "n")
def _jacobian_kernel(
    parts, weight, targets, index, counts, coefficients, jacobian, entropy_jacobian,
    first, n, rows, width, pitch, stride_token, stride_width,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d log p/dh and, if asked for, d entropy/dh from the sums over parts of the vocabulary, for the active rows."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known = (i < rows) & (first + i < n)
    active = known & (first + i < tl.load(counts))
    place = tl.load(index + first + i, mask=known, other=0)[:, None] * width + j[None, :]
    inside = active[:, None] & (j < width)[None, :]
    target = tl.load(targets + i, mask=active, other=0)
    w = tl.load(weight + target[:, None] * stride_token + j[None, :] * stride_width, mask=inside, other=0.0)
    w = w.to(tl.float32)
    part = parts + i[:, None] * pitch + j[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in tl.static_range(SPLITS):
        sums += tl.load(part + s * rows * pitch, mask=inside, other=0.0)
    own = tl.load(coefficients + i, mask=active, other=0.0)[:, None]
    others = tl.load(coefficients + rows + i, mask=active, other=0.0)[:, None]
    written = known[:, None] & (j < width)[None, :]
    tl.store(jacobian + place, own * w + others * sums, mask=written)
    if entropy_jacobian is not None:
        moments = tl.zeros((ROWS, COLUMNS), tl.float32)
        for s in tl.static_range(SPLITS):
            moments += tl.load(part + (SPLITS + s) * rows * pitch, mask=inside, other=0.0)
        own = tl.load(coefficients + 2 * rows + i, mask=active, other=0.0)[:, None]
        mean = tl.load(coefficients + 3 * rows + i, mask=active, other=0.0)[:, None]
        tl.store(entropy_jacobian + place, own * w + others * moments + mean * sums, mask=written)


@jit("row_tiles", "base", "rows", "vocabulary", "pre", "post")
def _dlogits_kernel(
    hidden, hidden_descriptor, weight, weight_descriptor, bias, targets, owns, grads, entropy_grads, entropies, lses,
    counts, out, bias_parts, row_tiles, base, rows, vocabulary, width, pitch, stride_token, stride_width, stride_out,
    pre, post,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/d(h·Wᵀ) of one tile from logits computed again: −p_v·(g + g_H·(log p_v + H)), and `owns` at the target, times
    the softcap's slope.

    Columns of `out` count from token `base`; bias_parts takes the tile's sum over its rows.
    """
    program = tl.program_id(0).to(tl.int64)
    row, column = (program % row_tiles) * ROWS, (program // row_tiles) * COLUMNS
    i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    if row >= tl.load(counts + 1):
        if bias_parts is not None:
            tl.store(bias_parts + (program % row_tiles) * stride_out + j, tl.zeros((COLUMNS,), tl.float32))
        return
    z, slope = _scores(
        hidden, hidden_descriptor, weight, weight_descriptor, bias, row, base + column, rows, vocabulary, width, pitch,
        stride_token, stride_width, pre, post, SOFTCAP, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    log_p = z - tl.load(lses + i)[:, None] * LOG2E
    p = tl.exp2(log_p)
    g = tl.load(grads + i)[:, None]
    weighted = g
    if entropy_grads is not None:
        log_p = tl.where(log_p < LOWEST, LOWEST, log_p) * LN2
        weighted += tl.load(entropy_grads + i)[:, None] * (log_p + tl.load(entropies + i)[:, None])
    dz = tl.where((base + j)[None, :] == tl.load(targets + i)[:, None], tl.load(owns + i)[:, None], -p * weighted)
    dz = tl.where((base + j < vocabulary)[None, :], dz * slope, 0.0)
    tl.store(out + i[:, None] * stride_out + j[None, :], narrow(dz, out.dtype.element_ty))
    if bias_parts is not None:
        tl.store(bias_parts + (program % row_tiles) * stride_out + j, tl.sum(dz, 0))


def _numbers(packed: Tensor) -> tuple[bool, float, float, float]:
    """Whether there is a softcap, what multiplies h·Wᵀ before and after its tanh (in base 2), and d z/d(h·Wᵀ)."""
    temperature, softcap, logit_scale = unpack_head(packed)
    scale = logit_scale / temperature
    if softcap is None:
        return False, 1.0, scale / math.log(2), scale
    return True, logit_scale / softcap, softcap / temperature / math.log(2), scale


def _whole(size: int, of: int) -> int:
    return -(-size // of) * of


class _Order(NamedTuple):
    """Rows as the kernels take them: active ones first, then scored ones, then the rest; counted on the device."""

    places: Tensor  # (N,) where each row stands in the caller's order
    counts: Tensor  # (2,) active rows, scored rows

    @staticmethod
    def of(scored: Tensor, active: Tensor | None) -> "_Order":
        chosen = scored if active is None else scored & active
        index = torch.where(chosen, 0, torch.where(scored, 1, 2)).argsort(stable=True)
        return _Order(index, torch.stack([chosen.sum(), scored.sum()]))

    def pack(self, x: Tensor, start: int, rows: int, fill: float = 0, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, ...) of x from row `start` of this order on, and `fill` beyond x."""
        packed = x.index_select(0, self.places[start : start + rows]).to(dtype or x.dtype)
        shape = rows, *(_whole(size, 16) for size in x.shape[1:])
        if packed.shape == shape:
            return packed
        out = packed.new_full(shape, fill)
        out[tuple(map(slice, packed.shape))] = packed
        return out


def _product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    depth: int,
    splits: int = 1,
    row_tiles: int | None = None,
    count: Tensor | None = None,
    first: int = 0,
    anchors: tuple[Tensor, Tensor, int] | None = None,
    moments: Tensor | None = None,
    add: bool = False,
    filled: int | None = None,
) -> None:
    """out (splits, rows, columns) = the product of a (rows, depth) and b (depth, columns).

    With `filled` a is (depth, rows) in memory, filled in tiles of that many rows up to `count`.
    """
    transposed = filled is not None
    tile = tiles_for(b, crowded=add or moments is not None)
    peaks, top, span = anchors or (None, None, filled or tile.depth)
    rows, columns = out.shape[1], b.shape[1]
    part = _whole(-(-depth // splits), max(span, tile.depth))
    if row_tiles is None:
        row_tiles = -(-rows // tile.rows)
    launch(
        _product_kernel, (row_tiles * -(-columns // tile.columns) * splits,), a,
        _descriptor(a, tile.depth, tile.rows) if transposed else _descriptor(a, tile.rows, tile.depth), moments,
        b, _descriptor(b, tile.depth, tile.columns), out, peaks, top, count,
        first, row_tiles, rows, columns, depth, part, a.stride(0), *b.stride(), out.stride(0), out.stride(1),
        ADD=add, TRANSPOSED=transposed, SPAN=span, **tile.options(),
    )  # fmt: skip


def forward(hidden, weight, targets, bias, packed, scored, active, entropy, order):
    """`_linear_tiles.forward` by the kernels: per block of rows one product, statistics, and `order` more products."""
    softcap, *numbers, scale = _numbers(packed)
    (n, width), vocabulary = hidden.shape, len(weight)
    tile, device = tiles_for(weight, crowded=softcap or order == 2), hidden.device
    vocab_tiles = -(-vocabulary // tile.columns)
    padded, pitch = vocab_tiles * tile.columns, _whole(width, 16)
    bytes_per_row = order * padded * weight.element_size() + 12 * vocab_tiles
    rows = max(min(_whole(n, tile.rows), SCRATCH // bytes_per_row // tile.rows * tile.rows), tile.rows)

    def scratch(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    logprobs, entropies, lses = (scratch(n) for _ in range(3))
    jacobians = [scratch(n if k < order else 0, width) for k in range(2)]
    sequence = _Order.of(scored, active)
    peaks, totals = scratch(vocab_tiles, rows), scratch(vocab_tiles, rows)
    moments = scratch(vocab_tiles, rows, wanted=entropy or order == 2)
    e = scratch(rows, padded, wanted=order > 0, dtype=weight.dtype)
    ex = scratch(rows, padded, wanted=order == 2, dtype=weight.dtype)
    top, coefficients = scratch(rows, wanted=order > 0), scratch(4, rows, wanted=order > 0)
    parts = scratch(order, SPLITS, rows, pitch, wanted=order > 0)
    for first in range(0, n, rows):
        row_tiles = -(-min(rows, n - first) // tile.rows)
        packed_hidden = sequence.pack(hidden, first, rows, dtype=weight.dtype)
        packed_targets = sequence.pack(targets, first, rows, -1, torch.int64)
        launch(
            _exponentials_kernel, (row_tiles * vocab_tiles,), packed_hidden,
            _descriptor(packed_hidden, tile.rows, tile.depth), weight, _descriptor(weight, tile.columns, tile.depth),
            bias, packed_targets, sequence.counts, peaks, totals, moments, e, ex, first, row_tiles, rows, vocabulary,
            width, pitch, *weight.stride(), padded, *numbers, SOFTCAP=softcap, **tile.options(),
        )  # fmt: skip
        launch(
            _finish_kernel, (-(-rows // 16),), packed_hidden, weight, bias, packed_targets, sequence.places,
            sequence.counts, peaks, totals, moments, logprobs, entropies, lses, top, coefficients, first, n, rows,
            vocab_tiles, width, pitch, *weight.stride(), *numbers, scale,
            SOFTCAP=softcap, ROWS=16, DEPTH=64, num_warps=4,
        )  # fmt: skip
        for k in range(order):
            _product(
                e, weight, parts[k], depth=vocabulary, splits=SPLITS, row_tiles=row_tiles, count=sequence.counts,
                first=first, anchors=(peaks, top, tile.columns), moments=ex if k else None,
            )  # fmt: skip
        if order:
            launch(
                _jacobian_kernel, (-(-rows // 16), -(-width // 128)), parts, weight, packed_targets, sequence.places,
                sequence.counts, coefficients, jacobians[0], jacobians[1] if order == 2 else None,
                first, n, rows, width, pitch, *weight.stride(), SPLITS=SPLITS, ROWS=16, COLUMNS=128, num_warps=4,
            )  # fmt: skip
        del packed_hidden, packed_targets
    return logprobs, entropies, lses, *jacobians


def backward(hidden, weight, bias, packed, scored, columns, need):
    """`_linear_tiles.backward` by the kernels, a piece of the vocabulary at a time."""
    softcap, *numbers, _ = _numbers(packed)
    (n, width), vocabulary, tile = hidden.shape, len(weight), tiles_for(weight, crowded=True)
    need_hidden, need_weight, need_bias = need
    sequence = _Order.of(scored, None)
    rows, pitch = _whole(max(n, 1), tile.rows), _whole(width, 16)
    span = max(SCRATCH // (rows * weight.element_size()) // tile.columns, 1) * tile.columns
    span = min(span, _whole(vocabulary, tile.columns))
    row_tiles = rows // tile.rows

    packed_hidden = sequence.pack(hidden, 0, rows, dtype=weight.dtype)
    columns = [None if x is None else sequence.pack(x, 0, rows, fill) for x, fill in columns]
    dlogits = torch.empty(rows, span, dtype=weight.dtype, device=hidden.device)
    bias_parts = torch.empty(row_tiles, span, device=hidden.device) if need_bias else None
    d_hidden = torch.zeros(1, rows if need_hidden else 0, pitch, device=hidden.device)
    d_weight = torch.empty(vocabulary if need_weight else 0, width, dtype=weight.dtype, device=hidden.device)
    d_bias = torch.empty(vocabulary if need_bias else 0, device=hidden.device)
    for base in range(0, vocabulary, span):
        stop = min(base + span, vocabulary)
        launch(
            _dlogits_kernel, (row_tiles * -(-(stop - base) // tile.columns),), packed_hidden,
            _descriptor(packed_hidden, tile.rows, tile.depth), weight, _descriptor(weight, tile.columns, tile.depth),
            bias, *columns, sequence.counts, dlogits, bias_parts, row_tiles, base, rows, vocabulary, width, pitch,
            *weight.stride(), span, *numbers, SOFTCAP=softcap, **tile.options(),
        )  # fmt: skip
        if bias_parts is not None:
            d_bias[base:stop] = bias_parts[:, : stop - base].sum(0)
        if need_hidden:
            _product(dlogits, weight[base:stop], d_hidden, depth=stop - base, count=sequence.counts[1:], add=True)
        if need_weight:
            chunk = d_weight[None, base:stop]
            _product(dlogits, packed_hidden[:, :width], chunk, depth=rows, count=sequence.counts[1:], filled=tile.rows)
    result = hidden.new_empty(hidden.shape if need_hidden else (0, width))
    if need_hidden:
        result[sequence.places] = d_hidden[0, :n, :width].to(hidden.dtype)
    return result, d_weight, d_bias.to(weight.dtype if bias is None else bias.dtype)
