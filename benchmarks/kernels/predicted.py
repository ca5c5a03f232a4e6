"""Times on an H200 where none has been measured, from the products an implementation makes and the logits it moves.

    t = products·2NHV / PRODUCT + bytes·NV / COPY

Bytes count every read and write of a tile of logits in device memory; what a product reads of its other operand is part
of its measured rate. A Triton product is taken to be as fast as the library's, which is the best it can hope for.
"""

from __future__ import annotations

from typing import NamedTuple

from ..rows import OURS, Row
from .harness import Case

PRODUCT = 790e12  # FLOP/s of a bf16 matrix product, measured on one H200
COPY = 4.3e12  # bytes/s that a device copy reads and writes, measured on the same


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


def milliseconds(cost: Cost, case: Case) -> float:
    logits = case.N * case.V
    return 1e3 * (cost.products * 2 * logits * (case.H or 0) / PRODUCT + cost.bytes * logits / COPY)


def rows(case: Case) -> list[Row]:
    """Of each contestant whose cost is known, as much of a row as the arithmetic gives."""
    return [
        {
            "op": case.op,
            "variant": case.variant,
            "dtype": case.precision,
            "contestant": name,
            "config": {},
            "predicted": cost._asdict(),
            "median_ms": milliseconds(cost, case),
            **{size: getattr(case, size) for size in ("N", "H", "V", "B", "T")},
        }
        for name, cost in COSTS.get((case.op, case.variant), {}).items()
    ]
