"""Definition of `uae_kernels.flow_grpo_loss`: Flow-GRPO (arXiv 2505.05470) on one denoising step."""

import torch
from torch import Tensor

from .._common import GRPOLoss, check_choice, check_impl, clamped, compute_dtype
from .flow_step import NOISE_LEVEL, check_step, coefficients, guided, log_density, row_mean_square
from .grpo_loss import MAX_EXPONENT

METRICS = ("kl", "ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high")


def flow_grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kind: str = "flow_sde",
    noise_level: float | None = None,
    ref_velocity: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "gaussian",
    log_prob: str = "gaussian",
    clip_range: float = 1e-4,
    advantage_clip: float | None = 5.0,
    sigma_max: float | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> GRPOLoss:
    """See `uae_kernels.flow_grpo_loss`; differentiable in `velocity`, `velocity_uncond` and `sample`."""
    check_impl("flow_grpo_loss", impl)
    sigmas = sigma, sigma_next, sigma_next if sigma_max is None else sigma_max
    check_step("flow_grpo_loss", velocity, sample, sigmas, kind, noise_level, velocity_uncond, log_prob)
    check_loss(sample, next_sample, old_log_prob, advantages, kind, noise_level, ref_velocity, beta, kl)
    noise_level = NOISE_LEVEL[kind] if noise_level is None else noise_level
    dtype = compute_dtype(velocity, sample)
    v, x = guided(velocity, velocity_uncond, guidance_scale, dtype), sample.to(dtype)
    a, b, std, s = coefficients(x, sigmas, kind, noise_level)
    mean = (a * x).addcmul_(b, v)
    logp = log_density(next_sample.detach().to(dtype), mean, std, log_prob)

    # L = max(−A·r, −A·clip(r, 1 ± c)), r = exp(log π − log π_old)
    advantage = advantages.detach().to(dtype)
    if advantage_clip is not None:
        advantage = clamped(advantage, -advantage_clip, advantage_clip)
    ratio = (logp - old_log_prob.detach().to(dtype)).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    per_token = torch.maximum(-advantage * ratio, -advantage * clamped(ratio, 1 - clip_range, 1 + clip_range))

    divergence = torch.zeros_like(logp)
    if ref_velocity is not None:
        v_uncond = None if velocity_uncond is None else velocity_uncond.detach()
        v_ref = guided(ref_velocity.detach(), v_uncond, guidance_scale, dtype)
        if kl == "velocity":
            divergence = row_mean_square(v, v_ref)
        else:
            # KL(N(μ, std²)‖N(μ_ref, std²)) = (μ − μ_ref)²/(2·std²), μ_ref a constant; Flow-GRPO's code leaves −dt out
            # of std²
            mean_ref = (a * x.detach()).addcmul_(b, v_ref)
            width = (std if kl == "gaussian" else s).flatten()
            exact = width == 0
            divergence = row_mean_square(mean, mean_ref) / (2 * torch.where(exact, 1, width).square())
            divergence = torch.where(exact, 0, divergence)
        per_token = per_token + beta * divergence

    samples = max(sample.shape[0], 1)
    count = samples if normalizer is None else normalizer
    loss = per_token.sum() / (count.to(ratio.dtype) if isinstance(count, Tensor) else count)
    with torch.no_grad():
        values = (
            divergence.sum() / samples,
            ratio.sum() / samples,
            ratio.amax() if len(ratio) else ratio.sum(),
            ((ratio < 1 - clip_range) & (advantage < 0)).to(dtype).sum() / samples,
            ((ratio > 1 + clip_range) & (advantage > 0)).to(dtype).sum() / samples,
        )
    return GRPOLoss(loss, dict(zip(METRICS, values, strict=True)), per_token, logp.detach())


def check_loss(
    sample: Tensor,
    next_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kind: str,
    noise_level: float | None,
    ref_velocity: Tensor | None,
    beta: float,
    kl: str,
) -> None:
    op = "flow_grpo_loss"
    check_choice(op, "kl", kl, ("gaussian", "flow_grpo", "velocity"))
    if kind == "ode" or noise_level == 0:
        raise ValueError(f"{op}: a deterministic step has no log-probability; use noise_level > 0")
    for name, value in (("next_sample", next_sample), ("ref_velocity", ref_velocity)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(f"{op}: {name} must be {tuple(sample.shape)}, got {tuple(value.shape)}")
    for name, value in (("old_log_prob", old_log_prob), ("advantages", advantages)):
        if value.shape != sample.shape[:1]:
            raise ValueError(f"{op}: {name} must be ({sample.shape[0]},), got {tuple(value.shape)}")
    if ref_velocity is None and beta != 0.0:
        raise ValueError(f"{op}: beta needs ref_velocity")
