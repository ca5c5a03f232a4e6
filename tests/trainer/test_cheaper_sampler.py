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
from uae_fast.parquet import open_images
from uae_fast.rollout.renders import Guidance, Shortcuts, draw, initial_noise, ode_path
from uae_fast.stages.cold_start import ColdStart
from uae_fast.stages.understanding_for_generation import UnderstandingForGeneration
from uae_fast.trainer import train

CHEAPER = "cheaper_sampler.vae=tiny"
PASSES = ("cheaper_sampler.guided_part=0.5", "cheaper_sampler.steps=6", "cheaper_sampler.reuse=[2, 4]")
GUIDED = "render.guidance_scale=3"


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


@pytest.fixture(scope="module")
def models():
    return load_models(load_config("tiny"))


@pytest.fixture
def passes(models, monkeypatch):
    """The (σ, context) of every forward pass."""
    seen, velocity = [], models.decoder.velocity

    def noted(latents, sigma, context, *rest):
        seen.append((sigma.item(), context))
        return velocity(latents, sigma, context, *rest)

    monkeypatch.setattr(models.decoder, "velocity", noted)
    return seen


@torch.no_grad()
def by_hand(models, noise, context, negative, guided, computed, steps=8, scale=3.0):
    """Euler steps, of which so many are guided and only those in `computed` have a velocity of their own."""
    decoder, x, v = models.decoder, noise, None
    sigmas = decoder.sigmas(steps)
    for step in range(steps):
        if step in computed:
            v = decoder.velocity(x, sigmas[step], context)
            if step < guided:
                u = decoder.velocity(x, sigmas[step], negative.expand(len(x), -1, -1))
                v = u + scale * (v - u)
        x = x + v * (sigmas[step + 1] - sigmas[step])
    return x


@pytest.mark.parametrize("shortcuts, guided, left_out", [
    (Shortcuts(guided_part=0.5), 4, ()),
    (Shortcuts(guided_part=0.3), 3, ()),  # steps 0, 1 and 2 begin before 0.3 of 8
    (Shortcuts(reuse=(3, 4, 7)), 8, (3, 4, 7)),
    (Shortcuts(guided_part=0.25, reuse=(1, 2, 5)), 2, (1, 2, 5)),  # step 2 takes the guided velocity of step 0
])  # fmt: skip
def test_a_path_with_shortcuts_is_the_loop_written_out(models, shortcuts, guided, left_out):
    decoder = models.decoder
    context = models.condition(["a red circle", "a blue square", "nothing"])
    context, negative = context[:2], context[2:]
    noise = initial_noise([0, 1], decoder.latent_shape(32), decoder.device)
    guidance = Guidance(3.0, negative)
    computed = [step for step in range(8) if step not in left_out]
    expected = by_hand(models, noise, context, negative, guided, computed)
    path = ode_path(decoder, noise, context, decoder.sigmas(8), 2, guidance, shortcuts=shortcuts)
    assert (path - expected).abs().max() < 1e-5 * expected.abs().max()
    full = ode_path(decoder, noise, context, decoder.sigmas(8), 2, guidance)
    assert (path - full).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("seeds", [[0, 1, 2, 3], [5, 5, 5, 5]], ids=["own noises", "one noise"])
@pytest.mark.parametrize("options, sigmas, conditional, unconditional", [
    ((), 8, range(8), range(8)),
    (PASSES[:1], 8, range(8), range(4)),
    (PASSES[1:2], 6, range(6), range(6)),
    (PASSES[2:], 8, (0, 1, 3, 5, 6, 7), (0, 1, 3, 5, 6, 7)),
    (PASSES, 6, (0, 1, 3, 5), (0, 1)),
], ids=["full", "guided_part", "steps", "reuse", "all"])  # fmt: skip
def test_as_many_forward_passes_as_the_settings_promise(
    models, passes, options, sigmas, conditional, unconditional, seeds
):
    config = load_config("tiny", [GUIDED, "render.batch=4", *options])
    draw(config, models, ["a red circle", "a blue square", "a green circle", "nothing"], seeds)
    levels = models.decoder.sigmas(sigmas).tolist()
    ours = [sigma for sigma, context in passes if context.stride(0)]
    theirs = [sigma for sigma, context in passes if not context.stride(0)]  # the one negative prompt, expanded
    assert ours == [levels[step] for step in conditional]
    assert theirs == [levels[step] for step in unconditional]


