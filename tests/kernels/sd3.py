"""Small and full-width SD3 transformers with random weights, and what the tests do with them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

POOLED, CONTEXT = 48, 40
FAMILY: dict[str, dict[str, Any]] = {
    "sd3": {"num_attention_heads": 24},
    "medium": {"num_attention_heads": 24, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "large": {"num_attention_heads": 38, "qk_norm": "rms_norm"},
}
NARROW = {"num_attention_heads": 3, "attention_head_dim": 16}
SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": CONTEXT,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 12,
}
# SD3.5-large, but for width and depth
PUBLISHED = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def transformer(kind: str, *, layers: int = 2, full_width: bool = False, **changes: Any):
    """An SD3 transformer whose every part contributes: norm weights and modulations are not near their defaults."""
    from diffusers import SD3Transformer2DModel

    options = (
        {"attention_head_dim": 64}
        | SMALL
        | FAMILY[kind]
        | ({} if full_width else NARROW)
        | {"num_layers": layers}
        | changes
    )
    options["caption_projection_dim"] = options["num_attention_heads"] * options["attention_head_dim"]
    model = SD3Transformer2DModel(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_" in name and parameter.dim() == 1 and "linear" not in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("net.0.proj.weight"):
                parameter.mul_(4)  # where GELU bends
    return model


def add_lora(model, targets=LORA_TARGETS, rank: int = 4) -> list[torch.nn.Parameter]:
    """A LoRA adapter as peft makes it, whose both factors are random; returns them."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=list(targets))
    )
    parameters = [p for name, p in model.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.2)
    return parameters


def inputs(
    batch: int = 2, size: tuple[int, int] = (8, 6), tokens: int = 5, *, same_pooled: bool = True
) -> dict[str, Tensor]:
    pooled = torch.randn(1 if same_pooled else batch, POOLED).expand(batch, -1)
    return {
        "hidden_states": torch.randn(batch, 4, *size),
        "encoder_hidden_states": torch.randn(batch, tokens, CONTEXT),
        "pooled_projections": pooled,
        "timestep": torch.full((batch,), 711.0),
    }


@torch.no_grad()
def sampled(model, sigmas: Tensor, given: dict[str, Tensor], guidance: float = 4.0) -> Tensor:
    """Euler steps with classifier-free guidance: the first half of the batch is the unconditional one."""
    x = given["hidden_states"][: len(given["hidden_states"]) // 2]
    for sigma, after in itertools.pairwise(sigmas):
        timestep = (1000 * sigma).expand(2 * len(x))
        v = model(**(given | {"hidden_states": torch.cat([x, x]), "timestep": timestep}), return_dict=False)[0]
        uncond, cond = v.chunk(2)
        x = x + (after - sigma) * (uncond + guidance * (cond - uncond))
    return x
