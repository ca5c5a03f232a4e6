"""What a run runs in: versions, hardware, a launcher's processes, and the other libraries' talk."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "uae-fast", "uae-kernels", "torch", "triton", "transformers", "diffusers", "peft", "accelerate", "bitsandbytes",
    "safetensors", "pyyaml", "flash-attn", "xformers",
)  # fmt: skip


def describe_environment() -> Iterator[str]:
    """Versions and hardware, a line each, for a bug report."""
    import torch

    from .determinism import describe_determinism

    yield f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} not installed"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if not torch.cuda.is_available():
        yield "GPU none"
    yield describe_determinism()


def launched() -> int:
    """How many processes a launcher says it has started, by torchrun's environment variables; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Within, of several processes process 0 alone prints; of what is wrong (stderr), the first on each machine."""
    with ExitStack() as stack:
        for place, redirect in (("RANK", redirect_stdout), ("LOCAL_RANK", redirect_stderr)):
            if launched() > 1 and os.environ[place] != "0":
                stack.enter_context(redirect(stack.enter_context(open(os.devnull, "w"))))
        yield


def quiet_libraries() -> None:
    """Turns off the libraries' own progress bars and advice; their errors still show."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module="PIL")  # of files that it reads all the same
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # peft, inside transformers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
