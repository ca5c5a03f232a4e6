"""The clipped policy loss of one denoising step."""

import math

import torch
from torch import Tensor

from . import reference
from ._common import UNRECORDED, GRPOLoss, pack
from ._flow import INPUTS, SCHEMA, TENSORS, Step, _backward, as_arguments, launch_forward
from ._triton import fp64, jit, launch, tl, use_triton
from .reference.flow_grpo_loss import METRICS, check_loss
from .reference.flow_step import NOISE_LEVEL, check_step
from .reference.grpo_loss import MAX_EXPONENT

SAMPLES = 256  # samples at a time
FAR = tl.constexpr(MAX_EXPONENT)


@jit("old_b", "advantages_b", "samples", "count", "lower", "upper", "limit", "beta")
def _loss_kernel(
    log_probs, old, old_b, advantages, advantages_b, distances, kl_factors, normalizer,
    loss, per_sample, metrics, slopes, divisor, samples, count, lower, upper, limit, beta, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Each sample's loss and its slope in the log-probability; the loss and the metrics, summed in fp64."""
    losses = tl.zeros((SAMPLES,), tl.float64)
    kls = tl.zeros((SAMPLES,), tl.float64)
    ratios = tl.zeros((SAMPLES,), tl.float64)
    lows = tl.zeros((SAMPLES,), tl.float64)
    highs = tl.zeros((SAMPLES,), tl.float64)
    largest = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, samples, SAMPLES):
        i = start + tl.arange(0, SAMPLES).to(tl.int64)
        m = i < samples
        a = tl.load(advantages + i * advantages_b, mask=m, other=0).to(tl.float32)
        a = tl.where(a > limit, limit, tl.where(a < -limit, -limit, a))
        log_ratio = tl.load(log_probs + i, mask=m, other=0)
        log_ratio -= tl.load(old + i * old_b, mask=m, other=0).to(tl.float32)
        near = tl.where(log_ratio > FAR, FAR, tl.where(log_ratio < -FAR, -FAR, log_ratio))
        ratio = tl.exp(near)
        free = -a * ratio
        clipped = -a * tl.where(ratio < lower, lower, tl.where(ratio > upper, upper, ratio))
        value = tl.where(free > clipped, free, clipped)
        # As autograd has it: at a bound, where both sides are equal, the slope is that of r itself.
        moves = ((ratio >= lower) & (ratio <= upper)) | (free > clipped)
        slope = tl.where(moves & (log_ratio >= -FAR) & (log_ratio <= FAR), free, 0.0)
        kl = tl.zeros((SAMPLES,), tl.float32)
        if distances is not None:
            kl = -tl.load(distances + i, mask=m, other=0) * tl.load(kl_factors + i, mask=m, other=0)
            value += beta * kl
        tl.store(per_sample + i, value, mask=m)
        tl.store(slopes + i, slope, mask=m)
        losses += tl.where(m, value, 0.0)
        kls += tl.where(m, kl, 0.0)
        ratios += tl.where(m, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(m, ratio, 0.0))
        lows += tl.where(m & (ratio < lower) & (a < 0), 1.0, 0.0)
        highs += tl.where(m & (ratio > upper) & (a > 0), 1.0, 0.0)

    own = tl.maximum(samples, 1).to(tl.float64)
    by = tl.where(count == count, count, own)
    if normalizer is not None:
        by = tl.load(normalizer).to(tl.float64)
    ratio_sum = tl.sum(ratios)  # has the NaN that a maximum drops
    tl.store(loss, tl.sum(losses) / by)
    tl.store(divisor, by)
    tl.store(metrics, tl.sum(kls) / own)
    tl.store(metrics + 1, ratio_sum / own)
    tl.store(metrics + 2, tl.where(ratio_sum == ratio_sum, tl.max(largest), ratio_sum))
    tl.store(metrics + 3, tl.sum(lows) / own)
    tl.store(metrics + 4, tl.sum(highs) / own)


