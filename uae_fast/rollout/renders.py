"""Drawing images with the decoder: the deterministic sampler, and windows of stochastic steps with their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from uae_kernels import flow_step

from ..config import Config
from ..models import Models
from ..models.batches import by_length, in_batches, pick
from ..models.decoder import Decoder
from ..models.fp8 import CAPTIONS
from ..phases import phase
from ..team import Team
from ..transfer import sent
from .graphs import loops_of


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v_u + scale·(v − v_u).

    Attributes:
        scale: 1 leaves the unconditional pass out.
        context: (1, L, D) of the negative prompt; unused at scale 1.
    """

    scale: float = 1.0
    context: Tensor | None = None

    def negative(self, decoder: Decoder, batch: int) -> Tensor | None:
        """The negative prompt's context (batch, L, D), or None at scale 1: one tensor, to be embedded once."""
        if self.scale == 1 or self.context is None:
            return None
        return self.context.to(decoder.dtype).expand(batch, -1, -1)

    @torch.no_grad()
    def unconditional(self, decoder: Decoder, latents: Tensor, sigma: Tensor, negative: Tensor | None) -> Tensor | None:
        """v_u (B, C, H, W) without a gradient, or None at scale 1: a forward pass of its own, in the batch's shape."""
        return None if negative is None else decoder.velocity(latents, sigma, negative)


