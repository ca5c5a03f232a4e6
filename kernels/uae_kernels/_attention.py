"""What the attention kernels share: tile sizes, softmax(q·kᵀ)·v over a run of keys, and its gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._triton import dot, jit, narrow, tl

LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Queries × keys at a time; a program owns one and walks along the other."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self, width: int) -> dict[str, int]:
        """What a launch takes of them, with the channels of a head and of its tile: a power of two, 16 at least."""
        return dict(
            WIDTH=width, DEPTH=depth_of(width), ROWS=self.rows, COLUMNS=self.columns, num_warps=self.warps,
            num_stages=self.stages,
        )  # fmt: skip


class Plan(NamedTuple):
    forward: Tiles  # a program owns queries
    queries: Tiles  # their gradient: the same
    keys: Tiles  # the gradient of keys and values: a program owns keys


# By compute capability, bytes of an element, channels of a head, and whether heads share keys. An entry serves
# the chips above it up to the next one, and narrower heads. None spills: tests/kernels/test_aot.py.
_MMA_64 = Plan(Tiles(128, 64, 8, 3), Tiles(64, 32, 8, 2), Tiles(32, 128, 8, 2))  # without wgmma or tcgen05
_MMA_128 = Plan(Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))
PLANS = {
    (0, 2, 128, False): Plan(*[Tiles(32, 16, 4, 1)] * 3),  # the interpreter
    (0, 4, 128, False): Plan(*[Tiles(32, 16, 4, 1)] * 3),
    (80, 2, 64, False): _MMA_64,
    (80, 2, 128, False): _MMA_128,
    (80, 2, 128, True): _MMA_128._replace(forward=Tiles(64, 64, 8, 2)),
    (80, 4, 64, False): Plan(Tiles(32, 16, 8, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    (90, 2, 64, False): Plan(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (90, 2, 64, True): Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (90, 2, 128, False): Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    (100, 2, 64, False): Plan(Tiles(128, 32, 4, 3), Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 2)),
    (100, 2, 128, False): Plan(Tiles(128, 32, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (120, 2, 64, False): _MMA_64,
    (120, 2, 128, False): _MMA_128,
}


def plan_for(tensor: Tensor, width: int, shared: bool = False) -> Plan:
    chip, size = _triton.capability(tensor), 4 if tensor.dtype == torch.float32 else 2
    fitting = [key for key in PLANS if key[0] <= chip and key[1] == size and key[2] >= width and key[3] <= shared]
    return PLANS[max(fitting, key=lambda key: (key[0], -key[2], key[3]))]


def depth_of(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def unsupported(tensor: Tensor, width: int) -> str | None:
    """What about these heads the kernels cannot serve."""
    widest = {torch.float64: 0, torch.float32: 64}.get(tensor.dtype, 128)
    if not widest:
        return "fp64"
    if width > widest:
        return f"{tensor.dtype} heads of more than {widest} channels"
    if tensor.is_cuda and _triton.capability(tensor) < 80:
        return "GPUs without bf16 matrix units (before sm_80)"
    return None


def rows_of(x: Tensor) -> Tensor:
    """x itself where a head's channels lie side by side, as the kernels read them, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of each between rows of the batch, tokens and heads."""
    return [x.stride(dim) for x in tensors for dim in range(3)]


