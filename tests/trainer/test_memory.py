"""Predicted memory against what PyTorch's profiler sees a CPU allocate, and against what is really held."""

import pytest
import torch
from uae_kernels.mmdit.modulation_table import _Waiting

from uae_fast.cli import main
from uae_fast.config import load_config
from uae_fast.data import ImageFolder
from uae_fast.models.loading import load_models
from uae_fast.models.memory import CUDA_BYTES, Phase, Predictor, advise, fill, predict, worst
from uae_fast.optim import build_optimizer
from uae_fast.rollout.captions import sample_captions
from uae_fast.rollout.renders import Guidance, render
from uae_fast.trainer import STAGES

LARGER = [
    "device=cpu", "models.load=dummy", "same_sampler.accelerate=false",
    "caption.image_tokens=4", "stage1.sampler_steps=2", "stage1.context=image",
    "stage2.images=4", "stage2.group_size=8", "stage2.micro_batch=32",
    "stage3.images=4", "stage3.group_size=8", "stage3.micro_batch=32",
]  # fmt: skip


def peak(function) -> int:
    """The most bytes that were allocated at once while `function` ran, by the profiler's events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def built(config, number):
    models = load_models(config)
    models.encoder.freeze_reader()
    stage = STAGES[number](config, models)
    return stage, [p for group in stage.groups() for p in group["params"]]


@pytest.mark.parametrize(
    "number, mode, checkpointing", [(0, "lora", False), (1, "full", True), (2, "lora", True), (3, "lora", False)]
)
def test_an_updates_peak_is_predicted_within_a_tenth(world, number, mode, checkpointing):
    options = [f"models.encoder={mode}", f"models.decoder={mode}", f"models.gradient_checkpointing={checkpointing}"]
    check_update(load_config("tiny", [*LARGER, *options, f"data.train={world / 'train'}"]), number)


def check_update(config, number):
    predicted = next(phase for phase in predict(config, [number])[number] if phase.name == "updating")
    stage, _ = built(config, number)
    images = ImageFolder(config.data.train, "data.train").batch(0, stage.settings.images, 0, stage.name)
    rollout = stage.rollout(images, 0)
    if number == 2:  # captions as long as they may be
        rollout.captions.mask[:], rollout.lengths = True, [config.caption.max_new_tokens] * len(rollout)
    measured = peak(lambda: stage.loss(rollout, slice(0, stage.settings.micro_batch))[0].backward())
    assert predicted.passing == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "engine, dtype, kind",
    [("uae", "float32", "none"), ("generate", "float32", "none"), ("uae", "bfloat16", "none"),
     ("uae", "bfloat16", "nf4"), ("uae", "bfloat16", "fp8")],
)  # fmt: skip
def test_the_peaks_of_a_rollout_are_predicted_within_a_tenth(world, engine, dtype, kind):
    """A CPU casts whole operands where an adapter's fp32 meets bf16, which adapters over NF4 leave out."""
    options = ["render.batch=32", f"caption.engine={engine}", f"data.train={world / 'train'}", f"models.dtype={dtype}"]
    if dtype == "bfloat16":
        for part in ("encoder", "decoder"):
            options += [f"models.{part}=lora", f"models.{part}_quantization={kind}"]
    config = load_config("tiny", [*LARGER, *options])
    predictor = Predictor(config)
    predicted = {phase.name: phase.passing for phase in predictor.phases(2)}
    models = load_models(config)
    models.encoder.freeze_reader()
    data = ImageFolder(config.data.train, "data.train")
    prompt = models.encoder.prompt([example.image for example in data.batch(0, 4, 0, "stage2")])
    encoder, captions = models.encoder, ["w20"] * 32
    assert predictor.prompt_length == prompt.ids.shape[1]
    context = models.condition(captions).detach()
    noise, guidance = list(range(32)), Guidance()
    images = torch.rand(32, 3, 32, 32)
    measured = {
        "writing captions": peak(
            lambda: sample_captions(encoder, prompt, noise, temperature=1.0, max_new_tokens=22, engine=engine)
        ),
        "reading captions": peak(torch.no_grad()(lambda: models.condition(captions))),
        "drawing": peak(
            lambda: render(models.decoder, context, noise, resolution=32, steps=2, batch=32, guidance=guidance)
        ),
        "rewarding": peak(torch.no_grad()(lambda: models.reward.embed(images))),
    }
    held = {"drawing": context.nbytes, "rewarding": images.nbytes}  # of what a prediction holds and these were handed
    for name, value in measured.items():
        assert predicted[name] == pytest.approx(value + held.get(name, 0), rel=0.1), name


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
def test_resident_bytes_are_exact(kind):
    options = ["models.encoder=lora", "models.decoder=lora", "models.dtype=bfloat16"]
    options += [f"models.{part}_quantization={kind}" for part in ("encoder", "decoder")]
    config = load_config("tiny", [*LARGER, *options])
    predictor = Predictor(config)
    models = load_models(config)
    models.encoder.freeze_reader()
    for name in ("encoder", "projector", "decoder", "reward"):
        part = getattr(models, name)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held(part)}
        assert predictor.weight_bytes(name) == sum(storages.values()), name


