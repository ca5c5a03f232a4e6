"""What an op needs at least, and times on an H200 where none has been measured.

`floor` is of any implementation: the FLOPs of the matrix products that an op cannot do without, and the bytes of its
inputs and results, each once, against what a GPU can do at most. The other times are of implementations, from the
products they make and the logits they move:

    t = products·2NHV / PRODUCT + bytes·NV / COPY

Bytes count every read and write of a tile of logits in device memory; what a product reads of its other operand is part
of its measured rate. A Triton product is taken to be as fast as the library's, which is the best it can hope for.
"""

from __future__ import annotations

from typing import NamedTuple

from ..gpus import Gpu
from ..rows import OURS
from .harness import Case

PRODUCT = 790e12  # FLOP/s of a bf16 matrix product, measured on one H200
COPY = 4.3e12  # bytes/s that a device copy reads and writes, measured on the same


SHARED = 2 * 128  # elements of a token's keys, as of its values: of shared_prefix_attention's two heads


class Cost(NamedTuple):
    products: int
    bytes: int  # for each logit


TRL = "TRL, ChunkedLogProbFunction"
COSTS = {
    ("linear_logprobs", "frozen"): {
        OURS: Cost(2, 4),  # e^z in bf16: written, read by the second product
        f"{OURS}, PyTorch": Cost(2, 36),  # fp32: product 4, max 4, − 8, exp 8, Σ 4; to bf16 6, product 2
        "eager": Cost(2, 40),  # product 2, to fp32 6, log-softmax 8; scatter 4, backward 12, to bf16 6, product 2
        TRL: Cost(3, 12),  # bf16: product 2, statistics 2; product 2, gradient in place 4, product 2
    },
    ("linear_logprobs", "forward"): {
        OURS: Cost(1, 0),
        f"{OURS}, PyTorch": Cost(1, 28),
        "eager": Cost(1, 16),
        TRL: Cost(1, 4),
    },
    ("linear_logprobs", "entropy"): {
        OURS: Cost(1, 0),
        f"{OURS}, PyTorch": Cost(1, 52),  # clamp 8, exp 8 and e·x 12 instead of exp 8, and a second Σ 4
        "eager": Cost(1, 40),  # exp 8, p·log p 12, Σ 4
        TRL: Cost(1, 4),
    },
    ("linear_logprobs", "trainable"): {
        OURS: Cost(4, 6),  # the gradient in bf16: written, read by two products
        f"{OURS}, PyTorch": Cost(
            4, 80
        ),  # forward 28; product 4, − 8, exp 8, two factors 16, twice to bf16 and product 16
        "eager": Cost(3, 42),
        TRL: Cost(4, 14),
    },
    ("token_logprobs", "backward"): {OURS: Cost(0, 6), "eager": Cost(0, 36), "TRL, selective_log_softmax": Cost(0, 6)},
    ("token_logprobs", "forward"): {OURS: Cost(0, 2), "eager": Cost(0, 14), "TRL, selective_log_softmax": Cost(0, 2)},
}
COSTS["linear_grpo_loss", "frozen"] = {
    f"{name} + eager loss" if name == TRL else name: cost for name, cost in COSTS["linear_logprobs", "frozen"].items()
}


class Need(NamedTuple):
    """Of one step of a case: FLOPs of its products, and bytes of its inputs and results."""

    flops: int
    bytes: int


PRODUCTS = {"frozen": 2, "forward": 1, "entropy": 1, "trainable": 3}  # of N·H·V, with a head


def need(case: Case) -> Need:
    """What a step of a case cannot do without. Gradients are results, and what they start from is an input."""
    n, h, v = case.N, case.H or 0, case.V or 0
    size, wide, label = case.dtype.itemsize, 4, 8  # bytes of an input's element, of an fp32 one, of a target
    policy = n * (2 * wide + 1) + (case.B or 0) * wide  # old and reference log-probs, mask; advantages
    if case.op == "linear_logprobs":
        moved = (n * h + v * h) * size + n * (label + wide)
        if case.variant == "entropy":
            moved += n * wide
        if case.variant in ("frozen", "trainable"):
            moved += n * h * size + n * wide
        if case.variant == "trainable":
            moved += v * h * size
        return Need(PRODUCTS[case.variant] * 2 * n * h * v, moved)
    if case.op == "linear_grpo_loss":
        unmasked = 3 * n // 4  # sequences end between T/2 and T (`inputs.policy_batch`); masked rows may be left out
        moved = (2 * n * h + v * h) * size + n * label + policy + wide
        return Need(PRODUCTS[case.variant] * 2 * unmasked * h * v, moved)
    if case.op == "token_logprobs":
        backward = case.variant == "backward"
        return Need(0, (1 + backward) * n * v * size + n * (label + wide + backward * wide))
    if case.op == "grpo_loss":
        own = 2 * n * v * size + n * label if case.variant == "logits" else 2 * n * wide
        return Need(0, own + policy + wide)
    if case.op == "group_advantages":
        return Need(0, 2 * n * wide)
    latents, row = n * h, 2 * n * wide  # two σ each
    if case.op == "flow_step":
        if case.variant == "draw":
            return Need(0, latents * (2 * size + 2 * wide) + row + n * label)
        return Need(0, latents * (3 * size + 2 * wide) + row + 2 * n * wide)
    if case.op == "flow_grpo_loss":
        reference = latents * size if case.variant == "KL" else 0
        return Need(0, latents * (3 * size + 2 * wide) + reference + row + 2 * n * wide + wide)
    if case.op == "shared_prefix_attention":
        # Scores and their sums forward, and five products backward; a token sees the prompt and half of its own
        seen = v + (case.T + 1) / 2
        shared, own = v * SHARED, n * SHARED
        return Need(int(7 * 2 * n * h * seen), (4 * n * h + 2 * 2 * (shared + own)) * size)
    raise ValueError(f"what {case.op} needs is not known")


def floor_ms(needed: Need, gpu: Gpu, dtype: str = "bfloat16") -> float:
    """The time that no implementation beats on a GPU."""
    return 1e3 * max(needed.flops / gpu.peak(dtype), needed.bytes / gpu.bandwidth)


def milliseconds(cost: Cost, case: Case) -> float:
    logits = case.N * case.V
    return 1e3 * (cost.products * 2 * logits * (case.H or 0) / PRODUCT + cost.bytes * logits / COPY)


def times(case: Case) -> dict[str, float]:
    """Milliseconds of each contestant whose cost is known."""
    return {name: milliseconds(cost, case) for name, cost in COSTS.get((case.op, case.variant), {}).items()}
