"""One denoising step of a flow-matching policy, and the log-probability of the step taken."""

import torch
from torch import Tensor

from . import reference
from ._common import UNRECORDED, FlowStep, pack
from ._flow import INPUTS, SCHEMA, TENSORS, Step, _backward, as_arguments, launch_forward
from ._triton import fp64, use_triton
from .reference.flow_step import NOISE_LEVEL, check_noise, check_step, seed_keys


def _outputs(step: Step, stochastic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, *rest = step.sample.shape
    drawn = [B, *rest] if stochastic and step.next_sample is None else [0]
    return step.empty(*drawn), step.empty(B if stochastic else 0), step.empty(B, *rest), step.empty(B, *[1] * len(rest))


@torch.library.custom_op(
    "uae_kernels::flow_step",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor? noise, Tensor? seeds, bool stochastic) -> (Tensor, Tensor, Tensor, Tensor)",
    **UNRECORDED,
)
def _forward(*inputs):
    """The drawn next sample, log-probability, mean and std; the former two without elements where there is none."""
    step, (noise, seeds, stochastic) = Step(*inputs[:INPUTS]), inputs[INPUTS:]
    drawn, log_probs, mean, std = outputs = _outputs(step, stochastic)
    launch_forward(
        step, noise=noise, seeds=seeds, drawn=drawn if drawn.numel() else None, mean=mean, std=std,
        log_probs=log_probs if stochastic else None,
    )  # fmt: skip
    return outputs


@_forward.register_fake
def _(*inputs):
    return _outputs(Step(*inputs[:INPUTS]), inputs[-1])


def _setup_context(ctx, inputs, output):
    step, stochastic = Step(*inputs[:INPUTS]), inputs[-1]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.drawn = stochastic and step.next_sample is None
    taken = step._replace(next_sample=output[0]) if ctx.drawn else step
    ctx.save_for_backward(*taken[:TENSORS])
    ctx.options = taken[TENSORS:]


def _autograd(ctx, grad_next, grad_log_prob, grad_mean, _):
    needs = ctx.needs_input_grad[:3]
    given = grad_mean, grad_next if ctx.drawn else None, grad_log_prob, None, None, None
    grads = _backward(*given, *ctx.saved_tensors, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * INPUTS


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
        impl: "auto" is Triton on a GPU and PyTorch elsewhere and for fp64 inputs; "triton" and "torch" ask for
            one of them.

    Returns:
        FlowStep(next_sample, log_prob, mean, std), fp32 (fp64 for fp64 inputs): next_sample and mean (B,
        ...), log_prob (B,), std (B, 1, ..., 1). A deterministic step (ode, noise_level 0) has log_prob None.
        Differentiable in velocity, velocity_uncond and sample through next_sample, mean and log_prob; in
        log_prob the step taken is a constant.

    Raises:
        ValueError: shapes that do not fit, unknown choices, a negative noise_level or integer seed, more
            than one source of noise.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    if not use_triton("flow_step", impl, sample, fp64(velocity, sample)):
        return reference.flow_step(
            velocity, sample, sigma, sigma_next, kind=kind, noise_level=noise_level, sigma_max=sigma_max,
            velocity_uncond=velocity_uncond, guidance_scale=guidance_scale, noise=noise, seed=seed,
            next_sample=next_sample, log_prob=log_prob,
        )  # fmt: skip
    sigmas = sigma, sigma_next, sigma_next if sigma_max is None else sigma_max
    check_step("flow_step", velocity, sample, sigmas, kind, noise_level, velocity_uncond, log_prob)
    check_noise(sample, noise, seed, next_sample)
    if noise_level is None or kind == "ode":
        noise_level = NOISE_LEVEL[kind]
    stochastic, keys = noise_level != 0, None
    if stochastic and next_sample is None and noise is None:
        if seed is None:
            noise = torch.randn(sample.shape, device=sample.device)
        else:
            keys = seed_keys(seed, sample)
    tensors, numbers = as_arguments(sample, *sigmas)
    packed = pack(*numbers, noise_level, guidance_scale)
    drawn, logp, mean, std = _forward(
        velocity, velocity_uncond, sample, next_sample, None, *tensors, packed, kind, log_prob, "gaussian", noise, keys,
        stochastic,
    )  # fmt: skip
    if next_sample is not None:
        taken = next_sample.to(mean.dtype)
    else:
        taken = drawn if stochastic else mean
    return FlowStep(taken, logp if stochastic else None, mean, std)
