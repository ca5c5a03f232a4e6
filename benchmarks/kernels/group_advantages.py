"""Group-relative advantages, forward: `group_advantages` and TRL's formula."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uae_kernels import group_advantages

from .harness import Case, Contestant, Results, Step, compiled, ours

GROUP = 8


def cases(device: str, quick: bool) -> Iterator[Case]:
    sizes = (256,) if quick else (256, 4096) if device == "cpu" else (256, 4096, 65_536)
    for rows in sizes:
        yield Case("group_advantages", "forward", device, torch.float32, N=rows, G=GROUP, calls=20, quick=quick)


def inputs(case: Case) -> Tensor:
    return torch.rand(case.N, device=case.device)


def truth(case: Case, rewards: Tensor) -> Results:
    return {"advantages": eager(rewards.double(), case.G)}


def eager(rewards: Tensor, group_size: int) -> Tensor:
    """As GRPOTrainer in TRL 1.16: NaN-aware, unbiased, ε 1e-4."""
    groups = rewards.view(-1, group_size)
    mean = groups.nanmean(1)
    count = (~groups.isnan()).sum(1)
    variance = (groups - mean[:, None]).square().nanmean(1) * count / (count - 1)
    mean, std = mean.repeat_interleave(group_size), variance.sqrt().repeat_interleave(group_size)
    return (rewards - mean) / (std + 1e-4)


def contestants(case: Case) -> list[Contestant]:
    def step(rewards: Tensor, function: Any) -> Step:
        return lambda: {"advantages": function(rewards, group_size=case.G)}

    return [
        *ours(
            case,
            lambda rewards, impl: step(rewards, partial(group_advantages, impl=impl)),
            lambda rewards: step(rewards, compiled(case, group_advantages)),
        ),
        Contestant("eager, TRL's formula", lambda rewards: step(rewards, eager)),
        Contestant("torch.compile of eager", lambda rewards: step(rewards, compiled(case, eager))),
    ]
