"""Drawing: Euler steps as diffusers takes them, nothing depends on neighbours, windows share their prefix."""

import pytest
import torch
from uae_kernels import flow_step

from uae_fast.config import load_config
from uae_fast.models.loading import load_models
from uae_fast.rollout.renders import Guidance, in_batches, initial_noise, ode_path, render, sde_window
from uae_fast.tiny.scenes import sample_scenes

CAPTIONS = [scene.caption() for scene in sample_scenes("heldout", 10, 0)]
SETTINGS = {"resolution": 32, "steps": 8, "batch": 8, "guidance": Guidance()}


@pytest.fixture(scope="module")
def models():
    return load_models(load_config("tiny"))


@pytest.fixture(scope="module")
def context(models):
    return models.condition(CAPTIONS)


def window(models, context, **changed):
    settings = {
        "group_size": 4, "start": 2, "resolution": 32, "steps": 8, "kind": "flow_sde", "noise_level": 0.3,
        "batch": 8, "micro_batch": 8, "guidance": Guidance(),
    }  # fmt: skip
    step_seeds = torch.arange(3 * 8).view(3, 8)
    return sde_window(models.decoder, context[:2], [5, 6], step_seeds, **{**settings, **changed})


@torch.no_grad()
def test_the_path_is_that_of_diffusers_scheduler(models, context):
    decoder = models.decoder
    noise = initial_noise(range(4), decoder.latent_shape(32), decoder.device)
    ours = ode_path(decoder, noise, context[:4], decoder.sigmas(8), 4, Guidance())
    decoder.scheduler.set_timesteps(8)
    x = noise
    for time in decoder.scheduler.timesteps:
        velocity = decoder.velocity(x, time / decoder.scheduler.config.num_train_timesteps, context[:4])
        x = decoder.scheduler.step(velocity, time, x, return_dict=False)[0]
    assert (ours - x).abs().max() < 1e-4 * x.abs().max()


@torch.no_grad()
def test_guidance_is_the_combination_of_two_velocities(models, context):
    decoder, negative = models.decoder, context[-1:]
    noise = initial_noise(range(2), decoder.latent_shape(32), decoder.device)
    sigmas = decoder.sigmas(2)
    guided = ode_path(decoder, noise, context[:2], sigmas[:2], 2, Guidance(3.0, negative))
    v = decoder.velocity(noise, sigmas[0], context[:2])
    u = decoder.velocity(noise, sigmas[0], negative.expand(2, -1, -1))
    expected = noise + (u + 3.0 * (v - u)) * (sigmas[1] - sigmas[0])
    assert (guided - expected).abs().max() < 1e-5


def test_an_image_depends_on_its_own_row_alone(models, context):
    images = render(models.decoder, context, range(10), **SETTINGS)
    alone = render(models.decoder, context[3:4], [3], **SETTINGS)
    turned = render(models.decoder, context.flip(0), range(9, -1, -1), **SETTINGS)
    assert torch.equal(images[3], alone[0])
    assert torch.equal(images, turned.flip(0))
    assert not torch.equal(images[3], images[4])


def test_short_batches_are_padded_to_the_one_shape():
    shapes = []

    def double(x):
        shapes.append(len(x))
        return 2 * x

    x = torch.arange(10.0)
    assert torch.equal(in_batches(double, 4, x), 2 * x)
    assert shapes == [4, 4, 4]


def test_a_group_shares_its_path_up_to_the_window(models, context):
    path = window(models, context)
    first = path.latents[:8].unflatten(0, (2, 4))
    assert torch.equal(first, first[:, :1].expand_as(first))
    second = path.latents[8:16]
    assert len({tuple(row.flatten().tolist()) for row in second}) == 8
    assert torch.equal(path.next_latents[:16], path.latents[8:])


def test_without_noise_the_window_is_the_deterministic_path(models, context):
    quiet = window(models, context, noise_level=1e-6)
    drawn = render(models.decoder, context[:2], [5, 6], **SETTINGS)
    assert (quiet.images - drawn.repeat_interleave(4, 0)).abs().max() < 1e-4


@pytest.mark.parametrize("kind, noise_level", [("flow_sde", 0.3), ("dance_sde", 0.3), ("cps", 0.4)])
def test_replay_gives_the_stored_log_probs_bit_for_bit(models, context, kind, noise_level):
    path = window(models, context, kind=kind, noise_level=noise_level, start=0)
    for step in range(3):
        rows = slice(8 * step, 8 * step + 8)
        velocity = models.decoder.velocity(path.latents[rows], path.sigma[rows.start], path.context)
        replay = flow_step(
            velocity, path.latents[rows], path.sigma[rows], path.sigma_next[rows], kind=kind,
            noise_level=noise_level, sigma_max=path.sigma_max, next_sample=path.next_latents[rows],
        )  # fmt: skip
        assert torch.equal(replay.log_prob, path.log_probs[rows])
    assert path.log_probs.isfinite().all()
