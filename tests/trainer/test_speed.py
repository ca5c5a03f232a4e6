"""Seconds of phases, and what a step is worth: events only on a GPU, formulas against PyTorch's own counter."""

import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from uae_fast import phases
from uae_fast.config import load_config
from uae_fast.logging import timeless
from uae_fast.models.loading import load_models
from uae_fast.phases import Stopwatch, phase
from uae_fast.report import phases as bar
from uae_fast.speed import Sizes, image_tokens, step_flops
from uae_fast.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second at every look."""
    ticks = itertools.count()
    monkeypatch.setattr(phases.time, "monotonic", lambda: float(next(ticks)))


def test_phases_add_up_and_inner_ones_belong_to_the_outer(clock):
    watch = Stopwatch(CPU)

    @phase("renders")
    def draw():
        with phase("conditions"):
            pass

    draw()  # nobody measures
    with watch.running("rollout"):
        for _ in range(2):
            draw()
        with phase("rewards"):
            pass
    draw()
    assert watch.seconds() == {"renders": 2.0, "rewards": 1.0, "rollout": 7.0}


def test_a_phase_that_fails_ends(clock):
    watch = Stopwatch(CPU)
    with pytest.raises(RuntimeError), watch.running("rollout"), phase("renders"):
        raise RuntimeError
    with watch.running("rollout"), phase("renders"):
        pass
    assert watch.seconds() == {"renders": 2.0, "rollout": 6.0}
    with phase("renders"):
        pass
    assert watch.seconds()["renders"] == 2.0


def test_on_a_gpu_nothing_waits(monkeypatch):
    """Ends are events, whose distance is asked for only by `seconds`."""

    made = []

    class Event:
        def __init__(self, enable_timing):
            self.place = len(made)
            made.append(self)

        def record(self, stream):
            self.recorded = True

        def elapsed_time(self, end):
            assert self.recorded and end.recorded
            return 1000.0 * (end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watch = Stopwatch(torch.device("cuda"))
    with watch.running("rollout"), phase("captions"):
        pass
    assert len(made) == 4
    assert watch.seconds() == {"captions": 1.0, "rollout": 3.0}


def test_a_run_logs_phases_that_make_up_the_rollout(world, small_config):
    run = train(small_config(world, "stages=[0,1,2,3]", "evaluate.images=0"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"captions", "conditions", "renders", "rewards"}
    for row in rows:
        took = {key.removeprefix("seconds/"): value for key, value in row.items() if key.startswith("seconds/")}
        assert took.keys() == {"data", "rollout", "update"} | (names if row["stage"] in ("stage2", "stage3") else set())
        parts = sum(took.get(name, 0.0) for name in names)
        assert parts <= took["rollout"] and took["update"] > 0
        if row["stage"] in ("stage2", "stage3"):
            assert parts > 0.5 * took["rollout"]
        assert ("tokens_per_second" in row) == (row["stage"] == "stage2")
        assert not any(key.startswith("memory/") or key == "mfu" for key in row)  # no GPU
        left = timeless(row)
        assert not any(key.startswith("seconds/") or key.endswith("_per_second") for key in left)
        assert "prompts/mean_length" in left or row["stage"] in ("stage0", "stage1")
    token = next(row for row in rows if row["stage"] == "stage2")
    lengths = token["completions/mean_length"] / token["tokens_per_second"]
    assert lengths == pytest.approx(1 / token["images_per_second"])
    assert "mfu" not in timeless({"mfu": 1.0, "memory/peak_gb": 2.0})


def products(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def models():
    return load_models(load_config("tiny", ["same_sampler.accelerate=false", "models.encoder=lora"]))


def test_the_formulas_of_a_pass_are_pytorchs_count(models):
    """Of one image's velocity, of a text with all pairs of tokens, of the projector and of the head."""
    sizes, decoder, encoder = Sizes.of(models), models.decoder, models.encoder
    context = torch.randn(1, 28, decoder.transformer.config.joint_attention_dim)
    latents = torch.randn(1, *decoder.latent_shape(32))
    image = image_tokens(models, 32)
    counted = products(lambda: decoder.velocity(latents, torch.tensor(0.5), context))
    assert sizes.draw(image, 28) == counted

    embeds = torch.randn(1, 30, encoder.head.weight.shape[1])

    def read():
        with encoder.acting_as("reference") as language_model:
            language_model(inputs_embeds=embeds, use_cache=False)

    rotary = products(lambda: encoder.model.model.language_model.rotary_emb(embeds, torch.zeros(3, 1, 30)))
    everything = 30 * (sizes.language + sizes.language_attention * 30)  # PyTorch counts pairs that causality masks too
    assert everything == products(read) - rotary
    assert sizes.read(30) == 30 * (sizes.language + sizes.language_attention * 15)
    assert sizes.read(10, 20) + sizes.read(20) == sizes.read(30)
    assert 30 * sizes.head == products(lambda: encoder.head(embeds))
    assert 30 * sizes.projector == products(lambda: models.projector(embeds, torch.ones(1, 30)))


