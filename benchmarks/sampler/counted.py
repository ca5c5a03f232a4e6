"""What a step of the sampler launches and moves at full size, without a GPU, and the time this predicts for an H200.

    python -m benchmarks.sampler.counted     # writes results/sampler-counted.jsonl, in a few minutes

A predicted time is what the kernels would take one after another, each product and each attention at a published rate
or at the rate of its bytes, whichever takes longer, everything else at the rate of its bytes:

    t = Σ max(FLOPs / rate, bytes / COPY)

Launches cost nothing in it: where the host cannot keep up, as at one small image, eager PyTorch is slower than this.
"""

from __future__ import annotations

import json

from ..counts import Counts
from ..rows import OURS, RESULTS, Row, environment
from .denoise import CLASS, EAGER, Case, cases, counts_and_bytes

NAME = "sampler-counted"
# What public timings of FLUX on an H200 and of SD3.5-large on an H100 amount to
PRODUCT, COPY = 655e12, 3.65e12
# FlashAttention 2, which PyTorch's attention is by default, at a head dimension of 64 on an H100, by FlashAttention 3's
# authors (arXiv 2407.08608): at 1,024 and at 4,096 tokens
ATTENTION = {512: 306e12, 1024: 321e12}


def predicted_ms(counts: Counts, pixels: int) -> float:
    seconds = 0.0
    for kernel in counts.kernels:
        rate = ATTENTION[pixels] if kernel.name == "attention" else PRODUCT
        seconds += max(kernel.flops / rate, kernel.bytes / COPY)
    return 1e3 * seconds


def row(case: Case, contestant: str) -> Row:
    """Counts of one step for all N images."""
    counts, resident = counts_and_bytes(case, contestant)
    return {
        "op": case.op,
        "variant": case.variant,
        "class": CLASS,
        "contestant": contestant,
        "config": {},
        **{key: getattr(case, key) for key in ("model", "pixels", "N", "T")},
        "dtype": case.precision,
        "launches": counts.launches,
        "other_bytes": counts.other_bytes,
        "flops": counts.flops,
        "attention_flops": sum(kernel.flops for kernel in counts.kernels if kernel.name == "attention"),
        "resident_bytes": resident,
        "predicted": {"device": "H200", "image_step_ms": predicted_ms(counts, case.pixels) / case.N},
    }


def main() -> None:
    where = environment("cpu")
    kept = {key: where[key] for key in ("commit", "dirty", "date", "versions", "python")} | {"kind": "counted"}
    rows = []
    for case in cases("cuda", quick=False):
        for contestant in (EAGER, OURS):
            rows.append(row(case, contestant) | kept)
            print(f"{case.variant}, {case.N} images, {contestant}: {rows[-1]['launches']:,} launches a step")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{NAME}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))


if __name__ == "__main__":
    main()
