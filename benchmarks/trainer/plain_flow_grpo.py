"""Flow-GRPO (arXiv 2505.05470) for SD3.5 in plain diffusers and peft: the published recipe, one line after another.

What stage 3 is compared with: its mathematics is derived anew from the paper, nothing is fused, shared or skipped, and
nothing of `uae_kernels` or `uae_fast` is used. Guidance is one batch of unconditional and conditional rows, gradients
stop at the unconditional half, and every step but the last is stochastic and trained on, in micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Recipe:
    """The released options for SD3.5-medium."""

    steps: int = 10
    guidance_scale: float = 4.5
    noise_level: float = 0.7
    untrained_steps: int = 1
    """Steps at the end that are neither stochastic nor trained on."""
    group_size: int = 24
    micro_batch: int = 8
    updates: int = 2
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    beta: float = 0.04
    kl_with_dt: bool = False
    """Whether the KL divides by the variance of the step, as the paper has it; the released code leaves dt out."""
    lr: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0


@dataclass
class Path:
    """The stochastic steps of B drawings: `latents`, `next_latents` (S, B, C, H, W) fp32, `log_probs` (S, B)."""

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    first: int = 0
    """Of the schedule's steps, the one that the first of these is."""


def sde_step(
    velocity: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor, noise_level: float,
    next_x: Tensor | None = None, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One step of the SDE whose marginals are the flow's: next sample, log-prob (B,), mean, std, diffusion coefficient.

    dx = [v + s²/(2σ)·(x + (1−σ)v)]dσ + s dw with s = a·√(σ/(1−σ)), by Euler–Maruyama; at σ = 1 the s of σ_max.
    The log-prob is the mean over a sample's elements.
    """
    velocity, x = velocity.float(), x.float()
    dt = sigma_next - sigma
    one = torch.where(sigma == 1, sigma_max, sigma)
    s = noise_level * torch.sqrt(sigma / (1 - one))
    mean = x + (velocity + s**2 / (2 * sigma) * (x + (1 - sigma) * velocity)) * dt
    std = s * torch.sqrt(-dt)
    if next_x is None:
        next_x = mean + std * (torch.randn_like(x) if noise is None else noise)
    log_prob = -((next_x.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return next_x, log_prob.mean((1, 2, 3)), mean, std, s


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(reward − its group's mean)/(std over all + 1e-4), in fp64: the released recipe's global standard deviation."""
    wide = rewards.double().view(-1, group_size)
    return ((wide - wide.mean(1, keepdim=True)) / (wide.std(correction=0) + 1e-4)).flatten().to(rewards.dtype)


class PlainFlowGRPO:
    """A policy over SD3's sampler.

    Args:
        transformer: an `SD3Transformer2DModel` with a peft adapter, which is what trains; without it, it is the
            reference.
        sigmas: (steps + 1,) noise levels from about 1 down to 0.
        pooled: (D,) the pooled text condition of every prompt.
        negative: (1, L, D) the negative prompt's condition, of the prompts' length; unused without guidance.
        reference: what the KL pulls towards where there is no adapter.
    """

    def __init__(
        self, transformer: Any, sigmas: Tensor, pooled: Tensor, negative: Tensor | None, recipe: Recipe,
        reference: Any = None,
    ):  # fmt: skip
        self.transformer, self.reference, self.recipe = transformer, reference, recipe
        self.sigmas, self.pooled, self.negative = sigmas, pooled, negative

    def velocity(self, x: Tensor, sigma: Tensor, context: Tensor, transformer: Any = None) -> Tensor:
        """v (B, C, H, W) fp32, guided; no gradient flows into the unconditional half."""
        scale, batch = self.recipe.guidance_scale, len(x)
        if scale != 1 and self.negative is not None:
            x, context = torch.cat([x, x]), torch.cat([self.negative.expand(batch, -1, -1), context])
        model = transformer or self.transformer
        out = model(
            hidden_states=x.to(model.dtype),
            encoder_hidden_states=context.to(model.dtype),
            pooled_projections=self.pooled.to(model.dtype).expand(len(x), -1),
            timestep=(1000 * sigma).expand(len(x)),
            return_dict=False,
        )[0].float()
        if len(x) == batch:
            return out
        uncond, cond = out.chunk(2)
        uncond = uncond.detach()
        return uncond + scale * (cond - uncond)

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        if self.reference is not None:
            return self.velocity(x, sigma, context, self.reference)
        self.transformer.disable_adapters()
        try:
            return self.velocity(x, sigma, context)
        finally:
            self.transformer.enable_adapters()

    @torch.no_grad()
    def rollout(self, noise: Tensor, context: Tensor) -> tuple[Path, Tensor]:
        """Draws from noise (B, C, H, W) and context (B, L, D): the stochastic steps, and the final latents."""
        recipe, rows = self.recipe, len(noise)
        before, after, log_probs, x = [], [], [], noise.float()
        for step in range(recipe.steps):
            sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
            velocity = torch.cat(
                [
                    self.velocity(x[i : i + recipe.micro_batch], sigma, context[i : i + recipe.micro_batch])
                    for i in range(0, rows, recipe.micro_batch)
                ]
            )
            if step >= recipe.steps - recipe.untrained_steps:
                x = x + velocity * (sigma_next - sigma)
                continue
            before.append(x)
            x, log_prob, *_ = sde_step(velocity, x, sigma, sigma_next, self.sigmas[1], recipe.noise_level)
            after.append(x)
            log_probs.append(log_prob)
        return Path(torch.stack(before), torch.stack(after), torch.stack(log_probs)), x

    def loss(self, path: Path, step: int, rows: slice, advantages: Tensor, context: Tensor) -> Tensor:
        """Of some drawings at one of the path's steps: mean over them of the clipped loss, plus β times the KL."""
        recipe, i = self.recipe, path.first + step
        sigma, sigma_next, x = self.sigmas[i], self.sigmas[i + 1], path.latents[step, rows]
        velocity = self.velocity(x, sigma, context[rows])
        _, log_prob, mean, std, s = sde_step(
            velocity, x, sigma, sigma_next, self.sigmas[1], recipe.noise_level, path.next_latents[step, rows]
        )
        a = advantages[rows].clamp(-recipe.advantage_clip, recipe.advantage_clip)
        ratio = torch.exp(log_prob - path.log_probs[step, rows])
        clipped = torch.clamp(ratio, 1 - recipe.clip_range, 1 + recipe.clip_range)
        loss = torch.maximum(-a * ratio, -a * clipped).mean()
        if recipe.beta:
            guide = self.reference_velocity(x, sigma, context[rows])
            _, _, mean_ref, *_ = sde_step(
                guide, x, sigma, sigma_next, self.sigmas[1], recipe.noise_level, path.next_latents[step, rows]
            )
            width = std if recipe.kl_with_dt else s
            kl = ((mean - mean_ref) ** 2).mean((1, 2, 3)) / (2 * width**2)
            loss = loss + recipe.beta * kl.mean()
        return loss

    def update(self, path: Path, advantages: Tensor, context: Tensor) -> Tensor:
        """The step's loss, its gradients added to the parameters', one micro-batch of one step after another."""
        steps, rows = path.log_probs.shape
        size, total = self.recipe.micro_batch, torch.zeros((), device=path.latents.device)
        for step in range(steps):
            for start in range(0, rows, size):
                loss = self.loss(path, step, slice(start, start + size), advantages, context)
                loss = loss * size / (steps * rows)
                loss.backward()
                total = total + loss.detach()
        return total
