"""The kernels at small sizes, once each, for NVIDIA's compute-sanitizer to watch: `make sanitize`.

    python3 tests/kernels/sanitize.py            # under each tool, in processes of their own

It runs without PyTorch's caching of memory, which would hide what lies beside a tensor. Nothing needs to be installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "initcheck")
WANTED = os.environ.get("SANITIZER", "compute-sanitizer")
SANITIZER = shutil.which(WANTED) or shutil.which(f"/usr/local/cuda/bin/{WANTED}")


def under(tool: str) -> tuple[int, str]:
    """The kernels under a tool: exit status and the end of what was printed."""
    paths = [str(HERE.parents[1] / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [str(SANITIZER), "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--watched"],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return found.returncode, found.stdout[-6000:]


def run() -> None:
    """Every case once, forward and backward."""
    import torch
    from small import CASES

    torch.manual_seed(0)
    for name, (make, call) in CASES.items():
        if "fp8" in name and torch.cuda.get_device_capability() < (8, 9):
            continue
        outputs = call("triton", **make("cuda", 7))
        torch.cuda.synchronize()
        print(f"{name}: {len(outputs)} outputs and gradients", flush=True)


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("sanitize runs the kernels on a GPU; PyTorch finds none here")
    if "--watched" in sys.argv:
        return run()
    if SANITIZER is None:
        sys.exit("sanitize needs NVIDIA's compute-sanitizer, of the CUDA toolkit; SANITIZER=/a/path says where it is")
    for tool in TOOLS:
        status, text = under(tool)
        print(f"{tool}:\n{text}", flush=True)
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
