"""The kernels at small sizes, once each, for NVIDIA's compute-sanitizer to watch: `make sanitize`.

It runs without PyTorch's caching of memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1), which would hide what lies beside a
tensor.
"""

from __future__ import annotations

import sys

import torch
from small import CASES


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("sanitize runs the kernels on a GPU; PyTorch finds none here")
    torch.manual_seed(0)
    for name, (make, call) in CASES.items():
        outputs = call("triton", **make("cuda", 7))
        torch.cuda.synchronize()
        print(f"{name}: {len(outputs)} outputs and gradients")


if __name__ == "__main__":
    main()
