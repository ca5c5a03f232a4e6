"""Stage 3's update by Flow-GRPO's published recipe, reference included, optimiser not: a plain one beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..kernels.harness import Contestant, Results, Step
from ..rows import OURS
from .contests import Case, Contest, training_step, update_of
from .contests import cases as make_cases
from .flow import as_path, plain_peer, twins
from .worlds import prepare

__all__ = ["Contest", "cases", "contestants", "inputs", "truth"]

OP = "trainer-stage3"
RECIPE = ("stage3.kind=flow_sde", "stage3.noise_level=0.7", "stage3.guidance_scale=4.5", "stage3.clip_range=1e-4",
          "stage3.beta=0.04", "stage3.kl=flow_grpo", "stage3.updates=1")  # fmt: skip
SIZES = {
    False: ("stage3.images=1", "stage3.group_size=24", "stage3.micro_batch=24", "render.batch=24",
            "stage3.window=7", "stage3.window_end=7", *RECIPE),
    True: ("stage3.images=1", "stage3.group_size=4", "stage3.micro_batch=4", "render.batch=4", "render.steps=3",
           "stage3.window=2", "stage3.window_end=2", *RECIPE),
}  # fmt: skip
FULL = {
    # With more at once the plain one, whose unconditional half keeps its graph, does not fit on 80 GB beside ours
    "sd35m_80gb": ("stage3.images=1", "stage3.group_size=24", "stage3.micro_batch=4", "render.batch=24",
                   "stage3.window=9", "stage3.window_end=9", *RECIPE),
}  # fmt: skip


def cases(device: str, quick: bool) -> Iterator[Case]:
    return make_cases(OP, 3, SIZES, FULL, device, quick)


def inputs(case: Case) -> SimpleNamespace:
    """A stage with its twin by diffusers' own modules, and a rollout whose ratios are not 1 and mostly in range."""
    config = case.config()
    ready = prepare(3, config)
    twin = prepare(3, replace(config, same_sampler=replace(config.same_sampler, accelerate=False)), ready.data)
    with torch.no_grad():
        for parameter in ready.parameters:  # away from the reference
            parameter += 1e-3 * torch.randn_like(parameter)
    rollout = ready.stage.rollout(ready.examples, 0)
    path = rollout.trajectory
    far = ready.stage.settings.clip_range * torch.tensor([0.5, 2.0, -0.5, -2.0], device=path.log_probs.device)
    path = replace(path, log_probs=path.log_probs + far.repeat(len(rollout) // 4))
    rollout = replace(rollout, trajectory=path)
    return SimpleNamespace(stage=ready.stage, twin=twin.stage, rollout=rollout, parameters=ready.parameters)


def ours(given: SimpleNamespace) -> Step:
    def update() -> torch.Tensor:
        own = replace(given.rollout, ref_velocity=given.stage.reference_velocity(given.rollout))
        return update_of(given.stage, own)()

    return training_step(update, given.parameters)


def plain(given: SimpleNamespace) -> Step:
    peer, path = plain_peer(given.stage, given.twin), as_path(given.stage, given.rollout)
    context, advantages = given.rollout.trajectory.context, given.rollout.advantages
    parameters = twins(given.stage, given.twin, given.parameters)
    return training_step(lambda: peer.update(path, advantages, context), parameters)


def truth(case: Case, given: SimpleNamespace) -> Results:
    """The plain one's results: what ours must equal."""
    return {name: result.double() for name, result in plain(given)().items()}


def contestants(case: Case) -> list[Contestant]:
    return [Contestant(OURS, ours), Contestant("Flow-GRPO, plain diffusers and peft", plain)]