@dataclass(frozen=True)
class Shortcuts:
    """Forward passes that a drawing leaves out: another drawing for less (`cheaper_sampler`).

    Attributes:
        guided_part: share of the steps, from the first, that are guided; the others take the prompt's pass alone.
        reuse: steps, numbered from 0, that take the velocity of the step before again, as guidance made it; never 0.
    """

    guided_part: float = 1.0
    reuse: tuple[int, ...] = ()

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step of so many is guided."""
        return step / steps < self.guided_part


FULL = Shortcuts()  # none


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of B drawings, W steps each, step by step: row w·B + b is drawing b at window step w.

    Attributes:
        latents, next_latents: (W·B, C, H, W) fp32.
        log_probs: (W·B,) of the policy that drew them.
        levels: (W + 1,) the window's part of the σ table: step w goes from levels[w] to levels[w + 1].
        sigma_max: () the schedule's second level, where 1−σ is taken at σ = 1.
        context: (B, L, D), the same at every step.
        lengths: how much of its context each of the B drawings sees; None is all of it.
        images: (B, 3, H, W) what the whole path ends in.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    levels: Tensor
    sigma_max: Tensor
    context: Tensor
    lengths: list[int] | None
    images: Tensor


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal latents (B, *shape), fp32, one seed a row."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return sent(torch.stack(rows), device)


@torch.no_grad()
def ode_path(
    decoder: Decoder, latents: Tensor, context: Tensor, sigmas: Tensor, batch: int, guidance: Guidance, *,
    lengths: Sequence[int] | None = None, first: Tensor | None = None, shortcuts: Shortcuts = FULL,
) -> Tensor:  # fmt: skip
    """Euler steps through the levels `sigmas` (S + 1,): latents (B, C, H, W) at sigmas[0] to latents at sigmas[-1].

    Args:
        batch: the one shape of all forward passes.
        lengths: how much of its context (B, L, D) each row sees; None is all of it.
        first: (B, C, H, W) the first step's unconditional velocities, where they are known.
        shortcuts: forward passes to leave out.
    """
    if len(sigmas) == 1:
        return latents
    negative, recorded = guidance.negative(decoder, batch), loops_of(decoder)
    loop = partial(euler, decoder, sigmas, guidance, shortcuts)

    def walk(c: Tensor, x: Tensor, unconditional: Tensor | None = None) -> Tensor:
        rows = x, c.to(decoder.dtype), negative, unconditional
        if recorded is None:
            return loop(*rows)
        decoder.ready(sigmas[0])
        settings = sigmas.data_ptr(), len(sigmas), guidance.scale, shortcuts
        return recorded.run(decoder, loop, settings, *rows)

    own = (latents,) if first is None else (latents, first)
    return by_length(walk, batch, lengths, context, *own)


def euler(
    decoder: Decoder, sigmas: Tensor, guidance: Guidance, shortcuts: Shortcuts,
    x: Tensor, context: Tensor, negative: Tensor | None, first: Tensor | None,
) -> Tensor:  # fmt: skip
    """The steps of one batch, on the device from the first to the last: x (batch, C, H, W) at sigmas[0] to sigmas[-1].

    What a CUDA graph holds: all that changes from call to call is in the last four tensors.

    Args:
        x: fp32 latents.
        context: (batch, L, D) in the transformer's dtype: a tensor that stays the same is embedded once.
        negative: (batch, L', D), None without guidance.
        first: the first step's unconditional velocities, where they are known.
    """
    velocity, unconditional = x, first  # step 0 computes the first velocity
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if step not in shortcuts.reuse:
            velocity = decoder.velocity(x, sigma, context)
            if not shortcuts.guides(step, len(sigmas) - 1):
                unconditional = None
            elif step or first is None:
                unconditional = guidance.unconditional(decoder, x, sigma, negative)
        x = flow_step(
            velocity, x, sigma, sigma_next, kind="ode", velocity_uncond=unconditional, guidance_scale=guidance.scale
        ).next_sample
    return x


@phase("renders")
@torch.no_grad()
def render(
    decoder: Decoder, context: Tensor, seeds: Sequence[int], *,
    resolution: int, steps: int, batch: int, guidance: Guidance, lengths: Sequence[int] | None = None,
    decode_batch: int | None = None, shortcuts: Shortcuts = FULL,
) -> Tensor:  # fmt: skip
    """Draws one image for each row of `context` with the deterministic sampler.

    A decoder that draws in fp8 and is not calibrated for this is so first, with up to 32 of the rows.

    Args:
        decoder: draws.
        context: (B, L, D).
        seeds: B seeds of the initial noise; equal seeds give equal noise.
        resolution: side of the images in pixels.
        steps: Euler steps.
        batch: the one batch shape in which everything is computed, so that an image depends only on its own row.
        guidance: classifier-free guidance. Of the first step its unconditional half depends on the noise alone: it is
            computed once for each seed.
        lengths: how much of its context each row sees; None is all of it. Rows of one length are drawn together.
        decode_batch: the one batch shape of the VAE; None is `batch`.
        shortcuts: forward passes to leave out.

    Returns:
        Images (B, 3, resolution, resolution), fp32 in [0, 1].
    """
    sigmas = decoder.sigmas(steps)
    if decoder.wants_calibration(steps):
        rows = range(0, len(seeds), -(-len(seeds) // CAPTIONS))
        few = initial_noise([seeds[i] for i in rows], decoder.latent_shape(resolution), decoder.device)
        own = None if lengths is None else [lengths[i] for i in rows]
        with decoder.recorded() as runs:
            ode_path(decoder, few, pick(context, rows), sigmas, batch, guidance, lengths=own)
        decoder.calibrate(runs, steps)
    distinct = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
    noise = initial_noise(list(distinct), decoder.latent_shape(resolution), decoder.device)
    places = [distinct[seed] for seed in seeds]
    negative, first = guidance.negative(decoder, batch), None
    if negative is not None and len(distinct) < len(seeds):
        first = pick(in_batches(lambda x: decoder.velocity(x, sigmas[0], negative), batch, noise), places)
    latents = ode_path(
        decoder, pick(noise, places), context, sigmas, batch, guidance,
        lengths=lengths, first=first, shortcuts=shortcuts,
    )  # fmt: skip
    return in_batches(decoder.decode, decode_batch or batch, latents)


@torch.no_grad()
def draw(config: Config, models: Models, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) of captions, one seed of the initial noise each: what stage 2 and evaluation look at.

    The one reader of `cheaper_sampler` but for its VAE: paths that are trained on take every pass.

    A caption that comes again with the same seed is read and drawn once. Captions are read, like images drawn, in
    batches of one shape: an image depends on its own caption and seed alone.
    """
    pairs = list(dict.fromkeys(zip(captions, seeds, strict=True)))
    places = {pair: i for i, pair in enumerate(pairs)}
    words, batch, cheaper = [caption for caption, _ in pairs], config.render.batch, config.cheaper_sampler
    scale = config.render.guidance_scale
    filled = words + words[-1:] * (-len(words) % batch)
    context = torch.cat([models.condition(filled[i : i + batch]) for i in range(0, len(filled), batch)])
    steps = cheaper.steps or config.render.steps
    with Team().first(lambda: models.decoder.wants_calibration(steps)):  # process 0 calibrates; its file has the scales
        images = render(
            models.decoder,
            context[: len(words)],
            [seed for _, seed in pairs],
            resolution=config.data.resolution,
            steps=steps,
            batch=batch,
            guidance=Guidance(scale, None if scale == 1 else models.negative(config.render.negative_prompt)),
            lengths=models.lengths(words),
            decode_batch=config.same_sampler.decode_batch,
            shortcuts=Shortcuts(cheaper.guided_part, tuple(cheaper.reuse)),
        )
    return pick(images, [places[pair] for pair in zip(captions, seeds, strict=True)])


@phase("renders")
@torch.no_grad()
def sde_window(
    decoder: Decoder, context: Tensor, seeds: Sequence[int], step_seeds: Tensor, *,
    group_size: int, start: int, resolution: int, steps: int, kind: str, noise_level: float, batch: int,
    micro_batch: int, guidance: Guidance, lengths: Sequence[int] | None = None, decode_batch: int | None = None,
) -> Trajectory:  # fmt: skip
    """Draws `group_size` images for each of n captions, with noise in a window of sampler steps (METHOD §3).

    Up to the window a group shares one deterministic path; in the window each drawing takes W stochastic steps of its
    own; after it each goes on deterministically. The window's velocities are computed in micro-batches of the update's
    shape, so that the update's first pass repeats them bit for bit.

    Args:
        context: (n, L, D), one row a caption.
        seeds: n seeds of the initial noise.
        step_seeds: (W, n·group_size) int64, the noise of each stochastic step.
        start: first step of the window.
        batch: the shape of the forward passes after the window; before it there are n rows, in batches of n if that is
            less, a number that is the same at every step of a run.
        micro_batch: divides n·group_size.
        lengths: how much of its context each caption's drawings see; None is all of it.
        decode_batch: the one batch shape of the VAE; None is `batch`.
    """
    sigmas = decoder.sigmas(steps)
    window = len(step_seeds)
    levels = sigmas[start : start + window + 1]
    noise = initial_noise(seeds, decoder.latent_shape(resolution), decoder.device)
    few = min(batch, len(context))
    shared = ode_path(decoder, noise, context, sigmas[: start + 1], few, guidance, lengths=lengths)
    x, context = shared.repeat_interleave(group_size, 0), context.repeat_interleave(group_size, 0)
    own = None if lengths is None else [length for length in lengths for _ in range(group_size)]
    negative = guidance.negative(decoder, micro_batch)

    points, log_probs = [x], []
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        nexts, x = [], points[-1]
        for first in range(0, len(x), micro_batch):
            rows = slice(first, first + micro_batch)
            with torch.enable_grad():  # a kernel may be chosen by whether it must give gradients, as in the update
                velocity = decoder.velocity(x[rows], sigma, context[rows], own and own[rows]).detach()
            result = flow_step(
                velocity, x[rows], sigma, sigma_next, kind=kind, noise_level=noise_level, sigma_max=sigmas[1],
                seed=step_seeds[step, rows], guidance_scale=guidance.scale,
                velocity_uncond=guidance.unconditional(decoder, x[rows], sigma, negative),
            )  # fmt: skip
            assert result.log_prob is not None  # the configuration has noise
            nexts.append(result.next_sample)
            log_probs.append(result.log_prob)
        points.append(torch.cat(nexts))

    latents = ode_path(decoder, points[-1], context, sigmas[start + window :], batch, guidance, lengths=own)
    return Trajectory(
        latents=torch.cat(points[:-1]),
        next_latents=torch.cat(points[1:]),
        log_probs=torch.cat(log_probs),
        levels=levels,
        sigma_max=sigmas[1],
        context=context,
        lengths=own,
        images=in_batches(decoder.decode, decode_batch or batch, latents),
    )