def held(part):
    """Every tensor that a part keeps, scales and tables of quantised weights included."""
    yield from part.buffers()
    for parameter in part.parameters():
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        if getattr(parameter, "SCB", None) is not None:
            yield parameter.SCB


FUSED = [option for option in LARGER if "accelerate" not in option]


@pytest.mark.parametrize("number, kind", [(0, "fp8"), (1, "fp8"), (2, "fp8"), (3, "fp8"), (3, "none"), (3, "nf4")])
def test_resident_bytes_of_an_accelerated_decoder_are_exact_in_each_stage(world, number, kind):
    """With a table the layers that make modulations are in the host's memory; not where stage 0 needs any level."""
    options = [f"models.{part}={mode}" for part, mode in (("encoder", "lora"), ("decoder", "lora"))]
    options += ["models.dtype=bfloat16", f"models.decoder_quantization={kind}", f"data.train={world / 'train'}"]
    config = load_config("tiny", [*FUSED, *options])
    predictor = Predictor(config)
    predictor.phases(number)
    stage, _ = built(config, number)
    decoder = stage.models.decoder
    rollout = stage.rollout(ImageFolder(config.data.train, "data.train").batch(0, 4, 0, stage.name), 0)
    stage.loss(rollout, slice(0, stage.settings.micro_batch))
    host = [p for module in decoder.modules() if isinstance(module, _Waiting) for p in module.parameters()]
    assert bool(host) == (number > 0 and kind != "nf4")
    waiting = {p.untyped_storage()._cdata for p in host}
    tensors = [*held(decoder), *([] if kind == "nf4" else [decoder._table.timesteps, decoder._table.values])]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    found = sum(size for key, size in storages.items() if key not in waiting)
    assert predictor.weight_bytes("decoder") == found
    assert sum(p.nbytes for p in host) > 0.2 * found or not host


@pytest.mark.parametrize("number, checkpointing, kind", [(0, True, "fp8"), (1, True, "fp8"), (3, False, "fp8"),
                                                         (3, True, "none")])  # fmt: skip
