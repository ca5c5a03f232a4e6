"""Learning guards: a minute of stage 2 and a minute of stage 3 must raise the reward on held-out scenes."""

import json

import pytest

from uae_fast.config import load_config
from uae_fast.tiny.export import export
from uae_fast.trainer import train


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learns")
    export(folder / "train", "train", 512, seed=0)
    export(folder / "heldout", "heldout", 512, seed=0)
    places = [f"run={folder / 'run'}", f"data.train={folder / 'train'}", f"data.heldout={folder / 'heldout'}"]
    run = train(load_config("tiny", [*places, "stages=[2,3]", "stage2.steps=40", "evaluate.images=512"]))
    return json.loads((run / "summary.json").read_text())


def test_stage_2_learns_to_say_more(summary):
    before, after = summary["before"], summary["stage2"]
    assert after["reward"] - before["reward"] > 0.1
    assert after["attribute_recall"] - before["attribute_recall"] > 0.1
    assert after["attribute_precision"] > 0.95


def test_stage_3_learns_to_draw_what_is_said(summary):
    stage2, stage3 = summary["stage2"], summary["stage3"]
    assert stage3["reward"] - stage2["reward"] > max(0.002, 2 * stage3["reward_gain_stderr"])