def test_images_with_shortcuts_are_others_and_their_own_rows_alone(models):
    captions, seeds = ["a red circle", "a blue square", "a green circle"], [0, 1, 0]
    drawn = {}
    for name, options in {"full": (), "cheaper": PASSES}.items():
        config = load_config("tiny", [GUIDED, "render.batch=2", *options])
        drawn[name] = draw(config, models, captions, seeds)
        turned = draw(config, models, captions[::-1], seeds[::-1])
        assert torch.equal(drawn[name], turned.flip(0))
    assert (drawn["full"] - drawn["cheaper"]).abs().max() > 0.05


def test_the_paths_that_are_trained_on_are_out_of_their_reach(folder, world, small_config):
    """Stage 3's trajectories and log-probs, and stage 1's images up to the VAE, bit for bit."""
    found = []
    for options in ((), (*PASSES, CHEAPER)):
        config = small_config(world, f"models.path={folder}", GUIDED, "stage1.guidance_scale=3", *options)
        models = load_models(config)
        data = open_images(config.data.train, "data.train", config.data)
        rollout = UnderstandingForGeneration(config, models).rollout([data[0], data[1]], 0)
        path = rollout.trajectory
        models.decoder.decode = lambda latents: latents
        drawn = ColdStart(config, models).draw(path.latents[:4], path.context[:4], None)
        found.append([path.latents, path.next_latents, path.log_probs, path.levels, drawn])
        keys = [key for key in rollout.metrics if key.startswith("cheaper_sampler/")]
        assert keys == (["cheaper_sampler/vae_tiny"] if options else [])  # its rewards know no other
    assert all(torch.equal(full, cheap) for full, cheap in zip(*found, strict=True))


def test_a_run_names_every_shortcut(world, small_config):
    options = (*PASSES, GUIDED, "stages=[2]", "stage2.steps=1")
    run = train(small_config(world, *options))
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    names = {"guided_part": "0.5", "steps": "6", "reuse": "2_4"}
    assert {key for key in row if "cheaper" in key} == {f"cheaper_sampler/{k}_{v}" for k, v in names.items()}
    assert json.loads((run / "summary.json").read_text())["cheaper_sampler"] == names


def test_modulations_of_fewer_steps_come_from_the_table(models):
    settings = [GUIDED, "cheaper_sampler.steps=5", "stage3.window_end=3"]
    decoder = load_models(load_config("tiny", settings)).decoder
    assert decoder._in_table(decoder.sigmas(5)[2]) and not models.decoder._in_table(models.decoder.sigmas(5)[2])


@pytest.mark.parametrize("options, message", [
    (["guided_part=0.5"], r"guided_part: .*render\.guidance_scale is 1"),
    (["guided_part=0", GUIDED], "guided_part: is a share: above 0, and at most 1"),
    (["guided_part=1.5", GUIDED], "guided_part: is a share"),
    (["steps=8"], r"steps: 8 are no fewer than render\.steps = 8"),
    (["steps=-1"], "steps: -1 is negative"),
    (["reuse=[0]"], r"reuse: must ascend and lie between 1 and 7, the last step: render\.steps = 8"),
    (["reuse=[8]"], "reuse: must ascend and lie between 1 and 7"),
    (["reuse=[5]", "steps=5"], r"reuse: .* between 1 and 4, the last step: cheaper_sampler\.steps = 5"),
    (["reuse=[3, 2]"], "reuse: must ascend"),
    (["reuse=[2, 2]"], "reuse: must ascend"),
])  # fmt: skip
def test_settings_that_contradict_are_named(options, message):
    keys = [option if option == GUIDED else f"cheaper_sampler.{option}" for option in options]
    with pytest.raises(ConfigError, match=rf"command line: cheaper_sampler\.{message}"):
        load_config("tiny", keys)
