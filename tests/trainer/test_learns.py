"""Learning guards: a minute of stage 2 and a minute of stage 3 must raise the reward."""

import json

from uae_fast.config import load_config
from uae_fast.tiny.export import export
from uae_fast.trainer import train


def run(folder, heldout, *overrides):
    places = [f"run={folder / 'run'}", f"data.train={folder / 'train'}", f"data.heldout={folder / heldout}"]
    return json.loads((train(load_config("tiny", [*places, *overrides])) / "summary.json").read_text())


def test_stage_2_learns_to_say_more_of_scenes_it_never_saw(tmp_path):
    export(tmp_path / "train", "train", 256, seed=0)
    export(tmp_path / "heldout", "heldout", 256, seed=0)
    summary = run(tmp_path, "heldout", "stages=[2]", "stage2.steps=40")
    before, after = summary["before"], summary["stage2"]
    assert after["reward"] - before["reward"] > 0.1
    assert after["attribute_recall"] - before["attribute_recall"] > 0.1
    assert after["attribute_precision"] > 0.95


def test_stage_3_learns_to_draw_what_its_captions_leave_out(tmp_path):
    """Sixteen scenes with one terse caption each: the decoder finds out what else is in them, by reward alone."""
    export(tmp_path / "train", "train", 16, seed=0)
    summary = run(
        tmp_path, "train", "stages=[3]", "caption.temperature=0.01", "stage3.steps=25", "stage3.images=16",
        "stage3.group_size=8", "stage3.lr=5e-5", "stage3.kind=cps", "stage3.noise_level=0.8", "stage3.window_end=3",
    )  # fmt: skip
    assert summary["stage3"]["reward"] - summary["before"]["reward"] > 0.02
