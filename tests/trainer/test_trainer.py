"""Whole runs of a few steps: what they leave, how they stop, and that going on changes nothing."""

import json

import pytest
import torch
from equal_runs import differing_tensors, rows

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.config import ConfigError
from uae_fast.logging import timeless
from uae_fast.models.loading import load_run
from uae_fast.trainer import train


def test_a_run_leaves_what_it_promises(world, small_config):
    config = small_config(world, "stages=[0,1,2,3]", "reporters=[tensorboard]", "stage2.lr=1e-2")
    run = train(config)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"seed", "minutes", "ceiling", "before", "stage0", "stage1", "stage2", "stage3"}
    keys = "reward reward_stderr reward_gain_stderr attribute_recall attribute_precision caption_tokens accuracy"
    assert set(summary["stage2"]) == set(keys.split())
    assert summary["before"]["reward_gain_stderr"] is None and summary["stage2"]["reward_gain_stderr"] > 0
    samples = [json.loads(line) for line in (run / "samples/before/scores.jsonl").read_text().splitlines()]
    mean = sum(row["reward"] for row in samples) / 8
    assert summary["before"]["reward"] == pytest.approx(mean) and len(samples) == 8
    for moment in ("source", "ceiling", "before", "stage3"):
        assert len(list((run / "samples" / moment).glob("*.png"))) == 2
    moments = [read_state(path)["moment"] for path in checkpoints(run / "checkpoints")]
    assert moments == [None, "stage0", "stage1", "stage2", "stage3"]


def test_stages_2_and_3_need_no_captions(own_world, world, small_config):
    """Without captions.jsonl they train, and train the same."""
    for split in ("train", "heldout"):
        (own_world / split / "captions.jsonl").unlink()
    blind = train(small_config(own_world, "stages=[2,3]", run="blind"))
    seeing = train(small_config(world, "stages=[2,3]", run="seeing"))
    assert list(map(timeless, rows(blind))) == list(map(timeless, rows(seeing)))
    assert differing_tensors(*(checkpoints(run / "checkpoints")[-1] for run in (blind, seeing))) == []
    summary = json.loads((blind / "summary.json").read_text())
    assert summary["ceiling"] is None and summary["stage3"]["attribute_recall"] is None
    with pytest.raises(ConfigError, match=r"captions\.jsonl"):
        train(small_config(own_world, "stages=[1]", run="needs"))


def test_broken_images_are_named_skipped_and_counted(own_world, small_config, capsys):
    (own_world / "train" / "scene-00007.png").write_bytes(b"not a picture")
    (own_world / "train" / "scene-00009.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="2 of the 64 images"):
        train(small_config(own_world, "stages=[2]"))
    run = train(small_config(own_world, "stages=[2]", "data.max_bad=0.05"))
    output = capsys.readouterr().out
    assert "scene-00007.png" in output and "scene-00009.png" in output
    assert {row["skipped_images"] for row in rows(run)} == {2}


def test_a_run_is_not_overwritten(world, small_config):
    config = small_config(world, "stages=[2]", "evaluate.images=0")
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        train(config, resume=True)
    train(config)
    with pytest.raises(ConfigError, match="--resume"):
        train(config)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_moments_of_a_run_can_be_loaded(world, small_config, mode):
    config = small_config(world, f"models.encoder={mode}", f"models.decoder={mode}", "stage2.lr=1e-2", "stage3.lr=1e-2")
    run = train(config)
    caption = "a red circle top-left on white"
    found = {}
    for moment in ("before", "stage1", "stage2", "stage3"):
        _, models = load_run(run, moment)
        context = models.condition([caption])
        latents = torch.ones(1, *models.decoder.latent_shape(32))
        with torch.no_grad():
            found[moment] = (
                models.encoder.read([caption], "policy")[0],
                context,
                models.decoder.velocity(latents, torch.tensor(0.5), context),
            )
    moves = (("before", "stage1", (1, 1, 1)), ("stage1", "stage2", (1, 0, 0)), ("stage2", "stage3", (0, 0, 1)))
    for earlier, later, moved in moves:
        changed = [not torch.equal(a, b) for a, b in zip(found[earlier], found[later], strict=True)]
        assert changed == list(map(bool, moved)), (earlier, later)
    with pytest.raises(ConfigError, match="stage0"):
        load_run(run, "stage0")
