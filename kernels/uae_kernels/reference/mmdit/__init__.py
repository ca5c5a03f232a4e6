"""Definitions of the ops of `uae_kernels.mmdit`."""

from .gated_residual import gated_residual, layer_norm_modulate
from .qk_norm import qk_norm

__all__ = ["gated_residual", "layer_norm_modulate", "qk_norm"]
