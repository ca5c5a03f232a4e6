"""Definition of `uae_kernels.flow_step`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import FlowStep, check_choice, check_impl, compute_dtype, number

KINDS = ("ode", "flow_sde", "dance_sde", "cps")
NOISE_LEVEL = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
LOG_PROBS = ("gaussian", "cps")

# Philox4x32-10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round
LOW = 2**32 - 1
PIECE = 2**16  # elements of which a CPU's caches hold all words, and that two threads share


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
    sigmas = sigma, sigma_next, sigma_next if sigma_max is None else sigma_max
    check_step("flow_step", velocity, sample, sigmas, kind, noise_level, velocity_uncond, log_prob)
    check_noise(sample, noise, seed, next_sample)
    noise_level = NOISE_LEVEL[kind] if noise_level is None else noise_level
    deterministic = kind == "ode" or noise_level == 0
    dtype = compute_dtype(velocity, sample)
    v, x = guided(velocity, velocity_uncond, guidance_scale, dtype), sample.to(dtype)
    mean, std, _ = transition(v, x, *sigmas, kind, noise_level)
    if next_sample is not None:
        next_sample = next_sample.to(dtype)
    elif deterministic:
        next_sample = mean
    else:
        noise = draw(x, seed) if noise is None else noise.clone()
        next_sample = noise.to(dtype).mul_(std).add_(mean)
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
    return (v - v_u).mul_(guidance_scale).add_(v_u)


def transition(
    v: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    sigma_max: float | Tensor,
    kind: str,
    noise_level: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, ...), standard deviation and diffusion coefficient (B, 1, ..., 1) of p(x' | x)."""
    a, b, std, s = coefficients(x, (sigma, sigma_next, sigma_max), kind, noise_level)
    return (a * x).addcmul_(b, v), std, s


