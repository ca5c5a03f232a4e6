"""Log-probs from logits: `token_logprobs` and what else computes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uae_kernels import token_logprobs

from . import inputs as made
from .harness import Absent, Case, Contestant, Results, Step, Truth, compiled, ours, training_step
from .linear_logprobs import SIZES

SEQUENCES = 8  # the N rows belong to as many sequences; some rivals go by sequence


def cases(device: str, quick: bool) -> Iterator[Case]:
    case = partial(Case, op="token_logprobs", device=device, B=SEQUENCES)
    if quick:
        yield case(variant="backward", dtype=torch.float32, N=64, T=8, V=8192, quick=True)
        return
    for order, variant in enumerate(("backward", "forward")):
        if device == "cpu":
            for dtype in (torch.float32, torch.bfloat16):
                yield case(variant=variant, dtype=dtype, N=256, T=32, V=32_768, order=order)
        else:
            for i, rows in enumerate(SIZES):
                size = {"N": rows, "T": rows // SEQUENCES, "V": 151_936}
                yield case(variant=variant, dtype=torch.bfloat16, order=i + order, **size)


def inputs(case: Case) -> Any:
    given = made.policy_logits(case.N, case.V, case.dtype, case.device)
    given.logits = given.logits.detach().view(case.B, case.T, case.V).requires_grad_()
    given.targets = given.targets.view(case.B, case.T)
    given.upstream = torch.randn(case.B, case.T, device=case.device)
    return given


def truth(case: Case, given: Any) -> Truth:
    values = {"logprobs": made.logits_values(given.logits, given.targets)}
    return values | made.d_logits(given.logits, given.targets, given.upstream) if case.variant == "backward" else values


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    return made.score(logits.float(), targets)


def trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def contestants(case: Case) -> list[Contestant]:
    def own(given: Any, impl: str) -> Step:
        return step(case, given, partial(token_logprobs, impl=impl))

    def liger(given: Any) -> Step:
        if case.device != "cuda":
            raise Absent("needs a GPU")
        if case.variant == "backward":
            raise Absent("has no gradient")
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        logits = with_a_last_row(given.logits)
        return lambda: {"logprobs": fused_selective_log_softmax(logits, given.targets, temperature=1.0)}

    return [
        *ours(case, own),
        Contestant("eager", lambda given: step(case, given, eager)),
        Contestant("torch.compile of eager", lambda given: step(case, given, compiled(case, eager))),
        Contestant("TRL, selective_log_softmax", lambda given: step(case, given, trl)),
        Contestant("Liger, fused_selective_log_softmax", liger),
    ]


def with_a_last_row(logits: Tensor) -> Tensor:
    """(B, T, V) -> (B, T + 1, V): Liger takes the logits after the last token along, and leaves them out."""
    return torch.nn.functional.pad(logits.detach(), (0, 0, 0, 1))


def step(case: Case, given: Any, function: Any) -> Step:
    if case.variant == "backward":
        leaves = {"logits": given.logits}
        return training_step("logprobs", lambda: function(given.logits, given.targets), leaves, given.upstream)

    @torch.no_grad()
    def forward() -> Results:
        return {"logprobs": function(given.logits, given.targets)}

    return forward
