"""The decoder: an SD3 transformer with its VAE and noise schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]


class Decoder(nn.Module):
    """SD3 (flow matching, v = ε − x0) conditioned on projected encoder states alone.

    Args:
        transformer: an `SD3Transformer2DModel`.
        vae: an `AutoencoderKL` with `scaling_factor` and `shift_factor`.
        scheduler: a `FlowMatchEulerDiscreteScheduler`, the source of the σ table.
        pooled: (D,) the pooled text condition, one constant for every prompt (METHOD §1).
    """

    pooled: Tensor
    transformer: Any
    vae: Any

    def __init__(self, transformer, vae, scheduler, pooled: Tensor):
        super().__init__()
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.register_buffer("pooled", pooled)
        self.has_adapter = False
        self.reference_copy: nn.Module | None = None
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.pooled.device

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image of `resolution` pixels."""
        side = resolution // self.downscale
        return self.transformer.config.in_channels, side, side

    # ---- what trains ------------------------------------------------------------------------------------------------

    def prepare_training(self, mode: str, rank: int, alpha: int) -> None:
        """Decides what may train: "lora" adds an adapter on the eight attention projections, "full" adds nothing."""
        if mode == "lora":
            from peft import LoraConfig

            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            self.transformer.add_adapter(config)
            for name, parameter in self.transformer.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.float()  # whatever the base is kept in
            self.has_adapter = True
            self.freeze()

    def trainable(self) -> list[nn.Parameter]:
        """Makes the policy trainable and returns its parameters: the adapter's, or the whole transformer's."""
        parameters = [p for name, p in self.transformer.named_parameters() if not self.has_adapter or ".lora_" in name]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def checkpoint_gradients(self) -> None:
        """From now on blocks of transformer and VAE are computed again in the backward pass, not kept for it."""
        self.transformer.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def freeze(self) -> None:
        """Nothing of the decoder trains."""
        self.transformer.requires_grad_(False)

    def keep_reference(self) -> None:
        """When the transformer trains in full: keeps a frozen copy of it as it is now, for the KL term."""
        if not self.has_adapter:
            self.reference_copy = copy.deepcopy(self.transformer).requires_grad_(False)

    @contextmanager
    def acting_as_reference(self) -> Iterator[None]:
        """Within, `velocity` is the reference's: the adapter is off, or the frozen copy computes."""
        if self.has_adapter:
            self.transformer.disable_adapters()
        else:
            self.transformer, policy = self.reference_copy, self.transformer
        try:
            yield
        finally:
            if self.has_adapter:
                self.transformer.enable_adapters()
            else:
                self.transformer = policy

    # ---- what it computes -------------------------------------------------------------------------------------------

    def sigmas(self, steps: int) -> Tensor:
        """The schedule's noise levels, fp32 (steps + 1,), from about 1 down to 0."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas.to(self.device, torch.float32)

    def velocity(self, latents: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """v_θ(x_σ, σ, c): (B, C, H, W) from latents (B, C, H, W), sigma () or (B,), context (B, L, D)."""
        dtype = self.transformer.dtype
        batch = latents.shape[0]
        return self.transformer(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=context.to(dtype),
            pooled_projections=self.pooled.to(dtype).expand(batch, -1),
            timestep=sigma.expand(batch) * self.scheduler.config.num_train_timesteps,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]: the posterior's mean, shifted and scaled."""
        mean = self.vae.encode(images.to(self.vae.dtype) * 2 - 1).latent_dist.mode()
        return (mean.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), fp32 in [0, 1], of latents (B, C, h, w)."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
