"""A small world with exact ground truth: scenes, their pictures, their captions, and how right a caption is.

A scene has a background and one to three objects in the cells of a 2×2 grid. Objects of one scene differ in color and
in shape, so every attribute word occurs at most once in a complete caption and a caption can be scored word by word.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "cyan": (60, 200, 220),
}
SHAPES = ("circle", "square", "triangle")
POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (20, 20, 20)}
ATTRIBUTE_WORDS = frozenset((*COLORS, *SHAPES, *POSITIONS, *BACKGROUNDS))
FILLER_WORDS = ("a", "and", "on", "thing")

# How often a terse writer mentions an attribute of each kind.
TERSE_RATES = {"color": 0.6, "shape": 0.75, "position": 0.55, "background": 0.45}
HELD_OUT_SHARE = 8  # one scene in eight is never trained on


@dataclass(frozen=True)
class Object:
    """One object: `position` in POSITIONS, `color` in COLORS, `shape` in SHAPES."""

    position: str
    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """A background and one to three objects in reading order."""

    background: str
    objects: tuple[Object, ...]

    def attributes(self) -> list[str]:
        """The attribute words of the complete caption, in its order."""
        return attribute_words(self.caption())

    def caption(self) -> str:
        """The complete caption, e.g. "a red circle top-left and a blue square bottom-right on white"."""
        return _write(self, lambda kind: True)

    def terse_caption(self, rng: random.Random) -> str:
        """A caption that mentions each attribute with the probability of TERSE_RATES."""
        return _write(self, lambda kind: rng.random() < TERSE_RATES[kind])

    def draw(self) -> np.ndarray:
        """The picture, uint8 (IMAGE_SIZE, IMAGE_SIZE, 3), antialiased."""
        scale = 8
        cell = IMAGE_SIZE * scale // 2
        image = Image.new("RGB", (2 * cell, 2 * cell), BACKGROUNDS[self.background])
        pen = ImageDraw.Draw(image)
        for item in self.objects:
            row, column = divmod(POSITIONS.index(item.position), 2)
            x, y, r = column * cell + cell / 2, row * cell + cell / 2, cell * 0.38
            color = COLORS[item.color]
            if item.shape == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
            elif item.shape == "square":
                pen.rectangle((x - r, y - r, x + r, y + r), fill=color)
            else:
                pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=color)
        return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _write(scene: Scene, mention) -> str:
    phrases = []
    for item in scene.objects:
        color, shape, position = mention("color"), mention("shape"), mention("position")
        if color or shape or position:
            words = [item.color if color else "", item.shape if shape else "thing", item.position if position else ""]
            phrases.append(" ".join(["a", *filter(None, words)]))
    caption = " and ".join(phrases)
    if mention("background"):
        caption = f"{caption} on {scene.background}".strip()
    return caption


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the world (12,096) in one fixed order."""
    scenes = []
    for background, count in itertools.product(BACKGROUNDS, (1, 2, 3)):
        for positions in itertools.combinations(POSITIONS, count):
            for colors in itertools.permutations(COLORS, count):
                for shapes in itertools.permutations(SHAPES, count):
                    objects = tuple(map(Object, positions, colors, shapes))
                    scenes.append(Scene(background, objects))
    return tuple(scenes)


def split_scenes(split: str) -> list[Scene]:
    """The scenes of `split` ("train" or "heldout"); a scene belongs to exactly one."""
    held_out = set(random.Random(0).sample(range(len(all_scenes())), len(all_scenes()) // HELD_OUT_SHARE))
    return [scene for i, scene in enumerate(all_scenes()) if (i in held_out) == (split == "heldout")]


def sample_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """`count` different scenes of `split`, the same ones for the same seed.

    Raises:
        ValueError: the split has fewer than `count` scenes, or there is no such split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"no split {split!r}: choose train or heldout")
    scenes = split_scenes(split)
    if count > len(scenes):
        raise ValueError(f"the {split} split has {len(scenes)} scenes; {count} were asked for")
    return random.Random(seed).sample(scenes, count)


@cache
def scenes_by_caption() -> dict[str, Scene]:
    """Every scene by its complete caption."""
    return {scene.caption(): scene for scene in all_scenes()}


def attribute_words(caption: str) -> list[str]:
    """Reads any caption back: its attribute words, in order, repetitions included."""
    return [word for word in caption.split() if word in ATTRIBUTE_WORDS]


def caption_scores(caption: str, attributes: Sequence[str]) -> tuple[float, float | None]:
    """Recall and precision of a caption against the true attribute words.

    Recall is the share of `attributes` that the caption says. Precision is the share of its attribute words that are
    true, where a word said again counts as wrong; None for a caption that says none.
    """
    said = attribute_words(caption)
    right = len(set(said) & set(attributes))
    return right / len(attributes), right / len(said) if said else None
