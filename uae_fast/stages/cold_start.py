"""Stage 1: encoder, projector and decoder learn together, through the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from uae_kernels import flow_step

from ..config import Config
from ..data import Example
from ..models import Models
from ..models.encoder import Patches, Prompt
from ..rollout.renders import Guidance, initial_noise, ode_path
from ..seeds import derive_seed
from . import Metrics, prepared, sampler_metrics


@dataclass
class Answers:
    """A step's images and their given captions."""

    captions: list[str]
    source: Tensor  # (B, D) reward embeddings of the images
    noise: Tensor  # (B, C, H, W) initial latents
    prompt: Prompt | None  # of the images, where stage1.context is "image"
    metrics: Metrics = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)


class ColdStart:
    """Stage 1: L1 = 1 − cos(f(x~), sg f(x)), where x~ is drawn from the given caption by a differentiable sampler.

    Gradients run through the last `backprop_last_steps` steps of the sampler, each recomputed in the backward pass, and
    into encoder, projector and decoder (METHOD §2).
    """

    name, title = "stage1", "cold start"
    trains = ("encoder", "projector", "decoder")
    needs_captions, reads_as_policy = True, True

    def __init__(self, config: Config, models: Models):
        self.config, self.models, self.settings = config, models, config.stage1

    def groups(self) -> list[dict]:
        self.models.projector.requires_grad_(True)
        return [
            {"params": self.models.encoder.trainable(), "lr": self.settings.lr_encoder},
            {"params": list(self.models.projector.parameters()), "lr": self.settings.lr_projector},
            {"params": self.models.decoder.trainable(), "lr": self.settings.lr_decoder},
        ]

    def prepare(self, image: Image.Image) -> Patches | None:
        return self.models.encoder.patches(image) if self.settings.context == "image" else None

    @torch.no_grad()
    def rollout(self, examples: Sequence[Example], step: int) -> Answers:
        models, images = self.models, [example.image for example in examples]
        patches = prepared(self.prepare, examples)
        seeds = [derive_seed(self.config.seed, self.name, step, example.id) for example in examples]
        shape = models.decoder.latent_shape(self.config.data.resolution)
        return Answers(
            captions=[example.caption or "" for example in examples],
            source=models.reward.embed_sources(images, [example.id for example in examples]),
            noise=initial_noise(seeds, shape, models.decoder.device),
            prompt=models.encoder.prompt(patches) if self.settings.context == "image" else None,
            metrics=sampler_metrics(self.config, drawn=False),
        )

    def loss(self, rollout: Answers, rows: slice) -> tuple[Tensor, Metrics]:
        images = self.draw(rollout.noise[rows], *self.context(rollout, rows))
        rewards = self.models.reward(images, rollout.source[rows])
        return (1 - rewards).sum() / len(rollout), {"reward": rewards.detach().mean()}

    def context(self, rollout: Answers, rows: slice) -> tuple[Tensor, list[int] | None]:
        """The decoder's context (B, L, D) for given captions, with gradients into projector and encoder; lengths."""
        models, captions = self.models, rollout.captions[rows]
        if rollout.prompt is None:
            return models.condition(captions, "policy"), models.lengths(captions)
        encoder, length = models.encoder, self.config.condition.length
        ids, mask = (part[:, :length] for part in encoder.answers(captions))
        context = models.projector(encoder.answer_states(rollout.prompt.rows(rows), ids, mask), mask)
        lengths = [encoder.bucket(len(encoder.words(caption)) + 1) for caption in captions] if encoder.buckets else None
        return torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1])), lengths

    def draw(self, noise: Tensor, context: Tensor, lengths: list[int] | None) -> Tensor:
        """Images (B, 3, H, W) from noise (B, C, H, W), differentiable in context and decoder."""
        decoder, settings = self.models.decoder, self.settings
        sigmas = decoder.sigmas(settings.sampler_steps)
        first = settings.sampler_steps - settings.backprop_last_steps
        guidance = Guidance()
        if settings.guidance_scale != 1:
            prompt = self.models.negative(self.config.render.negative_prompt, "policy")
            guidance = Guidance(settings.guidance_scale, prompt.detach())
        x = ode_path(decoder, noise, context.detach(), sigmas[: first + 1], len(noise), guidance, lengths=lengths)
        negative = guidance.negative(decoder, len(noise))

        def step(x: Tensor, context: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
            return flow_step(
                decoder.velocity(x, sigma, context, lengths), x, sigma, sigma_next, kind="ode",
                velocity_uncond=guidance.unconditional(decoder, x, sigma, negative), guidance_scale=guidance.scale,
            ).next_sample  # fmt: skip

        for sigma, sigma_next in zip(sigmas[first:-1], sigmas[first + 1 :], strict=True):
            x = checkpoint(step, x, context, sigma, sigma_next, use_reentrant=False)
        return decoder.decode(x)
