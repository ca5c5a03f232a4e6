"""Scenes as files: what training and evaluation read."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from .scenes import sample_scenes


def export(folder: Path, split: str, count: int, seed: int) -> None:
    """Writes PNG files and ``captions.jsonl`` ({file, caption, attributes}) of `count` scenes of a split.

    `attributes` are the attribute words of the complete caption, in its order.

    Raises:
        ValueError: the split has fewer scenes, or `folder` has files already.
    """
    scenes = sample_scenes(split, count, seed)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w") as file:
        for i, scene in enumerate(scenes):
            name = f"scene-{i:05d}.png"
            Image.fromarray(scene.draw()).save(folder / name)
            row = {"file": name, "caption": scene.caption(), "attributes": scene.attributes()}
            file.write(json.dumps(row) + "\n")
