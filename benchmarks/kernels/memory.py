"""Peak memory of `linear_logprobs` at full size, frozen head, forward and backward, on a machine without a GPU.

    python -m benchmarks.kernels.memory [N…]     # default 2400; appends to results/memory.jsonl

The PyTorch path runs (minutes at N = 2,400, some ten at 16,384). Of the Triton path the host's allocations are counted
while its launches are recorded and not made: they are those of a GPU.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from uae_kernels import linear_logprobs

from ..rows import OURS, RESULTS, Row, append, environment
from .harness import peak_and_flops
from .resources import TESTS

NAME = "memory"
H, V, DTYPE, CAPABILITY = 2048, 151_936, torch.bfloat16, 90


def measure(rows: int, impl: str) -> Row:
    hidden = torch.randn(rows, H).to(DTYPE).requires_grad_()
    weight = torch.empty(V, H, dtype=DTYPE).normal_(std=H**-0.5)
    targets = torch.randint(0, V, (rows,))

    def step() -> dict[str, torch.Tensor]:
        logprobs = linear_logprobs(hidden, weight, targets, impl=impl)
        return {"d_hidden": torch.autograd.grad(logprobs.sum(), hidden)[0]}

    if impl == "triton":
        sys.path.insert(0, str(TESTS))
        import launches

        # A launch that were kept would keep its scratch memory alive.
        with launches.recorded(CAPABILITY), mock.patch.object(launches, "Launch", lambda *_: None):
            peak, _ = peak_and_flops(step, "cpu")
    else:
        peak, _ = peak_and_flops(step, "cpu")
    how = f"Triton, sm_{CAPABILITY}, launches recorded" if impl == "triton" else "PyTorch, CPU"
    return {
        "op": "linear_logprobs",
        "variant": "frozen",
        "contestant": f"{OURS}, {how}",
        "N": rows,
        "H": H,
        "V": V,
        "dtype": str(DTYPE).removeprefix("torch."),
        "peak_bytes": peak,
    }


def main(sizes: list[int]) -> None:
    for rows in sizes:
        for impl in ("triton", "torch"):
            row = measure(rows, impl)
            append(RESULTS / f"{NAME}.jsonl", [row | environment("cpu")])
            print(f"{row['contestant']}, N {rows:,}: {row['peak_bytes'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [2400])
