"""Fused parts of Stable Diffusion 3's transformer (arXiv 2403.03206), and what puts them into diffusers' own."""

from ..reference.mmdit.gated_residual import Modulated, Stream
from ..reference.mmdit.qk_norm import Projections
from .gated_residual import gated_residual, layer_norm_modulate
from .joint_attention import joint_attention
from .modulation_table import ModulationTable
from .patch import accelerate_sd3, restore_sd3
from .qk_norm import qk_norm

__all__ = [
    "Modulated",
    "ModulationTable",
    "Projections",
    "Stream",
    "accelerate_sd3",
    "gated_residual",
    "joint_attention",
    "layer_norm_modulate",
    "qk_norm",
    "restore_sd3",
]
