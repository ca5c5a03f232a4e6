"""Definition of `uae_kernels.flow_step`."""

import math

import torch
from torch import Tensor

from .._common import FlowStep, check_choice, check_impl, compute_dtype, per_sample, row_sum

KINDS = ("ode", "flow_sde", "dance_sde", "cps")
NOISE_LEVEL = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
LOG_PROBS = ("gaussian", "cps")


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
    """See `uae_kernels.flow_step`; differentiable in `velocity`, `velocity_uncond` and `sample`."""
    check_impl("flow_step", impl)
    check_step("flow_step", velocity, sample, kind, noise_level, velocity_uncond, log_prob)
    check_noise(sample, noise, seed, next_sample)
    noise_level = NOISE_LEVEL[kind] if noise_level is None else noise_level
    deterministic = kind == "ode" or noise_level == 0
    dtype = compute_dtype(velocity, sample)
    mean, std, _ = transition(
        guided(velocity, velocity_uncond, guidance_scale, dtype),
        sample.to(dtype),
        per_sample(sigma, sample),
        per_sample(sigma_next, sample),
        per_sample(sigma_next if sigma_max is None else sigma_max, sample),
        kind,
        noise_level,
    )
    if next_sample is not None:
        next_sample = next_sample.to(dtype)
    elif deterministic:
        next_sample = mean
    else:
        if noise is None:
            noise = draw(sample, seed)
        next_sample = mean + std * noise.to(dtype)
    if deterministic:
        return FlowStep(next_sample, None, mean, std)
    # The action is a constant of the policy gradient: only the mean carries one.
    return FlowStep(next_sample, log_density(next_sample.detach(), mean, std, log_prob), mean, std)


