"""The reward: how well a reconstruction matches its source in an image encoder's eyes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..transfer import sent

SOURCES = 16_384  # embeddings of source images that are kept, those used last: 50 MB of CLIP ViT-L/14's


FACTOR = 40  # by which a GPU makes images smaller: PyTorch's kernel has shared memory for 47


class _Bicubic(torch.autograd.Function):
    """Resizing with antialiasing, whose gradient is two matrix products.

    PyTorch's own adds up in no fixed order on a GPU, and raises where `deterministic` is asked for. Beyond `FACTOR`, a
    photograph for a small encoder, the host resizes.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.sides = images.shape[-2:]
        far = any(side > FACTOR * new for side, new in zip(ctx.sides, size, strict=True))
        return F.interpolate(images.cpu() if far else images, size, mode="bicubic", antialias=True).to(images.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        rows, columns = (_weights(*sides, gradient) for sides in zip(ctx.sides, gradient.shape[-2:], strict=True))
        return rows.T @ gradient @ columns, None


def _weights(side: int, size: int, like: Tensor) -> Tensor:
    """The matrix (size, side) that resizes a column of `side` pixels."""
    columns = torch.eye(side, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(columns, (size, side), mode="bicubic", antialias=True)[0, 0]


class ImageEncoder(nn.Module):
    """A frozen image encoder f: the image tower of a CLIP or a SigLIP, or the CLS token of a DINOv2 or DINOv3.

    Images are resized bicubically straight to the encoder's square input, without a crop, and normalised with its
    mean and standard deviation (METHOD §5); gradients flow through.

    Args:
        model: a `CLIPModel`, `SiglipModel`, `Dinov2Model` or `DINOv3ViTModel`.
        mean, std: the encoder's normalisation, three numbers each, for pixels in [0, 1].
        size: side of its input in pixels; None for the one of its configuration.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model, mean: Sequence[float], std: Sequence[float], size: int | None = None):
        super().__init__()
        self.model = model
        self.size = size or getattr(model.config, "vision_config", model.config).image_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D), fp32, of images (B, 3, H, W) in [0, 1]."""
        if images.shape[-2:] != (self.size, self.size):
            images = _Bicubic.apply(images, (self.size, self.size)).clamp(0, 1)
        pixels = ((images - self.mean) / self.std).to(self.model.dtype)
        if hasattr(self.model, "get_image_features"):
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        else:
            features = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return F.normalize(features.float(), dim=-1)


class Reward(nn.Module):
    """R(x, x~) = Σ w_i cos(f_i(x), f_i(x~)) with frozen image encoders f_i (METHOD §1, §5), Σ w_i = 1.

    An embedding is the encoders' unit embeddings side by side, each times √w_i: the reward is one dot product.
    Reconstructions come as tensors, so gradients flow through and nothing touches a file.

    Args:
        encoders: the f_i.
        weights: the w_i, of any sum above 0; equal ones if empty.
    """

    def __init__(self, encoders: Sequence[ImageEncoder], weights: Sequence[float] = ()):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.weights = [weight / sum(weights or [1] * len(encoders)) for weight in weights or [1] * len(encoders)]
        self.sources: dict[Hashable, Tensor] = {}

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (B, ΣD) of length 1, fp32, of images (B, 3, H, W) in [0, 1]."""
        parts = zip(self.encoders, self.weights, strict=True)
        return torch.cat([math.sqrt(weight) * encoder(images) for encoder, weight in parts], -1)

    @torch.no_grad()
    def embed_sources(self, images: Sequence[Image.Image], names: Sequence[Hashable] | None = None) -> Tensor:
        """Embeddings (B, ΣD) of source images of any size, each computed by itself, once for each of `names`.

        The `SOURCES` names used last are remembered.
        """

        def one(image: Image.Image) -> Tensor:
            return self.embed(sent(to_tensor(image), self.encoders[0].get_buffer("mean").device))

        if names is None:
            return torch.cat([one(image) for image in images])
        for name, image in zip(names, images, strict=True):
            known = self.sources.pop(name, None)
            self.sources[name] = one(image) if known is None else known  # the last of the dictionary
        found = torch.cat([self.sources[name] for name in names])
        for name in list(self.sources)[:-SOURCES]:
            del self.sources[name]
        return found

    def forward(self, images: Tensor, source: Tensor) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) against source embeddings (B, ΣD)."""
        return (self.embed(images) * source).sum(-1)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a tensor (1, 3, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
