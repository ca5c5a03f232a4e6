"""Head, log-probs and clipped GRPO loss with its KL, forward and backward, the head frozen."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uae_kernels import linear_grpo_loss, reference

from . import grpo_loss, linear_logprobs
from . import inputs as made
from .harness import Absent, Case, Contestant, Results, Step, compiled, ours, training_step


def cases(device: str, quick: bool) -> Iterator[Case]:
    case = partial(Case, op="linear_grpo_loss", variant="frozen", device=device, B=8)
    if quick:
        yield case(dtype=torch.float32, N=128, T=16, H=256, V=8192, quick=True)
    elif device == "cpu":
        yield case(dtype=torch.float32, N=512, T=64, H=1024, V=32_768)
    else:
        for i, rows in enumerate(linear_logprobs.SIZES):
            yield case(dtype=torch.bfloat16, N=rows, T=rows // 8, H=2048, V=151_936, order=i)


def inputs(case: Case) -> Any:
    head = made.policy_head(case.N, case.H, case.V, case.dtype, case.device)
    values = made.head_values(head.hidden, head.weight, head.targets)
    given = made.policy_batch(values["logprobs"].view(case.B, case.T))
    given.hidden = head.hidden.detach().view(case.B, case.T, case.H).requires_grad_()
    given.weight, given.targets, given.logprobs = head.weight, head.targets.view(case.B, case.T), values["logprobs"]
    return given


def truth(case: Case, given: Any) -> Results:
    logprobs = given.logprobs.view(case.B, case.T).requires_grad_()
    plain = grpo_loss.loss(reference.grpo_loss)
    upstream = grpo_loss.step(given, logprobs, "logprobs", plain)()
    flat = given.hidden.flatten(0, 1), given.weight, given.targets.flatten(), upstream["d_logprobs"].flatten()
    return {"loss": upstream["loss"], "d_hidden": made.head_gradients(*flat, False)["d_hidden"].view_as(given.hidden)}


def contestants(case: Case) -> list[Contestant]:
    def step(given: Any, function: Any) -> Step:
        return training_step("loss", lambda: function(given), {"hidden": given.hidden})

    def own(given: Any, impl: str) -> Step:
        head = partial(linear_grpo_loss, given.hidden, given.weight, given.targets, impl=impl)
        options = dict(
            mask=given.mask, old_logprobs=given.old_logprobs, ref_logprobs=given.ref_logprobs,
            beta=grpo_loss.BETA, clip_low=grpo_loss.CLIP,
        )  # fmt: skip
        return step(given, lambda given: head(given.advantages, **options).loss)

    def two_parts(score: Any, compile: bool = False, **config: Any) -> Any:
        """Log-probs by `score`, then the loss in eager PyTorch."""
        plain = grpo_loss.loss(reference.grpo_loss)

        def function(hidden: Tensor, weight: Tensor, targets: Tensor, *batch: Tensor) -> Tensor:
            logprobs = score(hidden.flatten(0, 1), weight, targets.flatten(), False, **config)[0]
            return plain(logprobs.view_as(targets), *batch)

        def build(given: Any) -> Step:
            run = compiled(case, function) if compile else function
            return step(given, lambda g: run(g.hidden, g.weight, g.targets, *grpo_loss.batch(g)))

        return build

    def liger(given: Any, chunk_size: int, compiled: bool) -> Step:
        if compiled and case.quick:
            raise Absent("compiling takes too long for --quick")
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        head = LigerFusedLinearGRPOLoss(
            beta=grpo_loss.BETA, epsilon_low=grpo_loss.CLIP, epsilon_high=grpo_loss.CLIP, loss_type="grpo",
            compiled=compiled, chunk_size=chunk_size,
        )  # fmt: skip
        mask = given.mask.long()

        def function(given: Any) -> Tensor:
            return head(
                given.hidden, given.weight, given.targets, mask, given.advantages,
                ref_per_token_logps=given.ref_logprobs, old_per_token_logps=given.old_logprobs,
            )[0]  # fmt: skip

        return step(given, function)

    return [
        *ours(case, own),
        Contestant("eager", two_parts(linear_logprobs.eager)),
        Contestant("torch.compile of eager", two_parts(linear_logprobs.eager, compile=True)),
        *(
            Contestant(
                "TRL, ChunkedLogProbFunction + eager loss",
                two_parts(linear_logprobs.trl, chunk_size=size),
                {"chunk_size": size},
            )
            for size in linear_logprobs.CHUNKS[case.device]
            if size <= case.V
        ),
        *(
            Contestant("Liger, LigerFusedLinearGRPOLoss", partial(liger, **config), config)
            for config in ({"chunk_size": size, "compiled": compiled} for size in (1, 8) for compiled in (True, False))
        ),
    ]
