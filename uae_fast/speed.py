"""How fast a step is: seconds, images and tokens a second, memory, and the share of a GPU's peak that it makes use of.

That share, `mfu`, takes the FLOPs a step is worth by formula: the products of linear layers, 2·in·out a token, and of
attention, 4·width a pair of tokens, of the language model, its head, the projector and the decoder's transformer, each
as often as the stage's definition needs it: no padding of captions, no prompt twice for one image, nothing that is only
computed again in a backward pass. A pass with gradients is worth 3 forward passes where the weights train in full, 2
under an adapter or through a frozen head. Vision tower, VAE, image encoders and adapters are left out: it is a lower
bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config
from .models import Models
from .rollout.renders import Shortcuts
from .stages import Stage
from .team import Team

# FLOP/s of dense bf16 products by the maker's data sheets; the first name that the device's contains
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Of the GPU in bf16; None where it is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Sizes:
    """FLOPs of forward passes.

    Attributes:
        language: of the language model's layers, a token.
        language_attention: of the same, a token and token it attends to.
        head, projector: a token.
        image, context, row: of the decoder's transformer, an image token, a context token, and an image.
        attention, dual_attention: of its attention, a pair of tokens of image and context; a pair of image tokens.
    """

    language: int
    language_attention: int
    head: int
    projector: int
    image: int
    context: int
    row: int
    attention: int
    dual_attention: int

    @classmethod
    def of(cls, models: Models) -> Sizes:
        text, transformer = models.encoder.model.config.text_config, models.decoder.transformer
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        parts = {"image": 2 * transformer.pos_embed.proj.weight.numel(), "context": 0, "row": 0}
        for name, layer in _linears(transformer):
            if "norm" in name or name.startswith("time_text_embed"):
                part = "row"
            elif any(word in name for word in ("add_", "ff_context", "context_embedder")):
                part = "context"
            else:
                part = "image"
            parts[part] += 2 * layer.in_features * layer.out_features
        return cls(
            language=_products(models.encoder.model.model.language_model),
            language_attention=4 * text.num_hidden_layers * text.hidden_size,
            head=2 * text.hidden_size * text.vocab_size,
            projector=_products(models.projector),
            **parts,
            attention=4 * config.num_layers * width,
            dual_attention=4 * len(config.dual_attention_layers) * width,
        )

    def read(self, tokens: float, before: float = 0.0) -> float:
        """A text of so many tokens behind others that have been read: each attends to these and half of its own."""
        return tokens * (self.language + self.language_attention * (before + tokens / 2))

    def draw(self, image: int, context: int) -> float:
        """One velocity of an image of so many tokens."""
        everything = self.attention * (image + context) ** 2 + self.dual_attention * image**2
        return image * self.image + context * self.context + self.row + everything


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return [(name, part) for name, part in found if ".lora_" not in name]


def _products(module: nn.Module) -> int:
    return sum(2 * layer.in_features * layer.out_features for _, layer in _linears(module))


def image_tokens(models: Models, resolution: int) -> int:
    """Of a square image of `resolution` pixels in the decoder."""
    decoder = models.decoder
    return (decoder.latent_shape(resolution)[1] // decoder.transformer.config.patch_size) ** 2


def drawing_passes(config: Config) -> tuple[int, int]:
    """Forward passes of an image that stage 2 rewards: the prompt's, and the unconditional ones.

    A cheaper sampler leaves some out; what stages 1 and 3 draw takes all.
    """
    cheaper = config.cheaper_sampler
    steps = cheaper.steps or config.render.steps
    shortcuts = Shortcuts(cheaper.guided_part, tuple(cheaper.reuse))
    computed = [step for step in range(steps) if step not in shortcuts.reuse]
    guided = [step for step in computed if shortcuts.guides(step, steps)]
    return len(computed), len(guided) * (config.render.guidance_scale != 1)


def step_flops(number: int, config: Config, sizes: Sizes, image: int, values: dict[str, float]) -> float:
    """What one step of a stage is worth.

    Args:
        number: of the stage, 0 to 3.
        image: tokens of an image in the decoder.
        values: the step's metrics: of stages 2 and 3 "prompts/mean_length" and "completions/mean_length", of stage 3
            "window_start".
    """
    settings: Any = getattr(config, f"stage{number}")
    images, length, steps = settings.images, config.condition.length, config.render.steps
    trained = {part: 3 if getattr(config.models, part) == "full" else 2 for part in ("encoder", "decoder")}
    velocity = sizes.draw(image, length)
    condition = sizes.read(length) + length * sizes.projector
    if number == 0:
        return images * (sizes.read(length) + 3 * length * sizes.projector + trained["decoder"] * velocity)
    if number == 1:
        unguided, last = int(settings.guidance_scale != 1), settings.backprop_last_steps
        reading = trained["encoder"] * sizes.read(length) + 3 * length * sizes.projector
        passes = settings.sampler_steps * (1 + unguided) + last * (trained["decoder"] - 1)
        return images * (reading + passes * velocity)

    prompt, caption = values["prompts/mean_length"], values["completions/mean_length"]
    rows, reference = images * settings.group_size, int(settings.beta != 0)
    prompts = images * sizes.read(prompt)
    if number == 2:
        captions = rows * sizes.read(caption, prompt)
        written = prompts + captions + rows * caption * sizes.head
        drawn = rows * (condition + sum(drawing_passes(config)) * velocity)
        passes = reference + settings.updates * trained["encoder"]
        heads = reference + settings.updates * 2
        return written + drawn + passes * (prompts + captions) + heads * rows * caption * sizes.head
    unguided = int(settings.guidance_scale != 1)
    written = prompts + images * (sizes.read(caption, prompt) + caption * sizes.head + condition)
    start = values["window_start"]
    drawn = (start * images + (steps - start) * rows) * (1 + unguided)
    again = settings.window * rows * reference * (1 + unguided)
    trains = settings.window * rows * settings.updates * (trained["decoder"] + unguided)
    return written + (drawn + again + trains) * velocity


class Speed:
    """What the steps of a stage took: seconds, images and tokens a second, memory, and the share of the GPU's peak.

    Seconds are process 0's, images and tokens those of all processes, memory the most of one, the share of all GPUs.
    """

    def __init__(self, stage: Stage, config: Config):
        self.stage, self.config, self.device, self.team = stage, config, stage.models.decoder.device, Team()
        self.peak = peak_flops(self.device.type) if config.models.dtype == "bfloat16" else None
        self.sizes = None if self.peak is None else Sizes.of(stage.models)
        self.image = image_tokens(stage.models, config.data.resolution)

    def start(self) -> None:
        """A step begins."""
        self.began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def measure(self, values: dict[str, float], waited: float = 0.0) -> None:
        """The step is done: adds to its metrics. It has `waited` so many seconds for its images."""
        settings = self.stage.settings
        seconds, images = time.monotonic() - self.began, settings.images * getattr(settings, "group_size", 1)
        values["seconds/data"], values["seconds/update"] = waited, seconds - values["seconds/rollout"] - waited
        values["images_per_second"] = images / seconds
        if self.stage.trains == ("encoder",):
            values["tokens_per_second"] = images * values["completions/mean_length"] / seconds
        if self.device.type == "cuda":
            values["memory/peak_gb"] = max(self.team.exchange(torch.cuda.max_memory_allocated(self.device) / 2**30))
        if self.peak and self.sizes:
            worth = step_flops(int(self.stage.name[-1]), self.config, self.sizes, self.image, values)
            values["mfu"] = worth / (seconds * self.peak * self.team.size)
