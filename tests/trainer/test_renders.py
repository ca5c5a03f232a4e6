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
LENGTHS = [28, 20, 24, 20, 28, 24, 24, 20, 20, 28]


@pytest.fixture(scope="module")
def models():
    return load_models(load_config("tiny"))


@pytest.fixture(scope="module")
def context(models):
    return models.condition(CAPTIONS)


@pytest.fixture
def shapes(models, monkeypatch):
    """(rows, length of the context) of every forward pass of the transformer."""
    seen = []

    def forward(*arguments, **given):
        seen.append(tuple(given["encoder_hidden_states"].shape[:2]))
        return transformer(*arguments, **given)

    transformer = models.decoder.transformer.forward
    monkeypatch.setattr(models.decoder, "_use_table", lambda *_: None)  # puts another forward in its place
    monkeypatch.setattr(models.decoder.transformer, "forward", forward)
    return seen


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


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["one length", "three lengths"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_depends_on_its_own_row_alone(models, context, scale, lengths):
    settings = {**SETTINGS, "guidance": Guidance(scale, context[-1:, :24])}
    seeds = [*range(8), 3, 3]
    images = render(models.decoder, context, seeds, **settings, lengths=lengths)
    turned = render(models.decoder, context.flip(0), seeds[::-1], **settings, lengths=lengths and lengths[::-1])
    assert torch.equal(images, turned.flip(0))
    for row in (3, 5, 8):
        rows = slice(row, row + 1)
        alone = render(models.decoder, context[rows], seeds[rows], **settings, lengths=lengths and lengths[rows])
        assert torch.equal(images[row], alone[0])
    assert not torch.equal(images[3], images[4])


def test_a_row_sees_as_much_of_its_context_as_its_length_says(models, context, shapes):
    images = render(models.decoder, context, range(10), **SETTINGS, lengths=LENGTHS)
    assert shapes == [(8, length) for length in (20, 24, 28) for _ in range(8)]
    for length in (20, 24, 28):
        rows = [i for i, own in enumerate(LENGTHS) if own == length]
        cut = render(models.decoder, context[rows, :length], rows, **SETTINGS)
        assert torch.equal(images[rows], cut)
    whole = render(models.decoder, context, range(10), **SETTINGS)
    assert (whole[1] - images[1]).abs().max() > 1e-3  # the decoder attends to padding


def test_of_equal_noises_the_first_unconditional_step_is_computed_once(models, context, shapes):
    guidance, seeds = Guidance(3.0, context[-1:]), [5] * 6 + [6] * 4
    shared = render(models.decoder, context, seeds, **{**SETTINGS, "batch": 4, "guidance": guidance})
    assert set(shapes) == {(4, 28)}
    assert len(shapes) == 3 * (8 + 7) + 1  # three batches: steps with and without the prompt; the first without it
    noise = initial_noise(seeds, models.decoder.latent_shape(32), models.decoder.device)
    latents = ode_path(models.decoder, noise, context, models.decoder.sigmas(8), 4, guidance)
    assert len(shapes) == 3 * (8 + 7) + 1 + 3 * 2 * 8
    assert torch.equal(shared, in_batches(models.decoder.decode, 4, latents))


def test_short_batches_are_padded_to_the_one_shape():
    shapes = []

    def double(x):
        shapes.append(len(x))
        return 2 * x

    x = torch.arange(10.0)
    assert torch.equal(in_batches(double, 4, x), 2 * x)
    assert shapes == [4, 4, 4]


def test_the_vae_has_a_batch_shape_of_its_own(models, context, monkeypatch):
    sizes, decode = [], models.decoder.decode
    monkeypatch.setattr(models.decoder, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    images = render(models.decoder, context, range(10), **SETTINGS, decode_batch=3)
    assert sizes == [3, 3, 3, 3]
    one = render(models.decoder, context[4:5], [4], **SETTINGS, decode_batch=3)
    assert torch.equal(images[4], one[0])


def test_latents_and_levels_are_fp32_whatever_the_weights(context):
    models = load_models(load_config("tiny"))
    models.decoder.transformer.to(torch.bfloat16)
    path = window(models, context)
    for tensor in (path.latents, path.next_latents, path.log_probs, path.levels, path.images):
        assert tensor.dtype == torch.float32
    assert not torch.equal(path.next_latents, path.next_latents.bfloat16().float())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("accelerate", [True, False])
def test_nothing_waits_for_the_device(accelerate, scale):
    """On the meta device, where there are no values, whatever asks for one raises."""
    decoder = load_models(load_config("tiny", [f"same_sampler.accelerate={accelerate}"])).decoder.to("meta")
    decoder.trainable()  # no table: to make one, the pooled condition is looked at
    context = torch.empty(3, 28, 96, device="meta")
    settings = {"resolution": 32, "steps": 4, "batch": 2, "guidance": Guidance(scale, context[:1])}
    images = render(decoder, context, [1, 1, 2], **settings, lengths=[20, 28, 20])
    assert images.is_meta and images.shape == (3, 3, 32, 32)
    path = sde_window(
        decoder, context, [1, 2, 3], torch.zeros(2, 6, dtype=torch.int64, device="meta"), **settings, group_size=2,
        start=1, kind="cps", noise_level=0.4, micro_batch=3, lengths=[20, 28, 20],
    )  # fmt: skip
    assert path.images.is_meta and path.log_probs.shape == (12,)
    with pytest.raises(RuntimeError, match="meta"):
        path.log_probs[0].item()


def test_the_level_table_stays_where_it_is(models):
    assert models.decoder.sigmas(8) is models.decoder.sigmas(8)
    assert not torch.equal(models.decoder.sigmas(8), models.decoder.sigmas(9)[:9])


def test_a_group_shares_its_path_up_to_the_window(models, context):
    path = window(models, context)
    first = path.latents[:8].unflatten(0, (2, 4))
    assert torch.equal(first, first[:, :1].expand_as(first))
    second = path.latents[8:16]
    assert len({tuple(row.flatten().tolist()) for row in second}) == 8
    assert torch.equal(path.next_latents[:16], path.latents[8:])


def test_the_shapes_of_a_window(models, context, shapes):
    window(models, context, batch=4, micro_batch=8)
    assert shapes == [(2, 28)] * 2 + [(8, 28)] * 3 + [(4, 28)] * (2 * 3)


def test_a_window_computes_velocities_as_the_update_does(models, context, monkeypatch):
    """With gradients on: which kernel serves may depend on it, and the first ratio is exactly 1 with any."""
    modes, velocity = [], models.decoder.velocity
    monkeypatch.setattr(
        models.decoder, "velocity", lambda *given: modes.append(torch.is_grad_enabled()) or velocity(*given)
    )
    path = window(models, context)
    assert modes == [False] * 2 + [True] * 3 + [False] * 3
    assert not any(tensor.requires_grad for tensor in (path.latents, path.next_latents, path.log_probs, path.images))


@pytest.mark.parametrize("lengths", [None, [28, 20]])
def test_without_noise_the_window_is_the_deterministic_path(models, context, lengths):
    quiet = window(models, context, noise_level=1e-6, lengths=lengths)
    drawn = render(models.decoder, context[:2], [5, 6], **SETTINGS, lengths=lengths)
    assert (quiet.images - drawn.repeat_interleave(4, 0)).abs().max() < 1e-4


@pytest.mark.parametrize("lengths", [None, [28, 20]])
@pytest.mark.parametrize("kind, noise_level", [("flow_sde", 0.3), ("dance_sde", 0.3), ("cps", 0.4)])
def test_replay_gives_the_stored_log_probs_bit_for_bit(models, context, kind, noise_level, lengths):
    path = window(models, context, kind=kind, noise_level=noise_level, start=0, lengths=lengths)
    for step in range(3):
        rows = slice(8 * step, 8 * step + 8)
        velocity = models.decoder.velocity(path.latents[rows], path.levels[step], path.context, path.lengths)
        replay = flow_step(
            velocity, path.latents[rows], path.levels[step], path.levels[step + 1], kind=kind,
            noise_level=noise_level, sigma_max=path.sigma_max, next_sample=path.next_latents[rows],
        )  # fmt: skip
        assert torch.equal(replay.log_prob, path.log_probs[rows])
    assert path.log_probs.isfinite().all()
