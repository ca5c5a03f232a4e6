"""Entropies that pay for their gradient when one arrives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linear_logprobs import linear_logprobs


def logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` with differentiable entropies.

    TRL and verl always ask for entropies and mostly only log them. Under a frozen head their Jacobian would cost
    every call a third matrix product: it is left to the backward pass, which computes the logits again (three
    products) if a gradient reaches the entropies, and costs nothing if none does.
    """
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    deferred = frozen and hidden.requires_grad and torch.is_grad_enabled()
    logprobs, entropies = linear_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=True, entropy_grad=not deferred, **options
    )
    if deferred:
        entropies = _Entropies.apply(hidden, entropies, weight, targets, bias, options)
    return logprobs, entropies


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, entropies, weight, targets, bias, options):
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.options = options
        return entropies.view_as(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, bias = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            _, entropies = linear_logprobs(
                hidden, weight, targets, bias=bias, return_entropy=True, entropy_grad=True, **ctx.options
            )
        return *torch.autograd.grad(entropies, hidden, grad), *(None,) * 5
