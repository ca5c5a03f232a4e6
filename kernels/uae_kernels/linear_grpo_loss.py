"""LM head, log-probabilities, group advantages and policy loss in one call."""

from torch import Tensor

from ._common import GRPOLoss
from .advantages import group_advantages
from .grpo_loss import grpo_loss
from .linear_logprobs import active_logprobs
from .reference.linear_grpo_loss import mask_targets
from .reference.linear_logprobs import check_linear


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
    """`linear_logprobs` of the hidden states, then `grpo_loss` on them; see there for everything not listed
    here.

    Args:
        hidden: (B, T, H) floats; hidden[:, t] predicts targets[:, t].
        weight: (V, H) of the head. Frozen, forward and backward cost two matrix products, whatever the loss;
            tokens of advantage 0 take no part in the second while beta and entropy_coef are 0.
        targets: (B, T) int64 or int32. A position counts where `mask` is nonzero (None: everywhere) and its
            id lies in [0, V): the others cost nothing on a CPU.
        entropies: (B, T) to use instead of the head's own, which are computed where entropy_quantile or
            entropy_coef asks for them (with a gradient, a third product, for the latter).
        bias, temperature, softcap, logit_scale: of the head, as in `linear_logprobs`.
        impl: as in `linear_logprobs` and `grpo_loss`.

    Returns:
        GRPOLoss; `logprobs` (B, T) are those of this call, the next update's `old_logprobs`.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logprobs` and `grpo_loss`.
    """
    check_linear(hidden, weight, targets, bias, temperature, softcap)
    mask, targets = mask_targets(mask, targets, weight.shape[0])
    wants_entropy = entropies is None and (entropy_quantile is not None or entropy_coef != 0.0)
    logprobs = active_logprobs(
        hidden, weight, targets, _active(mask, advantages, rewards, group_size, beta, entropy_coef), bias, temperature,
        softcap, logit_scale, -100, wants_entropy, wants_entropy and entropy_coef != 0.0, impl,
    )  # fmt: skip
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
        impl=impl,
    )


def _active(
    mask: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    beta: float,
    entropy_coef: float,
) -> Tensor | None:
    """The tokens (B, T) that a gradient reaches: with advantage 0 none does, unless a KL or an entropy term brings
    one."""
    if beta != 0.0 or entropy_coef != 0.0:
        return None
    if advantages is None:
        if rewards is None or group_size is None or rewards.shape != mask.shape[:1] or len(rewards) % group_size:
            return None  # an error, which grpo_loss names
        advantages = group_advantages(rewards.detach(), group_size)
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        return None
    return mask & (advantages != 0 if advantages.dim() == 2 else (advantages != 0)[:, None])
