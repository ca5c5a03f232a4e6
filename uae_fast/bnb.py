"""bitsandbytes, without the compiled code that its import would fetch."""

from __future__ import annotations

import logging
import sys
from typing import Any

KERNELS = "kernels"  # Hugging Face's package that downloads them
# These would ask for that package, and say in every pass of every LLM.int8() layer that bf16 becomes fp16
QUIET = ("backends.cpu.ops", "autograd._functions")


def import_bitsandbytes() -> Any:
    """The package; called before anything else imports it.

    On CPUs with bf16 units its import fetches a kernel from the Hub and runs it, at whatever commit that is now, where
    Hugging Face's `kernels` is installed. So that package is not to be had meanwhile.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] == KERNELS}
    for name in known:
        del sys.modules[name]
    sys.modules[KERNELS] = None  # type: ignore[assignment]  # an import of it fails
    for module in QUIET:
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        del sys.modules[KERNELS]
        sys.modules.update(known)
    return bitsandbytes
