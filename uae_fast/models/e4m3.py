"""Frozen weights as 8-bit floating-point numbers (e4m3, arXiv 2209.05433) with a scale a row, under LoRA adapters.

A format of weights, as NF4 is (`models.…_quantization: fp8`): for each pass a weight is widened to the dtype of what it
is multiplied with, and let go. It trains what is over it, on any device that PyTorch has. Products of e4m3 numbers are
another thing, `same_sampler.fp8`: they draw with a frozen decoder, on few GPUs, and have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from uae_kernels.mmdit import quantize_rows


class E4M3Linear(nn.Linear):
    """A linear layer with the weight W[i] = values[i]·scales[i], values e4m3 and scales fp32, max|W[i]|/448.

    Both are kept as the integers of their bits, which no cast of the module changes. There is no gradient but the
    input's.

    Attributes:
        weight: (out·in, 1) uint8, the bits of `values`; not of an adapter's shape, so that merging one into them fails.
        scales: (out, 1) int32, the bits of the scales.
        bias: (out,) as it was, or None.
    """

    def __init__(self, layer: nn.Linear, device: torch.device):
        """The layer's weight rounded to nearest, on `device`; the same bits every time."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made = quantize_rows(layer.weight.detach().to(device), impl="torch")
        self.weight = nn.Parameter(made.values.view(torch.uint8).view(-1, 1), requires_grad=False)
        self.scales = nn.Parameter(made.scales.view(torch.int32), requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + bias, (..., out) of (..., in), in the dtype of x."""
        return _Product.apply(x, self.weight, self.scales, self.bias)


def widen(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that an `E4M3Linear`'s integers stand for: a product in fp32, rounded once to `dtype`."""
    return weight.view(torch.float8_e4m3fn).view(len(scales), -1).to(dtype).mul_(scales.view(torch.float32))


class _Product(torch.autograd.Function):
    """`torch.nn.functional.linear` that keeps the narrow weight for its backward pass, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scales)
        return nn.functional.linear(x, widen(weight, scales, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight, scales = ctx.saved_tensors
        return gradient @ widen(weight, scales, gradient.dtype), None, None, None
