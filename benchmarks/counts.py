"""What a call would launch on a GPU: kernels, their bytes, and the matrix products' FLOPs; counted without one.

Run on meta tensors a call computes nothing and takes no memory, so that full-size models are counted in seconds. A
TorchDispatchMode sees every ATen operation below autograd; inside the ops of uae_kernels, which it would take for one
each, their bodies are run in its sight, and their Triton launches are recorded with `launches.recorded`. Attention is
counted as one kernel, as flash attention is.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .rows import ROOT

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Kernel(NamedTuple):
    name: str
    bytes: int  # each element of an input or output once, however often it is expanded
    flops: int = 0  # of a matrix product or an attention


@dataclass
class Counts:
    """The kernels of one call, in the order they are launched."""

    kernels: list[Kernel] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def flops(self) -> int:
        """Of matrix products and attention."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def other_bytes(self) -> int:
        """Read and written by all that is neither a matrix product nor an attention."""
        return sum(kernel.bytes for kernel in self.kernels if not kernel.flops)

    def by_name(self) -> dict[str, tuple[int, int]]:
        """(launches, bytes) of each kernel."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for kernel in self.kernels:
            found[kernel.name][0] += 1
            found[kernel.name][1] += kernel.bytes
        return {name: (launches, size) for name, (launches, size) in found.items()}

    def __sub__(self, other: Counts) -> Counts:
        """What is launched more often here than there: of a model with one layer more, that layer."""
        rest = list(other.kernels)
        return Counts([kernel for kernel in self.kernels if not (kernel in rest and not rest.remove(kernel))])


def counted(call: Callable[[], Any], capability: int = 90) -> Counts:
    """The kernels `call` would launch on a GPU of this compute capability; its results are not to be used.

    Args:
        call: works on tensors of the device "meta", or on small ones of the CPU; `impl="auto"` is Triton here. What it
            does only the first time (an accelerated transformer lays its projections together) is counted too.
        capability: as in `launches.CAPABILITIES`.
    """
    sys.path.insert(0, str(ROOT / "tests/kernels"))
    try:
        from launches import recorded
    finally:
        sys.path.pop(0)
    with recorded(capability) as launches, one_attention(), _Counter(launches) as counter:
        call()
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self, launches: list[Any]):
        super().__init__()
        self.counts, self.launches = Counts(), launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace == "uae_kernels":
            with self:
                out = OPDEFS[name]._init_fn(*args, **(kwargs or {}))
            self.note_launches()
            return out
        out = func(*args, **(kwargs or {}))
        short = name.partition("::")[2]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and short not in NO_KERNEL:
            read, written = (_tensors(part) for part in ((args, kwargs), out))
            self.counts.kernels.append(Kernel(short, touched(read) + touched(written), _flops(short, read, written)))
        return out

    def note_launches(self) -> None:
        for launch in self.launches:
            # One that stands in for a second that is not there comes twice
            pointers = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
            self.counts.kernels.append(Kernel(launch.name, touched(pointers.values()), _flops_of_segments(launch)))
        self.launches.clear()


def _tensors(given: Any) -> list[Tensor]:
    return [x for x in tree_leaves(given) if isinstance(x, Tensor)]


def touched(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, an expanded dimension counted once."""
    total = 0
    for x in tensors:
        elements = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            elements *= size if stride or not size else 1
        total += elements * x.element_size()
    return total


def _flops(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name in ("attention", FLASH):
        q, k, *_ = read
        return 4 * q.numel() * k.shape[-2]
    if name == f"{FLASH}_backward":
        _, q, k, *_ = read
        return 10 * q.numel() * k.shape[-2]
    if name not in PRODUCTS:
        return 0
    if name == "convolution":
        return 2 * written[0].numel() * read[1][0].numel()
    left = read[1] if name in ("addmm", "baddbmm", "_addmm_activation") else read[0]
    return 2 * written[0].numel() * left.shape[-1]


def _flops_of_segments(launch: Any) -> int:
    """Of `segment_attention`'s forward kernel; 0 for any other."""
    if launch.name != "_forward_kernel" or launch.kernel.fn.__module__ != "uae_kernels.segment_attention":
        return 0
    given = launch.arguments
    tokens = given["tokens_a"] + given["tokens_b"]
    return 4 * given["q_a"].shape[0] * given["heads"] * tokens**2 * given["WIDTH"]


@torch.library.custom_op("uae_counts::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, S, D) in memory as q is, as PyTorch's flash attention gives it."""
    return torch.empty_like(q)


_attention.register_fake(_attention._init_fn)


@contextmanager
def one_attention() -> Iterator[None]:
    """`scaled_dot_product_attention` is one operation, which computes nothing."""

    def attention(q, k, v, *_, **__):
        return _attention(q, k, v)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield
