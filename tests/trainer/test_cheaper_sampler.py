"""A cheaper sampler draws other images, says so wherever its rewards are written, and is never had by accident."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from uae_fast.cli import main
from uae_fast.config import ConfigError, cheaper, load_config
from uae_fast.models.loading import load_models
from uae_fast.models.sources import TINY
from uae_fast.rollout.renders import draw
from uae_fast.stages.cold_start import ColdStart
from uae_fast.trainer import train

CHEAPER = "cheaper_sampler.vae=tiny"


def weights(folder, **changed):
    """The package's weights and an AutoencoderTiny of the same latents beside them."""
    from diffusers import AutoencoderTiny

    shutil.copytree(TINY, folder)
    shape = {
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 4,
        "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1), "scaling_factor": 0.5, "shift_factor": 0.1,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(**{**shape, **changed}).save_pretrained(folder / "decoder" / "vae_tiny")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("models") / "weights")


def test_the_tiny_vae_draws_other_images_of_the_same_latents(folder):
    full = load_models(load_config("tiny", [f"models.path={folder}"]))
    tiny = load_models(load_config("tiny", [f"models.path={folder}", CHEAPER]))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny.decoder.vae_tiny.decode(latents / 0.5 + 0.1).sample / 2 + 0.5
        assert (tiny.decoder.decode(latents) - expected.clamp(0, 1)).abs().max() < 1e-5
        image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(full.decoder.encode(image), tiny.decoder.encode(image))  # the decoder's latents stay
    config = load_config("tiny", ["render.batch=4"])
    drawings = [draw(config, models, ["a red circle"], [0]) for models in (full, tiny)]
    assert drawings[0].shape == drawings[1].shape == (1, 3, 32, 32)
    assert (drawings[0] - drawings[1]).abs().max() > 0.05


def test_a_run_names_its_cheaper_sampler(folder, world, small_config, capsys):
    rows = {}
    for name, options in (("cheaper", [f"models.path={folder}", CHEAPER]), ("same", [])):
        config = small_config(world, *options, "stage1.steps=1", "stage2.steps=1", "stage3.steps=1", run=name)
        run = train(config)
        rows[name] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        assert summary.get("cheaper_sampler") == ({"vae": "tiny"} if name == "cheaper" else None)
    assert [row["cheaper_sampler/vae_tiny"] for row in rows["cheaper"]] == [1.0, 1.0, 1.0]
    assert not any("cheaper_sampler" in key for row in rows["same"] for key in row)
    assert rows["cheaper"][1]["reward"] != rows["same"][1]["reward"]


def test_check_says_how_images_are_drawn(folder, capsys):
    assert main(["check", "tiny", f"models.path={folder}", CHEAPER]) == 0
    assert "decoder: accelerated, attention by sdpa; cheaper sampler: vae tiny" in capsys.readouterr().out
    assert main(["check", "tiny", "same_sampler.accelerate=false"]) == 0
    output = capsys.readouterr().out
    assert "decoder: by diffusers" in output and "cheaper" not in output


def test_settings_of_the_same_sampler_are_no_cheaper_one():
    same = load_config("tiny", ["same_sampler.accelerate=false", "same_sampler.decode_batch=2", "render.batch=3"])
    assert cheaper(same) == {}
    assert cheaper(load_config("tiny", [CHEAPER])) == {"vae": "tiny"}


def test_gradients_run_through_the_tiny_vae(folder, world, small_config):
    config = small_config(world, f"models.path={folder}", CHEAPER)
    stage = ColdStart(config, load_models(config))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = stage.models.condition(["a red circle", "a blue square"]).detach().requires_grad_()
    stage.draw(noise, context, None).square().sum().backward()
    assert context.grad.abs().max() > 0


def test_a_tiny_vae_that_is_not_there_or_does_not_fit_is_named(tmp_path, capsys):
    assert main(["check", "tiny", CHEAPER]) == 2
    assert f"cheaper_sampler.vae: {TINY} has no decoder/vae_tiny" in capsys.readouterr().err
    other = weights(tmp_path / "channels", latent_channels=16)
    with pytest.raises(ConfigError, match=r"cheaper_sampler\.vae.*\(16, 3\), not \(4, 3\)"):
        load_models(load_config("tiny", [f"models.path={other}", CHEAPER]))
    assert Path(other / "decoder" / "vae_tiny" / "config.json").is_file()
