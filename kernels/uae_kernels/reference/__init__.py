"""Each op in plain, differentiable PyTorch, with the signature of the public function: the definition."""

from .advantages import group_advantages
from .flow_grpo_loss import flow_grpo_loss
from .flow_step import flow_step
from .grpo_loss import grpo_loss
from .linear_grpo_loss import linear_grpo_loss
from .linear_logprobs import linear_logprobs
from .segment_attention import segment_attention
from .shared_prefix_attention import shared_prefix_attention
from .token_logprobs import token_logprobs

__all__ = [
    "flow_grpo_loss",
    "flow_step",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprobs",
    "segment_attention",
    "shared_prefix_attention",
    "token_logprobs",
]
