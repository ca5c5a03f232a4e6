"""Log-probs of a head from hidden states: `linear_logprobs` and what else computes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from uae_kernels import linear_logprobs

from . import inputs as made
from .harness import Absent, Case, Contestant, Results, Step, compiled, ours, training_step

SIZES = (2400, 4096, 8192, 16384)  # 8 captions of 300 tokens, and more
# What is computed, and the gradients asked for.
VARIANTS = ("frozen", "forward", "entropy", "trainable")
# Of the vocabulary, in TRL, whose own default is the last.
CHUNKS = {"cuda": (4096, 8192, 16384, 32768), "cpu": (4096, 32768)}


def cases(device: str, quick: bool) -> Iterator[Case]:
    case = partial(Case, op="linear_logprobs", device=device)
    if quick:
        yield case(variant="frozen", dtype=torch.float32, N=128, H=256, V=8192, quick=True)
    elif device == "cpu":
        for variant, order in zip(VARIANTS, (0, 1, 2, 2), strict=True):
            for dtype in (torch.float32, torch.bfloat16):
                yield case(variant=variant, dtype=dtype, N=512, H=1024, V=32_768, order=order)
    else:
        for variant in VARIANTS:
            for i, rows in enumerate(SIZES):
                order = i if variant == "frozen" else i + 1
                yield case(variant=variant, dtype=torch.bfloat16, N=rows, H=2048, V=151_936, order=order)


def inputs(case: Case) -> Any:
    given = made.policy_head(case.N, case.H, case.V, case.dtype, case.device)
    given.weight.requires_grad_(case.variant == "trainable")
    given.upstream = torch.randn(case.N, device=case.device)
    return given


def truth(case: Case, given: Any) -> Results:
    arguments = given.hidden, given.weight, given.targets
    values = made.head_values(*arguments)
    if case.variant == "entropy":
        return values
    gradients = {}
    if case.variant != "forward":
        gradients = made.head_gradients(*arguments, given.upstream, case.variant == "trainable")
    return {"logprobs": values["logprobs"], **gradients}


# Each takes (hidden, weight, targets, entropy) and returns the log-probs, with the entropies if they are wanted.


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax((hidden @ weight.T).float(), 1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    return (logprobs, -(log_p.exp() * log_p).sum(1)) if entropy else (logprobs,)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, chunk_size: int) -> tuple[Tensor, ...]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk_size, None, 1.0, outputs)[
        : 1 + entropy
    ]


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=entropy)
    return (-out[0], out[1]) if entropy else (-out,)


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, chunks: str) -> tuple[Tensor, ...]:
    if entropy:
        raise Absent("returns no entropy")
    if not hasattr(functional, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} does not have it")
    options = None if chunks == "none" else torch.nn.LinearCrossEntropyOptions(chunking_method=chunks)
    return (-functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options),)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, impl: str) -> tuple[Tensor, ...]:
    if not hidden.is_cuda or torch.cuda.get_device_capability() < (8, 0):
        raise Absent("needs a GPU of the Ampere generation or newer")
    if entropy:
        raise Absent("returns no entropy")
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl),)


def contestants(case: Case) -> list[Contestant]:
    def own(given: Any, impl: str) -> Step:
        def function(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, ...]:
            out = linear_logprobs(hidden, weight, targets, return_entropy=entropy, impl=impl)
            return out if entropy else (out,)

        return step(case, given, function)

    def rival(name: str, function: Any, **config: Any) -> Contestant:
        return Contestant(name, lambda given: step(case, given, partial(function, **config)), config)

    return [
        *ours(case, own),
        rival("eager", eager),
        Contestant("torch.compile of eager", lambda given: step(case, given, compiled(case, eager))),
        *(rival("TRL, ChunkedLogProbFunction", trl, chunk_size=size) for size in CHUNKS[case.device] if size <= case.V),
        rival("Liger, FusedLinearScaledCrossEntropy", liger),
        *(rival("PyTorch, linear_cross_entropy", pytorch, chunks=chunks) for chunks in ("none", "auto")),
        *(rival("cut-cross-entropy", cut_cross_entropy, impl=impl) for impl in ("cce", "cce_exact")),
    ]


def step(case: Case, given: Any, function: Any) -> Step:
    arguments = given.hidden, given.weight, given.targets, case.variant == "entropy"
    if case.variant in ("frozen", "trainable"):
        leaves = {"hidden": given.hidden}
        if case.variant == "trainable":
            leaves["weight"] = given.weight
        return training_step("logprobs", lambda: function(*arguments)[0], leaves, given.upstream)

    @torch.no_grad()
    def forward() -> Results:
        return dict(zip(("logprobs", "entropy"), function(*arguments), strict=False))

    return forward
