"""What does not depend on the micro-batch: captions and rewards at all, gradients but for rounding."""

import math

import pytest
import torch
from test_stages import build, examples, parameters_of

from uae_fast.models.loading import load_models
from uae_fast.rollout.renders import draw
from uae_fast.trainer import accumulate

TOLERANCE = 2e-5  # of the gradient's norm; each planted mistake below is at least a hundred times as large
SIZES = (1, 2, 4, 8)


def gradient(stage, rollout, parameters, size, weight=None):
    """The gradient as one vector, its loss, and its metrics; `weight(rows)` plants a mistake into the shares."""
    stage.settings.micro_batch = size
    for parameter in parameters:
        parameter.grad = None
    original = stage.loss
    if weight is not None:
        stage.loss = lambda rollout, rows: (lambda loss, metrics: (loss * weight(rows), metrics))(
            *original(rollout, rows)
        )
    metrics = accumulate(stage, rollout, parameters, math.inf)
    stage.loss = original
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double(), metrics


def step(config, number):
    """A stage after an update or so: ratios are no longer 1, so that every term of the loss counts."""
    stage = build(number, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, number), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return stage, rollout, parameters


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_stage_2_gradients_do_not_depend_on_the_micro_batch(world, small_config, loss_type):
    config = small_config(world, f"stage2.loss_type={loss_type}", "stage2.beta=0.1", "stage2.clip_high=0.3")
    stage, rollout, parameters = step(config, 2)
    mask = rollout.captions.mask
    assert len(set(mask.sum(1).tolist())) >= 3  # ragged
    expected, metrics = gradient(stage, rollout, parameters, 8)
    for size in SIZES[:-1]:
        found, again = gradient(stage, rollout, parameters, size)
        assert (found - expected).norm() < TOLERANCE * expected.norm(), size
        assert again["loss"].item() == pytest.approx(metrics["loss"].item(), rel=1e-4, abs=1e-6)
        assert again["grad_norm"].item() == pytest.approx(metrics["grad_norm"].item(), rel=1e-4)

    def per_micro_batch(rows):
        """Each micro-batch normalised by itself, as if its sequences were of average length."""
        local = mask[rows].sum() / mask.sum() * len(mask) / len(mask[rows])
        return local if loss_type in ("grpo", "dr_grpo", "luspo") else 1 / local

    for mistake in (per_micro_batch, lambda rows: 0.0 if rows.start == 6 else 1.0):
        wrong, _ = gradient(stage, rollout, parameters, 2, mistake)
        assert (wrong - expected).norm() > 100 * TOLERANCE * expected.norm()


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_stage_3_gradients_do_not_depend_on_the_micro_batch(world, small_config, kind):
    config = small_config(world, f"stage3.kind={kind}", "stage3.beta=0.1", "stage3.clip_range=0.1")
    stage, rollout, parameters = step(config, 3)
    expected, metrics = gradient(stage, rollout, parameters, 8)
    for size in SIZES[:-1]:
        found, again = gradient(stage, rollout, parameters, size)
        assert (found - expected).norm() < TOLERANCE * expected.norm(), size
        assert again["loss"].item() == pytest.approx(metrics["loss"].item(), rel=1e-4, abs=1e-6)
    for mistake in (lambda rows: 1.01, lambda rows: 0.0 if rows.start == 6 else 1.0):
        wrong, _ = gradient(stage, rollout, parameters, 2, mistake)
        assert (wrong - expected).norm() > 100 * TOLERANCE * expected.norm()


def test_captions_and_rewards_do_not_depend_on_the_micro_batch(world, small_config):
    """Bit for bit in stage 2; in stage 3 the drawings themselves are made in micro-batches, and round differently."""
    rollouts = {}
    for number in (2, 3):
        for size in SIZES:
            config = small_config(world, f"stage{number}.micro_batch={size}")
            stage = build(number, config)
            rollouts[number, size] = rollout = stage.rollout(examples(config, number), 0)
            if number == 2:
                for start in range(0, 8, size):
                    stage.loss(rollout, slice(start, start + size))
    for size in SIZES[:-1]:
        ours, theirs = rollouts[2, size], rollouts[2, 8]
        assert ours.captions.texts == theirs.captions.texts
        assert torch.equal(ours.captions.ids, theirs.captions.ids)
        assert torch.equal(ours.advantages, theirs.advantages)
        assert torch.equal(ours.metrics["reward"], theirs.metrics["reward"])
        assert (ours.old_logprobs - theirs.old_logprobs)[theirs.captions.mask].abs().max() < 1e-4
        latents = [rollouts[3, each].trajectory.next_latents for each in (size, 8)]
        assert (latents[0] - latents[1]).abs().max() < 1e-4
        assert rollouts[3, size].metrics["reward"].item() == pytest.approx(
            rollouts[3, 8].metrics["reward"].item(), abs=1e-5
        )


def test_an_image_depends_on_its_caption_and_seed_alone(world, small_config):
    """Not on how many others there are, nor on the batches they are read and drawn in; twins are drawn once."""
    config = small_config(world, "render.batch=4", "render.steps=2", "stage3.window=1", "stage3.window_end=1")
    models = load_models(config)
    models.encoder.freeze_reader()
    read, drawn = [], []
    models.encoder.reader_copy.register_forward_pre_hook(
        lambda _, __, given: read.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    velocity = models.decoder.velocity
    models.decoder.velocity = lambda x, *given: drawn.append(len(x)) or velocity(x, *given)
    words = [
        "a red circle",
        "a blue square",
        "",
        "a red circle",
        "a red circle top-left",
        "a blue square",
        "one",
        "two",
    ]
    seeds = [1, 1, 2, 1, 3, 2, 1, 1]
    images = draw(config, models, words, seeds)
    assert read == [4, 4] and drawn == [4] * 2 * 2  # seven pairs
    assert torch.equal(images[0], images[3]) and not torch.equal(images[1], images[5])
    for i in range(8):
        assert torch.equal(draw(config, models, words[i : i + 1], seeds[i : i + 1])[0], images[i]), i
    read.clear()
    assert torch.equal(draw(config, models, words[:1] * 5, [1] * 5), images[:1].expand(5, -1, -1, -1))
    assert read == [4]
