"""Definitions of the ops of `uae_kernels.mmdit`."""

from .fp8 import fp8_linear, quantize_rows
from .gated_residual import gated_residual, layer_norm_modulate
from .qk_norm import qk_norm

__all__ = ["fp8_linear", "gated_residual", "layer_norm_modulate", "qk_norm", "quantize_rows"]
