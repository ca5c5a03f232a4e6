"""Stage 0: the decoder learns to draw from projected captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ..config import Config
from ..data import Example, square
from ..models import Models
from ..models.decoder import Decoder
from ..seeds import generator
from ..transfer import sent
from . import Metrics, prepared


def flow_matching_loss(
    decoder: Decoder,
    latents: Tensor,
    context: Tensor,
    sigma: Tensor,
    noise: Tensor,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """L0 = E ‖v_θ(x_σ, σ, c) − (ε − x0)‖² with x_σ = (1−σ)x0 + σε (METHOD §2).

    Args:
        decoder: whose transformer is trained.
        latents: (B, C, H, W), x0.
        context: (B, L, D) projected captions.
        sigma: (B,) in (0, 1).
        noise: (B, C, H, W), ε.
        lengths: how much of its context each row sees; None is all of it.
    """
    level = sigma.view(-1, 1, 1, 1)
    velocity = decoder.velocity((1 - level) * latents + level * noise, sigma, context, lengths)
    return (velocity.float() - (noise - latents)).square().mean()


def flow_matching_draws(shape: Sequence[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logit-normal(0, 1) σ (B,) and standard normal ε (B, C, H, W) for latents of `shape`."""
    return torch.sigmoid(torch.randn(shape[0], generator=rng)), torch.randn(tuple(shape), generator=rng)


@dataclass
class Pairs:
    """A step's images as latents, its captions as encoder states."""

    latents: Tensor  # (B, C, H, W)
    states: Tensor  # (B, L, H)
    mask: Tensor  # (B, L)
    sigma: Tensor  # (B,)
    noise: Tensor  # (B, C, H, W)
    lengths: list[int] | None  # how much of its context each row sees
    metrics: Metrics = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


class DecoderPretrain:
    """Stage 0: projector and decoder train on (image, long caption) pairs; the encoder is frozen."""

    name, title = "stage0", "decoder pre-training"
    trains = ("projector", "decoder")
    needs_captions, reads_as_policy = True, True

    def __init__(self, config: Config, models: Models):
        self.config, self.models, self.settings = config, models, config.stage0

    def groups(self) -> list[dict]:
        self.models.projector.requires_grad_(True)
        return [
            {"params": list(self.models.projector.parameters()), "lr": self.settings.lr_projector},
            {"params": self.models.decoder.trainable(), "lr": self.settings.lr_decoder},
        ]

    def prepare(self, image: Image.Image) -> Tensor:
        return square(image, self.config.data.resolution)

    @torch.no_grad()
    def rollout(self, examples: Sequence[Example], step: int) -> Pairs:
        decoder = self.models.decoder
        images = torch.cat(prepared(self.prepare, examples))
        captions, size = [example.caption or "" for example in examples], self.settings.micro_batch
        latents = torch.cat([decoder.encode(sent(some, decoder.device)) for some in images.split(size)])
        read = [self.models.encoder.read(captions[i : i + size], "policy") for i in range(0, len(captions), size)]
        states, mask = (torch.cat(part) for part in zip(*read, strict=True))
        draws = [
            flow_matching_draws((1, *latents.shape[1:]), generator(self.config.seed, self.name, step, example.id))
            for example in examples
        ]
        sigma, noise = (sent(torch.cat(part), decoder.device) for part in zip(*draws, strict=True))
        return Pairs(latents, states, mask, sigma, noise, self.models.lengths(captions))

    def loss(self, rollout: Pairs, rows: slice) -> tuple[Tensor, Metrics]:
        context = self.models.projector(rollout.states[rows], rollout.mask[rows])
        loss = flow_matching_loss(
            self.models.decoder,
            rollout.latents[rows],
            context,
            rollout.sigma[rows],
            rollout.noise[rows],
            rollout.lengths and rollout.lengths[rows],
        )
        return loss * len(context) / len(rollout), {"velocity_mse": loss.detach()}
