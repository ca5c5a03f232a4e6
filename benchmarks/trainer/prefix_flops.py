"""What stage 2's update computes for the captions of one image that share its prompt, and for a row each: FLOPs.

    python -m benchmarks.trainer.prefix_flops     # prints the table of docs/models.md, in a minute, without a GPU

The encoder's own code runs at full size on tensors without memory: forward and backward pass of the language model up
to the captions' states. PyTorch's FlopCounterMode counts the linear layers. Attention and head, whose kernels it cannot
look into, are formulas: tests/benchmarks/test_bench_prefix.py compares them with the products a CPU runs. Counts are no
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from uae_fast.models.encoder import Encoder, Prompt
from uae_fast.models.loading import load_encoder
from uae_fast.models.memory import feign
from uae_fast.models.sources import Source, shipped_shape

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
IMAGE_TOKENS = 324  # of 504 × 504 pixels: patches of 14, four to a token
TEMPLATE_TOKENS = 78  # the chat template and the `paper` preset's prompt: counted by hand, the tokenizer is not here
CAPTIONS = (300,) * 8
MODES = {
    "adapters, gradient checkpointing": ("lora", True),
    "adapters": ("lora", False),
    "all weights": ("full", False),
}


@dataclass(frozen=True)
class Update:
    """Counts of one forward and backward pass over the captions of an image.

    Attributes:
        tokens: that pass through the language model.
        linear: FLOPs of its linear layers, adapters included.
        head: FLOPs of `linear_grpo_loss` under a frozen head, which are two products of (tokens, H) and (H, V).
        attention: FLOPs of attention as FlopCounterMode and the plain formula have it: rectangles of queries and keys,
            two products forward and four backward.
        kernels: FLOPs of attention as fused kernels compute it: only keys that are seen, and scores computed again.
            Flash attention has five products backward, `shared_prefix_attention` seven.
    """

    tokens: int
    linear: int
    head: int
    attention: int
    kernels: int

    @property
    def total(self) -> int:
        return self.linear + self.head + self.attention

    @property
    def with_kernels(self) -> int:
        return self.linear + self.head + self.kernels


def qwen(mode: str, checkpointing: bool, name: str = QWEN) -> Encoder:
    """The encoder of a Hub repository whose shape ships with the package, in bf16 without memory, its policy trained.

    Args:
        mode: "lora" with adapters of rank 32, or "full".
        checkpointing: layers are computed again in the backward pass.
    """
    shape: dict[str, Any] = shipped_shape(name) or {}
    encoder = load_encoder(
        Source.parse(f"{name}@{shape['revision']}", "models.encoder_from"),
        caption_prompt="describe", condition_length=512, image_tokens=0,
        dtype=torch.bfloat16, device=torch.device("meta"), quantization="none", seed=0,
    )  # fmt: skip
    encoder.prepare_training(mode, 32, 64)
    if checkpointing:
        encoder.checkpoint_gradients()
    return pretended(encoder.to("meta"))


def pretended(encoder: Encoder) -> Encoder:
    """An encoder of the device "meta" made to pass for one of the CPU, its policy trained."""
    encoder.trainable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        feign([encoder])
    return encoder


def update(
    encoder: Encoder,
    shared: bool,
    *,
    checkpointing: bool,
    prompt: int = IMAGE_TOKENS + TEMPLATE_TOKENS,
    captions: Sequence[int] = CAPTIONS,
) -> Update:
    """Counts of the update on one image.

    Args:
        encoder: as from `pretended`.
        shared: the captions share the prompt; else each has a row behind a copy of it, padded to the longest.
        checkpointing: as the encoder has it.
        prompt: tokens of the prompt, the image's included.
        captions: tokens of each caption.
    """
    longest = max(captions)
    vocabulary, width = encoder.head.weight.shape
    with encoder.head.weight.fake_mode, FlopCounterMode(display=False) as counter:
        ids = torch.zeros(len(captions), longest, dtype=torch.long)
        asked = torch.zeros(1, prompt, dtype=torch.long)
        given = Prompt(asked, asked == 0, asked.expand(3, -1, -1), (torch.zeros(1, width),), (prompt,))
        if shared:
            states = encoder.group_states(given, ids, captions)
        else:
            states = encoder.caption_states(given.repeat(len(captions)), ids, ids == 0)
        states.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))

    # What a row reads, behind what all rows read once; and the pairs of a query and a key that it sees.
    read = [length - 1 for length in captions] if shared else [prompt + longest] * len(captions)
    once = prompt if shared else 0
    own = sum(length * once + length * (length + 1) // 2 for length in read)
    flash, ours = (once * (once + 1) // 2, own) if shared else (own, 0)
    again = 2 * checkpointing
    return Update(
        tokens=once + sum(read),
        linear=linear,
        head=2 * 2 * sum(captions) * width * vocabulary,
        attention=per_pair(encoder) * (6 + again) * (once**2 + len(read) * max(read) * (once + max(read))),
        kernels=per_pair(encoder) * ((7 + again) * flash + (9 + again) * ours),
    )


def per_pair(encoder: Encoder) -> int:
    """FLOPs of one of attention's products for a query and a key, in all layers and heads."""
    text = encoder.model.config.text_config
    return 2 * text.hidden_size * text.num_hidden_layers


def table_row(name: str, rows: Update, row: Update) -> str:
    """A row of the table: separate rows → one row with a shared prompt."""

    def tera(part: str) -> str:
        return f"{getattr(rows, part) / 1e12:.1f} → {getattr(row, part) / 1e12:.1f}"

    return (
        f"| {name} | {rows.tokens:,} → {row.tokens:,} | {tera('linear')} | {tera('head')} | {tera('attention')} | "
        f"{tera('total')} | {row.total / rows.total:.3f} | {row.with_kernels / rows.with_kernels:.3f} |"
    )


def main() -> None:
    print("| trained | tokens | linear layers | head | attention | TFLOP | ratio | ratio with fused kernels |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (mode, checkpointing) in MODES.items():
        encoder = qwen(mode, checkpointing)
        rows, row = (update(encoder, shared, checkpointing=checkpointing) for shared in (False, True))
        print(table_row(name, rows, row), flush=True)


if __name__ == "__main__":
    main()
