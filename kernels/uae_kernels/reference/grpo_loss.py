"""Definition of `uae_kernels.grpo_loss`: GRPO (arXiv 2402.03300) and its variants as in TRL 1.16."""

import math

import torch
from torch import Tensor

from .._common import GRPOLoss, check_choice, check_impl, clamped, compute_dtype, number
from .advantages import group_advantages

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "luspo_legacy")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
OVER_TOKENS = ("bnpo", "dapo", "cispo", "vespo")  # divided by the number of tokens, not of sequences
METRICS = ("kl", "ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high", "zero_std_fraction")

# exp() overflows fp32 at 88; a ratio of e^20 is already beyond every clip range.
MAX_EXPONENT = 20.0
# A sampled token with probability 0 has log-probability −inf: its log-ratio to another −inf is defined as 0.
MIN_LOGPROB = -1e4
MIN_LOG_WEIGHT = math.log(1e-8)


def grpo_loss(
    logprobs: Tensor,
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
    impl: str = "auto",
) -> GRPOLoss:
    """See `uae_kernels.grpo_loss`; differentiable in `logprobs` and, through the bonus, `entropies`."""
    check_impl("grpo_loss", impl)
    check_arguments(
        logprobs, advantages, rewards, group_size, (mask, old_logprobs, ref_logprobs, sampling_logprobs, entropies),
        loss_type, importance_level, kl_estimator, importance_mode, beta, entropy_quantile, entropy_coef,
    )  # fmt: skip
    shape, dtype = logprobs.shape, compute_dtype(logprobs)
    clip_high = clip_low if clip_high is None else clip_high
    m = kept_tokens(logprobs, mask)
    tokens = m.sum(1, keepdim=True)  # K_i
    length = tokens.clamp(min=1)

    def unmasked(x: Tensor) -> Tensor:  # what a masked position holds never enters, not even as 0·NaN
        return torch.where(m, x.to(dtype), 0)

    if advantages is None:
        assert rewards is not None
        advantages = group_advantages(rewards, group_size)
    advantages = advantages.detach().to(dtype)
    zero_std = zero_std_fraction(advantages, m, group_size)
    if advantages.dim() == 1:
        a = torch.where(tokens > 0, advantages[:, None], 0).expand(shape)
    else:
        a = unmasked(advantages)

    logp = unmasked(logprobs).clamp(min=MIN_LOGPROB)
    now = logp.detach()
    old = now if old_logprobs is None else unmasked(old_logprobs.detach()).clamp(min=MIN_LOGPROB)

    # Importance ratio r: per token, or exp of the sequence's mean log-ratio (GSPO, arXiv 2507.18071)
    log_ratio = logp - old
    level = log_ratio
    if importance_level == "sequence":
        level = (log_ratio.sum(1, keepdim=True) / length).expand(shape)
    ratio = level.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()

    # Sampler correction ρ = exp(l_old − l_sampler), one per token or one per sequence
    correction, sampler = torch.ones_like(now), old
    if sampling_logprobs is not None:
        sampler = unmasked(sampling_logprobs.detach()).clamp(min=MIN_LOGPROB)
        sampler = torch.where(sampler.isnan(), old, sampler)
        floor = 0.0 if importance_floor is None else importance_floor
        cap = math.inf if importance_cap is None else importance_cap
        correction = sampler_correction(old - sampler, m, importance_mode, floor, cap)

    low = high = torch.zeros_like(m)
    if loss_type in CLIPPED:
        # L = −min(min(r, δ)·A, clip(r, 1 − ε_low, 1 + ε_high)·A)
        free = ratio if delta is None else clamped(ratio, high=delta)
        per_token = -torch.minimum(free * a, clamped(ratio, 1 - clip_low, 1 + clip_high) * a)
        low, high = (ratio < 1 - clip_low) & (a < 0), (ratio > 1 + clip_high) & (a > 0)
    elif loss_type == "cispo":
        # L = −sg(min(r, ε_high))·A·log π  (arXiv 2506.13585); ε_high is the cap itself
        per_token = -clamped(ratio.detach(), high=clip_high) * a * logp
        high = (ratio > clip_high) & (a > 0)
    elif loss_type == "sapo":
        # L = −(4/τ)·σ(τ(r − 1))·A, τ by the sign of A  (arXiv 2511.20347)
        tau = torch.where(a > 0, number(sapo_temperature[0], a), number(sapo_temperature[1], a))
        per_token = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * a
    else:
        # L = −φ·A·log π
        per_token = -vespo_weight(log_ratio.detach(), correction, a, vespo) * a * logp
        correction = torch.ones_like(now)

    # Off-policy sequence mask: a sequence of negative advantage that the policy has left behind is dropped
    if off_policy_threshold is not None:
        drift = (sampler - now).sum(1, keepdim=True) / length
        per_token = torch.where((a < 0) & (drift > off_policy_threshold), 0, per_token)

    # Entropy mask: the fraction of tokens with the highest entropy (arXiv 2506.01939)
    chosen = m
    if entropies is not None and entropy_quantile is not None and m.numel():
        h = entropies.detach().to(dtype)
        chosen = m & (h >= entropy_cut(h, m, entropy_quantile))
        per_token = torch.where(chosen, per_token, 0)

    per_token = per_token * correction

    kl = torch.zeros_like(now)
    if ref_logprobs is not None:
        kl = _kl(unmasked(ref_logprobs.detach()).clamp(min=MIN_LOGPROB) - logp, ratio, kl_estimator)
        per_token = per_token + beta * kl

    masked = torch.where(m, per_token, 0)
    sums = (per_token if loss_type == "luspo_legacy" else masked).sum(1, keepdim=True)
    loss = (sums * shares(tokens, loss_type, normalizer, shape[1], max_length, sums)).sum()
    if entropies is not None:
        bonus = torch.where(chosen, entropies.to(dtype), 0).sum() / chosen.sum().clamp(min=1)
        loss = loss - entropy_coef * bonus

    def average(x: Tensor) -> Tensor:
        return torch.where(m, x.detach(), 0).sum() / tokens.sum().clamp(min=1)

    with torch.no_grad():
        values = (
            average(kl),
            average(ratio),
            torch.where(m, ratio, 0).amax() if m.numel() else zero_std.new_zeros(()),
            average(low.to(dtype)),
            average(high.to(dtype)),
            zero_std,
        )
    metrics = dict(zip(METRICS, values, strict=True))
    return GRPOLoss(loss, metrics, masked, logprobs.detach())


