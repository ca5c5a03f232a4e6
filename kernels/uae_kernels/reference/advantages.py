"""Definition of `uae_kernels.group_advantages`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import check_choice, check_impl, clamped, compute_dtype, number


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
    """See `uae_kernels.group_advantages`; differentiable in `rewards`."""
    check_impl("group_advantages", impl)
    check_arguments(rewards, group_size, group_ids, reward_weights, aggregation, scale, leave_one_out)
    table = rewards.to(compute_dtype(rewards))
    table = table[:, None] if table.dim() == 1 else table  # (B, R)
    weights = weight_row(reward_weights, table)
    valid = table.isfinite()
    table = torch.where(valid, table, 0)
    scored = valid.any(1)

    if aggregation == "sum_then_normalize":
        # A = (r − mean_group) / (std + eps), r = Σ_k w_k r_k  (GRPO, arXiv 2402.03300; the sum as in TRL)
        total = (table * weights).sum(1)
        mean, std, count, constant = _group_statistics(total, scored, group_size, group_ids, unbiased)
        advantages = torch.where(scored & ~constant, total - mean, 0)
        if leave_one_out:  # r_i − mean of the others = n/(n−1)·(r_i − mean)  (RLOO, arXiv 2402.14740)
            advantages = advantages * (count / (count - 1).clamp(min=1))
        if scale == "batch":
            _, std, _, _ = _statistics(total[None], scored[None], unbiased)
            std = std[0]
        if scale != "none":
            advantages = advantages / (std + eps)
    else:
        # z_k = (r_k − mean_group) / (std_group + eps), A = z-score over the batch of Σ_k w_k z_k  (GDPO)
        total, all_constant = torch.zeros_like(table[:, 0]), torch.ones_like(scored)
        for k in range(table.shape[1]):
            mean, std, _, constant = _group_statistics(table[:, k], valid[:, k], group_size, group_ids, unbiased)
            z = torch.where(valid[:, k] & ~constant, table[:, k] - mean, 0) / (std + eps)
            total, all_constant = total + weights[k] * z, all_constant & constant
        mean, std, _, constant = _statistics(total[None], scored[None], unbiased)
        informative = scored & ~all_constant & ~constant[0]
        advantages = torch.where(informative, total - mean[0], 0) / (std[0] + eps)

    return advantages if clip is None else clamped(advantages, -clip, clip)


def check_arguments(
    rewards: Tensor,
    group_size: int | None,
    group_ids: Tensor | None,
    reward_weights: Tensor | Sequence[float] | None,
    aggregation: str,
    scale: str,
    leave_one_out: bool,
) -> None:
    op = "group_advantages"
    check_choice(op, "aggregation", aggregation, ("sum_then_normalize", "normalize_then_sum"))
    check_choice(op, "scale", scale, ("group", "batch", "none"))
    if rewards.dim() not in (1, 2) or not rewards.is_floating_point():
        raise ValueError(f"{op}: rewards must be a float tensor (B,) or (B, R), got {tuple(rewards.shape)}")
    if (group_size is None) == (group_ids is None):
        raise ValueError(f"{op}: pass exactly one of group_size and group_ids")
    if group_size is not None and (group_size < 1 or rewards.shape[0] % group_size):
        raise ValueError(f"{op}: {rewards.shape[0]} rewards are not whole groups of {group_size}")
    if group_ids is not None and (group_ids.shape != rewards.shape[:1] or group_ids.is_floating_point()):
        raise ValueError(f"{op}: group_ids must be {rewards.shape[0]} integers, got {tuple(group_ids.shape)}")
    columns = rewards.shape[1] if rewards.dim() == 2 else 1
    if reward_weights is not None and len(reward_weights) != columns:
        raise ValueError(f"{op}: {len(reward_weights)} reward_weights for {columns} rewards")
    if aggregation == "normalize_then_sum" and (scale != "group" or leave_one_out):
        raise ValueError(f'{op}: normalize_then_sum takes neither scale="{scale}" nor leave_one_out')


def weight_row(reward_weights: Tensor | Sequence[float] | None, table: Tensor) -> Tensor:
    """The weights as a tensor beside (B, R) `table`; a list is filled in on the device, without a copy from
    the host."""
    if reward_weights is None:
        return table.new_ones(table.shape[1])
    if isinstance(reward_weights, Tensor):
        return reward_weights.to(table)
    return torch.stack([number(weight, table) for weight in reward_weights])


def _group_statistics(
    x: Tensor, valid: Tensor, group_size: int | None, group_ids: Tensor | None, unbiased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_statistics` of each sample's group, as four (B,) tensors."""
    if group_size is not None:
        statistics = _statistics(x.view(-1, group_size), valid.view(-1, group_size), unbiased)
        mean, std, count, constant = (s.repeat_interleave(group_size) for s in statistics)
    else:
        assert group_ids is not None
        same = group_ids[:, None] == group_ids[None, :]  # (B, B): no sorting, no synchronisation
        mean, std, count, constant = _statistics(x[None].expand_as(same), same & valid[None], unbiased)
    return mean, std, count, constant


def _statistics(x: Tensor, valid: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, count and "all equal" of the valid entries of each row.

    The standard deviation of a constant row is given as 1: its advantages are zeros, whatever divides them.
    """
    count = valid.sum(1).to(x.dtype)
    mean = torch.where(valid, x, 0).sum(1) / count.clamp(min=1)
    variance = torch.where(valid, x - mean[:, None], 0).square().sum(1) / (count - int(unbiased)).clamp(min=1)
    # Rounding in the mean leaves residues of 1e-8 in a constant group, which 1/(std + eps) would amplify.
    low = torch.where(valid, x.detach(), torch.inf).amin(1)
    high = torch.where(valid, x.detach(), -torch.inf).amax(1)
    constant = high <= low
    return mean, torch.where(constant, 1, variance).sqrt(), count, constant