def test_an_accelerated_updates_peak_is_predicted_within_a_tenth(world, number, checkpointing, kind):
    options = [f"models.{part}=lora" for part in ("encoder", "decoder")]
    options += [f"models.decoder_quantization={kind}", f"models.gradient_checkpointing={checkpointing}"]
    check_update(load_config("tiny", [*FUSED, *options, f"data.train={world / 'train'}"]), number)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_the_optimisers_bytes_are_exact(optimizer):
    config = load_config("tiny", [*LARGER, f"optimizer.name={optimizer}", "stage3.ema_decay=0"])
    stage, parameters = built(config, 3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made = build_optimizer(stage.groups(), config.optimizer)
    made.step()
    tables = {"qmap1", "qmap2", "step"}  # one table for all
    state = sum(
        value.numel() * value.element_size()
        for values in made.state.values()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and name not in tables
    )
    assert Predictor(config).state_bytes(stage, parameters) == state


def test_offloading_keeps_only_what_computes():
    options = [*LARGER, "models.encoder=lora", "models.decoder=lora"]
    plain, turns = (
        {phase.name: phase for phase in predict(load_config("tiny", [*options, f"models.offload={on}"]), [2])[2]}
        for on in (False, True)
    )
    assert {phase.resident for phase in plain.values()} == {plain["drawing"].resident}
    assert all(phase.resident < plain[name].resident for name, phase in turns.items())
    assert turns["rewarding"].resident < turns["drawing"].resident and len({p.resident for p in turns.values()}) == 3
    assert all(turns[name].passing == phase.passing for name, phase in plain.items())


def test_advice_makes_a_stage_fit():
    config = load_config("tiny", [*LARGER, "models.encoder=lora", "models.decoder=lora"])
    phases = predict(config, [3])[3]
    needed = worst(phases).total - CUDA_BYTES
    changed, changes, needs = advise(config, 3, phases, CUDA_BYTES + needed // 2)
    assert needs.total <= CUDA_BYTES + needed // 2
    assert changes == ["models.dtype=bfloat16", "models.gradient_checkpointing=true"]
    assert (
        worst(predict(load_config("tiny", [*LARGER, "models.encoder=lora", "models.decoder=lora", *changes]), [3])[3])
        == needs
    )
    assert changed.models.gradient_checkpointing and not config.models.gradient_checkpointing


def test_advice_ends_where_nothing_is_left():
    config = load_config(
        "tiny", [*LARGER, "stage2.images=1", "stage2.micro_batch=1", "models.gradient_checkpointing=true"]
    )
    _, changes, needs = advise(config, 2, [Phase("updating", 10, 10)], 0)
    assert changes == [] and needs.total == 20 + CUDA_BYTES


def test_check_prints_predictions_and_advice(capsys):
    assert main(["check", "tiny", "stages=[2]", "--gpu-memory", "0.85"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "predicted GiB" in output and "stage 2 does not fit 0.85 GiB: with models.gradient_checkpointing=true" in output
    )
    assert main(["check", "tiny", "stages=[2]", "--gpu-memory", "24"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_filling_takes_the_largest_batches_that_fit():
    """One more would not: the limit is what just these need."""
    options = [*LARGER, "stages=[2]", "stage2.images=4", "stage2.group_size=6", "stage2.micro_batch=24"]
    roomy = dict(change.split("=") for change in fill(load_config("tiny", options), 10**12))
    assert roomy == {"render.batch": "64", "stage2.micro_batch": "24"}
    exact = load_config("tiny", [*options, "stage2.micro_batch=4", "render.batch=2"])
    limit = worst(predict(exact)[2]).total
    changes = fill(load_config("tiny", options), limit)
    chosen = dict(change.split("=") for change in changes)
    assert chosen["stage2.micro_batch"] == "4"
    assert worst(predict(load_config("tiny", [*options, *changes]))[2]).total <= limit
    more = f"render.batch={2 * int(chosen['render.batch'])}"
    drawn = predict(load_config("tiny", [*options, *changes, more]))[2]
    assert max(phase.total for phase in drawn if phase.name in ("reading captions", "drawing")) > limit


def test_what_cannot_be_filled_is_refused_with_advice(capsys):
    assert main(["check", "tiny", "stages=[2]", "--fill-memory", "0.81"]) == 2
    said = capsys.readouterr().err
    assert "stage 2 does not fit 0.81 GiB" in said and "models." in said
