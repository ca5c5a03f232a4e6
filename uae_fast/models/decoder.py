"""The decoder: an SD3 transformer with its VAE and noise schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import by_length
from .fp8 import calibrate_transformer, load_calibration, save_calibration

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class Decoder(nn.Module):
    """SD3 (flow matching, v = ε − x0) conditioned on projected encoder states alone.

    Args:
        transformer: an `SD3Transformer2DModel`.
        vae: an `AutoencoderKL` with `scaling_factor` and `shift_factor`.
        scheduler: a `FlowMatchEulerDiscreteScheduler`, the source of the σ table.
        pooled: (D,) the pooled text condition, one constant for every prompt (METHOD §1).
        vae_tiny: an `AutoencoderTiny` that turns latents into images in the VAE's stead (a cheaper sampler).
    """

    pooled: Tensor
    transformer: Any
    vae: Any
    vae_tiny: Any

    def __init__(self, transformer, vae, scheduler, pooled: Tensor, vae_tiny=None):
        super().__init__()
        self.transformer, self.vae, self.vae_tiny, self.scheduler = transformer, vae, vae_tiny, scheduler
        self.register_buffer("pooled", pooled.to(transformer.dtype))
        self.has_adapter = False
        self.reference_copy: nn.Module | None = None
        self.attention: str | None = None  # the accelerated transformer's backend
        self.records = False  # whether the sampler's loops become CUDA graphs
        self.loops: Any = None  # those that have, see rollout.graphs
        self._schedules: dict[int, Tensor] = {}
        self._tabulated: list[Tensor] = []  # the schedules that have a table
        self._table: Any = None  # a ModulationTable
        self.fp8 = False  # whether a frozen transformer draws in fp8
        self.fp8_file: Path | None = None  # where its calibration is looked for
        self.fp8_calibrates = True  # whether one is made, and kept there, where there is none; else tokens have scales
        self._calibration: Any = None  # an Fp8Calibration
        self._calibrated: Tensor | None = None  # the schedule it is for
        self.runs: list[dict[str, Any]] | None = None  # what the transformer is given, while that is recorded
        self._uses_table = self._uses_fp8 = False  # the accelerated transformer, as it is now
        self._frozen, self._asked = True, False  # whether fp8_file was asked for a calibration
        for part in filter(None, (vae, vae_tiny)):
            part.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.pooled.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights; latents are fp32 whatever it is."""
        return self.transformer.dtype

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image of `resolution` pixels."""
        side = resolution // self.downscale
        return self.transformer.config.in_channels, side, side

    # ---- how fast it computes: the same numbers up to rounding ------------------------------------------------------

    def accelerate(self, attention: str = "auto", schedules: Sequence[int] = (), fp8: bool = False) -> None:
        """From now on the transformer computes by `uae_kernels.mmdit`; parameters and their names stay as they are.

        While nothing that makes modulations trains, and unless bitsandbytes keeps their layers, a table holds them for
        the levels of `schedules`, and their layers' weights wait in the host's memory. Under an adapter it is made now;
        else when it is first needed, and anew after training.

        With `fp8` the same goes for the products of a frozen transformer and their weights, at the levels of the
        schedule it is calibrated for (`calibrate`), and at any where it draws without calibration. What trains, its
        samples and its log-probs are computed with the weights themselves, which are put back for it.

        Args:
            attention: the backend, see `uae_kernels.mmdit.joint_attention`.
            schedules: different numbers of steps. The table serves the elements of what `sigmas` gives for them; at any
                other level modulations are computed.
            fp8: whether it draws in fp8 while it is frozen.

        Raises:
            RuntimeError: fp8 on a GPU older than sm_89, or a backend that is not installed.
        """
        from uae_kernels.mmdit import accelerate_sd3
        from uae_kernels.mmdit.modulation_table import may_wait, modulation_layers
        from uae_kernels.mmdit.products import check_products

        if fp8:
            check_products(self.transformer)
        accelerate_sd3(self.transformer, attention=attention)
        self.attention, self.fp8 = attention, fp8
        plain = all(map(may_wait, modulation_layers(self.transformer).values()))
        self._tabulated = [self.sigmas(steps) for steps in schedules] if plain else []
        self._use_table(bool(self._tabulated) and self.has_adapter)

    def _use_table(self, wanted: bool, fp8: bool = False) -> None:
        """Has a table stand in for the modulations, and the products computed in fp8, or not."""
        if (wanted, fp8) == (self._uses_table, self._uses_fp8):
            return
        from uae_kernels.mmdit import ModulationTable, accelerate_sd3, restore_sd3

        restore_sd3(self.transformer)
        if wanted and not (self._table and self._table.was_made_from(self.transformer)):
            times = self._timesteps(torch.cat([sigmas[:-1] for sigmas in self._tabulated]))
            self._table = ModulationTable(self.transformer, times, self.pooled.to(self.dtype))
        accelerate_sd3(
            self.transformer,
            fp8=(self._calibration or True) if fp8 else False,
            modulation_table=self._table if wanted else None,
            attention=self.attention or "auto",
        )
        self._uses_table, self._uses_fp8 = wanted, fp8

    @property
    def _draws_in_fp8(self) -> bool:
        return self.fp8 and self._frozen and self.runs is None

    def _in_fp8(self, sigma: Tensor) -> bool:
        """Whether σ is drawn at in fp8."""
        if not self._draws_in_fp8:
            return False
        if self._calibration is None:
            return not self.fp8_calibrates
        return sigma.dim() == 0 and _part_of(sigma, self._calibrated)

    def wants_calibration(self, steps: int) -> bool:
        """Whether to record drawings of this schedule for `calibrate` before any is drawn in fp8.

        A calibration that lies in `fp8_file` for the transformer as it is now is taken from there.
        """
        sigmas = self.sigmas(steps)
        if not self._draws_in_fp8 or (self._calibration is not None and _part_of(sigmas, self._calibrated)):
            return False
        if self.fp8_file is not None and self.fp8_file.is_file() and (self.fp8_calibrates or not self._asked):
            self._asked = True
            try:
                made = load_calibration(self.fp8_file, self.transformer, self._timesteps(sigmas[:-1]))
                self._calibration, self._calibrated = made, sigmas
                return False
            except ValueError as error:
                print(f"fp8: {error}", flush=True)
        return self.fp8_calibrates

    @contextmanager
    def recorded(self) -> Iterator[list[dict[str, Any]]]:
        """Within, what the transformer is given is kept in `runs`, for `calibrate`, and nothing is drawn in fp8."""
        self.runs = []
        try:
            yield self.runs
        finally:
            self.runs = None

    def calibrate(self, runs: Sequence[dict[str, Any]], steps: int) -> None:
        """Fits fp8's scales to drawings of a schedule, and keeps them in `fp8_file`."""
        from uae_kernels.mmdit import accelerate_sd3, restore_sd3

        table, attention = self._table if self._uses_table else None, self.attention or "auto"
        restore_sd3(self.transformer)
        try:
            self._calibration = calibrate_transformer(self.transformer, runs, table, attention)
        finally:
            accelerate_sd3(self.transformer, attention=attention)
            self._uses_table = False
        self._calibrated = self.sigmas(steps)
        if self.fp8_file is not None:
            save_calibration(self.fp8_file, self._calibration)

    @property
    def table(self) -> Any:
        """The `ModulationTable` in use, or None."""
        return self._table if self._uses_table else None

    def ready(self, sigma: Tensor) -> None:
        """Takes the table into use if it serves σ, else out of it, and fp8 likewise, as `velocity` does first."""
        if self.attention is not None:
            self._use_table(self._in_table(sigma), self._in_fp8(sigma))

    def _in_table(self, sigma: Tensor) -> bool:
        """Whether a table serves σ, told from where σ lies: its value stays on the device."""
        fixed = self._frozen or self.has_adapter  # modulations do not train
        return fixed and not sigma.dim() and any(_part_of(sigma, sigmas) for sigmas in self._tabulated)

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
        """Makes the policy trainable and returns its parameters: the adapter's, or the whole transformer's.

        Until `freeze` nothing is computed in fp8.
        """
        self._use_table(self._uses_table and self.has_adapter)
        self._frozen, self._calibration, self._asked = False, None, False
        if not self.has_adapter:
            self._table = None
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
        self._frozen = True
        self.transformer.requires_grad_(False)

    def keep_reference(self) -> None:
        """When the transformer trains in full: keeps a frozen copy of it as it is now, for the KL term."""
        if not self.has_adapter:
            self._use_table(False)
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
        """The schedule's noise levels, fp32 (steps + 1,), from about 1 down to 0; always the same tensor."""
        known = self._schedules.get(steps)
        if known is None or known.device != self.device:
            self.scheduler.set_timesteps(steps)
            known = self._schedules[steps] = self.scheduler.sigmas.to(self.device, torch.float32)
        return known

    def _timesteps(self, sigma: Tensor) -> Tensor:
        return sigma * self.scheduler.config.num_train_timesteps

    def velocity(self, latents: Tensor, sigma: Tensor, context: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """v_θ(x_σ, σ, c), (B, C, H, W).

        Args:
            latents: (B, C, H, W).
            sigma: () or (B,).
            context: (B, L, D).
            lengths: how much of its context each row sees; None is all of it. Rows of one length are computed together,
                padded to B rows.
        """
        self.ready(sigma)
        dtype, time = self.dtype, self._timesteps(sigma)

        def compute(c: Tensor, x: Tensor, t: Tensor) -> Tensor:
            given = {
                "hidden_states": x.to(dtype),
                "encoder_hidden_states": c.to(dtype),
                "pooled_projections": self.pooled.to(dtype).expand(len(t), -1),
                "timestep": t,
            }
            if self.runs is not None:
                self.runs.append(given)
            return self.transformer(**given, return_dict=False)[0]

        if time.dim():
            return by_length(compute, len(latents), lengths, context, latents, time)
        # One level has one row of modulations, whatever the batch
        return by_length(partial(compute, t=time.view(1)), len(latents), lengths, context, latents)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]: the posterior's mean, shifted and scaled."""
        mean = self.vae.encode(images.to(self.vae.dtype) * 2 - 1).latent_dist.mode()
        return (mean.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), fp32 in [0, 1], of latents (B, C, h, w), by `vae_tiny` where there is one."""
        vae = self.vae if self.vae_tiny is None else self.vae_tiny
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        latents = latents.to(vae.dtype, memory_format=torch.channels_last)
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def _part_of(sigma: Tensor, sigmas: Tensor | None) -> bool:
    """Whether σ lies in a schedule's memory."""
    return sigmas is not None and sigma.untyped_storage()._cdata == sigmas.untyped_storage()._cdata
