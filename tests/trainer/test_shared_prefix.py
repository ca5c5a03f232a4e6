"""Captions that share their image's prompt, against the same captions in rows of their own."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from test_stages import gradients
from torch.utils.checkpoint import CheckpointError
from uae_kernels import shared_prefix_attention

from uae_fast.config import load_config
from uae_fast.models import shared_prefix
from uae_fast.models.loading import load_models
from uae_fast.models.shared_prefix import Ragged, SharedPrefix
from uae_fast.rollout.captions import Captions
from uae_fast.stages.generation_for_understanding import CaptionRollout
from uae_fast.tiny.scenes import sample_scenes
from uae_fast.trainer import STAGES, train

TOLERANCE = 1e-5  # of the largest element of each gradient; each planted mistake below is a hundred times as large
SIZES = [(32, 32), (48, 32), (64, 48)]  # of the images, in pixels: 4, 6 and 12 tokens
GROUP = 4
LENGTHS = [7, 1, 22, 12, 5, 9, 2, 16, 22, 3, 11, 8]  # of the captions


def build(mode, *options):
    """Stage 2 on a random model that has left its initial weights, and captions whose ratios are not 1."""
    config = load_config(
        "tiny",
        [
            f"models.encoder={mode}", "models.load=dummy", "device=cpu", "stage2.images=3", "stage2.beta=0.1",
            f"stage2.group_size={GROUP}", "stage2.micro_batch=12", *options,
        ],
    )  # fmt: skip
    models = load_models(config)
    encoder = models.encoder
    encoder.freeze_reader()
    stage = STAGES[2](config, models)
    parameters = [p for group in stage.groups() for p in group["params"]]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    encoder.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    scenes = sample_scenes("heldout", len(SIZES), 0)
    images = [Image.fromarray(scene.draw()).resize(size) for scene, size in zip(scenes, SIZES, strict=True)]
    shape = len(LENGTHS), max(LENGTHS)
    words = torch.tensor(sorted(set(range(len(encoder.tokenizer))) - encoder.special_ids))
    ids = words[torch.randint(len(words), shape, generator=generator)]
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    captions = Captions(
        ids.masked_fill(~mask, encoder.tokenizer.pad_token_id), mask, [""] * len(LENGTHS), torch.zeros(shape)
    )
    advantages = torch.randn(shape[0], generator=generator)
    prompt = encoder.prompt(images)
    rollout = CaptionRollout(prompt, captions, LENGTHS, advantages, torch.zeros(shape), {}, torch.zeros(shape))
    stage.settings.shared_prefix = False
    with torch.no_grad():
        logprobs = stage.logprobs(rollout, slice(0, len(rollout)), "policy")
    rollout.old_logprobs, rollout.ref_logprobs = (
        logprobs + 0.2 * torch.randn(shape, generator=generator) for _ in range(2)
    )
    stage.settings.shared_prefix = True
    return stage, rollout, parameters


def losses(stage, rollout, parameters, shared, size=12):
    """The step's loss and the gradient of every parameter."""
    stage.settings.shared_prefix = shared
    return gradients(stage, rollout, parameters, size)


def difference(found, expected):
    """The largest relative difference: of the losses, and of each gradient by its largest element."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    most = max(gradient.abs().max() for gradient in expected_gradients)
    worst = abs(loss - expected_loss) / abs(expected_loss)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.abs().max() > 1e-4 * most  # none is mere rounding
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_loss_and_every_gradient_are_those_of_separate_rows(mode, checkpointing):
    """In micro-batches of whole groups, of halves and quarters of them, and of pieces of two."""
    given = build(mode, f"models.gradient_checkpointing={checkpointing}")
    expected = losses(*given, shared=False)
    assert len({*given[1].prompt.lengths}) == 3 and len(expected[1]) == {"full": 3 * 12 + 1, "lora": 3 * 7 * 2}[mode]
    for size in (12, 8, 6, 4, 3, 2, 1):
        if 12 % size == 0:
            assert difference(losses(*given, shared=True, size=size), expected) < TOLERANCE, size


def running_positions(given, monkeypatch):
    """Every caption goes on where the one before it ended."""

    def number(model, args, kwargs):
        shared, positions = kwargs.get("shared_prefix"), kwargs["position_ids"]
        if shared is not None:
            count = shared.prompts.tokens
            running = positions[:, :, count - 1 :].amax() + torch.arange(positions.shape[2] - count)
            kwargs["position_ids"] = torch.cat([positions[:, :, :count], running.expand(3, 1, -1)], 2)
        return args, kwargs

    given[0].models.encoder.model.model.language_model.register_forward_pre_hook(number, with_kwargs=True)


def another_prefix_is_gathered(given, monkeypatch):
    def predicting(self, states, length, right=SharedPrefix.predicting):
        found = right(self, states, length)
        return torch.cat([found[:, :1].roll(self.group_size, 0), found[:, 1:]], 1)

    monkeypatch.setattr(SharedPrefix, "predicting", predicting)


def the_token_before_the_end_is_gathered(given, monkeypatch):
    def predicting(self, states, length, right=SharedPrefix.predicting):
        prefix, own = self.split(states)
        return right(self, torch.cat([prefix.roll(1, 0), own]), length)

    monkeypatch.setattr(SharedPrefix, "predicting", predicting)


def attention(change):
    """A mistake in what the captions' attention is given."""

    def plant(given, monkeypatch):
        given[0].models.encoder.prefix_attention = lambda *tensors, **options: shared_prefix_attention(
            *tensors, **{**options, **change(options)}
        )

    return plant