def _outputs(step: Step) -> tuple[Tensor, ...]:
    """Loss, per sample, metrics, log-probabilities; for the backward pass slopes and what the loss is divided by."""
    B = len(step.sample)
    return tuple(step.empty(*shape) for shape in ((), (B,), (len(METRICS),), (B,), (B,), ()))


@torch.library.custom_op(
    "uae_kernels::flow_grpo_loss",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor old_log_prob, Tensor advantages, Tensor? normalizer) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    **UNRECORDED,
)
def _forward(*inputs):
    step, (old_log_prob, advantages, normalizer) = Step(*inputs[:INPUTS]), inputs[INPUTS:]
    n, B = step.numbers, len(step.sample)
    loss, per_sample, metrics, log_probs, slopes, divisor = outputs = _outputs(step)
    distances = kl_factors = None
    if step.ref_velocity is not None:
        distances, kl_factors = step.empty(B), step.empty(B)
    launch_forward(step, std=step.empty(B), log_probs=log_probs, distances=distances, kl_factors=kl_factors)
    launch(
        _loss_kernel, (1,), log_probs, old_log_prob, old_log_prob.stride(0), advantages, advantages.stride(0),
        distances, kl_factors, normalizer, loss, per_sample, metrics, slopes, divisor, B,
        math.nan if n.normalizer is None else n.normalizer, 1 - n.clip_range, 1 + n.clip_range,
        math.inf if n.advantage_clip is None else n.advantage_clip, n.beta, SAMPLES=SAMPLES,
    )  # fmt: skip
    return outputs


@_forward.register_fake
def _(*inputs):
    return _outputs(Step(*inputs[:INPUTS]))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:], *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:INPUTS]


def _autograd(ctx, grad, grad_per_sample, *_):
    slopes, divisor, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _backward(None, None, grad_per_sample, grad, slopes, divisor, *tensors, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * INPUTS


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
        impl: "auto" is Triton on a GPU and PyTorch elsewhere and for fp64 inputs; "triton" and "torch" ask for
            one of them.

    Returns:
        GRPOLoss: `loss` fp32 (fp64 for fp64 inputs), differentiable in velocity, velocity_uncond and sample;
        `metrics` over samples: kl, ratio_mean, ratio_max, clip_fraction_low (r < 1 − c, A < 0),
        clip_fraction_high (r > 1 + c, A > 0); `per_token` (B,), each sample's loss; `logprobs` (B,),
        detached.

    Raises:
        ValueError: shapes that do not fit, unknown choices, a deterministic step, beta without ref_velocity.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    if not use_triton("flow_grpo_loss", impl, sample, fp64(velocity, sample)):
        return reference.flow_grpo_loss(
            velocity, sample, next_sample, old_log_prob, advantages, sigma, sigma_next, kind=kind,
            noise_level=noise_level, ref_velocity=ref_velocity, beta=beta, kl=kl, log_prob=log_prob,
            clip_range=clip_range, advantage_clip=advantage_clip, sigma_max=sigma_max, velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale, normalizer=normalizer,
        )  # fmt: skip
    sigmas = sigma, sigma_next, sigma_next if sigma_max is None else sigma_max
    check_step("flow_grpo_loss", velocity, sample, sigmas, kind, noise_level, velocity_uncond, log_prob)
    check_loss(sample, next_sample, old_log_prob, advantages, kind, noise_level, ref_velocity, beta, kl)
    noise_level = NOISE_LEVEL[kind] if noise_level is None else noise_level
    divisor, count = (normalizer.to(sample.device), None) if isinstance(normalizer, Tensor) else (None, normalizer)
    tensors, numbers = as_arguments(sample, *sigmas)
    packed = pack(*numbers, noise_level, guidance_scale, beta, clip_range, advantage_clip, count)
    loss, per_sample, metrics, logprobs, _, _ = _forward(
        velocity, velocity_uncond, sample, next_sample, ref_velocity, *tensors, packed, kind, log_prob, kl,
        old_log_prob, advantages, divisor,
    )  # fmt: skip
    return GRPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), per_sample, logprobs)
