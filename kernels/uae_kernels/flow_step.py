"""One denoising step of a flow-matching policy, and the log-probability of the step taken."""

import torch
from torch import Tensor

from . import reference
from ._common import FlowStep, check_impl, compute_dtype, fake_pull_back, pack, per_sample, pull_back, unpack
from .reference.flow_step import NOISE_LEVEL, check_noise, check_step, seed_keys


def _step(
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    sample: Tensor,
    next_sample: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: Tensor,
    packed: Tensor,
    kind: str,
    log_prob: str,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Next sample, log-probability, mean and std; the former two without elements where there is none to
    compute."""
    noise_level, guidance_scale = unpack(packed)
    step = reference.flow_step(
        velocity,
        sample,
        sigma,
        sigma_next,
        kind=kind,
        noise_level=noise_level,
        sigma_max=sigma_max,
        velocity_uncond=velocity_uncond,
        guidance_scale=guidance_scale,
        noise=noise,
        seed=seed,
        next_sample=next_sample,
        log_prob=log_prob,
    )
    nothing = step.mean.new_empty(0)
    return (
        step.next_sample if stochastic and next_sample is None else nothing,
        nothing.clone() if step.log_prob is None else step.log_prob,
        step.mean,
        step.std,
    )


_forward = torch.library.custom_op("uae_kernels::flow_step", _step, mutates_args=())


@_forward.register_fake
def _(
    velocity, velocity_uncond, sample, next_sample, noise, seed, sigma, sigma_next, sigma_max, packed,
    kind, log_prob, stochastic,
):  # fmt: skip
    dtype, rows = compute_dtype(velocity, sample), sample.shape[0]
    drawn = sample.shape if stochastic and next_sample is None else 0
    return (
        sample.new_empty(drawn, dtype=dtype),
        sample.new_empty(rows if stochastic else 0, dtype=dtype),
        sample.new_empty(sample.shape, dtype=dtype),
        sample.new_empty(rows, *[1] * (sample.dim() - 1), dtype=dtype),
    )


@torch.library.custom_op("uae_kernels::flow_step_backward", mutates_args=())
def _backward(
    grad_log_prob: Tensor,
    grad_mean: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    sample: Tensor,
    next_sample: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: Tensor,
    packed: Tensor,
    kind: str,
    log_prob: str,
    stochastic: bool,
    need_velocity: bool,
    need_uncond: bool,
    need_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of velocity, velocity_uncond and sample, from a replay of the step."""
    step = next_sample, None, None, sigma, sigma_next, sigma_max, packed, kind, log_prob, stochastic
    return pull_back(
        lambda v, v_uncond, x: _step(v, v_uncond, x, *step)[1:3],
        (velocity, velocity_uncond, sample),
        (need_velocity, need_uncond, need_sample),
        (grad_log_prob, grad_mean),
    )


@_backward.register_fake
def _(grad_log_prob, grad_mean, velocity, velocity_uncond, sample, *options):
    return fake_pull_back((velocity, velocity_uncond, sample), options[-3:], grad_mean)


def _setup_context(ctx, inputs, output):
    velocity, velocity_uncond, sample, next_sample, _, _, *sigmas, packed, kind, log_prob, stochastic = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.drawn = stochastic and next_sample is None
    taken = output[0] if ctx.drawn else next_sample
    ctx.save_for_backward(velocity, velocity_uncond, sample, taken, *sigmas, packed)
    ctx.options = kind, log_prob, stochastic


def _autograd(ctx, grad_next, grad_log_prob, grad_mean, _):
    if ctx.drawn:  # next_sample = mean + std·noise
        grad_mean = grad_mean + grad_next
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad_log_prob, grad_mean, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)


