"""The clipped GRPO loss with its KL, forward and backward: from log-probs, and from logits as Liger's kernel has it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uae_kernels import grpo_loss, reference, token_logprobs

from . import inputs as made
from .harness import Absent, Case, Contestant, Results, Step, Truth, compiled, ours, training_step
from .linear_logprobs import SIZES
from .token_logprobs import with_a_last_row

BETA, CLIP = 0.04, 0.2


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The variant "logits" is what Liger's kernel does: log-softmax of each row, loss, gradient of the logits."""
    case = partial(Case, op="grpo_loss", device=device)
    if quick:
        sizes = [(16, 128, 8, 8, 8192)]
    elif device == "cpu":
        sizes = [(64, 512, 8, 32, 32_768)]
    else:
        sizes = [(8, rows // 8, 8, rows // 8, 151_936) for rows in SIZES]
    for i, (b, t, *_) in enumerate(sizes):
        yield case(variant="logprobs", dtype=torch.float32, N=b * t, B=b, T=t, calls=20, quick=quick, order=i)
    for i, (*_, b, t, v) in enumerate(sizes):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        yield case(variant="logits", dtype=dtype, N=b * t, B=b, T=t, V=v, quick=quick, order=i)


def inputs(case: Case) -> Any:
    if case.variant == "logprobs":
        logprobs = -torch.empty(case.B, case.T, device=case.device).exponential_()
        given = made.policy_batch(logprobs)
        given.logprobs = logprobs.requires_grad_()
        return given
    head = made.policy_logits(case.N, case.V, case.dtype, case.device)
    logits, targets = head.logits.detach().view(case.B, case.T, case.V), head.targets.view(case.B, case.T)
    given = made.policy_batch(made.logits_values(logits, targets))
    given.logits, given.targets = logits.requires_grad_(), targets
    return given


def truth(case: Case, given: Any) -> Truth:
    if case.variant == "logprobs":
        return step(given, given.logprobs.detach().double().requires_grad_(), "logprobs", loss(reference.grpo_loss))()
    logprobs = made.logits_values(given.logits, given.targets).requires_grad_()
    exact = step(given, logprobs, "logprobs", loss(reference.grpo_loss))()
    return {"loss": exact["loss"], **made.d_logits(given.logits, given.targets, exact["d_logprobs"])}


def loss(function: Any, **options: Any) -> Any:
    """`function` with the settings of all contestants: log-probs, batch -> loss."""

    def call(logprobs: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        batch = dict(mask=mask, old_logprobs=old, ref_logprobs=ref, beta=BETA, clip_low=CLIP)
        return function(logprobs, advantages, **batch, **options).loss

    return call


def batch(given: Any) -> tuple[Tensor, ...]:
    return given.advantages, given.mask, given.old_logprobs, given.ref_logprobs


def step(given: Any, leaf: Tensor, name: str, function: Any) -> Step:
    return training_step("loss", lambda: function(leaf, *batch(given)), {name: leaf})


def contestants(case: Case) -> list[Contestant]:
    plain = loss(reference.grpo_loss)
    if case.variant == "logprobs":

        def own(given: Any, impl: str) -> Step:
            return step(given, given.logprobs, "logprobs", loss(grpo_loss, impl=impl))

        return [
            *ours(case, own, lambda given: step(given, given.logprobs, "logprobs", compiled(case, loss(grpo_loss)))),
            Contestant("eager", lambda given: step(given, given.logprobs, "logprobs", plain)),
            Contestant(
                "torch.compile of eager",
                lambda given: step(given, given.logprobs, "logprobs", compiled(case, plain)),
            ),
            Contestant("Liger, triton_grpo_loss", _needs_logits),
        ]

    def from_logits(score: Any, loss: Any, compile: bool = False) -> Any:
        def build(given: Any) -> Step:
            def function(logits: Tensor, *others: Tensor) -> Tensor:
                return loss(score(logits, given.targets), *others)

            return step(given, given.logits, "logits", compiled(case, function) if compile else function)

        return build

    def own_from_logits(given: Any, impl: str, compile: bool = False) -> Step:
        return from_logits(partial(token_logprobs, impl=impl), loss(grpo_loss, impl=impl), compile)(given)

    def eager_score(logits: Tensor, targets: Tensor) -> Tensor:
        return made.score(logits.float(), targets)

    return [
        *ours(case, own_from_logits, lambda given: own_from_logits(given, "auto", compile=True)),
        Contestant("eager", from_logits(eager_score, plain)),
        Contestant("torch.compile of eager", from_logits(eager_score, plain, compile=True)),
        Contestant("Liger, triton_grpo_loss", _liger),
    ]


def _needs_logits(given: Any) -> Step:
    raise Absent("takes logits: see that variant")


def _liger(given: Any) -> Step:
    if not given.logits.is_cuda:
        raise Absent("needs a GPU")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits, mask = with_a_last_row(given.logits).requires_grad_(), given.mask.long()

    def step() -> Results:
        value, _ = triton_grpo_loss(
            logits, given.old_logprobs, given.ref_logprobs, given.targets, given.advantages, mask,
            temperature=1.0, beta=BETA, eps_low=CLIP, eps_high=CLIP, inplace=False, loss_type="grpo", reduce=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(value, logits)
        return {"loss": value.detach(), "d_logits": gradient[:, :-1]}

    return step
