"""A frozen decoder draws in fp8; one that trains never computes in it."""

import json

import pytest
import torch
from uae_kernels import _triton
from uae_kernels.mmdit.products import InFp8

from uae_fast.check import sampler_line
from uae_fast.config import ConfigError, load_config
from uae_fast.models.decoder import Decoder
from uae_fast.models.fp8 import NAME, load_calibration
from uae_fast.models.loading import load_models, load_run
from uae_fast.parquet import open_images
from uae_fast.rollout.renders import draw
from uae_fast.stages.cold_start import ColdStart
from uae_fast.stages.understanding_for_generation import UnderstandingForGeneration
from uae_fast.trainer import train

FP8 = "same_sampler.fp8=true"
CAPTIONS = ["a red circle", "a blue square above a green triangle", "two yellow circles"]
STEPS = "stage1.steps=1", "stage2.steps=1", "stage3.steps=1"


def in_fp8(models):
    return sum(isinstance(module, InFp8) for module in models.decoder.transformer.modules())


def loaded(*options):
    config = load_config("tiny", ["render.batch=4", *options])
    return config, load_models(config)


def test_frozen_drawings_are_near_the_others_and_the_weights_wait():
    (config, plain), (_, fp8) = loaded(), loaded(FP8)
    before = {name: value.clone() for name, value in fp8.decoder.transformer.state_dict().items()}
    expected, drawn = (draw(config, models, CAPTIONS, [5, 6, 7]) for models in (plain, fp8))
    assert in_fp8(fp8) > 30 and not in_fp8(plain)
    assert 1e-4 < (drawn - expected).square().mean().sqrt() < 0.05
    assert torch.equal(draw(config, fp8, CAPTIONS, [5, 6, 7]), drawn)
    after = fp8.decoder.transformer.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", [ColdStart, UnderstandingForGeneration])
def test_what_trains_is_computed_with_the_weights_themselves(kind, mode, world):
    """Bit for bit as without fp8: samples, old log-probs, losses."""
    found = []
    for options in ((), (FP8,)):
        config, models = loaded(
            f"models.decoder={mode}", "stage3.images=2", "stage3.group_size=2", "stage3.micro_batch=4",
            "stage1.images=2", "stage1.micro_batch=2", *options,
        )  # fmt: skip
        if options:
            draw(config, models, CAPTIONS, [5, 6, 7])
            assert in_fp8(models) > 30
        stage = kind(config, models)
        parameters = [p for group in stage.groups() for p in group["params"]]
        assert not in_fp8(models) and parameters
        data = open_images(str(world / "train"), "data.train", config.data, captions=True)
        rollout = stage.rollout(data.batch(0, 2, 0, "test"), 0)
        loss, _ = stage.loss(rollout, slice(0, stage.settings.micro_batch))
        loss.backward()
        assert not in_fp8(models)
        made = [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]
        if kind is UnderstandingForGeneration:
            made += [rollout.trajectory.log_probs, rollout.trajectory.images]
        found.append(made)
        if options:
            models.freeze()
            draw(config, models, CAPTIONS, [5, 6, 7])
            assert in_fp8(models) > 30
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_run_calibrates_once_for_each_decoder_and_keeps_it(world, small_config, capsys, monkeypatch):
    made = []
    calibrate = Decoder.calibrate
    monkeypatch.setattr(Decoder, "calibrate", lambda self, *given: made.append(1) or calibrate(self, *given))
    config = small_config(world, FP8, *STEPS, run="fp8")
    run = train(config)
    # At the first measurement, and after each stage that trains the decoder
    assert len(made) == 3 and "fp8  calibration" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["ratio/mean"] == 1.0 and rows[2]["clip_ratio/high"] == 0.0
    assert (run / NAME).is_file() and not list(run.glob("*.part"))

    config, models = load_run(run, None)
    decoder = models.decoder
    draw(config, models, CAPTIONS, [5, 6, 7])
    assert len(made) == 3 and in_fp8(models) and decoder._calibration is not None
    _, earlier = load_run(run, "before")
    kept = (run / NAME).read_bytes()
    capsys.readouterr()
    draw(config, earlier, CAPTIONS, [5, 6, 7])
    draw(config, earlier, CAPTIONS, [5, 6, 7])
    said = capsys.readouterr().out
    assert said.count(f"{run / NAME}: this Fp8Calibration was made with other weights") == 1
    assert len(made) == 3 and in_fp8(earlier) and earlier.decoder._calibration is None
    assert (run / NAME).read_bytes() == kept


def test_a_file_is_refused_by_name(tmp_path):
    config, models = loaded(FP8)
    decoder = models.decoder
    decoder.fp8_file = tmp_path / NAME
    draw(config, models, CAPTIONS, [5, 6, 7])
    made, times = decoder._calibration, decoder._timesteps(decoder.sigmas(config.render.steps)[:-1])
    again = load_calibration(tmp_path / NAME, decoder.transformer, times)
    assert again.fallback == made.fallback and again.errors == made.errors and again.error == made.error
    assert all(torch.equal(again.scales[name], scales) for name, scales in made.scales.items())
    with pytest.raises(ValueError, match=f"{NAME} is of another schedule"):
        load_calibration(tmp_path / NAME, decoder.transformer, times[1:])
    with torch.no_grad():
        decoder.transformer.proj_out.bias.add_(1)
    with pytest.raises(ValueError, match=f"{NAME}: .* made with other weights"):
        load_calibration(tmp_path / NAME, decoder.transformer, times)
    for content in (b"", b"not safetensors" * 100):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(ValueError, match=f"{NAME} is not a calibration"):
            load_calibration(tmp_path / NAME, decoder.transformer, times)


def test_another_schedule_has_its_own_calibration():
    config, models = loaded(FP8)
    draw(config, models, CAPTIONS, [5, 6, 7])
    first = models.decoder._calibration
    config.render.steps = 5
    draw(config, models, CAPTIONS, [5, 6, 7])
    assert len(first.timesteps) == 8 and len(models.decoder._calibration.timesteps) == 5 and in_fp8(models)


@pytest.mark.parametrize(
    "options, message",
    [
        (["same_sampler.accelerate=false"], "same_sampler.accelerate is false"),
        (["models.offload=true"], "models.offload is true"),
        (["models.decoder=lora", "models.decoder_quantization=nf4"], "models.decoder_quantization is nf4"),
        (["device=mps"], "device is mps"),
    ],
)
def test_what_the_configuration_alone_tells(options, message):
    with pytest.raises(ConfigError, match=rf"same_sampler\.fp8.*{message}"):
        load_config("tiny", [FP8, *options])


def test_an_older_gpu_is_refused_before_models_are_loaded(monkeypatch):
    from uae_fast.models import loading

    monkeypatch.setattr(loading, "load_encoder", lambda *_, **__: pytest.fail("models are loaded"))
    monkeypatch.setattr(_triton, "capability", lambda tensor: 80)
    with pytest.raises(ConfigError, match=r"same_sampler\.fp8: .* 8\.9 or newer .* this GPU has 8\.0"):
        load_models(load_config("tiny", [FP8]))


def test_what_draws_is_said():
    emulated, given = (sampler_line(load_config("tiny", [FP8, f"device={device}"])) for device in ("cpu", "cuda"))
    assert emulated.endswith("products in fp8 where it is frozen (emulated)")
    assert given.endswith("products in fp8 where it is frozen")
