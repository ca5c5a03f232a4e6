"""Stage 2, Generation for Understanding: the encoder learns to write captions from which its images can be redrawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor
from uae_kernels import linear_grpo_loss, linear_logprobs

from ..config import Config
from ..data import Example
from ..models import Models
from ..models.encoder import Patches, Prompt
from ..rollout.captions import Captions, sample_captions
from ..rollout.renders import draw
from ..seeds import derive_seed
from ..team import Team
from . import (
    Metrics,
    advantages,
    caption_metrics,
    judge,
    policy_metrics,
    prepared,
    reward_metrics,
    sampler_metrics,
    sampling_metrics,
)

OVER_TOKENS = ("bnpo", "dapo", "cispo")  # losses that are divided by the tokens of the step, not by its captions


@dataclass
class CaptionRollout:
    """B = images · group_size sampled captions, what they are worth, and their log-probs.

    The policy that wrote them is the one that the first update starts from: its log-probs are those of that update's
    own pass, and a pass for them alone is saved.
    """

    prompt: Prompt  # of the images
    captions: Captions
    lengths: list[int]  # of the captions, in tokens
    advantages: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B, T)
    metrics: Metrics
    logprobs: Tensor  # (B, T), filled micro-batch by micro-batch in the first update
    old_logprobs: Tensor | None = None  # (B, T), from the end of the first update on
    tokens: float | None = None  # of all captions, a mean over the processes, where the loss is divided by them

    def __len__(self) -> int:
        return len(self.advantages)


class GenerationForUnderstanding:
    """Stage 2: GRPO on captions; projector, decoder and reward are frozen (METHOD §2)."""

    name, title = "stage2", "generation for understanding"
    trains = ("encoder",)
    needs_captions, reads_as_policy = False, False

    def __init__(self, config: Config, models: Models):
        self.config, self.models, self.settings = config, models, config.stage2

    def groups(self) -> list[dict]:
        return [{"params": self.models.encoder.trainable(), "lr": self.settings.lr}]

    def prepare(self, image: Image.Image) -> Patches:
        return self.models.encoder.patches(image)

    @torch.no_grad()
    def rollout(self, examples: Sequence[Example], step: int) -> CaptionRollout:
        config, settings, models = self.config, self.settings, self.models
        size = settings.group_size
        seeds = [derive_seed(config.seed, self.name, step, e.id, i) for e in examples for i in range(size)]
        prompt = models.encoder.prompt(prepared(self.prepare, examples))
        captions = sample_captions(
            models.encoder,
            prompt,
            seeds,
            temperature=settings.temperature,
            max_new_tokens=config.caption.max_new_tokens,
            engine=config.caption.engine,
        )
        # All captions of an image start from one noise: what is left of the reward's spread is the captions' own.
        noise = [derive_seed(config.seed, self.name, "noise", step, e.id) for e in examples for _ in range(size)]
        drawn = draw(config, models, captions.texts, noise)
        rewards, metrics = judge(models, drawn, examples)
        lengths, counts = captions.mask.sum(1).float(), captions.mask.sum(1).tolist()
        if config.reward.token_penalty:
            metrics["reward_similarity"] = rewards.mean()
            rewards = rewards - config.reward.token_penalty * (lengths - config.reward.free_tokens).clamp(min=0)
        rollout = CaptionRollout(
            prompt,
            captions,
            counts,
            advantages=advantages(rewards, settings),
            ref_logprobs=torch.empty_like(captions.logprobs) if settings.beta else None,
            metrics={
                **reward_metrics(rewards, size),
                **metrics,
                **sampler_metrics(config),
                **caption_metrics(captions, models.encoder.eos_id),
                "completions/unique": torch.tensor(len(set(zip(captions.texts, noise, strict=True))) / len(noise)),
                "prompts/mean_length": prompt.mask.sum(1).float().mean(),
            },
            logprobs=torch.empty_like(captions.logprobs),
            tokens=fmean(Team().exchange(sum(counts))) if settings.loss_type in OVER_TOKENS else None,
        )
        if rollout.ref_logprobs is not None:
            for start in range(0, len(rollout), settings.micro_batch):
                rows = slice(start, start + settings.micro_batch)
                rollout.ref_logprobs[rows] = self.logprobs(rollout, rows, "reference")
        return rollout

    def logprobs(self, rollout: CaptionRollout, rows: slice, role: str) -> Tensor:
        """Log-probs (B, T) of the sampled tokens under the policy or the reference."""
        logprobs = linear_logprobs(
            self.states(rollout, rows, role),
            self.models.encoder.head.weight,
            self.targets(rollout, rows),
            temperature=self.settings.temperature,
        )
        assert isinstance(logprobs, Tensor)  # a pair only where the entropy is asked for
        return logprobs

    def states(self, rollout: CaptionRollout, rows: slice, role: str) -> Tensor:
        """Hidden states (B, T, H) that predict the sampled tokens.

        With `stage2.shared_prefix` the captions that an image has in these rows share its prompt. Where images have
        several numbers of them, as many as divide all: a prompt is computed once for so many.
        """
        encoder, captions = self.models.encoder, rollout.captions
        start, stop, _ = rows.indices(len(rollout))
        size = self.settings.group_size
        shared = math.gcd(start, stop, size) if self.settings.shared_prefix else 1
        prompt = rollout.prompt.take([row // size for row in range(start, stop, shared)])
        if self.settings.shared_prefix:
            return encoder.group_states(prompt, captions.ids[rows], rollout.lengths[rows], role)
        return encoder.caption_states(prompt, captions.ids[rows], captions.mask[rows], role)

    def targets(self, rollout: CaptionRollout, rows: slice) -> Tensor:
        """Sampled tokens (B, T), −100 at padding."""
        return rollout.captions.ids[rows].masked_fill(~rollout.captions.mask[rows], -100)

    def loss(self, rollout: CaptionRollout, rows: slice) -> tuple[Tensor, Metrics]:
        settings, mask = self.settings, rollout.captions.mask
        share = len(mask[rows]) / len(mask)
        loss, metrics, _, logprobs = linear_grpo_loss(
            self.states(rollout, rows, "policy"),
            self.models.encoder.head.weight,
            self.targets(rollout, rows),
            rollout.advantages[rows],
            mask=mask[rows],
            old_logprobs=None if rollout.old_logprobs is None else rollout.old_logprobs[rows],
            ref_logprobs=None if rollout.ref_logprobs is None else rollout.ref_logprobs[rows],
            temperature=settings.temperature,
            loss_type=settings.loss_type,
            importance_level=settings.importance_level,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            kl_estimator=settings.kl_estimator,
            normalizer=rollout.tokens,
            max_length=self.config.caption.max_new_tokens,
        )
        found = policy_metrics(metrics)
        if rollout.old_logprobs is None:
            rollout.logprobs[rows] = logprobs
            if rows.indices(len(rollout))[1] == len(rollout):  # the first update has seen them all
                rollout.old_logprobs = rollout.logprobs
                found |= sampling_metrics(rollout.captions, rollout.logprobs)
        return loss if settings.loss_type in OVER_TOKENS else loss * share, found
