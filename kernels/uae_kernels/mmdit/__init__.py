"""Fused parts of Stable Diffusion 3's transformer (arXiv 2403.03206), and what puts them into diffusers' own."""

from ..reference.mmdit.fp8 import Quantized
from ..reference.mmdit.gated_residual import Modulated, Stream
from ..reference.mmdit.qk_norm import Projections
from .calibration import calibrate
from .fp8 import fp8_linear, quantize_rows
from .gated_residual import gated_residual, layer_norm_modulate
from .joint_attention import joint_attention
from .modulation_table import ModulationTable
from .patch import accelerate_sd3, restore_sd3
from .products import Fp8Calibration
from .qk_norm import qk_norm

__all__ = [
    "Fp8Calibration",
    "Modulated",
    "ModulationTable",
    "Projections",
    "Quantized",
    "Stream",
    "accelerate_sd3",
    "calibrate",
    "fp8_linear",
    "gated_residual",
    "joint_attention",
    "layer_norm_modulate",
    "qk_norm",
    "quantize_rows",
    "restore_sd3",
]
