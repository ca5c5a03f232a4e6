"""Definition of `uae_kernels.linear_logprobs`."""

import torch
from torch import Tensor

from .._common import check_impl, compute_dtype
from .token_logprobs import check_head, token_logprobs

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `uae_kernels.linear_logprobs`; holds the whole (N, V)."""
    check_impl("linear_logprobs", impl)
    check_linear(hidden, weight, targets, bias, temperature, softcap)
    dtype = compute_dtype(weight)
    # Products of the weight's dtype, summed in fp32.
    logits = hidden.to(weight.dtype).to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logprobs(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        entropy_grad=entropy_grad,
    )


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not (plain and value.dtype in FLOATS):
            raise TypeError(
                f"linear_logprobs: {name} must be a plain dense float tensor, got {type(value).__name__}"
                f"{f' of {value.dtype}' if plain else ''}. Pass module.weight of an unwrapped nn.Linear; "
                "gather a DTensor with full_tensor(), dequantise a quantised head, merge a LoRA adapter into "
                "the head first."
            )
    if hidden.dtype not in FLOATS:
        raise TypeError(f"linear_logprobs: hidden must be fp64, fp32, bf16 or fp16, got {hidden.dtype}")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            "linear_logprobs: expected hidden (..., H), weight (V, H), targets (...), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprobs: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_head(targets, temperature, softcap)
