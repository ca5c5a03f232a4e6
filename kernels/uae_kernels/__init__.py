"""GRPO and flow-policy ops for any RL codebase: exact log-probs, group advantages, policy losses, SDE
steps."""

from . import reference
from ._common import FlowStep, GRPOLoss
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
    "FlowStep",
    "GRPOLoss",
    "flow_grpo_loss",
    "flow_step",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprobs",
    "reference",
    "segment_attention",
    "shared_prefix_attention",
    "token_logprobs",
]