def kept_tokens(logprobs: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T), True where a token counts."""
    if mask is None:
        return torch.ones_like(logprobs, dtype=torch.bool)
    return mask if mask.dtype == torch.bool else mask != 0


def sampler_correction(gap: Tensor, m: Tensor, mode: str, floor: float, cap: float) -> Tensor:
    """ρ = exp(log π_old − log π_sampler) within its limits: (B, T), or (B, 1) for whole sequences."""
    if mode.startswith("sequence"):
        gap = gap.sum(1, keepdim=True)
    rho = gap.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    if mode.endswith("truncate"):
        rho = clamped(rho, floor, cap)
    else:
        rho = torch.where((rho >= floor) & (rho <= cap), rho, 0)
    return rho if mode.startswith("sequence") else torch.where(m, rho, 1)


def vespo_weight(log_ratio: Tensor, correction: Tensor, a: Tensor, vespo: tuple[float, float, float, float]) -> Tensor:
    """φ = w^k·exp(λ(1 − w)), w the whole sequence's ratio, k and λ by the sign of A."""
    log_w = log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).sum(1, keepdim=True)
    log_w = log_w + correction.log().clamp(MIN_LOG_WEIGHT, MAX_EXPONENT).sum(1, keepdim=True)
    log_w = log_w.clamp(MIN_LOG_WEIGHT, MAX_EXPONENT)
    k_positive, lam_positive, k_negative, lam_negative = (number(x, a) for x in vespo)
    k, lam = torch.where(a >= 0, k_positive, k_negative), torch.where(a >= 0, lam_positive, lam_negative)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def entropy_cut(h: Tensor, m: Tensor, fraction: float) -> Tensor:
    """The entropy that `fraction` of the unmasked tokens reach: a quantile, for any number of tokens."""
    m = m & ~h.isnan()
    ordered = torch.where(m, h, torch.inf).flatten().sort().values
    place = (m.sum() - 1).clamp(min=0).double() * (1 - fraction)
    low, high = (ordered.gather(0, i.long()[None])[0] for i in (place.floor(), place.ceil()))
    return low.lerp(high, place.frac().to(h.dtype))


