"""Frozen linear layers in 4 or 8 bits (bitsandbytes, or e4m3), with LoRA adapters in full precision on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .e4m3 import E4M3Linear

OUTLIERS = 6.0  # LLM.int8(): activations beyond it are multiplied in 16 bits


def quantize_linears(
    model: Any,
    inside: Iterable[nn.Module],
    kind: str,
    device: torch.device,
    make: Callable[[nn.Parameter, str], nn.Parameter] | None = None,
) -> None:
    """Replaces every linear layer of some submodules by its quantised form on `device`, one layer at a time.

    Args:
        model: the library's model, told that it is quantised, so that peft wraps its layers accordingly.
        inside: submodules of it, whose weights are in the dtype of the computation.
        kind: "nf4" (4-bit NormalFloat in blocks of 64, their scales quantised once more; QLoRA, arXiv 2305.14314),
            "int8" (rows of 8 bits, outliers in 16: LLM.int8(), arXiv 2208.07339) or "fp8" (`E4M3Linear`).
        device: where the quantised weights lie.
        make: gives a parameter without memory, of the name "weight" or "bias", its values.
    """
    for part in inside:
        for parent in list(part.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is not nn.Linear:
                    continue
                for key, parameter in layer._parameters.items():
                    if make is not None and parameter is not None:
                        layer._parameters[key] = make(parameter, key)
                setattr(parent, name, quantized(layer, kind, device))
                layer._parameters.clear()  # frees what the list of modules would keep
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"


def quantized(layer: nn.Linear, kind: str, device: torch.device) -> nn.Linear:
    """A linear layer's quantised form; its bias keeps its dtype."""
    if kind == "fp8":
        return E4M3Linear(layer, device).eval()
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight, shape = layer.weight.data, (layer.in_features, layer.out_features, layer.bias is not None)
    new: Any
    if kind == "nf4":
        new = Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        new.weight = Params4bit(weight, quant_type="nf4", module=new)
        # On some CPUs bitsandbytes repacks weights in inference; here one layer serves rollouts and updates.
        new.support_avx512bf16_for_cpu = False
    else:
        new = Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        new.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    new.weight = new.weight.to(device)  # quantises
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return new.eval().requires_grad_(False)