def test_what_a_step_is_worth_by_hand():
    config = load_config(
        "tiny",
        ["stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8", "stage3.images=2", "stage3.group_size=4",
         "stage3.micro_batch=8", "render.steps=8", "condition.length=20", "stage3.window=2", "stage3.window_end=7",
         "stage3.updates=2", "stage1.images=3", "stage1.micro_batch=3"],
    )  # fmt: skip
    sizes = Sizes(10, 0, 1000, 100, 3, 2, 7, 0, 0)
    velocity, condition = 64 * 3 + 20 * 2 + 7, 20 * 10 + 20 * 100
    values = {"prompts/mean_length": 30.0, "completions/mean_length": 12.0, "window_start": 3.0}
    read = 2 * 30 * 10 + 8 * 12 * 10
    head = 8 * 12 * 1000
    # Sampling; conditions and renders; reference log-probs; an update in full, through a frozen head
    stage2 = read + head + 8 * (condition + 8 * velocity) + (read + head) + 3 * read + 2 * head
    assert step_flops(2, config, sizes, 64, values) == stage2
    config.stage2.beta, config.models.encoder, config.render.guidance_scale = 0.0, "lora", 2.0
    lora = read + head + 8 * (condition + 16 * velocity) + 2 * read + 2 * head
    assert step_flops(2, config, sizes, 64, values) == lora
    cheaper = config.cheaper_sampler
    for cheaper.steps, cheaper.guided_part, cheaper.reuse, passes in (
        (6, 1.0, [], 6 + 6), (0, 0.5, [], 8 + 4), (0, 1.0, [3, 4, 7], 5 + 5), (6, 0.5, [2, 4], 4 + 2),
    ):  # fmt: skip
        assert step_flops(2, config, sizes, 64, values) == lora + 8 * (passes - 16) * velocity
    written = 2 * (30 * 10 + 12 * 10 + 12 * 1000 + condition)  # stage 3 takes every pass
    # Three steps shared by a group, five of its own, of which two train twice
    assert step_flops(3, config, sizes, 64, values) == written + (3 * 2 + 5 * 8 + 2 * 8 * 2 * 3) * velocity
    config.stage3.guidance_scale, config.stage3.beta, config.models.decoder = 4.5, 0.1, "lora"
    passes = 2 * (3 * 2 + 5 * 8) + 2 * 2 * 8 + 2 * 8 * 2 * (2 + 1)
    assert step_flops(3, config, sizes, 64, values) == written + passes * velocity
    config.models.encoder = config.models.decoder = "full"
    stage1 = 3 * (3 * 200 + 3 * 2000 + (8 + 2 * 2) * velocity)
    assert step_flops(1, config, sizes, 64, values) == stage1
    assert step_flops(0, config, sizes, 64, values) == 32 * (200 + 3 * 2000 + 3 * velocity)


def test_the_reports_bar():
    rows = [{"seconds/rollout": 4.0, "seconds/renders": 3.0, "seconds/rewards": 0.001, "seconds/update": 6.0}] * 3
    html = bar(rows)
    assert "renders <small>3 s" in html and "update <small>6 s" in html and "rest of the rollout <small>0.999 s" in html
    assert "rewards" not in html  # too short to be seen
    assert bar([{"reward": 1.0}]) == bar([]) == ""