@jit()
def load_rows(x, places, inside, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The DEPTH channels of the rows at `places`, 0 from channel WIDTH on and where not `inside` (None: all are)."""
    d = tl.arange(0, DEPTH)
    at = x + places[:, None] + d[None, :]
    if WIDTH == DEPTH:
        if inside is None:
            values = tl.load(at)
        else:
            values = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        mask = (d < WIDTH)[None, :]
        if inside is not None:
            mask = mask & inside[:, None]
        values = tl.load(at, mask=mask, other=0.0)
    return values


@jit()
def store_rows(x, places, inside, values, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    d = tl.arange(0, DEPTH)
    mask = inside[:, None] & (d < WIDTH)[None, :]
    tl.store(x + places[:, None] + d[None, :], narrow(values, x.dtype.element_ty), mask=mask)


@jit()
def attend(
    q, k, v, total, mass, top, full, size, limit, k_stride, v_stride, scale,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds `size` keys, COLUMNS at a time, to Σ p·v, Σ p and the largest score, p = 2^(score − largest).

    score = scale·q·k. Every row sees the first `full` keys, whole blocks; of the others those below its `limit`: these
    are few, and a pipeline for them would only take registers.
    """
    for masked in tl.static_range(2):
        for first in tl.range(full * masked, size if masked else full, COLUMNS, num_stages=1 if masked else None):
            j = first + tl.arange(0, COLUMNS)
            inside = j < size if masked else None
            keys = load_rows(k, j.to(tl.int64) * k_stride, inside, WIDTH, DEPTH)
            s = dot(q, tl.trans(keys), tl.zeros((ROWS, COLUMNS), tl.float32))
            if masked:
                s = tl.where(j[None, :] < limit, s, -float("inf"))
            peak = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - peak[:, None])
            shrink = tl.exp2(top - peak)
            mass = mass * shrink + tl.sum(p, 1)
            values = load_rows(v, j.to(tl.int64) * v_stride, inside, WIDTH, DEPTH)
            total = dot(narrow(p, values.dtype), values, total * shrink[:, None])
            top = peak
    return total, mass, top


@jit()
def query_gradient(
    q, g, lse, delta, k, v, total, full, size, limit, k_stride, v_stride, scale,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds `size` keys to Σ ds·k, ds = p·(g·v − delta), p = 2^(score − lse); otherwise as `attend`."""
    for masked in tl.static_range(2):
        for first in tl.range(full * masked, size if masked else full, COLUMNS, num_stages=1 if masked else None):
            j = first + tl.arange(0, COLUMNS)
            inside = j < size if masked else None
            keys = load_rows(k, j.to(tl.int64) * k_stride, inside, WIDTH, DEPTH)
            s = dot(q, tl.trans(keys), tl.zeros((ROWS, COLUMNS), tl.float32))
            p = tl.exp2(s * scale - lse[:, None])
            if masked:
                p = tl.where(j[None, :] < limit, p, 0.0)
            values = load_rows(v, j.to(tl.int64) * v_stride, inside, WIDTH, DEPTH)
            ds = p * (dot(g, tl.trans(values), tl.zeros((ROWS, COLUMNS), tl.float32)) - delta[:, None])
            total = dot(narrow(ds, keys.dtype), keys, total)
    return total


@jit()
def key_gradient(
    k, v, q, g, lses, deltas, dk, dv, start, stop, size, position,
    q_stride, q_head, g_stride, g_head, scale,
    SHARE: tl.constexpr, CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds query rows start … stop, ROWS at a time, to Σ dsᵀ·q and Σ pᵀ·g.

    Row i is head i % SHARE of token i // SHARE; `size` rows exist. CAUSAL: a key is seen by the tokens from its
    `position` on.
    """
    for first in tl.range(start, stop, ROWS, num_stages=1 if CAUSAL else None):
        i = first + tl.arange(0, ROWS)
        inside = i < size
        token, head = (i // SHARE).to(tl.int64), (i % SHARE).to(tl.int64)
        queries = load_rows(q, token * q_stride + head * q_head, inside, WIDTH, DEPTH)
        s = dot(k, tl.trans(queries), tl.zeros((COLUMNS, ROWS), tl.float32))
        p = tl.exp2(s * scale - tl.load(lses + i, mask=inside, other=float("inf"))[None, :])
        if CAUSAL:
            p = tl.where(position[:, None] <= token[None, :], p, 0.0)
        grads = load_rows(g, token * g_stride + head * g_head, inside, WIDTH, DEPTH)
        dv = dot(narrow(p, grads.dtype), grads, dv)
        ds = dot(v, tl.trans(grads), tl.zeros((COLUMNS, ROWS), tl.float32))
        ds = p * (ds - tl.load(deltas + i, mask=inside, other=0.0)[None, :])
        dk = dot(narrow(ds, queries.dtype), queries, dk)
    return dk, dv
