"""The reward: how well a reconstruction matches its source in an image encoder's eyes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Reward(nn.Module):
    """R(x, x~) = cos(f(x), f(x~)) with a frozen image encoder f (METHOD §1, §5).

    Images are resized bicubically straight to the encoder's square input, without a crop, and normalised with its
    mean and standard deviation; reconstructions come as tensors, so gradients flow through and nothing touches a file.

    Args:
        model: a `CLIPModel`.
        mean, std: the encoder's normalisation, three numbers each, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.size = model.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D), fp32, of images (B, 3, H, W) in [0, 1]."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = ((images - self.mean) / self.std).to(self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def embed_sources(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings (B, D) of source images of any size."""
        return torch.cat([self.embed(to_tensor(image).to(self.mean.device)) for image in images])

    def forward(self, images: Tensor, source: Tensor) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) against source embeddings (B, D)."""
        return (self.embed(images) * source).sum(-1)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a tensor (1, 3, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
