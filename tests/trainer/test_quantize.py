"""Quantised frozen weights under adapters, with bitsandbytes' own arithmetic on the CPU; and parts that take turns."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from uae_fast.checkpoint import checkpoints
from uae_fast.cli import main
from uae_fast.config import ConfigError, load_config
from uae_fast.data import ImageFolder
from uae_fast.models.loading import load_models, load_run
from uae_fast.models.offload import Offloader
from uae_fast.models.quantize import quantized
from uae_fast.trainer import STAGES, train

CAPTION = "a red circle top-left on white"
ADAPTERS = ("models.encoder=lora", "models.decoder=lora")
BOTH = {kind: (*ADAPTERS, *(f"models.{part}_quantization={kind}" for part in ("encoder", "decoder")))
        for kind in ("none", "nf4", "int8")}  # fmt: skip


def outputs(models):
    """The reader's states, and a velocity, of one caption."""
    context = models.condition([CAPTION])
    latents = torch.randn(2, *models.decoder.latent_shape(32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = models.encoder.read([CAPTION], "policy")[0]
        return states, models.decoder.velocity(latents, torch.tensor(0.6), context.expand(2, -1, -1))


def linears(models):
    """The frozen linear layers of what is quantised, under their adapters."""
    for part in (models.encoder.model.model.language_model.layers, models.decoder.transformer.transformer_blocks):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
                yield module


def test_nf4_computes_with_the_weights_that_bitsandbytes_stands_for():
    """Equal to a plain model whose weights went through 4 bits and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    models = load_models(load_config("tiny", list(BOTH["nf4"])))
    reference = load_models(load_config("tiny", list(ADAPTERS)))
    plain = outputs(reference)
    assert {type(layer) for layer in linears(models)} == {Linear4bit}
    assert len(list(linears(models))) == len(list(linears(reference))) == 3 * 7 + 53
    for layer in linears(reference):
        weight, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
        layer.weight.data = dequantize_4bit(weight, state)
    for found, expected, exact in zip(outputs(models), outputs(reference), plain, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (exact - expected).norm() > 0.01 * exact.norm()  # four bits show


def test_int8_is_close():
    plain, found = (outputs(load_models(load_config("tiny", list(BOTH[kind])))) for kind in ("none", "int8"))
    for a, b in zip(plain, found, strict=True):
        assert 1e-4 * a.norm() < (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("kind, bits", [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 1024)])
def test_a_layer_takes_the_bits_it_promises(kind, bits):
    layer = quantized(torch.nn.Linear(1024, 2048, bias=False, dtype=torch.bfloat16), kind, torch.device("cpu"))
    held = [layer.weight.data]
    if kind == "nf4":
        state = layer.weight.quant_state
        held += [state.absmax, state.state2.absmax]
    else:
        held.append(layer.weight.SCB)
    assert 8 * sum(t.numel() * t.element_size() for t in held) / (1024 * 2048) == bits


@pytest.mark.parametrize("number, kind", [(1, "nf4"), (2, "nf4"), (3, "nf4"), (2, "int8"), (3, "int8")])
def test_adapters_train_over_quantised_weights(world, small_config, number, kind):
    config = small_config(world, *BOTH[kind], "stage3.kind=cps", "models.gradient_checkpointing=true")
    models = load_models(config)
    models.encoder.freeze_reader()
    before = [layer.weight.data.clone() for layer in linears(models)]
    stage = STAGES[number](config, models)
    parameters = [p for group in stage.groups() for p in group["params"]]
    assert {p.dtype for p in parameters} == {torch.float32}
    rollout = stage.rollout(ImageFolder(config.data.train, "data.train").batch(0, 2, 0, stage.name), 0)
    loss, metrics = stage.loss(rollout, slice(0, 8))
    loss.backward()
    if number > 1:
        assert metrics["ratio/mean"].item() == metrics["ratio/max"].item() == 1.0
    moved = [p.grad is not None and p.grad.abs().max() > 0 for p in parameters]
    assert sum(moved) >= len(parameters) // 3
    assert all(torch.equal(a, layer.weight.data) for a, layer in zip(before, linears(models), strict=True))


def test_a_quantised_run_resumes_and_loads(world, small_config):
    options = (*BOTH["nf4"], "stages=[2,3]", "checkpoint.every=1", "stage2.lr=1e-3", "evaluate.images=0")
    run = train(small_config(world, *options))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    last = checkpoints(run / "checkpoints")[-1]
    assert all(".lora_" in name for file in last.glob("*coder/*.safetensors") for name in load_file(file))
    states, velocity = outputs(load_run(run, "stage3")[1])
    earlier, old_velocity = outputs(load_run(run, "before")[1])
    assert not torch.equal(states, earlier) and not torch.equal(velocity, old_velocity)


def test_random_weights_are_quantised_as_they_are_made():
    models = load_models(load_config("tiny", [*BOTH["nf4"], "models.load=dummy", "models.dtype=bfloat16"]))
    kinds = {type(layer).__name__ for layer in linears(models) if layer.weight.dtype == torch.uint8}
    assert kinds == {"Linear4bit"}
    assert all(part.isfinite().all() for part in outputs(models))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["models.encoder_quantization=nf4"], "set models.encoder to lora"),
        (["models.decoder_quantization=fp8"], "nf4"),
        (["models.encoder=lora", "models.offload=true"], "choose lora"),
        ([*BOTH["int8"], "models.offload=true"], "choose nf4"),
    ],
)
def test_what_cannot_be_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config("tiny", overrides)


def test_fused_ops_compute_over_quantised_weights_without_a_table():
    """Modulation layers in 4 bits have no table; the rest is fused, and the images are those of diffusers' modules."""
    models, plain = (
        load_models(load_config("tiny", [*BOTH["nf4"], f"same_sampler.accelerate={on}"])) for on in (True, False)
    )
    assert models.decoder.attention == "auto" and plain.decoder.attention is None
    latents = torch.randn(2, *models.decoder.latent_shape(32), generator=torch.Generator().manual_seed(0))
    context = plain.condition([CAPTION, "a blue square"])
    with torch.no_grad():
        found, expected = (m.decoder.velocity(latents, m.decoder.sigmas(8)[3], context) for m in (models, plain))
    assert models.decoder._table is None
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- taking turns ---------------------------------------------------------------------------------------------------


class Recorder(Offloader):
    """Notes every move, and fails where a part computes while it waits."""

    def __init__(self, models):
        self.where = {}
        super().__init__(models, torch.device("cpu", 0), "cpu")
        assert set(self.where.values()) == {self.host} and self.where.keys() == self.parts.keys()
        for name, part in self.parts.items():
            for module in part.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(lambda *_, name=name: self.check(name))

    def check(self, name):
        assert self.where[name] == self.device, f"{name} computes on the host"

    def move(self, name, place):
        self.where[name] = place


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_parts_take_turns_and_none_computes_while_it_waits(world, small_config, number):
    by_diffusers = "same_sampler.accelerate=false"  # as it is with models.offload
    config = small_config(world, *ADAPTERS, "models.gradient_checkpointing=true", by_diffusers)
    expected = None
    for offload in (False, True):
        models = load_models(config)
        models.encoder.freeze_reader()
        recorder = Recorder(models) if offload else None
        stage = STAGES[number](config, models)
        parameters = [p for group in stage.groups() for p in group["params"]]
        images = ImageFolder(config.data.train, "data.train").batch(0, 4, 0, stage.name)
        rollout = stage.rollout(images, 0)
        loss, _ = stage.loss(rollout, slice(0, stage.settings.micro_batch))
        loss.backward()
        gradients = [copy.copy(p.grad) for p in parameters]
        if expected is None:
            expected = (loss.item(), gradients)
    assert recorder is not None and loss.item() == expected[0]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
    waiting = {name for name, place in recorder.where.items() if place == recorder.host}
    needed = {0: {"decoder"}, 1: {"encoder", "decoder"}, 2: {"encoder"}, 3: {"decoder"}}[number]
    assert waiting == set(recorder.parts) - needed  # after an update only what trained is on the device


def test_a_run_is_the_same_whoever_waits(world, small_config):
    options = ("stages=[2]", *ADAPTERS, "evaluate.images=2", "render.batch=4", "same_sampler.accelerate=false")
    runs = [train(small_config(world, *options, f"models.offload={on}", run=f"run-{on}")) for on in (False, True)]
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}
    scores = [(run / "samples" / "stage2" / "scores.jsonl").read_text() for run in runs]
    assert scores[0] == scores[1]


def test_a_decoder_that_takes_turns_computes_by_diffusers(capsys):
    options = [*ADAPTERS, "models.offload=true", "device=cpu"]
    assert load_models(load_config("tiny", options)).decoder.attention is None
    assert main(["check", "tiny", *options]) == 0
    assert "decoder: by diffusers, because of models.offload" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"models\.offload is true"):
        load_config("tiny", [*options, "same_sampler.attention=sdpa"])