def captions_see_each_other(given, monkeypatch):
    def attend(q, k, v, prefix_k, prefix_v, *, group_size, lengths, prefix_lengths, scale):
        one = (x.unflatten(0, (-1, group_size)).flatten(1, 2) for x in (q, k, v))
        out = shared_prefix_attention(*one, prefix_k, prefix_v, group_size=1, prefix_lengths=prefix_lengths)
        return out.view_as(q)

    given[0].models.encoder.prefix_attention = attend


def padding_is_on_the_left(given, monkeypatch):
    def of(lengths, device, right=Ragged.of):
        found = right(lengths, device)
        shift = torch.repeat_interleave(found.width - found.lengths, found.lengths)
        return Ragged(found.lengths, found.places + shift, found.width)

    monkeypatch.setattr(Ragged, "of", of)


MISTAKES = {
    "positions": running_positions,
    "gather": another_prefix_is_gathered,
    "end": the_token_before_the_end_is_gathered,
    "neighbours": captions_see_each_other,
    "padding": padding_is_on_the_left,
    "padded prefix": attention(lambda options: {"prefix_lengths": None}),
    "scale": attention(lambda options: {"scale": 1.1 * options["scale"]}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(mistake, monkeypatch):
    given = build("full")
    expected = losses(*given, shared=False)
    MISTAKES[mistake](given, monkeypatch)
    assert difference(losses(*given, shared=True), expected) > 100 * TOLERANCE


def test_a_layer_that_is_computed_again_attends_as_before(monkeypatch):
    """In the backward pass, outside `sharing_prefixes`: without the context that `checkpoint` gets it would not."""
    monkeypatch.setattr("uae_fast.models.encoder.recomputing", lambda config: (nullcontext(), nullcontext()))
    given = build("full", "models.gradient_checkpointing=true")
    with pytest.raises(CheckpointError, match="recomputation"):
        losses(*given, shared=True)


def test_tokens_are_computed_once_and_padding_never():
    stage, rollout, _ = build("lora")
    seen = []
    layer = stage.models.encoder.model.model.language_model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        for start, stop in ((0, 12), (0, 4), (4, 6), (2, 6), (0, 6), (11, 12)):
            for shared in (True, False):
                stage.settings.shared_prefix = shared
                stage.states(rollout, slice(start, stop), "policy")
    prompts, read = rollout.prompt.lengths, [length - 1 for length in LENGTHS]
    assert seen[0::2] == [
        sum(prompts) + sum(read),
        prompts[0] + sum(read[:4]),
        prompts[1] + sum(read[4:6]),
        prompts[0] + prompts[1] + sum(read[2:6]),
        2 * prompts[0] + prompts[1] + sum(read[:6]),  # four captions and two: two at a time
        prompts[2] + read[11],
    ]
    assert seen[1::2] == [rows * (max(prompts) + max(LENGTHS)) for rows in (12, 4, 2, 4, 6, 1)]


def test_captions_of_one_token_need_no_forward_of_their_own():
    stage, rollout, parameters = build("lora")
    captions = Captions(
        *(x[:, :1] for x in (rollout.captions.ids, rollout.captions.mask)), rollout.captions.texts,
        rollout.captions.logprobs[:, :1],
    )  # fmt: skip
    short = CaptionRollout(
        rollout.prompt, captions, [1] * 12, rollout.advantages, rollout.ref_logprobs[:, :1], {},
        rollout.logprobs[:, :1], rollout.old_logprobs[:, :1],
    )  # fmt: skip
    expected = losses(stage, short, parameters, shared=False)
    assert difference(losses(stage, short, parameters, shared=True), expected) < TOLERANCE


def test_everything_else_keeps_the_models_own_attention():
    stage, rollout, _ = build("full")
    encoder = stage.models.encoder
    config = encoder.model.model.language_model.config
    ours = encoder.read(["a red circle"])[0]
    encoder.prefix_attention = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        stage.states(rollout, slice(0, 4), "policy")
    assert config._attn_implementation == "sdpa"
    assert torch.equal(encoder.read(["a red circle"])[0], ours)
    encoder.answer_states(rollout.prompt.repeat(GROUP), rollout.captions.ids, rollout.captions.mask)


def test_a_sliding_window_is_refused():
    stage, rollout, _ = build("lora")
    layer = stage.models.encoder.model.model.language_model.layers[2]
    layer.self_attn.sliding_window = 8
    with pytest.raises(NotImplementedError, match=r"layer 2 .* 8 tokens back.* stage2\.shared_prefix"):
        stage.states(rollout, slice(0, 4), "policy")


def test_importing_registers_nothing():
    code = f"""
import uae_fast.models.encoder, uae_fast.trainer
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
assert {shared_prefix.NAME!r} not in AttentionInterface() and {shared_prefix.NAME!r} not in AttentionMaskInterface()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_vision_tower_runs_once_an_image_and_step(world, small_config, monkeypatch):
    """Scoring, the reference and two updates in four micro-batches each see the features of one pass."""
    from uae_fast import trainer

    calls = []

    def watched(config, load=trainer.load_models):
        models = load(config)
        models.encoder.model.model.visual.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        return models

    monkeypatch.setattr(trainer, "load_models", watched)
    train(
        small_config(
            world, "stages=[2]", "stage2.updates=2", "stage2.micro_batch=2", "stage2.beta=0.1", "evaluate.images=0"
        )
    )
    assert calls == [2, 2]  # two steps of two images
