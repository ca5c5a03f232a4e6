"""Optimisers, the learning rate's warm-up, and the running mean of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimizerConfig


def build_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimiser over parameter groups {"params", "lr"}.

    The 8-bit ones are bitsandbytes': blockwise 8-bit moments, fp32 ones for tensors under 4,096 elements.
    """
    options: dict[str, Any] = {"betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    for group in groups:
        group["peak_lr"] = group["lr"]
    if config.name == "adamw":
        # One kernel in place on a GPU: the one of many would hold the square roots of all second moments at once
        fused = all(p.is_cuda for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, fused=fused or None, **options)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Pp]aged.*")  # without a GPU paged is plain 8-bit
        return (AdamW8bit if config.name == "adamw8bit" else PagedAdamW8bit)(groups, **options)


def warm_up(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> None:
    """Sets each group's learning rate for `step`: linear up to its peak over `warmup_steps`, then constant."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * min(1.0, (step + 1) / (warmup_steps + 1))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors, "place.name"; numbers become 0-d tensors."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{place}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for place, parameter in enumerate(places)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    places = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        group, index, parameter = places[int(place)]
        state = optimizer.state[parameter]
        if isinstance(optimizer, torch.optim.AdamW):
            here = name != "step" or optimizer.param_groups[group]["fused"]
            state[name] = value.to(parameter.device) if here else value
            continue
        if not state:  # bitsandbytes makes its own buffers, in paged memory where they are to be paged
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)  # type: ignore[attr-defined]
        if name == "step":  # a Python number there
            state[name] = int(value)
        else:
            state[name].copy_(value)


class RunningMean:
    """An exponential running mean of parameters, decay warmed up as (1 + n)/(10 + n).

    Args:
        parameters: what to follow.
        decay: 0 turns it off: the mean is the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.means = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Moves the mean towards the parameters; called once an optimiser step."""
        self.updates += 1
        if self.decay:
            keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.means, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def adopt(self) -> None:
        """Makes the mean the parameters' value, for good."""
        for parameter, mean in zip(self.parameters, self.means, strict=False):
            parameter.copy_(mean)

    def tensors(self) -> dict[str, Tensor]:
        """The mean as flat tensors, with the number of updates."""
        return {"updates": torch.tensor(self.updates), **{str(i): mean for i, mean in enumerate(self.means)}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        self.updates = int(tensors["updates"])
        for i, mean in enumerate(self.means):
            mean.copy_(tensors[str(i)])
