"""Products of 8-bit floating-point numbers (e4m3, arXiv 2209.05433): rows are quantised, and multiplied by a GPU's fp8
units. For drawing with frozen weights: nothing here has a gradient.
"""

import functools
import logging

import torch
from torch import Tensor

from .. import _triton
from .._triton import e4m3, fp64, jit, launch, tanh, tl, use_triton
from ..reference import mmdit as definitions
from ..reference.mmdit.fp8 import E4M3, LARGEST, SMALLEST_SCALE, Quantized, check_product, check_rows

log = logging.getLogger("uae_kernels")

CAPABILITY = 89  # of the first GPUs that multiply e4m3 numbers
WARPS = 8

_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST_SCALE)


@jit()
def row_scale(x):
    """max|x|/448 of one row, never 0; a NaN does not count, and is one in e4m3 too."""
    return tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), 0), _LARGEST), _SMALLEST)


@jit("tokens", "scale_stride")
def _quantize_kernel(
    x, scale, values, scales, tokens, sample_stride, token_stride, scale_stride, width,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < width
    sample = (i.to(tl.int32) // tokens).to(tl.int64)  # a division of 64-bit numbers is a call
    h = tl.load(x + sample * sample_stride + (i - sample * tokens) * token_stride + j, mask=inside, other=0.0)
    h = h.to(tl.float32)
    if GELU:
        h = 0.5 * h * (1 + tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    size = row_scale(h) if scale is None else tl.load(scale + sample * scale_stride)
    tl.store(scales + i, size)
    tl.store(values + i * width + j, e4m3(h * tl.math.div_rn(1.0, size)), mask=inside)


@torch.library.custom_op("uae_kernels::quantize_rows", mutates_args=())
def _quantize(x: Tensor, scale: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """x (B, N, C) with a unit last stride, scale (B,) of any stride."""
    batch, tokens, width = x.shape
    values, scales = torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format), _scales(x)
    block = 1 << max(width - 1, 1).bit_length()
    launch(
        _quantize_kernel, (batch * tokens,), x, scale, values, scales, tokens, x.stride(0), x.stride(1),
        0 if scale is None else scale.stride(0), width, GELU=gelu, BLOCK=block, num_warps=WARPS << (block > 4096),
    )  # fmt: skip
    return values, scales


@_quantize.register_fake
def _(x, scale, gelu):
    return torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format), _scales(x)


def _scales(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def quantize_rows(x: Tensor, *, scale: Tensor | None = None, gelu: bool = False, impl: str = "auto") -> Quantized:
    """Rows as e4m3 numbers with a scale each, in one pass: values = e4m3(x/scale), rounded to nearest.

    Args:
        x: (N, C) or (B, N, C) floats, of any strides.
        scale: () or (B,) fp32, above 0; what then lies beyond ±448·scale becomes that. None: each row's own,
            max|x|/448, and of a row of zeros 2⁻¹²⁶.
        gelu: GELU(x), by tanh, is what is quantised.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere and for fp64; "triton" and "torch" ask for one of them.

    Returns:
        Quantized(values (..., C) float8_e4m3fn, scales (..., 1) fp32), computed in fp32 (fp64 for fp64). Where x is not
        finite, its row's values or scales are not.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: x needs a gradient, there is none; a GPU older than sm_89; `impl="triton"` where it cannot run.
    """
    check_rows(x, scale)
    no_gradient("quantize_rows", x)
    if not use_triton("quantize_rows", impl, x, fp64(x)):
        return definitions.quantize_rows(x, scale=scale, gelu=gelu)
    check_device("quantize_rows", x)
    rows = x if x.stride(-1) == 1 else x.contiguous()
    rows = rows if x.dim() == 3 else rows[:, None]
    if scale is not None:
        scale = scale.float().expand(len(rows))
    values, scales = _quantize(rows, scale, gelu)
    return Quantized(values.view(x.shape), scales.view(*x.shape[:-1], 1))


def fp8_linear(
    x: Quantized, weight: Quantized, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x·weightᵀ + bias of rows of e4m3 numbers.

    By `torch._scaled_mm` on a GPU: sums in fp32, rounded to bf16. Emulated on a CPU, which is logged once, at level
    INFO: the same numbers multiplied in fp32.

    Args:
        x: of (..., C).
        weight: of (D, C); on a GPU C and D are multiples of 16.
        bias: (D,) or None.
        dtype: of the result.

    Returns:
        (..., D).

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a GPU older than sm_89.
    """
    check_product(x, weight, bias)
    check_device("fp8_linear", x.values)
    if not x.values.is_cuda:
        _announce()
        return definitions.fp8_linear(x, weight, bias, dtype=dtype)
    inside = bias if bias is not None and bias.dtype == dtype == torch.bfloat16 else None
    out = torch._scaled_mm(
        x.values.flatten(0, -2), weight.values.t(), x.scales.view(-1, 1), weight.scales.view(1, -1),
        bias=inside, out_dtype=torch.bfloat16, use_fast_accum=False,
    ).unflatten(0, x.values.shape[:-1])  # fmt: skip
    return (out if inside is bias else out + bias).to(dtype)


@functools.cache
def _announce() -> None:
    log.info("fp8 products are emulated on this device: e4m3 numbers, multiplied in fp32")


def no_gradient(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: e4m3 numbers have no gradient; call it under torch.no_grad()")


def check_device(op: str, tensor: Tensor) -> None:
    """Raises unless e4m3 numbers are multiplied on the tensor's device, or emulated there."""
    found = _triton.capability(tensor)
    if 0 < found < CAPABILITY or tensor.device.type not in ("cuda", "cpu", "meta"):
        raise RuntimeError(
            f"{op}: fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), or a CPU, which "
            f"emulates it; {f'this GPU has {found / 10}' if found else f'this is {tensor.device}'}: use fp8=False"
        )
