"""Group-relative advantages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._common import check_impl, compute_dtype, fake_pull_back, pack, pull_back, unpack
from .reference.advantages import check_arguments


def _advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    weights: Tensor | None,
    packed: Tensor,
    group_size: int | None,
    aggregation: str,
    scale: str,
    unbiased: bool,
    leave_one_out: bool,
) -> Tensor:
    eps, clip, *listed = unpack(packed)
    return reference.group_advantages(
        rewards,
        group_size,
        group_ids=group_ids,
        reward_weights=weights if weights is not None else listed or None,
        aggregation=aggregation,
        scale=scale,
        unbiased=unbiased,
        eps=eps,
        leave_one_out=leave_one_out,
        clip=clip,
    )


_forward = torch.library.custom_op("uae_kernels::group_advantages", _advantages, mutates_args=())


@_forward.register_fake
def _(rewards, group_ids, weights, packed, group_size, aggregation, scale, unbiased, leave_one_out):
    return rewards.new_empty(rewards.shape[0], dtype=compute_dtype(rewards))


@torch.library.custom_op("uae_kernels::group_advantages_backward", mutates_args=())
def _backward(
    grad: Tensor,
    rewards: Tensor,
    group_ids: Tensor | None,
    weights: Tensor | None,
    packed: Tensor,
    group_size: int | None,
    aggregation: str,
    scale: str,
    unbiased: bool,
    leave_one_out: bool,
) -> Tensor:
    options = group_ids, weights, packed, group_size, aggregation, scale, unbiased, leave_one_out
    return pull_back(lambda r: (_advantages(r, *options),), [rewards], [True], (grad,))[0]


@_backward.register_fake
def _(grad, rewards, *options):
    return fake_pull_back([rewards], [True], grad)[0]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.group_size, ctx.aggregation, ctx.scale, ctx.unbiased, ctx.leave_one_out = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    options = ctx.group_size, ctx.aggregation, ctx.scale, ctx.unbiased, ctx.leave_one_out
    return _backward(grad, *ctx.saved_tensors, *options), *(None,) * 8


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
        group_ids: (B,) integers; equal ids form a group, wherever they stand and however many. Takes B²
            memory.
        reward_weights: (R,) weights of the reward functions, None = ones.
        aggregation: "sum_then_normalize" normalises Σ_k w_k·r_k. "normalize_then_sum" is GDPO: each reward
            function is normalised within its group, and their weighted sum over the batch.
        scale: the std that divides: of the "group" or of the whole "batch"; "none" divides by nothing (Dr.
            GRPO).
        unbiased: std with n − 1 (as torch and TRL) or n.
        eps: added to the std; TRL 1e-4, verl 1e-6, OpenRLHF 1e-9.
        leave_one_out: subtract the mean of the *other* samples (RLOO, arXiv 2402.14740, with scale="none").
        clip: clamp the result to ±clip, None = no clamp.
        impl: "auto" and "torch" run PyTorch; "triton" raises.

    Returns:
        (B,) fp32 (fp64 for fp64 rewards), differentiable in `rewards`.

    Raises:
        ValueError: shapes that do not fit, unknown choices, neither or both of group_size and group_ids, or
            "normalize_then_sum" with another scale or leave_one_out.
        RuntimeError: `impl="triton"`.
    """
    check_impl("group_advantages", impl)
    check_arguments(rewards, group_size, group_ids, reward_weights, aggregation, scale, leave_one_out)
    weights, listed = (reward_weights, ()) if isinstance(reward_weights, Tensor) else (None, reward_weights or ())
    return _forward(
        rewards,
        group_ids,
        weights,
        pack(eps, clip, *listed),
        group_size,
        aggregation,
        scale,
        unbiased,
        leave_one_out,
    )
