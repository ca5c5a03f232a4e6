"""Triton where it is installed; without it the package imports all the same and PyTorch serves every op."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)  # the one name used outside kernels

# Read where Triton reads it: when the kernels are decorated.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(*numbers: str) -> Callable[[Any], Any]:
    """`triton.jit` that never compiles again for another value of the arguments named `numbers`."""
    return (lambda kernel: kernel) if triton is None else triton.jit(do_not_specialize=list(numbers))


def launchable(tensor: Tensor) -> bool:
    """Whether a kernel can run on this tensor: on a GPU or its stand-in, or on the CPU under TRITON_INTERPRET=1."""
    on_a_cpu = INTERPRETED and tensor.device.type == "cpu"
    return triton is not None and (tensor.is_cuda or on_a_cpu or stands_for(tensor) > 0)


def stands_for(tensor: Tensor) -> int:
    """The compute capability of the GPU that a tensor without memory stands for, 0 for none.

    It is what the tensor's `FakeTensorMode` has as `capability`: PyTorch without CUDA has no fake tensors of a GPU.
    """
    return getattr(tensor.fake_mode, "capability", 0) if isinstance(tensor, FakeTensor) else 0


def use_triton(op: str, impl: str, tensor: Tensor, unsupported: str | None = None) -> bool:
    """Which implementation serves a call: True for Triton, False for PyTorch.

    Args:
        impl: "auto" | "triton" | "torch"; auto is Triton on a GPU, PyTorch elsewhere.
        tensor: one that the kernel would read.
        unsupported: what about this call Triton cannot serve, None = nothing. "auto" then takes PyTorch.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: "triton" where it cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'{op}: impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "triton":
        if unsupported:
            raise RuntimeError(f'{op}: impl="triton" does not support {unsupported}; use impl="auto" or impl="torch"')
        if not launchable(tensor):
            reason = "Triton is not installed" if triton is None else f"the tensors are on {tensor.device}"
            raise RuntimeError(
                f'{op}: impl="triton" needs tensors on a GPU (or TRITON_INTERPRET=1 before the import), but {reason}; '
                'use impl="auto" or impl="torch"'
            )
        return True
    return impl == "auto" and capability(tensor) > 0 and launchable(tensor) and not unsupported


def fp64(*tensors: Tensor | None) -> str | None:
    """The `unsupported` of kernels that compute in fp32."""
    return "fp64" if any(t is not None and t.dtype == torch.float64 for t in tensors) else None


def capability(tensor: Tensor) -> int:
    """The compute capability that tile sizes are chosen for, as 10·major + minor; 0 for the interpreter."""
    if not tensor.is_cuda:
        return stands_for(tensor)
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` on the device of its first tensor; nothing for an empty grid."""
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


_INTERPRETED = tl.constexpr(INTERPRETED)


@jit()
def dot(a, b, total):
    """total + a·b, exact products summed in fp32."""
    if _INTERPRETED:  # its own dot multiplies the bit patterns of bf16, and sums in an order that depends on the row
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")


@jit()
def narrow(x, DTYPE: tl.constexpr):
    """fp32 x in DTYPE, rounded to nearest."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter would cut the bits off
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@jit()
def e4m3(x):
    """fp32 x as an e4m3 number, rounded to nearest; what lies beyond ±448 becomes that."""
    if _INTERPRETED:  # it would cut the bits off, and let large numbers wrap around
        size = tl.abs(x)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = ((size + 24576.0 - 24576.0) * 512).to(tl.int32)  # in steps of 2⁻⁹
        code = tl.minimum(tl.where(size < 0.015625, subnormal, normal), 0x7E)
        code = tl.where(x == x, code, 0x7F) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    # Triton's own conversion rounds twice on sm_89: to fp16 first
    code = tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,r,r", [x], dtype=tl.uint8, is_pure=True, pack=2
    )
    return code.to(tl.float8e4nv, bitcast=True)


@jit()
def log1p(x):
    """log(1 + x) for x ≥ 0 without the cancellation of small x: 2·atanh(x/(2 + x)) as a series up to 0.5."""
    s = x / (2 + x)
    q = s * s
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
    return tl.where(x < 0.5, series, tl.log(1 + x))


@jit()
def tanh(x):
    """tanh with full relative precision: its series up to 0.25, then (1 − e)/(1 + e), e = exp(−2|x|)."""
    q = x * x
    series = x * (1 - q * (1 / 3 - q * (2 / 15 - q * (17 / 315 - q * (62 / 2835 - q * (1382 / 155925))))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))
