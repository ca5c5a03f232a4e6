"""The clipped loss of a flow policy's step, forward and backward, without and with its KL to the reference.

H counts the elements of a sample. Rivals do what Flow-GRPO's trainer does, in fp32 from the guided velocity on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uae_kernels import flow_grpo_loss, reference

from . import flow_step
from .flow_step import eager, policy
from .harness import Case, Contestant, Results, Step, compiled, ours, training_step

BETA, CLIP = 0.04, 1e-4


def cases(device: str, quick: bool) -> Iterator[Case]:
    return flow_step.cases(device, quick, "flow_grpo_loss", ("policy", "KL"))


def inputs(case: Case) -> Any:
    """Every second ratio has left the clip range; all stay away from its ends, where the gradient jumps."""
    given = flow_step.inputs(case)
    given.ref = given.velocity.detach() + 0.1 * torch.randn_like(given.velocity)
    with torch.no_grad():
        log_prob = reference.flow_step(**policy(given), next_sample=given.next_sample).log_prob
    row = torch.arange(case.N, device=case.device)
    given.old_log_prob = log_prob - CLIP * torch.tensor([0.5, 3.0, -0.5, -3.0], device=case.device)[row % 4]
    given.advantages = torch.randn(case.N, device=case.device)
    return given


def loss(function: Any, case: Case, given: Any, **options: Any) -> Tensor:
    if case.variant == "KL":
        options |= dict(ref_velocity=given.ref, beta=BETA, kl="flow_grpo")
    batch = dict(next_sample=given.next_sample, old_log_prob=given.old_log_prob, advantages=given.advantages)
    return function(**policy(given) | batch, clip_range=CLIP, **options).loss


def truth(case: Case, given: Any) -> Results:
    wide = type(given)(**{k: v.detach().double() for k, v in vars(given).items()})
    wide.velocity.requires_grad_()
    return training_step("loss", lambda: loss(reference.flow_grpo_loss, case, wide), {"velocity": wide.velocity})()


def plain(
    velocity: Tensor, uncond: Tensor, ref: Tensor | None, sample: Tensor, sigma: Tensor, sigma_next: Tensor,
    taken: Tensor, old: Tensor, advantages: Tensor,
) -> Tensor:  # fmt: skip
    _, log_prob, mean = eager(velocity, uncond, sample, sigma, sigma_next, taken)
    a, ratio = advantages.clamp(-5, 5), torch.exp(log_prob - old)
    value = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)).mean()
    if ref is None:
        return value
    with torch.no_grad():
        mean_ref = eager(ref, uncond, sample, sigma, sigma_next, taken)[2]
    s = flow_step.NOISE_LEVEL * torch.sqrt(sigma / (1 - sigma))
    return value + BETA * (((mean - mean_ref) ** 2).mean((1, 2, 3)) / (2 * s**2)).mean()


def contestants(case: Case) -> list[Contestant]:
    def own(given: Any, impl: str, function: Any = flow_grpo_loss) -> Step:
        call = partial(loss, function, case, given, impl=impl)
        return training_step("loss", call, {"velocity": given.velocity})

    def rival(given: Any, function: Any) -> Step:
        call = partial(
            function, given.velocity, given.uncond, given.ref if case.variant == "KL" else None, given.sample,
            given.sigma, given.sigma_next, given.next_sample, given.old_log_prob, given.advantages,
        )  # fmt: skip
        return training_step("loss", call, {"velocity": given.velocity})

    return [
        *ours(case, own, lambda given: own(given, "auto", compiled(case, flow_grpo_loss))),
        Contestant("eager, Flow-GRPO's formula", lambda given: rival(given, plain)),
        Contestant("torch.compile of eager", lambda given: rival(given, compiled(case, plain))),
    ]
