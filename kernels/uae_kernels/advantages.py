"""Group-relative advantages: one launch, two for GDPO."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._common import UNRECORDED, pack, schema, unpack
from ._triton import fp64, jit, launch, tl, use_triton
from .reference.advantages import check_arguments, weight_row

SAMPLES = 16  # a program serves these samples of one group
OTHERS = {"size": 256, "ids": 32}  # against so many at a time, by how groups are given
WARPS = 4
REGISTERS = 128  # a thread; left to itself, ptxas takes fewer and spills


@jit("columns", "stride_b", "stride_r")
def _read(rewards, weights, sample, inside, columns, stride_b, stride_r):
    """x = Σ_k w_k·r_k over a sample's finite rewards, and whether it has one."""
    x = tl.zeros(sample.shape, tl.float64)
    scored = tl.zeros(sample.shape, tl.int1)
    pointer = rewards + sample * stride_b
    for k in range(columns):
        reward = tl.load(pointer, mask=inside, other=float("nan")).to(tl.float64)
        finite = tl.abs(reward) < float("inf")
        if weights is not None:
            reward *= tl.load(weights + k)
        x += tl.where(finite, reward, 0)
        scored |= finite
        pointer += stride_r
    return x, scored


@jit("size")
def _mine(ids, size, SAMPLES: tl.constexpr):
    """A program's samples, which of them exist, their ids (one for all without ids), and their group's first sample."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, SAMPLES)
    first = program // blocks * size
    position = program % blocks * SAMPLES + tl.arange(0, SAMPLES)
    sample, inside = first + position, position < size
    mine = tl.zeros([1], tl.int64) if ids is None else tl.load(ids + sample, mask=inside, other=0)
    return sample, inside, mine, first


@jit("start", "first", "size", "columns", "stride_b", "stride_r")
def _members(rewards, weights, ids, mine, start, first, size, columns, stride_b, stride_r, OTHERS: tl.constexpr):
    """Samples from first + start on and their x (1, OTHERS), and which are scored and of the same id as `mine`."""
    sample = first + start + tl.arange(0, OTHERS)
    inside = sample < first + size
    x, scored = _read(rewards, weights, sample, inside, columns, stride_b, stride_r)
    same = scored[None, :]
    if ids is not None:
        same = same & (mine[:, None] == tl.load(ids + sample, mask=inside, other=0)[None, :])
    return sample[None, :], x[None, :], same


@jit("first", "size", "columns", "stride_b", "stride_r", "unbiased")
def _moments(rewards, weights, ids, mine, first, size, columns, stride_b, stride_r, unbiased, OTHERS: tl.constexpr):
    """Mean, standard deviation, count and "all equal" of the scored samples first, ..., first + size − 1.

    Of all of them (1,), or with `ids` of those that share an id with `mine` (S,). The standard deviation of equal
    rewards is given as 1: their advantages are zeros, whatever divides them.
    """
    count = tl.zeros(mine.shape, tl.float64)
    total = tl.zeros(mine.shape, tl.float64)
    low = tl.full(mine.shape, float("inf"), tl.float64)
    high = tl.full(mine.shape, float("-inf"), tl.float64)
    for start in range(0, size, OTHERS):
        _, x, same = _members(rewards, weights, ids, mine, start, first, size, columns, stride_b, stride_r, OTHERS)
        count += tl.sum(same.to(tl.float64), 1)
        total += tl.sum(tl.where(same, x, 0), 1)
        low = tl.minimum(low, tl.min(tl.where(same, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(same, x, float("-inf")), 1))
    mean = total / tl.maximum(count, 1)
    squares = tl.zeros(mine.shape, tl.float64)
    for start in range(0, size, OTHERS):
        _, x, same = _members(rewards, weights, ids, mine, start, first, size, columns, stride_b, stride_r, OTHERS)
        d = tl.where(same, x - mean[:, None], 0)
        squares += tl.sum(d * d, 1)
    constant = high <= low
    variance = squares / tl.maximum(count - unbiased, 1)
    return mean, tl.sqrt(tl.where(constant, 1, variance)), count, constant


@jit("first", "size", "columns", "stride_b", "stride_r")
def _products(
    grads, advantages, rewards, weights, ids, mine, first, size, columns, stride_b, stride_r, OTHERS: tl.constexpr
):
    """Σ h and Σ h·A over the same samples as `_moments`."""
    column, width = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    sum_h = tl.zeros(mine.shape, tl.float64)
    sum_ha = tl.zeros(mine.shape, tl.float64)
    for start in range(0, size, OTHERS):
        sample, _, same = _members(rewards, weights, ids, mine, start, first, size, columns, stride_b, stride_r, OTHERS)
        inside, place = sample < first + size, sample * width + column
        h = tl.load(grads + place, mask=inside, other=0).to(tl.float64)
        a = tl.load(advantages + place, mask=inside, other=0)
        sum_h += tl.sum(tl.where(same, h, 0), 1)
        sum_ha += tl.sum(tl.where(same, h * a, 0), 1)
    return sum_h, sum_ha


@jit("batch", "size", "columns", "stride_b", "stride_r", "unbiased", "eps", "clip", "missing")
def _forward_kernel(
    rewards, weights, ids, muted, out, constants,
    batch, size, columns, stride_b, stride_r, unbiased, eps, clip, missing,
    SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, SAMPLES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    column, width = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rewards += column * stride_r
    sample, inside, mine, first = _mine(ids, size, SAMPLES)
    mean, std, count, constant = _moments(
        rewards, weights, ids, mine, first, size, columns, stride_b, stride_r, unbiased, OTHERS
    )
    if SCALE == "batch":
        anyone = tl.zeros([1], tl.int64)
        _, std, _, _ = _moments(
            rewards, weights, None, anyone, 0, batch, columns, stride_b, stride_r, unbiased, OTHERS
        )  # fmt: skip
    x, scored = _read(rewards, weights, sample, inside, columns, stride_b, stride_r)
    a = tl.where(constant, 0, x - mean)
    if LEAVE_ONE_OUT:  # x_i − mean of the others = n/(n − 1)·(x_i − mean)
        a *= count / tl.maximum(count - 1, 1)
    if SCALE != "none":
        a /= std + eps
    a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
    a = tl.where(scored, a, missing)
    if muted is not None:  # samples whose group is constant in every column
        silent = inside
        for k in range(columns):
            silent = silent & tl.load(muted + sample * columns + k, mask=inside, other=0).to(tl.int1)
        a = tl.where(silent, 0, a)
    tl.store(out + sample * width + column, a, mask=inside)
    tl.store(constants + sample * width + column, constant & inside, mask=inside)


@jit("eps")
def _through_std(d, sum_ha, x, std, degrees, eps):
    return (d - sum_ha * x / (tl.maximum(degrees, 1) * std)) / (std + eps)


@jit("batch", "size", "columns", "stride_b", "stride_r", "unbiased", "eps")
def _backward_kernel(
    grads, advantages, rewards, weights, ids, out,
    batch, size, columns, stride_b, stride_r, unbiased, eps,
    SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, SAMPLES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    column, width = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rewards += column * stride_r
    sample, inside, mine, first = _mine(ids, size, SAMPLES)
    mean, std, count, constant = _moments(
        rewards, weights, ids, mine, first, size, columns, stride_b, stride_r, unbiased, OTHERS
    )
    sum_h, sum_ha = _products(
        grads, advantages, rewards, weights, ids, mine, first, size, columns, stride_b, stride_r, OTHERS
    )
    x, _ = _read(rewards, weights, sample, inside, columns, stride_b, stride_r)
    h = tl.load(grads + sample * width + column, mask=inside, other=0).to(tl.float64)
    d = h - sum_h / tl.maximum(count, 1)
    if LEAVE_ONE_OUT:
        d *= count / tl.maximum(count - 1, 1)
    if SCALE == "group":
        d = _through_std(d, sum_ha, x - mean, std, count - unbiased, eps)
    d = tl.where(constant, 0, d)
    if SCALE == "batch":
        anyone = tl.zeros([1], tl.int64)
        mean, std, count, _ = _moments(
            rewards, weights, None, anyone, 0, batch, columns, stride_b, stride_r, unbiased, OTHERS
        )  # fmt: skip
        _, sum_ha = _products(
            grads, advantages, rewards, weights, None, anyone, 0, batch, columns, stride_b, stride_r, OTHERS
        )  # fmt: skip
        d = _through_std(d, sum_ha, x - mean, std, count - unbiased, eps)
    pointer = rewards + sample * stride_b
    for k in range(columns):
        reward = tl.load(pointer, mask=inside, other=float("nan")).to(tl.float64)
        slope = tl.where(tl.abs(reward) < float("inf"), d, 0)
        if weights is not None:
            slope *= tl.load(weights + k)
        tl.store(out + sample * width * columns + column + k, slope, mask=inside)
        pointer += stride_r


class _Groups(NamedTuple):
    """A = c·(x − mean)/(std + eps) within groups of `size` samples, or of equal `ids` among all of them."""

    ids: Tensor | None
    size: int  # the number of samples with ids
    scale: str
    unbiased: bool
    leave_one_out: bool
    eps: float

    def launch(self, kernel: Any, rewards: Tensor, apart: bool, tensors: tuple[Tensor | None, ...], *numbers: float):
        batch, columns = rewards.shape
        blocks = batch // self.size * -(-self.size // SAMPLES)
        launch(
            kernel, (blocks, columns if apart else 1), *tensors, batch, self.size, 1 if apart else columns,
            *rewards.stride(), int(self.unbiased), self.eps, *numbers,
            SCALE=self.scale, LEAVE_ONE_OUT=self.leave_one_out, SAMPLES=SAMPLES,
            OTHERS=OTHERS["size" if self.ids is None else "ids"], num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip

    def normalize(
        self,
        rewards: Tensor,
        weights: Tensor | None = None,
        *,
        apart: bool = False,
        muted: Tensor | None = None,
        clip: float = math.inf,
        missing: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor]:
        """(B, R) -> A and "all equal in its group" (B, 1), or (B, R) for each column `apart`.

        A sample without rewards gets `missing`, one that is `muted` (B, R) in every column 0.
        """
        out = rewards.new_empty(rewards.shape if apart else (len(rewards), 1), dtype=dtype)
        constants = torch.empty_like(out, dtype=torch.bool)
        tensors = rewards, weights, self.ids, muted, out, constants
        self.launch(_forward_kernel, rewards, apart, tensors, clip, missing)
        return out, constants

    def backward(
        self,
        grad: Tensor,
        advantages: Tensor,
        rewards: Tensor,
        weights: Tensor | None = None,
        *,
        apart: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """dL/dr (B, R) from h = dL/dA (B, 1), or (B, R) for columns `apart`.

        dL/dx_j = c·(h_j − mean h)/(std + eps) − Σ_i h_i·A_i·(x_j − mean)/((n − 1)·std·(std + eps)), the means over j's
        group, the second term over what `std` is taken of.
        """
        out = rewards.new_empty(rewards.shape, dtype=dtype)
        self.launch(_backward_kernel, rewards, apart, (grad.contiguous(), advantages, rewards, weights, self.ids, out))
        return out


class _Inputs(NamedTuple):
    """What the op takes, forward and backward."""

    rewards: Tensor
    group_ids: Tensor | None
    weights: Tensor | None
    packed: Tensor  # eps, clip, and the weights where they are numbers
    group_size: int | None
    aggregation: str
    scale: str
    unbiased: bool
    leave_one_out: bool

    def prepared(self) -> tuple[Tensor, Tensor | None, float, _Groups, _Groups]:
        """Rewards (B, R), their weights, the clip, the groups, and the batch as one group."""
        eps, clip, *listed = unpack(self.packed)
        table = self.rewards[:, None] if self.rewards.dim() == 1 else self.rewards
        given = listed or None if self.weights is None else self.weights
        weights = None if given is None else weight_row(given, table.new_empty(0, dtype=torch.float32)).contiguous()
        ids = None if self.group_ids is None else self.group_ids.contiguous()
        groups = _Groups(ids, self.group_size or len(table), self.scale, self.unbiased, self.leave_one_out, eps)
        whole = _Groups(None, len(table), "group", self.unbiased, False, eps)
        return table, weights, math.inf if clip is None else clip, groups, whole


SCHEMA = schema(_Inputs)


@torch.library.custom_op("uae_kernels::group_advantages", mutates_args=(), schema=f"({SCHEMA}) -> Tensor", **UNRECORDED)
def _forward(*inputs):
    """(B,) or (B, R) -> (B,)."""
    x = _Inputs(*inputs)
    if not len(x.rewards):
        return x.rewards.new_empty(0, dtype=torch.float32)
    table, weights, clip, groups, whole = x.prepared()
    if x.aggregation == "sum_then_normalize":
        a, _ = groups.normalize(table, weights, clip=clip, dtype=torch.float32)
    else:
        z, constants = groups.normalize(table, apart=True, missing=math.nan)
        a, _ = whole.normalize(z, weights, muted=constants, clip=clip, dtype=torch.float32)
    return a[:, 0]


@_forward.register_fake
def _(rewards, *options):
    return rewards.new_empty(rewards.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "uae_kernels::group_advantages_backward", mutates_args=(), schema=f"(Tensor grad, {SCHEMA}) -> Tensor", **UNRECORDED
)
def _backward(grad, *inputs):
    x, grad = _Inputs(*inputs), grad[:, None]
    if not len(x.rewards):
        return torch.zeros_like(x.rewards, memory_format=torch.contiguous_format)
    table, weights, clip, groups, whole = x.prepared()
    if x.aggregation == "sum_then_normalize":
        a, _ = groups.normalize(table, weights)
        grad = torch.where(a.abs() <= clip, grad, 0)
        result = groups.backward(grad, a, table, weights, dtype=torch.float32)
    else:
        z, constants = groups.normalize(table, apart=True, missing=math.nan)
        a, _ = whole.normalize(z, weights)
        grad = torch.where((a.abs() <= clip) & ~constants.all(1, keepdim=True), grad, 0)
        grad = whole.backward(grad, a, z, weights)
        result = groups.backward(grad, z, table, apart=True, dtype=torch.float32)
    return result.to(x.rewards.dtype).reshape(x.rewards.shape)


@_backward.register_fake
def _(grad, rewards, *options):
    return rewards.new_empty(rewards.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _autograd(ctx, grad):
    return _backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    leave_one_out: bool = False,
    clip: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Advantage of each sample over its group: A = (r − mean_group)/(std + eps)  (GRPO, arXiv 2402.03300).

    Defined everywhere: a reward that is NaN or infinite is left out of its group's statistics and gets 0; a
    group without variance, and a group of one, get exactly 0.

    Args:
        rewards: (B,) floats, or (B, R) for R reward functions; a sample counts while one of its R rewards is
            finite.
        group_size: G consecutive samples form a group; B must be a multiple of it. Either this or
            `group_ids`.
        group_ids: (B,) integers; equal ids form a group, wherever they stand and however many. B² operations;
            PyTorch takes B² memory.
        reward_weights: (R,) weights of the reward functions, None = ones.
        aggregation: "sum_then_normalize" normalises Σ_k w_k·r_k. "normalize_then_sum" is GDPO: each reward
            function is normalised within its group, and their weighted sum over the batch.
        scale: the std that divides: of the "group" or of the whole "batch"; "none" divides by nothing (Dr.
            GRPO).
        unbiased: std with n − 1 (as torch and TRL) or n.
        eps: added to the std; TRL 1e-4, verl 1e-6, OpenRLHF 1e-9.
        leave_one_out: subtract the mean of the *other* samples (RLOO, arXiv 2402.14740, with scale="none").
        clip: clamp the result to ±clip, None = no clamp.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere and for fp64 rewards; "triton" and "torch" ask
            for one of them.

    Returns:
        (B,) fp32 (fp64 for fp64 rewards), differentiable in `rewards`. With group_size, and unless the
        whole batch's std divides, Triton's bits for a group are the same alone and in any batch.

    Raises:
        ValueError: shapes that do not fit, unknown choices, neither or both of group_size and group_ids, or
            "normalize_then_sum" with another scale or leave_one_out.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    if not use_triton("group_advantages", impl, rewards, fp64(rewards)):
        return reference.group_advantages(
            rewards, group_size, group_ids=group_ids, reward_weights=reward_weights, aggregation=aggregation,
            scale=scale, unbiased=unbiased, eps=eps, leave_one_out=leave_one_out, clip=clip,
        )  # fmt: skip
    check_arguments(rewards, group_size, group_ids, reward_weights, aggregation, scale, leave_one_out)
    weights, listed = (reward_weights, ()) if isinstance(reward_weights, Tensor) else (None, reward_weights or ())
    packed = pack(eps, clip, *listed)
    return _forward(rewards, group_ids, weights, packed, group_size, aggregation, scale, unbiased, leave_one_out)
