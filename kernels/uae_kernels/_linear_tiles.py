"""`linear_logprobs` on library matrix products: the CPU's path, and any GPU's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._common import compute_dtype, unpack_head

# Libraries choose another algorithm for another row count, and treat the rows of an odd-sized product
# unequally: every product has ROWS rows and multiples of ALIGN elsewhere, filled up with zeros.
ROWS = {"cpu": 128, "cuda": 512}
COLUMNS = {"cpu": 4096, "cuda": 16384}
ALIGN = 16
TILES = 16  # row tiles that share one pass over the vocabulary

UNSEEN = -1e30  # the running maximum before the first logit: finite, so that no −inf − −inf arises
LOWEST = -1e4  # exp() is 0 from here on, and 0·LOWEST is 0 where 0·−inf is NaN


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class _Head:
    """The weight in pieces that a matrix product takes, and the map from h·Wᵀ to scaled logits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: Tensor):
        self.weight, self.bias, self.dtype = weight, bias, compute_dtype(weight)
        self.temperature, self.softcap, self.logit_scale = unpack_head(packed)
        self.scale = self.logit_scale / self.temperature  # d logit/d(h·Wᵀ), apart from the softcap's slope
        device = weight.device.type
        self.rows, self.columns = ROWS.get(device, ROWS["cuda"]), COLUMNS.get(device, COLUMNS["cuda"])
        # A GPU multiplies bf16 and returns fp32; elsewhere operands are widened, with products exact in fp32.
        mixed = weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype_out")
        self.operand = weight.dtype if mixed else self.dtype
        self.width = _aligned(weight.shape[1])

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first token, one past the last, their piece of the weight): (columns, H), both aligned."""
        vocabulary, width = self.weight.shape
        buffer: Tensor | None = None
        for start in range(0, vocabulary, self.columns):
            stop = min(start + self.columns, vocabulary)
            chunk = self.weight[start:stop]
            if chunk.dtype != self.operand or chunk.shape != (_aligned(stop - start), self.width):
                if buffer is None:
                    buffer = self.weight.new_zeros(
                        min(self.columns, _aligned(vocabulary)), self.width, dtype=self.operand
                    )
                buffer[: stop - start, :width] = chunk
                chunk = buffer[: _aligned(stop - start)]
                chunk[stop - start :] = 0
            yield start, stop, chunk

    def row_tiles(self, chosen: Tensor) -> list[Tensor]:
        """Row numbers in tiles: of the chosen rows, or of all where a choice would synchronise with the device."""
        rows = (
            chosen.nonzero()[:, 0] if chosen.device.type == "cpu" else torch.arange(len(chosen), device=chosen.device)
        )
        return list(rows.split(self.rows)) if len(rows) else []

    def gather(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The (ROWS, H) operand of some rows, filled up with zeros."""
        tile = hidden.new_zeros(self.rows, self.width, dtype=self.operand)
        tile[: len(rows), : hidden.shape[1]] = hidden.index_select(0, rows).to(self.weight.dtype)
        return tile

    def column(self, x: Tensor, rows: Tensor, fill: float) -> Tensor:
        """(ROWS, 1): x (N,) of some rows, and `fill` below."""
        padded = x.new_full((self.rows, 1), fill)
        padded[: len(rows), 0] = x.index_select(0, rows)
        return padded

    def logits(self, tile: Tensor, chunk: Tensor, start: int, stop: int, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """z (ROWS, columns) in `out`'s memory, −inf in the columns that fill up, and the softcap's slope."""
        z = out[: self.rows * len(chunk)].view(self.rows, len(chunk))
        if z.dtype == chunk.dtype:
            torch.mm(tile, chunk.T, out=z)
        else:
            torch.ops.aten.mm.dtype_out(tile, chunk.T, z.dtype, out=z)
        if self.bias is not None:
            z[:, : stop - start].add_(self.bias[start:stop])
        z, slope = self.transform(z)
        z[:, stop - start :] = -torch.inf
        return z, slope

    def transform(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """softcap·tanh(logit_scale·z/softcap)/temperature in place, and the slope 1 − tanh², if any."""
        if self.softcap is None:
            return (z if self.scale == 1 else z.mul_(self.scale)), None
        z.mul_(self.logit_scale / self.softcap).tanh_()
        slope = z.square().neg_().add_(1)
        return z.mul_(self.softcap / self.temperature), slope

    def accumulate(self, a: Tensor, b: Tensor, out: Tensor, first: bool = False) -> None:
        """out += a·b, or out = a·b where it is the `first`."""
        if out.dtype == b.dtype:
            torch.addmm(out, a, b, beta=0 if first else 1, out=out)
        elif first:
            torch.ops.aten.mm.dtype_out(a.to(b.dtype), b, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a.to(b.dtype), b, out.dtype, out=out)

    def exact(self, tile: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row: its logit (ROWS, 1) in fp64, its weight times the softcap's slope (ROWS, H)."""
        index = tokens[:, 0].clamp(0, len(self.weight) - 1)
        weight = self.weight.index_select(0, index)
        z = (tile[:, : weight.shape[1]].double() * weight).sum(1, keepdim=True)
        if self.bias is not None:
            z.add_(self.bias.index_select(0, index)[:, None])
        z, slope = self.transform(z)
        return z, weight.to(self.dtype) if slope is None else weight * slope.to(self.dtype)

    def scratch(self) -> Tensor:
        return self.weight.new_empty(self.rows * self.columns, dtype=self.dtype)


def _put(z: Tensor, tokens: Tensor, values: Tensor | float, start: int, stop: int) -> Tensor:
    """z (ROWS, columns) with the row's value in the column of its token, if that is among start … stop."""
    inside = (tokens >= start) & (tokens < stop)
    index = (tokens - start).clamp_(0, stop - start - 1)
    return z.scatter_(1, index, torch.where(inside, values, z.gather(1, index)))


class _Rows:
    """One row tile during the sweep over the vocabulary, anchored at each row's running maximum.

    The target's own term is left out of the sums and added at the end: 1 − p is then a sum, not a difference.
    """

    def __init__(self, head: _Head, hidden: Tensor, targets: Tensor, rows: Tensor, entropy: bool, order: int):
        self.head, self.rows, self.entropy = head, rows, entropy
        self.hidden = head.gather(hidden, rows)
        self.target = head.column(targets, rows, -1)
        # The logits that matter most, the target's and the largest, are taken in fp64: single dot products.
        self.z_target, self.w_target = head.exact(self.hidden, self.target)
        self.top = self.z_target.to(head.dtype).clamp(min=UNSEEN)
        self.winner = torch.full_like(self.target, -1)  # the largest logit's token, if it is not the target
        # Σ e^x and Σ e^x·x over the other tokens, x = z − top
        self.rest, self.rest_x = torch.zeros_like(self.top), torch.zeros_like(self.top)
        # Σ e^x·s·W (order 1) and Σ e^x·x·s·W (order 2), s the softcap's slope
        self.sums = [hidden.new_zeros(head.rows, head.width, dtype=head.dtype) for _ in range(order)]

    def add(self, start: int, stop: int, chunk: Tensor, out: Tensor) -> None:
        z, slope = self.head.logits(self.hidden, chunk, start, stop, out)
        _put(z, self.target, -torch.inf, start, stop)
        # A maximum with its place takes five times as long as one without: it is asked of one column in ALIGN.
        folds = z.unflatten(1, (ALIGN, -1))
        largest, place = folds.amax(1).max(1, keepdim=True)
        index = folds.take_along_dim(place[:, None], 2).argmax(1) * folds.shape[2] + place
        self.winner = torch.where(largest > self.top, index + start, self.winner)
        top = torch.maximum(self.top, largest)
        x, shift = z.sub_(top), self.top - top
        shrink = shift.exp()
        if self.entropy:
            e = x.clamp_(min=LOWEST).exp()
            x.mul_(e)
            self.rest_x = shrink * (self.rest_x + shift * self.rest) + x.sum(1, keepdim=True)
        else:
            e = x.exp_()
        self.rest = shrink * self.rest + e.sum(1, keepdim=True)
        self.top = top
        if not self.sums:
            return
        if len(self.sums) == 2:
            self.sums[1].addcmul_(self.sums[0], shift).mul_(shrink)
            self.head.accumulate(x if slope is None else x.mul_(slope), chunk, self.sums[1])
        self.sums[0].mul_(shrink)
        self.head.accumulate(e if slope is None else e.mul_(slope), chunk, self.sums[0])

    def finish(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """log p, entropy, log Σ e^z, and the rows d log p/d hidden and d entropy/d hidden."""
        head = self.head
        z_winner, w_winner = head.exact(self.hidden, self.winner)
        error = torch.where(self.winner >= 0, z_winner - self.top, 0).to(head.dtype)
        corrections = torch.expm1(error), error.exp() * error
        self.rest, self.rest_x = self.rest + corrections[0], self.rest_x + corrections[1]
        sums = [s[:, : w_winner.shape[1]] + c * w_winner for s, c in zip(self.sums, corrections, strict=False)]

        x = (self.z_target - self.top).to(head.dtype)
        e = x.exp()
        dead = self.top <= UNSEEN  # every logit is −inf
        total = torch.where(dead, 1, self.rest + e)
        log_total = torch.log1p(self.rest + torch.expm1(x))
        logp = torch.where(dead, -torch.inf, (x - log_total).clamp(max=0))
        lse = torch.where(dead, -torch.inf, self.top + log_total)
        x = x.clamp(min=LOWEST)
        entropy = torch.where(dead, 0, log_total - (self.rest_x + e * x) / total)
        jacobians = []
        if sums:
            # d log p/dh = scale·[(1 − p_y)·s_y·W_y − Σ_{v≠y} p_v·s_v·W_v]
            rows = (self.rest / total) * self.w_target - sums[0] / total
            jacobians.append(torch.where(dead, 0, rows * head.scale))
        if len(sums) == 2:
            # dH/dh = −scale·Σ_v p_v·s_v·(log p_v + H)·W_v, log p = x − log Σ e^x
            first, second = sums[0] + e * self.w_target, sums[1] + (e * x) * self.w_target
            rows = second / total + (entropy - log_total) * (first / total)
            jacobians.append(torch.where(dead, 0, rows * -head.scale))
        return logp[:, 0], entropy[:, 0], lse[:, 0], jacobians


def forward(hidden, weight, targets, bias, packed, scored, active, entropy, order):
    """(N, H), (V, H), (N,) -> log p, entropy, log Σ e^z (N,), d log p/dh, d entropy/dh (N, H).

    0 where a target is not `scored` (N,). `order` says how many of the two Jacobians are wanted; the others have no
    rows. On a CPU rows that are not `active` (N,) do not take part in them.
    """
    head = _Head(weight, bias, packed)
    results = [hidden.new_zeros(len(targets), dtype=head.dtype) for _ in range(3)]
    # fp32 even where hidden is bf16: rounded twice, a gradient would be off by up to 2.9e-3, not 1.7e-3.
    jacobians = [
        hidden.new_zeros(len(targets) if k < order else 0, hidden.shape[1], dtype=head.dtype) for k in range(2)
    ]
    tiles = [(rows, order) for rows in head.row_tiles(scored if active is None or not order else scored & active)]
    if active is not None and order and hidden.device.type == "cpu":
        tiles += [(rows, 0) for rows in head.row_tiles(scored & ~active)]
    out = head.scratch()
    for first in range(0, len(tiles), TILES):
        block = [_Rows(head, hidden, targets, rows, entropy, count) for rows, count in tiles[first : first + TILES]]
        for start, stop, chunk in head.chunks():
            for tile in block:
                tile.add(start, stop, chunk, out)
        for tile in block:
            *values, rows = tile.finish()
            keep = scored.index_select(0, tile.rows)
            for result, value in zip(results, values, strict=True):
                result[tile.rows] = torch.where(keep, value[: len(keep)], 0)
            for jacobian, value in zip(jacobians, rows, strict=False):
                jacobian[tile.rows] = torch.where(keep[:, None], value[: len(keep)], 0)
    return *results, *jacobians


def backward(hidden, weight, bias, packed, scored, columns, need):
    """The gradients of hidden, weight and bias, as far as they are `need`ed, from logits computed again.

    `columns` are, of each row, (target, dL/d(h·Wᵀ) there, g and g_H times d z/d(h·Wᵀ), entropy, log Σ e^z) and what
    stands for them where there is no row; g_H may be None.
    """
    head = _Head(weight, bias, packed)
    need_hidden, need_weight, need_bias = need
    d_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0, hidden.shape[1]))
    d_weight = weight.new_empty(weight.shape if need_weight else (0, weight.shape[1]))
    d_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=head.dtype)
    tiles, out = head.row_tiles(scored), head.scratch()
    sums = [hidden.new_zeros(head.rows, head.width, dtype=head.dtype) for _ in tiles if need_hidden]
    of_tile: list[list[Any]] = [
        [None if x is None else head.column(x, rows, fill) for x, fill in columns] for rows in tiles
    ]
    for start, stop, chunk in head.chunks():
        d_rows = d_weight[start:stop]
        in_place = d_rows.dtype == head.dtype and d_rows.shape == chunk.shape
        d_chunk = d_rows if in_place else chunk.new_empty(chunk.shape if need_weight else 0, dtype=head.dtype)
        for i, rows in enumerate(tiles):
            tile = head.gather(hidden, rows)
            target, own, g, g_entropy, entropy, lse = of_tile[i]
            z, slope = head.logits(tile, chunk, start, stop, out)
            z.sub_(lse)  # log p
            # dL/dz_v = −p_v·(g + g_H·(log p_v + H)), apart from the target's
            if g_entropy is None:
                dz = z.exp_().mul_(-g)
            else:
                p = z.clamp_(min=LOWEST).exp()
                dz = z.add_(entropy).mul_(g_entropy).add_(g).mul_(p).neg_()
            _put(dz, target, own, start, stop)
            if slope is not None:
                dz.mul_(slope)
            if need_bias:
                d_bias[start:stop] += dz.sum(0)[: stop - start]
            if need_hidden:
                head.accumulate(dz, chunk, sums[i])
            if need_weight:
                head.accumulate(dz.T, tile, d_chunk, first=i == 0)
        if need_weight and not tiles:
            d_rows.zero_()
        elif need_weight and not in_place:
            d_rows.copy_(d_chunk[: stop - start, : weight.shape[1]])
    if need_hidden:
        for rows, total in zip(tiles, sums, strict=True):
            d_hidden[rows] = total[: len(rows), : hidden.shape[1]].to(hidden.dtype)
    return d_hidden, d_weight, d_bias.to(weight.dtype if bias is None else bias.dtype)
