"""The stages' promises: exact first ratios, shares that add up, gradients where they belong."""

import pytest
import torch

from uae_fast.data import ImageFolder
from uae_fast.models.loading import load_models
from uae_fast.trainer import STAGES

BOTH_WAYS = ["full", "lora"]
BUCKETS = "condition.buckets=[18,20,24]"


def build(number, config):
    models = load_models(config)
    models.encoder.freeze_reader()
    return STAGES[number](config, models)


def examples(config, number):
    data = ImageFolder(config.data.train, "data.train")
    return data.batch(0, getattr(config, f"stage{number}").images, config.seed, f"stage{number}")


def gradients(stage, rollout, parameters, micro_batch):
    for parameter in parameters:
        parameter.grad = None
    total = 0.0
    for start in range(0, len(rollout), micro_batch):
        loss, _ = stage.loss(rollout, slice(start, start + micro_batch))
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]


def parameters_of(stage):
    return [parameter for group in stage.groups() for parameter in group["params"]]


@pytest.mark.parametrize("mode", BOTH_WAYS)
@pytest.mark.parametrize(
    "number, options",
    [
        (2, []),
        (3, []),
        (3, ["same_sampler.accelerate=false"]),
        (3, [BUCKETS, "stage3.images=4", "stage3.group_size=2"]),
        (3, ["stage3.guidance_scale=4.5", "stage3.beta=0.1"]),
    ],
    ids=["captions", "drawings", "drawings by diffusers", "drawings of several lengths", "guided drawings"],
)
def test_the_first_ratio_is_exactly_one(world, small_config, number, options, mode):
    """In two micro-batches, against log-probs stored by the rollout or the pass before; the second update's is not."""
    config = small_config(
        world, f"models.encoder={mode}", f"models.decoder={mode}", f"stage{number}.micro_batch=4", "stage3.kind=cps",
        *options,
    )  # fmt: skip
    stage = build(number, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, number), 0)
    if BUCKETS in options:
        assert any(len(set(rollout.trajectory.lengths[start : start + 4])) > 1 for start in (0, 4))
    for start in (*range(0, len(rollout), 4), *range(0, len(rollout), 4)):
        _, metrics = stage.loss(rollout, slice(start, start + 4))
        assert metrics["ratio/mean"].item() == metrics["ratio/max"].item() == 1.0
        assert metrics["clip_ratio/low"].item() == metrics["clip_ratio/high"].item() == 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    assert stage.loss(rollout, slice(0, 4))[1]["ratio/mean"].item() != 1.0


@pytest.mark.parametrize("number, option", [(0, ""), (1, "stage1.context=caption"), (1, "stage1.context=image")]
                         + [(2, f"stage2.loss_type={name}") for name in ("grpo", "dapo", "bnpo", "dr_grpo")]
                         + [(3, "stage3.beta=0.1"), (3, "stage3.guidance_scale=3.0")]
                         + [(number, BUCKETS) for number in (0, 1, 3)])  # fmt: skip
def test_micro_batches_add_up(world, small_config, number, option):
    config = small_config(world, *filter(None, [option]), f"stage{number}.micro_batch=4")
    stage = build(number, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, number), 0)
    whole = 8 if number == 3 else len(rollout)
    stage.settings.micro_batch = whole
    expected_loss, expected = gradients(stage, rollout, parameters, whole)
    stage.settings.micro_batch = 4 if whole > 4 else 2
    loss, found = gradients(stage, rollout, parameters, stage.settings.micro_batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    scale = max(gradient.abs().max().item() for gradient in expected)
    assert scale > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-4 * scale


@pytest.mark.parametrize("mode", BOTH_WAYS)
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_gradients_reach_what_trains_and_nothing_else(world, small_config, number, mode):
    config = small_config(world, f"models.encoder={mode}", f"models.decoder={mode}")
    stage = build(number, config)
    stage.models.freeze()
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, number), 0)
    gradients(stage, rollout, parameters, stage.settings.micro_batch)
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in parameters) >= len(parameters) // 3
    ours = {id(p) for p in parameters}
    models = stage.models
    parts = (models.encoder, models.projector, models.decoder, models.reward)
    others = [p for part in parts for p in part.parameters()]
    assert all(p.grad is None for p in others if id(p) not in ours)
    trained = {
        "encoder": any(id(p) in ours for p in models.encoder.parameters()),
        "projector": any(id(p) in ours for p in models.projector.parameters()),
        "decoder": any(id(p) in ours for p in models.decoder.parameters()),
    }
    assert tuple(name for name, trains in trained.items() if trains) == stage.trains


