"""The counts of TRL's update: its parts by hand, and what ours must stay below."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.trainer import trl_flops
from benchmarks.trainer.prefix_flops import MODES


def test_trls_head_is_three_products():
    assert trl_flops.head(100, 64, 40_000) == 3 * 2 * 100 * 64 * 40_000


def test_the_tower_by_hand():
    """Of Qwen2.5-VL: 32 layers of which 4 attend to the whole image, the others to windows of 112² pixels."""
    patches, width, inner, side = (504 // 14) ** 2, 1280, 3420, 504 // 14
    layer = 2 * patches * (4 * width**2 + 3 * width * inner)
    edges = [8] * (side // 8) + ([side % 8] if side % 8 else [])
    windows = sum((a * b) ** 2 for a in edges for b in edges)
    attention = 4 * width * (4 * patches**2 + 28 * windows)
    merger = 2 * (patches // 4) * (5120 * 5120 + 5120 * 2048)
    embedding = 2 * patches * width * (3 * 2 * 14 * 14)
    assert trl_flops.tower() == 32 * layer + attention + merger + embedding
    assert trl_flops.tower(2) == 2 * trl_flops.tower()


@pytest.mark.parametrize("mode, checkpointing", MODES.values(), ids=MODES)
def test_ours_computes_little_more_than_half_of_it(mode, checkpointing):
    """Eight captions of 300 tokens on 504 × 504 pixels, by Qwen2.5-VL-3B."""
    theirs, ours = trl_flops.counted(mode, checkpointing)
    assert theirs.head == 1.5 * ours.head and theirs.tower == 8 * ours.tower
    assert 0.4 * theirs.total < ours.total <= trl_flops.BOUND * theirs.total
    assert ours.language <= trl_flops.BOUND * theirs.language