def guided(velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """v = v_u + g·(v − v_u): classifier-free guidance."""
    v = velocity.to(dtype)
    if velocity_uncond is None:
        return v
    v_u = velocity_uncond.to(dtype)
    return v_u + guidance_scale * (v - v_u)


def transition(
    v: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: Tensor,
    kind: str,
    noise_level: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, ...), standard deviation and diffusion coefficient (B, 1, ..., 1) of p(x' | x); σ's are (B,).

    v = ε − x0, x = (1 − σ)·x0 + σ·ε, dt = σ' − σ < 0.
    """
    sigma, sigma_next, sigma_max = (
        s.to(v.dtype).view(-1, *[1] * (x.dim() - 1)) for s in (sigma, sigma_next, sigma_max)
    )
    dt = sigma_next - sigma
    if kind == "cps":
        # Flow-CPS (arXiv 2509.05952): coefficients preserve the noise level, (σ' cos)² + (σ' sin)² = σ'²
        x0, x1 = x - sigma * v, x + (1 - sigma) * v
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        mean = (1 - sigma_next) * x0 + sigma_next * math.cos(noise_level * math.pi / 2) * x1
        return mean, std, std
    if kind == "ode":
        s = torch.zeros_like(sigma)
    elif kind == "flow_sde":
        # Flow-GRPO (arXiv 2505.05470) eq. 9: s = a·√(σ/(1 − σ)), with 1 − σ taken at σ_max where σ = 1
        s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    else:
        s = noise_level * torch.ones_like(sigma)  # DanceGRPO (arXiv 2505.07818): constant s = η
    # mean = x·(1 + s²dt/(2σ)) + v·(1 + s²(1 − σ)/(2σ))·dt, std = s·√(−dt)
    drift = s.square() / (2 * sigma)
    mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
    return mean, s * (-dt).sqrt(), s


def log_density(x: Tensor, mean: Tensor, std: Tensor, form: str) -> Tensor:
    """Per sample, the mean over its elements of log N(x; mean, std²), or Flow-CPS's −(x − mean)².

    Where std is 0 (a cps step to σ' = 0) there is no density: 0, with no gradient.
    """
    error = row_sum((x - mean).square().flatten(1)) / x.shape[1:].numel()
    if form == "cps":
        return -error
    std = std.flatten()
    exact = std == 0
    std = torch.where(exact, 1, std)
    return torch.where(exact, 0, -error / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi))


def draw(sample: Tensor, seed: int | Tensor | None) -> Tensor:
    """Standard normal noise of `sample`'s shape: from torch's generator, or from one key per sample."""
    if seed is None:
        return torch.randn(sample.shape, dtype=compute_dtype(sample), device=sample.device)
    keys = seed_keys(seed, sample)
    return philox_normal(keys, sample.shape[1:].numel()).view(sample.shape)


def seed_keys(seed: int | Tensor, sample: Tensor) -> Tensor:
    """(B,) int64 keys; an integer s means s·2^20 + row."""
    if isinstance(seed, Tensor):
        return seed
    return torch.arange(sample.shape[0], device=sample.device) + seed * 2**20


def philox_normal(keys: Tensor, count: int) -> Tensor:
    """(B, count) fp32 normals, entry [b, i] = `triton.language.randn(keys[b], i)`: Box–Muller on two Philox
    words."""
    words = philox(keys, count)
    u1, u2 = (_uniform(word) for word in words[:2])
    return (-2 * u1.clamp(min=1e-7).log()).sqrt() * (2 * math.pi * u2).cos()


def philox(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011), four (B, count) words < 2^32 held in int64.

    Key = the seed's low and high 32 bits, counter = (element index, 0, 0, 0). An int64 product keeps the low
    64 bits of the exact one, so its two halves are the 32-bit multiply's low and high words.
    """
    low = 0xFFFFFFFF
    k0, k1 = (keys & low)[:, None], ((keys >> 32) & low)[:, None]
    c0 = torch.arange(count, device=keys.device).expand(keys.shape[0], count)
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & low) ^ c1 ^ k0, ((a >> 32) & low) ^ c3 ^ k1
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word as an fp32 number in [0, 1), Triton's way: the upper half of the range is folded back."""
    return torch.where(word < 2**31, word, 2**32 - 1 - word).to(torch.float32) * 4.6566127342e-10


def check_step(
    op: str,
    velocity: Tensor,
    sample: Tensor,
    kind: str,
    noise_level: float | None,
    velocity_uncond: Tensor | None,
    log_prob: str,
) -> None:
    check_choice(op, "kind", kind, KINDS)
    check_choice(op, "log_prob", log_prob, LOG_PROBS)
    for name, value in (("velocity", velocity), ("velocity_uncond", velocity_uncond)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(f"{op}: {name} must be {tuple(sample.shape)} like sample, got {tuple(value.shape)}")
    if sample.dim() < 2 or not sample.is_floating_point():
        raise ValueError(f"{op}: sample must be floats of shape (B, ...), got {tuple(sample.shape)}")
    if noise_level is not None and noise_level < 0:
        raise ValueError(f"{op}: noise_level must not be negative, got {noise_level}")
    if kind == "cps" and noise_level is not None and noise_level > 1:
        raise ValueError(f"{op}: noise_level of cps is a fraction of a quarter turn, at most 1, got {noise_level}")


def check_noise(sample: Tensor, noise: Tensor | None, seed: int | Tensor | None, next_sample: Tensor | None) -> None:
    if sum(value is not None for value in (noise, seed, next_sample)) > 1:
        raise ValueError("flow_step: pass at most one of noise, seed and next_sample")
    for name, value in (("noise", noise), ("next_sample", next_sample)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(f"flow_step: {name} must be {tuple(sample.shape)}, got {tuple(value.shape)}")
    if isinstance(seed, int) and not 0 <= seed < 2**43:
        raise ValueError(f"flow_step: an integer seed must be at least 0 and below 2^43, got {seed}")
    if isinstance(seed, Tensor) and (seed.shape != sample.shape[:1] or seed.dtype != torch.int64):
        raise ValueError(f"flow_step: seed must be ({sample.shape[0]},) int64, got {tuple(seed.shape)} {seed.dtype}")
