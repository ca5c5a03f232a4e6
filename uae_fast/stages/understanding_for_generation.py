"""Stage 3, Understanding for Generation: the decoder learns to draw what the encoder's captions say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from uae_kernels import flow_grpo_loss

from ..config import Config
from ..data import Example
from ..models import Models
from ..models.encoder import Patches
from ..rollout.captions import sample_captions
from ..rollout.renders import Guidance, Trajectory, sde_window
from ..seeds import derive_seed
from ..transfer import sent
from . import Metrics, advantages, caption_metrics, judge, policy_metrics, prepared, reward_metrics, sampler_metrics


@dataclass
class DrawingRollout:
    """The stochastic steps of B = images · group_size drawings, W of them each: W·B samples."""

    trajectory: Trajectory
    advantages: Tensor  # (B,)
    ref_velocity: Tensor | None  # (W·B, C, H, W), guided
    metrics: Metrics
    guidance: Guidance = field(default_factory=Guidance)

    def __len__(self) -> int:
        return len(self.trajectory.latents)


class UnderstandingForGeneration:
    """Stage 3: Flow-GRPO (arXiv 2505.05470) on the encoder's own captions; the encoder is frozen (METHOD §2, §3)."""

    name, title = "stage3", "understanding for generation"
    trains = ("decoder",)
    needs_captions, reads_as_policy = False, False

    def __init__(self, config: Config, models: Models):
        self.config, self.models, self.settings = config, models, config.stage3
        if self.settings.beta:
            models.decoder.keep_reference()

    def groups(self) -> list[dict]:
        return [{"params": self.models.decoder.trainable(), "lr": self.settings.lr}]

    def prepare(self, image: Image.Image) -> Patches:
        return self.models.encoder.patches(image)

    @torch.no_grad()
    def rollout(self, examples: Sequence[Example], step: int) -> DrawingRollout:
        config, settings, models = self.config, self.settings, self.models
        size = settings.group_size
        prompt = models.encoder.prompt(prepared(self.prepare, examples))
        captions = sample_captions(
            models.encoder,
            prompt,
            [self.seed("caption", example.id) for example in examples],
            temperature=config.caption.temperature,
            max_new_tokens=config.caption.max_new_tokens,
            engine=config.caption.engine,
        )
        last_start = settings.window_end - settings.window
        start = self.seed("window", step) % (last_start + 1)
        step_seeds = [
            [self.seed(step, example.id, i, w) for example in examples for i in range(size)]
            for w in range(settings.window)
        ]
        guidance = Guidance()
        if settings.guidance_scale != 1:
            guidance = Guidance(settings.guidance_scale, models.negative(config.render.negative_prompt))
        trajectory = sde_window(
            models.decoder,
            models.condition(captions.texts),
            [self.seed("noise", step, example.id) for example in examples],
            sent(torch.tensor(step_seeds), models.decoder.device),
            group_size=size,
            start=start,
            resolution=config.data.resolution,
            steps=config.render.steps,
            kind=settings.kind,
            noise_level=settings.noise_level,
            batch=config.render.batch,
            micro_batch=settings.micro_batch,
            guidance=guidance,
            lengths=models.lengths(captions.texts),
            decode_batch=config.same_sampler.decode_batch,
        )
        rewards, metrics = judge(models, trajectory.images, examples)
        rollout = DrawingRollout(
            trajectory,
            advantages=advantages(rewards, settings),
            ref_velocity=None,
            metrics={
                **reward_metrics(rewards, size),
                **metrics,
                **caption_metrics(captions, models.encoder.eos_id),
                **sampler_metrics(config, drawn=False),
                "prompts/mean_length": prompt.mask.sum(1).float().mean(),
                "clip_range_nats": torch.tensor(settings.clip_range * trajectory.latents[0].numel()),
                "window_start": torch.tensor(start),
            },
            guidance=guidance,
        )
        if settings.beta:
            rollout.ref_velocity = self.reference_velocity(rollout)
        return rollout

    @torch.no_grad()
    def reference_velocity(self, rollout: DrawingRollout) -> Tensor:
        """The reference's velocities (W·B, C, H, W) at the rollout's samples, fp32, guided by its own v_u."""
        found = torch.empty_like(rollout.trajectory.latents)
        with self.models.decoder.acting_as_reference():
            for first in range(0, len(rollout), self.settings.micro_batch):
                rows = slice(first, first + self.settings.micro_batch)
                velocity, uncond = self.velocity(rollout, rows).float(), self.unconditional(rollout, rows)
                if uncond is not None:
                    velocity = uncond.float().lerp(velocity, rollout.guidance.scale)
                found[rows] = velocity
        return found

    def seed(self, *parts: int | str) -> int:
        """The seed of one of the stage's draws."""
        return derive_seed(self.config.seed, self.name, *parts)

    def velocity(self, rollout: DrawingRollout, rows: slice) -> Tensor:
        """v_θ (B, C, H, W) at samples that share one sampler step: micro_batch divides the drawings."""
        path, drawings = rollout.trajectory, self.drawings(rollout, rows)
        # The step's one σ, as the rollout had it: a vector of equal σ may round elsewhere.
        sigma = path.levels[rows.start // len(path.context)]
        lengths = path.lengths and path.lengths[drawings]
        return self.models.decoder.velocity(path.latents[rows], sigma, path.context[drawings], lengths)

    def unconditional(self, rollout: DrawingRollout, rows: slice) -> Tensor | None:
        """v_u (B, C, H, W) at the same samples, without a gradient; None without guidance."""
        path, decoder = rollout.trajectory, self.models.decoder
        negative = rollout.guidance.negative(decoder, self.settings.micro_batch)
        sigma = path.levels[rows.start // len(path.context)]
        return rollout.guidance.unconditional(decoder, path.latents[rows], sigma, negative)

    def drawings(self, rollout: DrawingRollout, rows: slice) -> slice:
        """Which drawings the samples of one sampler step belong to."""
        first = rows.start % len(rollout.trajectory.context)
        return slice(first, first + self.settings.micro_batch)

    def loss(self, rollout: DrawingRollout, rows: slice) -> tuple[Tensor, Metrics]:
        settings, path = self.settings, rollout.trajectory
        step = rows.start // len(path.context)
        uncond, scale = self.unconditional(rollout, rows), rollout.guidance.scale
        reference = None if rollout.ref_velocity is None else rollout.ref_velocity[rows]
        if uncond is not None and reference is not None:
            reference = uncond.float().lerp(reference, 1 / scale)  # the op guides it again, by the policy's v_u
        loss, metrics, _, _ = flow_grpo_loss(
            self.velocity(rollout, rows),
            path.latents[rows],
            path.next_latents[rows],
            path.log_probs[rows],
            rollout.advantages[self.drawings(rollout, rows)],
            path.levels[step],
            path.levels[step + 1],
            sigma_max=path.sigma_max,
            kind=settings.kind,
            noise_level=settings.noise_level,
            velocity_uncond=uncond,
            guidance_scale=scale,
            ref_velocity=reference,
            beta=settings.beta,
            kl=settings.kl,
            clip_range=settings.clip_range,
            advantage_clip=settings.advantage_clip,
        )
        return loss * settings.micro_batch / len(rollout), policy_metrics(metrics)
