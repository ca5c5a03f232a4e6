"""What stage 2's update computes for the captions of one image by TRL's GRPOTrainer, and by ours: FLOPs.

    python -m benchmarks.trainer.trl_flops     # prints the table of benchmarks/README.md, in a minute, without a GPU

TRL hands every caption to the model in a row of its own: the language model is what `prefix_flops` counts for separate
rows. Its vision tower runs in the update, for each row; ours runs once, in the rollout, and is counted here all the
same. Its head computes the logits in the forward pass and again in the backward pass: three products a token, ours two.
Tower and head are counted by running transformers' and TRL's own code at full size on tensors without memory. Attention
is counted alike for both, as rectangles of queries and keys. Counts are no times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from uae_fast.models.sources import shipped_shape

from ..guard import Tally
from .prefix_flops import CAPTIONS, MODES, QWEN, qwen, update

SIDE = 504  # pixels
BOUND = 0.55  # what ours may be of TRL's


@dataclass(frozen=True)
class Counted:
    """FLOPs of an update: of the vision tower, of the language model's layers, of its head."""

    tower: int
    language: int
    head: int

    @property
    def total(self) -> int:
        return self.tower + self.language + self.head


@cache
def tower(images: int = 1) -> int:
    """Of the vision tower on so many images of SIDE² pixels, forward."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(**(shipped_shape(QWEN) or {})["model"]["vision_config"])
    with torch.device("meta"):
        visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    grid = torch.tensor([[1, SIDE // config.patch_size, SIDE // config.patch_size]] * images)
    rows, depth = int(grid.prod(1).sum()), config.in_channels * config.temporal_patch_size * config.patch_size**2
    width = config.hidden_size // config.num_heads

    def no_rotation(module: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty(rows, width, device="meta"), torch.empty(rows, width, device="meta")

    kind = type(visual.rotary_pos_emb)
    with mock.patch.object(kind, "forward", no_rotation), torch.no_grad(), Tally() as tally:
        visual(torch.empty(rows, depth, device="meta"), grid)
    return tally.flops


def head(tokens: int, width: int, vocabulary: int) -> int:
    """Of TRL's head on so many tokens, forward and backward, the weight frozen."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    with FakeTensorMode(), Tally() as tally:
        hidden, weight = torch.empty(tokens, width, requires_grad=True), torch.empty(vocabulary, width)
        targets = torch.zeros(tokens, dtype=torch.long)
        log_probs, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
        )
        log_probs.sum().backward()
    return tally.flops


def counted(mode: str, checkpointing: bool) -> tuple[Counted, Counted]:
    """TRL's update and ours, of `prefix_flops.CAPTIONS` on one image.

    Args:
        mode: "lora" or "full": what trains, of both.
        checkpointing: layers are computed again in the backward pass, of both.
    """
    encoder = qwen(mode, checkpointing)
    vocabulary, width = encoder.head.weight.shape
    rows, row = (update(encoder, shared, checkpointing=checkpointing) for shared in (False, True))
    theirs = Counted(len(CAPTIONS) * tower(), rows.linear + rows.attention, head(sum(CAPTIONS), width, vocabulary))
    return theirs, Counted(tower(), row.linear + row.attention, row.head)


def main() -> None:
    print("| trained | TRL: tower | language model | head | ours: tower | language model | head | ours / TRL |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (mode, checkpointing) in MODES.items():
        theirs, ours = counted(mode, checkpointing)
        cells = [f"{part / 1e12:.1f}" for c in (theirs, ours) for part in (c.tower, c.language, c.head)]
        print(f"| {name} | {' | '.join(cells)} | {ours.total / theirs.total:.3f} |", flush=True)


if __name__ == "__main__":
    main()
