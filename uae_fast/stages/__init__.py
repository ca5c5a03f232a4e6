"""The stages of Unified-GRPO. Each is a class with a rollout and a loss; the loop is `trainer.train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from uae_kernels import group_advantages

from ..config import Config, cheaper
from ..data import Example
from ..models import Models
from ..models.reward import Reward
from ..phases import phase
from ..rollout.captions import Captions
from ..team import Team

Metrics = dict[str, Tensor]


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    title: str
    trains: tuple[str, ...]
    """Of "encoder", "projector" and "decoder"."""
    needs_captions: bool
    """Whether `captions.jsonl` must give every training image a caption."""
    reads_as_policy: bool
    """Whether captions are re-read by the policy, not by the frozen reader."""
    models: Models
    settings: Any
    """The stage's part of the configuration: steps, images, micro_batch."""

    def __init__(self, config: Config, models: Models): ...

    def groups(self) -> list[dict]:
        """Makes trainable what this stage trains; optimiser groups {"params", "lr"}."""
        ...

    def prepare(self, image: Image.Image) -> Any:
        """What the rollout makes of an image on the host, without a draw; a thread calls it during the step before."""
        ...

    def rollout(self, examples: Sequence[Example], step: int) -> Any:
        """Everything that needs no gradient of this process's part of a step: a length (samples) and `metrics`."""
        ...

    def loss(self, rollout: Any, rows: slice) -> tuple[Tensor, Metrics]:
        """The samples' share of the loss of this process's part of the step, and metrics.

        Shares add up to that loss; the step's is the mean over the processes.

        Metrics are 0-d tensors on the device; of several micro-batches and processes the loop takes the mean (the
        largest or least, where the name says max or min).
        """
        ...


def prepared(prepare: Callable[[Image.Image], Any], examples: Sequence[Example]) -> list[Any]:
    """What `Stage.prepare` makes of a step's images, as far as that was not done ahead."""
    return [prepare(example.image) if example.prepared is None else example.prepared for example in examples]


@phase("rewards")
def judge(models: Models, images: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
    """Rewards (B,) of drawings (B, 3, H, W) of n examples, B/n of each in a row, and what a held-out encoder says.

    A source is embedded once in a run.
    """
    group_size = len(images) // len(examples)
    sources, names = [example.image for example in examples], [example.id for example in examples]

    def compare(reward: Reward) -> Tensor:
        return reward(images, reward.embed_sources(sources, names).repeat_interleave(group_size, 0))

    rewards = compare(models.reward)
    return rewards, {} if models.heldout is None else {"reward_heldout": compare(models.heldout).mean()}


def advantages(rewards: Tensor, settings: Any) -> Tensor:
    """Advantages (B,) of this process's rewards (B,), whole groups; the spread of a batch is that of all processes'."""
    team, everybody = Team(), rewards
    if settings.scale_advantages == "batch" and team.size > 1:
        everybody = rewards.new_tensor(team.exchange(rewards.tolist())).flatten()
    found = group_advantages(everybody, settings.group_size, scale=settings.scale_advantages)
    return found if everybody is rewards else found[team.part(len(found))]


def reward_metrics(rewards: Tensor, group_size: int) -> Metrics:
    """Mean and spread of the rewards (B,) of groups of `group_size`, named as in TRL."""
    groups = rewards.view(-1, group_size)
    return {
        "reward": rewards.mean(),
        "reward_std": groups.std(1).mean(),
        "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
    }


def caption_metrics(captions: Captions, end: int) -> Metrics:
    """Lengths in tokens, and the share of captions cut off before their end of turn `end`; named as in TRL."""
    lengths = captions.mask.sum(1).float()
    ended = ((captions.ids == end) & captions.mask).any(1)
    return {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.amin(),
        "completions/max_length": lengths.amax(),
        "completions/clipped_ratio": 1 - ended.float().mean(),
    }


def sampling_metrics(captions: Captions, logprobs: Tensor) -> Metrics:
    """|Δ log-prob| of the sampled tokens between the rollout and the trainer, logprobs (N, T); named as in TRL."""
    mask, difference = captions.mask, (captions.logprobs - logprobs).abs()
    counted = difference.where(mask, 0.0)
    return {
        "sampling/sampling_logp_difference/mean": counted.sum() / mask.sum(),
        "sampling/sampling_logp_difference/p99": difference.where(mask, torch.nan).nanquantile(0.99),
        "sampling/sampling_logp_difference/max": counted.amax(),
    }


def sampler_metrics(config: Config, *, drawn: bool = True) -> Metrics:
    """A 1 for each setting of a cheaper sampler, named cheaper_sampler/KEY_VALUE: its rewards are of another kind.

    Args:
        drawn: whether `rollout.renders.draw` makes the images, which alone takes all of these settings.
    """
    return {f"cheaper_sampler/{key}_{value}": torch.ones(()) for key, value in cheaper(config, drawn=drawn).items()}


def policy_metrics(metrics: Metrics) -> Metrics:
    """The kernels' metrics under TRL's names."""
    return {
        "kl": metrics["kl"],
        "ratio/mean": metrics["ratio_mean"],
        "ratio/max": metrics["ratio_max"],
        "clip_ratio/low": metrics["clip_fraction_low"],
        "clip_ratio/high": metrics["clip_fraction_high"],
    }
