"""Stage 2's update of the language model, without the optimiser: TRL's GRPOTrainer beside ours, on one rollout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..kernels.harness import Contestant, Results, Step
from ..rows import OURS
from .contests import Case, Contest, training_step, update_of
from .contests import cases as make_cases
from .trl import TRLUpdate
from .worlds import prepare

__all__ = ["Contest", "cases", "contestants", "inputs", "truth"]

OP = "trainer-stage2"
SIZES = {False: (), True: ("stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8", "render.batch=8")}
FULL = {
    "sd35m_80gb": ("stage2.images=1", "stage2.group_size=8", "stage2.micro_batch=8", "caption.max_new_tokens=300"),
}


def cases(device: str, quick: bool) -> Iterator[Case]:
    return make_cases(OP, 2, SIZES, FULL, device, quick)


def inputs(case: Case) -> SimpleNamespace:
    """A stage, a rollout of it whose ratios are not 1, and the parameters."""
    ready = prepare(2, case.config())
    rollout = ready.stage.rollout(ready.examples, 0)
    with torch.no_grad():
        logprobs = ready.stage.logprobs(rollout, slice(0, len(rollout)), "policy")
    moved = {"old_logprobs": logprobs + torch.empty_like(logprobs).uniform_(-0.15, 0.15)}
    if rollout.ref_logprobs is not None:
        moved["ref_logprobs"] = rollout.ref_logprobs + 0.1 * torch.randn_like(rollout.ref_logprobs)
    rollout = replace(rollout, **moved)
    return SimpleNamespace(stage=ready.stage, rollout=rollout, examples=ready.examples, parameters=ready.parameters)


def trls(given: SimpleNamespace) -> Step:
    encoder = given.stage.models.encoder
    peer = TRLUpdate(given.stage, given.rollout, given.examples)
    parameters = peer.parameters(encoder.model if encoder.adapters is None else encoder.adapters, given.parameters)

    def update() -> torch.Tensor:
        peer.trainer._metrics["train"].clear()
        loss = peer.loss()
        loss.backward()
        return loss

    return training_step(update, parameters)


def truth(case: Case, given: SimpleNamespace) -> Results:
    """TRL's results: what ours must equal."""
    return {name: result.double() for name, result in trls(given)().items()}


def contestants(case: Case) -> list[Contestant]:
    ours = Contestant(OURS, lambda given: training_step(update_of(given.stage, given.rollout), given.parameters))
    return [ours, Contestant("TRL, GRPOTrainer", trls)]