def _kl(x: Tensor, ratio: Tensor, estimator: str) -> Tensor:
    """Estimators of KL(π‖π_ref) from x = log π_ref − log π (Schulman, "Approximating KL divergence")."""
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return 0.5 * x.square()
    x = x.clamp(max=MAX_EXPONENT)
    k3 = x.exp() - x - 1
    return k3 * ratio if estimator == "k3_importance" else k3


def shares(
    tokens: Tensor, loss_type: str, normalizer: float | Tensor | None, width: int, max_length: int | None, like: Tensor
) -> Tensor:
    """The table in `uae_kernels.grpo_loss`'s docstring: what each sequence's sum of `width` losses counts in the loss.

    (B, 1), of the dtype of `like`.
    """
    if normalizer is None:
        normalizer = tokens.sum() if loss_type in OVER_TOKENS else len(tokens)
    share = torch.ones_like(tokens, dtype=like.dtype)
    if loss_type in ("grpo", "sapo"):
        share = share / tokens.clamp(min=1)
    elif loss_type == "dr_grpo":
        share = share / (max(width, 1) if max_length is None else max_length)
    elif loss_type == "luspo_legacy":
        share = share * tokens / max(width, 1)
    return share / (normalizer.clamp(min=1).to(like.dtype) if isinstance(normalizer, Tensor) else max(normalizer, 1))


def zero_std_fraction(advantages: Tensor, m: Tensor, group_size: int | None) -> Tensor:
    flat = advantages == 0 if advantages.dim() == 1 else ((advantages == 0) | ~m).all(1)
    groups = flat.view(-1, group_size or 1).all(1).to(advantages.dtype)
    return groups.sum() / max(groups.numel(), 1)


def check_arguments(
    logprobs: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    per_token: tuple[Tensor | None, ...],
    loss_type: str,
    importance_level: str,
    kl_estimator: str,
    importance_mode: str,
    beta: float,
    entropy_quantile: float | None,
    entropy_coef: float,
) -> None:
    op = "grpo_loss"
    check_choice(op, "loss_type", loss_type, LOSS_TYPES)
    check_choice(op, "importance_level", importance_level, ("token", "sequence"))
    check_choice(op, "kl_estimator", kl_estimator, ("k1", "k2", "k3", "k3_importance"))
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    check_choice(op, "importance_mode", importance_mode, modes)
    if logprobs.dim() != 2 or not logprobs.is_floating_point():
        raise ValueError(f"{op}: logprobs must be floats of shape (B, T), got {tuple(logprobs.shape)}")
    for name, value in zip(
        ("mask", "old_logprobs", "ref_logprobs", "sampling_logprobs", "entropies"), per_token, strict=True
    ):
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(f"{op}: {name} must be {tuple(logprobs.shape)}, got {tuple(value.shape)}")
    if (advantages is None) == (rewards is None):
        raise ValueError(f"{op}: pass exactly one of advantages and rewards")
    if advantages is not None and advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(f"{op}: advantages must be (B,) or (B, T), got {tuple(advantages.shape)}")
    if rewards is not None and (group_size is None or rewards.shape != logprobs.shape[:1]):
        raise ValueError(f"{op}: rewards must be ({logprobs.shape[0]},) and come with group_size")
    if group_size is not None and (group_size < 1 or logprobs.shape[0] % group_size):
        raise ValueError(f"{op}: {logprobs.shape[0]} sequences are not whole groups of {group_size}")
    # An option whose input is missing is an error, never dropped.
    _, _, ref_logprobs, _, entropies = per_token
    if ref_logprobs is None and beta != 0.0:
        raise ValueError(f"{op}: beta needs ref_logprobs")
    if entropies is None and (entropy_quantile is not None or entropy_coef != 0.0):
        raise ValueError(f"{op}: entropy_quantile and entropy_coef need entropies")
