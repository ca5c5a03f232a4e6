"""Definitions of `uae_kernels.mmdit`'s products of 8-bit floating-point numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._common import check_impl, compute_dtype

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of the e4m3 numbers
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32 number: what a row of zeros is divided by


class Quantized(NamedTuple):
    """Rows of e4m3 numbers with a scale each: row i is values[i]·scales[i]."""

    values: Tensor  # (..., C) float8_e4m3fn
    scales: Tensor  # (..., 1) fp32
    plain: Tensor | None = None  # (..., C), the rows as they were, where something else reads them too


def quantize_rows(x: Tensor, *, scale: Tensor | None = None, gelu: bool = False, impl: str = "auto") -> Quantized:
    """See `uae_kernels.mmdit.quantize_rows`; not differentiable."""
    check_impl("quantize_rows", impl)
    check_rows(x, scale)
    wide = x.to(compute_dtype(x))
    if gelu:
        wide = torch.nn.functional.gelu(wide, approximate="tanh")
    return in_e4m3(wide, scale)


def in_e4m3(x: Tensor, scale: Tensor | None = None, plain: Tensor | None = None) -> Quantized:
    """fp32 rows x (..., C) as e4m3 numbers, of a scale that is given, () or (B,), or of each row's own."""
    if scale is None:
        largest = x.abs().amax(-1, keepdim=True).float()
        # By a tensor: a number's reciprocal is what PyTorch multiplies with on a GPU
        scales = (largest / torch.full_like(largest, LARGEST)).clamp(min=SMALLEST_SCALE)
    else:
        scales = scale.float().view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1).contiguous()
    return Quantized((x * (1 / scales)).clamp(-LARGEST, LARGEST).to(E4M3), scales, plain)


def fp8_linear(
    x: Quantized, weight: Quantized, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """See `uae_kernels.mmdit.fp8_linear`."""
    check_product(x, weight, bias)
    wide = compute_dtype(bias)
    # The numbers are multiplied as they are, and their sum scaled, as a GPU does it
    out = torch.nn.functional.linear(x.values.to(wide), weight.values.to(wide)) * x.scales * weight.scales.squeeze(-1)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def check_rows(x: Tensor, scale: Tensor | None) -> None:
    if not 2 <= x.dim() <= 3 or not x.is_floating_point():
        raise ValueError(f"quantize_rows: x must be floats of shape (N, C) or (B, N, C), got {tuple(x.shape)}")
    if scale is not None and scale.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"quantize_rows: scale must be () or ({x.shape[0]},), got {tuple(scale.shape)}")


def check_product(x: Quantized, weight: Quantized, bias: Tensor | None) -> None:
    for name, rows in (("x", x), ("weight", weight)):
        if rows.values.dtype != E4M3 or rows.scales.shape != (*rows.values.shape[:-1], 1):
            raise ValueError(
                f"fp8_linear: {name} must be e4m3 numbers (..., C) with scales (..., 1), got {rows.values.dtype} "
                f"{tuple(rows.values.shape)} with {tuple(rows.scales.shape)}"
            )
    size, inner = (tuple(weight.values.shape) + (-1, -1))[:2]
    if weight.values.dim() != 2 or x.values.shape[-1] != inner or (bias is not None and bias.shape != (size,)):
        raise ValueError(
            f"fp8_linear: x (..., C), weight (D, C) and bias (D,) do not fit: {tuple(x.values.shape)}, "
            f"{tuple(weight.values.shape)}, {None if bias is None else tuple(bias.shape)}"
        )