def coefficients(
    x: Tensor, sigmas: Sequence[float | Tensor], kind: str, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean = a·x + b·v, the standard deviation and the diffusion coefficient s, all (B, 1, ..., 1); of σ, σ', σ_max.

    v = ε − x0, x = (1 − σ)·x0 + σ·ε, dt = σ' − σ < 0.
    """
    rows = (s.to(x) if isinstance(s, Tensor) else number(s, x) for s in sigmas)
    sigma, sigma_next, sigma_max = (s.expand(len(x)).view(-1, *[1] * (x.dim() - 1)) for s in rows)
    if kind == "cps":
        # Flow-CPS (arXiv 2509.05952): mean = (1 − σ')·x0 + σ' cos θ·x1 with x0 = x − σv, x1 = x + (1 − σ)v; the
        # coefficients preserve the noise level, (σ' cos θ)² + (σ' sin θ)² = σ'²
        std, of_x1 = (sigma_next * f(noise_level * math.pi / 2) for f in (math.sin, math.cos))
        of_x0 = 1 - sigma_next
        return of_x0 + of_x1, of_x1 * (1 - sigma) - of_x0 * sigma, std, std
    dt = sigma_next - sigma
    if kind == "ode":
        s = torch.zeros_like(sigma)
    elif kind == "flow_sde":
        # Flow-GRPO (arXiv 2505.05470) eq. 9: s = a·√(σ/(1 − σ)), with 1 − σ taken at σ_max where σ = 1
        s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    else:
        s = noise_level * torch.ones_like(sigma)  # DanceGRPO (arXiv 2505.07818): constant s = η
    # mean = x·(1 + s²dt/(2σ)) + v·(1 + s²(1 − σ)/(2σ))·dt, std = s·√(−dt)
    drift = s.square() / (2 * sigma)
    return 1 + drift * dt, (1 + drift * (1 - sigma)) * dt, s * (-dt).sqrt(), s


def log_density(x: Tensor, mean: Tensor, std: Tensor, form: str) -> Tensor:
    """Per sample, the mean over its elements of log N(x; mean, std²), or Flow-CPS's −(x − mean)².

    Where std is 0 (a cps step to σ' = 0) there is no density: 0, with no gradient.
    """
    error = row_mean_square(x, mean)
    if form == "cps":
        return -error
    std = std.flatten()
    exact = std == 0
    std = torch.where(exact, 1, std)
    return torch.where(exact, 0, -error / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi))


def row_mean_square(x: Tensor, y: Tensor) -> Tensor:
    """(B, ...) -> mean (x − y)² of each sample (B,), in an order that does not depend on B.

    One long sum with a single result would be split over threads; sums of 1,024 never are.
    """
    squares = torch.nn.functional.mse_loss(x, y, reduction="none").flatten(1)
    rows, n = squares.shape
    if n % 1024:
        squares = torch.nn.functional.pad(squares, (0, -n % 1024))
    return squares.reshape(rows, squares.shape[1] // 1024, 1024).sum(-1).sum(-1) / n


def draw(sample: Tensor, seed: int | Tensor | None) -> Tensor:
    """Standard normal noise of `sample`'s shape: from torch's generator, or from one key per sample."""
    if seed is None:
        return torch.randn_like(sample)
    keys = seed_keys(seed, sample)
    return philox_normal(keys, sample.shape[1:].numel()).view(sample.shape)


def seed_keys(seed: int | Tensor, sample: Tensor) -> Tensor:
    """(B,) int64 keys; an integer s means s·2^20 + row."""
    if isinstance(seed, Tensor):
        return seed
    return torch.arange(sample.shape[0], device=sample.device) + seed * 2**20


def philox(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011), four (B, count) words < 2^32 held in int64.

    Key = the seed's low and high 32 bits, counter = (element index, 0, 0, 0). An int64 product keeps the low
    64 bits of the exact one, so its two halves are the 32-bit multiply's low and high words.
    """
    k0, k1 = (keys & LOW)[:, None], ((keys >> 32) & LOW)[:, None]
    c0 = torch.arange(count, device=keys.device).expand(keys.shape[0], count)
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((b >> 32) & LOW) ^ c1 ^ k0, ((a >> 32) & LOW) ^ c3 ^ k1
        c1, c3 = b & LOW, a & LOW
        k0, k1 = (k0 + STEPS[0]) & LOW, (k1 + STEPS[1]) & LOW
    return c0, c1, c2, c3


# An op, for Inductor would unroll the pieces and the rounds into one kernel that computes a word again for every use.
@torch.library.custom_op("uae_kernels::philox_normal", mutates_args=())
def philox_normal(keys: Tensor, count: int) -> Tensor:
    """(B, count) fp32 normals, entry [b, i] = `triton.language.randn(keys[b], i)`: Box–Muller on the first two words
    of `philox`, taken in place, on a CPU a piece at a time."""
    normals = torch.empty(len(keys), count, dtype=torch.float32, device=keys.device)
    piece = PIECE if keys.device.type == "cpu" else max(normals.numel(), 1)
    rows, columns = max(piece // max(count, 1), 1), max(min(count, piece), 1)
    state = torch.empty(3, 2, min(rows, len(keys)), columns, dtype=torch.int64, device=keys.device)
    words = torch.empty(state.shape[1:], dtype=torch.int32, device=keys.device)
    uniform = torch.empty_like(words, dtype=torch.float32)
    for some, out in zip(keys.split(rows), normals.split(rows), strict=True):
        for start in range(0, count, columns):
            part = slice(None), slice(len(some)), slice(min(columns, count - start))
            w, u = words[part], uniform[part]
            _first_words(some, start, state[(slice(None), *part)], w)
            # A 32-bit word as a number in [0, 1), Triton's way: the upper half of the range is folded back.
            u1, u2 = u.copy_(w.bitwise_xor_(w >> 31)).mul_(4.6566127342e-10)
            radius = u1.clamp_(min=1e-7).log_().mul_(-2).sqrt_()
            torch.mul(radius, u2.mul_(2 * math.pi).cos_(), out=out[:, start : start + columns])
    return normals


@philox_normal.register_fake
def _(keys, count):
    return keys.new_empty(len(keys), count, dtype=torch.float32)


def _first_words(keys: Tensor, start: int, state: Tensor, words: Tensor) -> None:
    """`philox`'s first two words of the elements from `start` on into `words` (2, rows, columns) int32.

    `state` (3, 2, rows, columns) int64 is memory: for c0 and c2, for c3 and c1 (with anything above their 32 bits), and
    for products.
    """
    counter, low, product = state
    k0, k1 = (keys & LOW)[:, None], ((keys >> 32) & LOW)[:, None]
    c0, c2 = counter
    first = torch.arange(start, start + c0.shape[1], device=keys.device) * MULTIPLIERS[0]
    c0.copy_(k0)
    torch.bitwise_xor((first >> 32) & LOW, k1, out=c2)
    low[0], low[1] = first, 0
    for i in range(9):
        k0, k1 = (k0 + STEPS[0]) & LOW, (k1 + STEPS[1]) & LOW
        a, b = product
        torch.mul(c2, MULTIPLIERS[1], out=b)
        if i < 8:
            torch.mul(c0, MULTIPLIERS[0], out=a)
            torch.bitwise_right_shift(a, 32, out=c2).bitwise_xor_(low[0]).bitwise_xor_(k1)
        torch.bitwise_right_shift(b, 32, out=c0).bitwise_xor_(low[1]).bitwise_xor_(k0)
        counter.bitwise_and_(LOW)
        low, product = product, low
    words[0], words[1] = c0, low[1]


def check_step(
    op: str,
    velocity: Tensor,
    sample: Tensor,
    sigmas: Sequence[float | Tensor],
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
    for sigma in sigmas:
        if isinstance(sigma, Tensor) and sigma.shape not in ((), sample.shape[:1]):
            raise ValueError(
                f"{op}: a σ must be a number or a tensor of shape () or ({len(sample)},), got {tuple(sigma.shape)}"
            )
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