def flow_step(
    velocity: Tensor,
    sample: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kind: str = "flow_sde",
    noise_level: float | None = None,
    sigma_max: float | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    next_sample: Tensor | None = None,
    log_prob: str = "gaussian",
    impl: str = "auto",
) -> FlowStep:
    """Steps x_σ to x_σ' under the policy N(mean, std²), or replays a step already taken.

    σ ∈ [0, 1], x_σ = (1 − σ)·x0 + σ·ε, v = ε − x0, dt = σ' − σ < 0; with guidance v = v_u + g·(v − v_u).

    - ode: mean = x + v·dt, std = 0
    - flow_sde (Flow-GRPO, arXiv 2505.05470): mean = x·(1 + s²dt/(2σ)) + v·(1 + s²(1 − σ)/(2σ))·dt,
      std = s·√(−dt), s = noise_level·√(σ/(1 − σ)), the 1 − σ taken at sigma_max where σ = 1
    - dance_sde (DanceGRPO, arXiv 2505.07818): the same with constant s = noise_level
    - cps (Flow-CPS, arXiv 2509.05952): std = σ'·sin(noise_level·π/2),
      mean = (1 − σ')(x − σv) + √(σ'² − std²)·(x + (1 − σ)v)

    The noise of a sample depends on its seed alone, not on its row: one Philox4x32-10 key per sample, counter
    = element index, the numbers of `triton.language.randn(seed, index)`. A replay returns the bits of the
    log-probability that the step returned, at the same batch shape and velocity.

    Args:
        velocity: (B, ...) floats, the model's output.
        sample: (B, ...) floats, x_σ. Keep it in fp32 from step to step.
        sigma, sigma_next: noise levels, numbers, 0-d or (B,) tensors; σ > 0 and σ' < σ.
        kind: "ode", "flow_sde", "dance_sde" or "cps".
        noise_level: None = 0.7 (flow_sde), 0.3 (dance_sde), 0.8 (cps, at most 1). 0 is a deterministic step.
        sigma_max: the second σ of the schedule, None = sigma_next. Below 1.
        velocity_uncond: (B, ...), the unconditional half of classifier-free guidance.
        guidance_scale: g.
        noise: (B, ...) standard normal numbers to use.
        seed: (B,) int64 keys, or an integer 0 ≤ s < 2^43 meaning keys s·2^20 + row.
        next_sample: (B, ...), the step taken: nothing is drawn. At most one of noise, seed, next_sample; with
            none of them the noise comes from torch's generator.
        log_prob: "gaussian": mean over elements of −(x' − mean)²/(2std²) − log std − log √(2π);
            "cps": −mean (x' − mean)². Where std is 0 (cps to σ' = 0) the former is 0, without gradient.
        impl: "auto" and "torch" run PyTorch; "triton" raises.

    Returns:
        FlowStep(next_sample, log_prob, mean, std), fp32 (fp64 for fp64 inputs): next_sample and mean (B,
        ...), log_prob (B,), std (B, 1, ..., 1). A deterministic step (ode, noise_level 0) has log_prob None.
        Differentiable in velocity, velocity_uncond and sample through next_sample, mean and log_prob; in
        log_prob the step taken is a constant.

    Raises:
        ValueError: shapes that do not fit, unknown choices, a negative noise_level or integer seed, more
            than one source of noise.
        RuntimeError: `impl="triton"`.
    """
    check_impl("flow_step", impl)
    check_step("flow_step", velocity, sample, kind, noise_level, velocity_uncond, log_prob)
    check_noise(sample, noise, seed, next_sample)
    noise_level = NOISE_LEVEL[kind] if noise_level is None else noise_level
    stochastic = kind != "ode" and noise_level != 0
    keys = None
    if stochastic and next_sample is None and noise is None:
        if seed is None:
            noise = torch.randn(sample.shape, dtype=compute_dtype(velocity, sample), device=sample.device)
        else:
            keys = seed_keys(seed, sample)
    drawn, logp, mean, std = _forward(
        velocity,
        velocity_uncond,
        sample,
        next_sample,
        noise,
        keys,
        per_sample(sigma, sample),
        per_sample(sigma_next, sample),
        per_sample(sigma_next if sigma_max is None else sigma_max, sample),
        pack(noise_level, guidance_scale),
        kind,
        log_prob,
        stochastic,
    )
    if next_sample is not None:
        taken = next_sample.to(mean.dtype)
    else:
        taken = drawn if stochastic else mean
    return FlowStep(taken, logp if stochastic else None, mean, std)