def test_the_reference_is_guided_by_itself(world, small_config):
    """Where the policy has not moved it is the reference: no KL, whatever the guidance; and where it has, there is."""
    config = small_config(world, "stage3.guidance_scale=4.5", "stage3.beta=0.1", "models.decoder=lora")
    stage = build(3, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, 3), 0)
    assert stage.loss(rollout, slice(0, 8))[1]["kl"].item() < 1e-8
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert stage.loss(rollout, slice(0, 8))[1]["kl"].item() > 1e-3


def test_captions_of_one_image_share_their_noise(world, small_config):
    """One caption said twice gets one reward: nothing but the caption decides."""
    config = small_config(world, "stage2.temperature=1e-4")
    stage = build(2, config)
    rollout = stage.rollout(examples(config, 2), 0)
    assert rollout.metrics["frac_reward_zero_std"].item() == 1.0
    assert rollout.advantages.abs().max().item() == 0.0


def test_a_rollout_says_what_its_captions_are_like(world, small_config):
    """Names of TRL; each number against one counted in Python."""
    config = small_config(world, "caption.max_new_tokens=10", "stage2.temperature=0.3", "stage2.images=4")
    stage = build(2, config)
    rollout = stage.rollout(examples(config, 2), 0)
    _, update = stage.loss(rollout, slice(0, 16))
    captions, metrics = rollout.captions, {name: x.item() for name, x in {**rollout.metrics, **update}.items()}
    lengths = captions.mask.sum(1).tolist()
    ends = [row[n - 1] != stage.models.encoder.eos_id for row, n in zip(captions.ids.tolist(), lengths, strict=True)]
    assert len(set(lengths)) > 1 and 0 < sum(ends) < 16
    assert metrics["completions/mean_length"] == pytest.approx(sum(lengths) / 16)
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (min(lengths), max(lengths))
    assert metrics["completions/clipped_ratio"] == pytest.approx(sum(ends) / 16)
    images = [i // 4 for i in range(16)]
    pairs = set(zip(images, captions.texts, strict=True))
    assert metrics["completions/unique"] == pytest.approx(len(pairs) / 16) and len(pairs) < 16
    gaps = (captions.logprobs - rollout.old_logprobs)[captions.mask].abs().double()
    below, p99, above = (gaps.quantile(0.99, interpolation=way).item() for way in ("lower", "linear", "higher"))
    p99 = pytest.approx(p99, abs=1e-4 * (above - below))  # the place between these two is rounded in fp32
    said = {name: metrics[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "p99", "max")}
    assert said == {"mean": pytest.approx(gaps.mean().item()), "p99": p99, "max": gaps.amax().item()}
    assert 0 < said["max"] < 1e-5


def test_a_rollout_computes_an_images_prompt_once(world, small_config):
    config = small_config(world)
    stage, rows = build(2, config), []
    language_model = stage.models.encoder.model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda _, __, given: rows.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    rollout = stage.rollout(examples(config, 2), 0)
    hook.remove()
    width = rollout.prompt.ids.shape[1]
    assert rows[0] == (2, width) and rows[1] == (8, 1)


@pytest.mark.parametrize("engine", ["uae", "generate"])
def test_captions_are_sampled_at_the_stages_temperature(world, small_config, engine):
    """The trainer's log-probs are of the same temperature: of another one they would be far off."""
    for temperature in (0.5, 2.0):
        config = small_config(world, f"stage2.temperature={temperature}", f"caption.engine={engine}")
        stage = build(2, config)
        rollout = stage.rollout(examples(config, 2), 0)
        _, metrics = stage.loss(rollout, slice(0, len(rollout)))
        assert metrics["sampling/sampling_logp_difference/max"].item() < 1e-5


def test_a_step_is_the_same_again_and_another_step_is_not(world, small_config):
    config = small_config(world)
    for number in (2, 3):
        stage = build(number, config)
        batch = examples(config, number)
        first, again, other = (stage.rollout(batch, step).advantages for step in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradients_run_through_the_last_steps_of_the_sampler_only(world, small_config):
    norms = []
    for last in (1, 8):
        config = small_config(world, f"stage1.backprop_last_steps={last}")
        stage = build(1, config)
        rollout = stage.rollout(examples(config, 1), 0)
        loss, found = gradients(stage, rollout, parameters_of(stage), 4)
        norms.append((loss, sum(g.square().sum().item() for g in found) ** 0.5))
    assert norms[0][0] == pytest.approx(norms[1][0], abs=1e-5)  # the same images
    assert norms[0][1] != pytest.approx(norms[1][1], rel=0.01)
