"""Drawing images with the decoder: the deterministic sampler, and windows of stochastic steps with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from uae_kernels import flow_step

from ..config import Config
from ..models import Models
from ..models.decoder import Decoder


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v_u + scale·(v − v_u).

    Attributes:
        scale: 1 leaves the unconditional pass out.
        context: (1, L, D) of the negative prompt; unused at scale 1.
    """

    scale: float = 1.0
    context: Tensor | None = None

    def unconditional(self, decoder: Decoder, latents: Tensor, sigma: Tensor) -> Tensor | None:
        """v_u (B, C, H, W) without a gradient, or None at scale 1: a forward pass of its own, in the batch's shape."""
        if self.scale == 1 or self.context is None:
            return None
        with torch.no_grad():
            return decoder.velocity(latents, sigma, self.context.expand(len(latents), -1, -1))


def render_guidance(config: Config, models: Models) -> Guidance:
    """The guidance of rewards and evaluation (`render.guidance_scale`)."""
    scale = config.render.guidance_scale
    return Guidance(scale, None if scale == 1 else models.condition([config.render.negative_prompt]))


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of B drawings, W steps each, step by step: row w·B + b is drawing b at window step w.

    Attributes:
        latents, next_latents: (W·B, C, H, W) fp32.
        log_probs: (W·B,) of the policy that drew them.
        sigma, sigma_next: (W·B,) fp32.
        sigma_max: () the schedule's second level, where 1−σ is taken at σ = 1.
        context: (B, L, D), the same at every step.
        images: (B, 3, H, W) what the whole path ends in.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    sigma: Tensor
    sigma_next: Tensor
    sigma_max: Tensor
    context: Tensor
    images: Tensor


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal latents (B, *shape), fp32, one seed a row."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def in_batches(function: Callable[..., Tensor], batch: int, *tensors: Tensor) -> Tensor:
    """`function` over chunks of exactly `batch` rows; a short last chunk is padded with copies of its last row."""
    outputs = []
    for chunk in zip(*(tensor.split(batch) for tensor in tensors), strict=True):
        rows = len(chunk[0])
        if rows < batch:
            chunk = tuple(torch.cat([part, part[-1:].expand(batch - rows, *part.shape[1:])]) for part in chunk)
        outputs.append(function(*chunk)[:rows])
    return torch.cat(outputs)


@torch.no_grad()
def ode_path(
    decoder: Decoder, latents: Tensor, context: Tensor, sigmas: Tensor, batch: int, guidance: Guidance
) -> Tensor:
    """Euler steps through the levels `sigmas` (S + 1,): latents (B, C, H, W) at sigmas[0] to latents at sigmas[-1]."""

    def walk(x: Tensor, c: Tensor) -> Tensor:
        for sigma, sigma_next in pairwise(sigmas):
            velocity, unconditional = decoder.velocity(x, sigma, c), guidance.unconditional(decoder, x, sigma)
            x = flow_step(
                velocity, x, sigma, sigma_next, kind="ode",
                velocity_uncond=unconditional, guidance_scale=guidance.scale,
            ).next_sample  # fmt: skip
        return x

    return in_batches(walk, batch, latents, context) if len(sigmas) > 1 else latents


@torch.no_grad()
def render(
    decoder: Decoder,
    context: Tensor,
    seeds: Sequence[int],
    *,
    resolution: int,
    steps: int,
    batch: int,
    guidance: Guidance,
) -> Tensor:
    """Draws one image for each row of `context` with the deterministic sampler.

    Args:
        decoder: draws.
        context: (B, L, D).
        seeds: B seeds of the initial noise; equal seeds give equal noise.
        resolution: side of the images in pixels.
        steps: Euler steps.
        batch: the one batch shape in which everything is computed, so that an image depends only on its own row.
        guidance: classifier-free guidance.

    Returns:
        Images (B, 3, resolution, resolution), fp32 in [0, 1].
    """
    noise = initial_noise(seeds, decoder.latent_shape(resolution), decoder.device)
    latents = ode_path(decoder, noise, context, decoder.sigmas(steps), batch, guidance)
    return in_batches(decoder.decode, batch, latents)


@torch.no_grad()
def sde_window(
    decoder: Decoder,
    context: Tensor,
    seeds: Sequence[int],
    step_seeds: Tensor,
    *,
    group_size: int,
    start: int,
    resolution: int,
    steps: int,
    kind: str,
    noise_level: float,
    batch: int,
    micro_batch: int,
    guidance: Guidance,
) -> Trajectory:
    """Draws `group_size` images for each of n captions, with noise in a window of sampler steps (METHOD §3).

    Up to the window a group shares one deterministic path; in the window each drawing takes W stochastic steps of its
    own; after it each goes on deterministically. The window's velocities are computed in micro-batches of the update's
    shape, so that the update's first pass repeats them bit for bit.

    Args:
        context: (n, L, D), one row a caption.
        seeds: n seeds of the initial noise.
        step_seeds: (W, n·group_size) int64, the noise of each stochastic step.
        start: first step of the window.
        micro_batch: divides n·group_size.
    """
    sigmas = decoder.sigmas(steps)
    window = len(step_seeds)
    noise = initial_noise(seeds, decoder.latent_shape(resolution), decoder.device)
    shared = ode_path(decoder, noise, context, sigmas[: start + 1], min(batch, len(context)), guidance)
    x, context = shared.repeat_interleave(group_size, 0), context.repeat_interleave(group_size, 0)

    before, after, log_probs = [], [], []
    for step in range(window):
        sigma, sigma_next = sigmas[start + step], sigmas[start + step + 1]
        nexts, probs = [], []
        for rows in torch.arange(len(x), device=x.device).split(micro_batch):
            result = flow_step(
                decoder.velocity(x[rows], sigma, context[rows]), x[rows], sigma, sigma_next,
                kind=kind, noise_level=noise_level, sigma_max=sigmas[1], seed=step_seeds[step, rows],
                velocity_uncond=guidance.unconditional(decoder, x[rows], sigma), guidance_scale=guidance.scale,
            )  # fmt: skip
            assert result.log_prob is not None  # the configuration has noise
            nexts.append(result.next_sample)
            probs.append(result.log_prob)
        before.append(x)
        x = torch.cat(nexts)
        after.append(x)
        log_probs.append(torch.cat(probs))

    latents = ode_path(decoder, x, context, sigmas[start + window :], batch, guidance)
    levels = sigmas[start : start + window + 1].repeat_interleave(len(x))
    return Trajectory(
        latents=torch.cat(before),
        next_latents=torch.cat(after),
        log_probs=torch.cat(log_probs),
        sigma=levels[: -len(x)],
        sigma_next=levels[len(x) :],
        sigma_max=sigmas[1],
        context=context,
        images=in_batches(decoder.decode, batch, latents),
    )
