"""What GPUs can do at most, by their makers' documents: nobody computes or moves more a second."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    bf16: float  # FLOP/s of dense products of bf16 numbers, summed in fp32
    fp8: float | None  # of e4m3 numbers, summed in fp32; None where there are no such products
    bandwidth: float  # bytes/s of the device's memory

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in a dtype; of an fp32 one those of bf16, which nothing exceeds."""
        return self.fp8 or self.bf16 if dtype == "float8_e4m3fn" else self.bf16


GPUS = {
    # NVIDIA H200 data sheet, SXM: bf16 1,979 and fp8 3,958 TFLOP/s with sparsity, which doubles them; 4.8 TB/s
    "H200": Gpu(989.5e12, 1979e12, 4.8e12),
    # NVIDIA H100 data sheet, SXM: the same products; 3.35 TB/s
    "H100": Gpu(989.5e12, 1979e12, 3.35e12),
    # NVIDIA A100 data sheet, 80 GB SXM: bf16 312 TFLOP/s, no fp8; 2,039 GB/s
    "A100": Gpu(312e12, None, 2.039e12),
    # NVIDIA Ada GPU Architecture, table 2: bf16 and fp8 with fp32 sums 165.2 and 330.3 TFLOP/s; 1,008 GB/s
    "RTX 4090": Gpu(165.2e12, 330.3e12, 1.008e12),
    # NVIDIA RTX Blackwell GPU Architecture, table 2: bf16 and fp8 with fp32 sums 209.5 and 419 TFLOP/s; 1,792 GB/s
    "RTX 5090": Gpu(209.5e12, 419e12, 1.792e12),
}


def find(name: str) -> str:
    """The GPU that a person means: "h200", "rtx4090" and "4090" will do.

    Raises:
        ValueError: none, or more than one; the message lists them.
    """

    def plain(text: str) -> str:
        return "".join(text.lower().split()).replace("-", "")

    found = [known for known in GPUS if plain(name) and plain(name) in plain(known)]
    if len(found) != 1:
        raise ValueError(f"--predict {name}: no such GPU is known; known are {', '.join(GPUS)}")
    return found[0]
