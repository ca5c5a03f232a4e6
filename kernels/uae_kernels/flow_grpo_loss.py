"""The clipped policy loss of one denoising step."""

import torch
from torch import Tensor

from . import reference
from ._common import GRPOLoss, check_impl, compute_dtype, fake_pull_back, pack, per_sample, pull_back, unpack
from .reference.flow_grpo_loss import METRICS, check_loss
from .reference.flow_step import check_step


def _loss(
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    sample: Tensor,
    next_sample: Tensor,
    ref_velocity: Tensor | None,
    old_log_prob: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: Tensor,
    normalizer: Tensor | None,
    packed: Tensor,
    kind: str,
    kl: str,
    log_prob: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), per sample (B,), metrics (5,) and log-probabilities (B,)."""
    noise_level, beta, clip_range, advantage_clip, guidance_scale, count = unpack(packed)
    out = reference.flow_grpo_loss(
        velocity,
        sample,
        next_sample,
        old_log_prob,
        advantages,
        sigma,
        sigma_next,
        kind=kind,
        noise_level=noise_level,
        ref_velocity=ref_velocity,
        beta=beta,
        kl=kl,
        log_prob=log_prob,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        sigma_max=sigma_max,
        velocity_uncond=velocity_uncond,
        guidance_scale=guidance_scale,
        normalizer=count if normalizer is None else normalizer,
    )
    return out.loss, out.per_token, torch.stack(list(out.metrics.values())), out.logprobs


_forward = torch.library.custom_op("uae_kernels::flow_grpo_loss", _loss, mutates_args=())


@_forward.register_fake
def _(velocity, velocity_uncond, sample, *options):
    dtype, rows = compute_dtype(velocity, sample), sample.shape[0]
    return tuple(sample.new_empty(shape, dtype=dtype) for shape in ((), rows, len(METRICS), rows))


@torch.library.custom_op("uae_kernels::flow_grpo_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_per_sample: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    sample: Tensor,
    next_sample: Tensor,
    ref_velocity: Tensor | None,
    old_log_prob: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: Tensor,
    normalizer: Tensor | None,
    packed: Tensor,
    kind: str,
    kl: str,
    log_prob: str,
    need_velocity: bool,
    need_uncond: bool,
    need_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of velocity, velocity_uncond and sample."""
    constants = (
        next_sample, ref_velocity, old_log_prob, advantages, sigma, sigma_next, sigma_max, normalizer, packed,
        kind, kl, log_prob,
    )  # fmt: skip
    return pull_back(
        lambda v, v_uncond, x: _loss(v, v_uncond, x, *constants)[:2],
        (velocity, velocity_uncond, sample),
        (need_velocity, need_uncond, need_sample),
        (grad, grad_per_sample),
    )


@_backward.register_fake
def _(grad, grad_per_sample, velocity, velocity_uncond, sample, *options):
    return fake_pull_back((velocity, velocity_uncond, sample), options[-3:], grad)


def _setup_context(ctx, inputs, output):
    *tensors, kind, kl, log_prob = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors)
    ctx.options = kind, kl, log_prob


def _autograd(ctx, grad, grad_per_sample, *_):
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad, grad_per_sample, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 12


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """Flow-GRPO (arXiv 2505.05470): max(−A·r, −A·clip(r, 1 ± clip_range)) + beta·KL, r = exp(log π − log
    π_old).

    The log-probability is `flow_step`'s, by the same code: at the velocity of the rollout and its batch shape
    every ratio is exactly 1 and both clip fractions are exactly 0. It is a mean over a sample's N elements,
    so a clip range c is ±c·N nats of the joint density and changes its meaning with the resolution.

    Args:
        velocity: (B, ...) floats, the current policy's output at `sample`.
        sample, next_sample: (B, ...), the step taken.
        old_log_prob: (B,), what `flow_step` returned for it.
        advantages: (B,), clamped to ±advantage_clip (None = not).
        sigma, sigma_next, kind, noise_level, sigma_max, velocity_uncond, guidance_scale, log_prob: as in
            `flow_step`; kind "ode" and noise_level 0 have no log-probability and raise.
        ref_velocity: (B, ...), the reference policy's conditional output, guided by the same velocity_uncond.
        beta: weight of the KL to the reference.
        kl: "gaussian": mean (μ − μ_ref)²/(2std²), 0 where std is 0; "flow_grpo": the same with s² for std²
            (without −dt, as the released code; for cps they are equal); "velocity": mean (v − v_ref)².
        normalizer: what the sum over samples is divided by, number or 0-d tensor, None = B.
        impl: "auto" and "torch" run PyTorch; "triton" raises.

    Returns:
        GRPOLoss: `loss` fp32 (fp64 for fp64 inputs), differentiable in velocity, velocity_uncond and sample;
        `metrics` over samples: kl, ratio_mean, ratio_max, clip_fraction_low (r < 1 − c, A < 0),
        clip_fraction_high (r > 1 + c, A > 0); `per_token` (B,), each sample's loss; `logprobs` (B,),
        detached.

    Raises:
        ValueError: shapes that do not fit, unknown choices, a deterministic step, beta without ref_velocity.
        RuntimeError: `impl="triton"`.
    """
    check_impl("flow_grpo_loss", impl)
    check_step("flow_grpo_loss", velocity, sample, kind, noise_level, velocity_uncond, log_prob)
    check_loss(sample, next_sample, old_log_prob, advantages, kind, noise_level, ref_velocity, beta, kl)
    divisor, count = (normalizer, None) if isinstance(normalizer, Tensor) else (None, normalizer)
    loss, per_sample_loss, metrics, logprobs = _forward(
        velocity,
        velocity_uncond,
        sample,
        next_sample,
        ref_velocity,
        old_log_prob,
        advantages,
        per_sample(sigma, sample),
        per_sample(sigma_next, sample),
        per_sample(sigma_next if sigma_max is None else sigma_max, sample),
        divisor,
        pack(noise_level, beta, clip_range, advantage_clip, guidance_scale, count),
        kind,
        kl,
        log_prob,
    )
    return GRPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), per_sample_loss, logprobs)
