"""Reads attributes off a picture: the judge of reconstructions, trained apart from the reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Scene

EMPTY = len(SHAPES)  # the class of a cell without an object
GROUPS = (len(BACKGROUNDS), *[len(SHAPES) + 1, len(COLORS)] * len(POSITIONS))


def scene_labels(scenes: Sequence[Scene]) -> Tensor:
    """Class indices (B, 9): background, then shape and color of each cell; an empty cell's color is −1."""
    rows = []
    for scene in scenes:
        row = [list(BACKGROUNDS).index(scene.background)] + [EMPTY, -1] * len(POSITIONS)
        for item in scene.objects:
            cell = 1 + 2 * POSITIONS.index(item.position)
            row[cell : cell + 2] = SHAPES.index(item.shape), list(COLORS).index(item.color)
        rows.append(row)
    return torch.tensor(rows)


def attribute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the attribute groups; logits (B, sum(GROUPS)), labels (B, 9)."""
    parts = logits.split(GROUPS, 1)
    return torch.stack([F.cross_entropy(part, labels[:, i], ignore_index=-1) for i, part in enumerate(parts)]).mean()


class Classifier(nn.Module):
    """A small convolutional network from pictures (B, 3, 32, 32) in [0, 1] to attribute logits (B, sum(GROUPS))."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(48, 16, 1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 64, sum(GROUPS)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images - 0.5)

    @torch.no_grad()
    def accuracy(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Share of each scene's attributes that its reconstruction shows, (B,).

        The attributes are the background and, for every object, its position (something is drawn there), shape and
        color; an object drawn into an empty cell counts as one more attribute, missed.
        """
        labels = scene_labels(scenes)
        read = torch.stack([part.argmax(1) for part in self(images).split(GROUPS, 1)], 1).cpu()
        there, drawn = labels[:, 1::2] != EMPTY, read[:, 1::2] != EMPTY
        shape_right = (there & (read[:, 1::2] == labels[:, 1::2])).sum(1)
        color_right = (there & drawn & (read[:, 2::2] == labels[:, 2::2])).sum(1)
        right = (read[:, 0] == labels[:, 0]) + (there & drawn).sum(1) + shape_right + color_right
        return right / (1 + 3 * there.sum(1) + (~there & drawn).sum(1))

    def save(self, folder: Path) -> None:
        """Writes `classifier.safetensors` (fp16) into `folder`."""
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "classifier.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Reads what `save` wrote."""
        model = cls()
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "classifier.safetensors").items()})
        return model.requires_grad_(False).eval()
