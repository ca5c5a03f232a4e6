"""Definition of `uae_kernels.linear_grpo_loss`."""

import torch
from torch import Tensor

from .._common import GRPOLoss, check_impl
from .grpo_loss import grpo_loss
from .linear_logprobs import check_linear, linear_logprobs
from .token_logprobs import is_scored


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    loss_type: str = "grpo",
    importance_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    sapo_temperature: tuple[float, float] = (1.0, 1.05),
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
    importance_mode: str = "token_truncate",
    importance_floor: float | None = None,
    importance_cap: float | None = None,
    off_policy_threshold: float | None = None,
    entropy_quantile: float | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> GRPOLoss:
    """See `uae_kernels.linear_grpo_loss`."""
    check_impl("linear_grpo_loss", impl)
    check_linear(hidden, weight, targets, bias, temperature, softcap)
    mask, targets = mask_targets(mask, targets, weight.shape[0])
    wants_entropy = entropies is None and (entropy_quantile is not None or entropy_coef != 0.0)
    logprobs = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        return_entropy=wants_entropy,
        entropy_grad=wants_entropy and entropy_coef != 0.0,
    )
    if wants_entropy:
        logprobs, entropies = logprobs
    assert isinstance(logprobs, Tensor)
    return grpo_loss(
        logprobs,
        advantages,
        rewards=rewards,
        group_size=group_size,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        entropies=entropies,
        loss_type=loss_type,
        importance_level=importance_level,
        clip_low=clip_low,
        clip_high=clip_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        sapo_temperature=sapo_temperature,
        vespo=vespo,
        importance_mode=importance_mode,
        importance_floor=importance_floor,
        importance_cap=importance_cap,
        off_policy_threshold=off_policy_threshold,
        entropy_quantile=entropy_quantile,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
        max_length=max_length,
    )


def mask_targets(mask: Tensor | None, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The mask without targets outside the vocabulary, and −100 for the targets it leaves out."""
    scored = is_scored(targets, vocabulary, -100)
    if mask is not None:
        if mask.shape != targets.shape:
            raise ValueError(f"linear_grpo_loss: mask must be {tuple(targets.shape)}, got {tuple(mask.shape)}")
        scored = scored & (mask != 0)
    return scored, torch.where(scored, targets, -100)
