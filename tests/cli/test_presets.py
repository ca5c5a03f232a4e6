"""The presets that ship: sound before anything loads, and their paths through every stage on small models."""

import json
from pathlib import Path

import pytest
from layouts import write_decoder, write_encoder, write_image_encoder

from uae_fast.config import PRESETS, ConfigError, load_config, preset_names
from uae_fast.models.memory import GIB, PARTS, Predictor, worst
from uae_fast.models.sources import find_sources, shipped_shape
from uae_fast.trainer import train

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
FULL_SIZE = [name for name in preset_names() if name != "tiny"]


def test_the_presets_that_were_promised_ship():
    assert FULL_SIZE == ["paper", "sd35l_24gb", "sd35l_80gb", "sd35l_h200", "sd35m_16gb", "sd35m_24gb", "sd35m_80gb"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_preset_is_sound_and_pinned_without_a_network(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(name)
    sources = find_sources(config)
    for source in (sources.encoder, sources.decoder, *sources.rewards, sources.heldout):
        assert source.revision == shipped_shape(source.name)["revision"]
    assert config.stages == [0, 1, 2, 3] and config.run == f"runs/{name}"
    for override in (
        "stage2.group_size=1",
        "stage3.micro_batch=7",
        "stage3.window_end=10",
        "caption.image_tokens=200000",
    ):
        with pytest.raises(ConfigError):
            find_sources(load_config(name, [override]))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_preset_says_how_it_starts_and_what_is_only_predicted(name):
    head = [line for line in (PRESETS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith(f"#   uae-fast train {name} ") for line in head)
    text = "\n".join(head)
    assert (
        "Predicted" in text and f"uae-fast check {name}" in text and "measured" not in text.replace("not measured", "")
    )
    for stage in range(4):
        assert any(line.startswith(f"#   stage {stage} ") for line in head)


def stated(name):
    """GiB of each stage in a preset's header, with what it needs them for; and the preset's row in docs/models.md."""
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    head = [line.split(maxsplit=4)[3:] for line in lines if line.startswith("#   stage ")]
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    return head, [cell.strip() for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_table_of_the_docs_has_the_headers_numbers(name):
    head, row = stated(name)
    assert len(row) == 9 and row[5:] == [peak for peak, _ in head]


def test_a_preset_needs_what_its_header_and_the_docs_say():
    """The smallest one, in the stage that is told soonest; `uae-fast check` says so of the others."""
    predictor, (head, row) = Predictor(load_config("sd35m_16gb")), stated("sd35m_16gb")
    assert row[:5] == [f"{predictor.weight_bytes(part) / GIB:.2f}" for part in PARTS]
    peak = worst(predictor.phases(0))
    assert head[0] == [f"{peak.total / GIB:.1f}", peak.name]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_presets_path_runs_through_every_stage(name, world, tmp_path):
    """Dtype, quantisation, kinds and optimiser as in the preset; models and batches small."""
    small = [
        f"run={tmp_path / 'run'}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}", "reporters=[]",
        f"models.encoder_from={write_encoder(tmp_path / 'encoder')}",
        f"models.decoder_from={write_decoder(tmp_path / 'decoder')}",
        f"reward.encoders=[{write_image_encoder(tmp_path / 'clip', 'clip')}]",
        f"reward.heldout={write_image_encoder(tmp_path / 'dino', 'dinov2')}",
        "data.resolution=32", "caption.prompt=describe the image", "caption.image_tokens=4",
        "caption.max_new_tokens=22", "condition.length=28", "evaluate.images=0",
        "models.lora_rank=4", "models.lora_alpha=8", "render.steps=4", "stage3.window=2", "stage3.window_end=3",
        "stage1.sampler_steps=2", "stage1.backprop_last_steps=2", "stage2.group_size=2", "stage3.group_size=2",
        *(f"stage{stage}.steps=1" for stage in range(4)), *(f"stage{stage}.images=2" for stage in range(4)),
        *(f"stage{stage}.micro_batch=2" for stage in (0, 2, 3)),
    ]  # fmt: skip
    run = train(load_config(name, small))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["stage0", "stage1", "stage2", "stage3"]
    for row in rows:
        assert all(value == value for value in row.values()) and row["grad_norm"] >= 0
        if row["stage"] in ("stage2", "stage3"):
            assert (
                row["ratio/mean"] == row["ratio/max"] == 1.0 and row["clip_ratio/low"] == row["clip_ratio/high"] == 0.0
            )
            assert -1 <= row["reward_heldout"] <= 1
