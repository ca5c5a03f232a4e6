"""Fixtures of the trainer's and the commands' tests: a small exported world, and runs of a few steps on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with ``train`` (64 scenes) and ``heldout`` (24 scenes)."""
    from uae_fast.tiny.export import export

    folder = tmp_path_factory.mktemp("world")
    export(folder / "train", "train", 64, seed=0)
    export(folder / "heldout", "heldout", 24, seed=0)
    return folder


@pytest.fixture
def own_world(world, tmp_path) -> Path:
    """A copy of `world` that a test may spoil."""
    return Path(shutil.copytree(world, tmp_path / "world"))


@pytest.fixture
def small_config(tmp_path):
    """``small_config(world, "key=value", …)``: the tiny preset with batches and steps cut down."""
    from uae_fast.config import load_config

    def make(world: Path, *overrides: str, run: str = "run"):
        small = [
            f"run={tmp_path / run}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}",
            "evaluate.images=8", "evaluate.gallery=2", "render.batch=16", "checkpoint.every=2", "reporters=[]",
            "stage0.steps=2", "stage0.images=8", "stage0.micro_batch=8",
            "stage1.steps=2", "stage1.images=4", "stage1.micro_batch=4",
            "stage2.steps=2", "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8",
            "stage3.steps=2", "stage3.images=2", "stage3.group_size=4", "stage3.micro_batch=8",
        ]  # fmt: skip
        return load_config("tiny", [*small, *overrides])

    return make
