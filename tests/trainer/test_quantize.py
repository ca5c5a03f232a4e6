"""Frozen weights in 4 and 8 bits under adapters, by bitsandbytes on the CPU or in e4m3; and parts that take turns."""

import copy
import json

import pytest
import torch
from equal_runs import assert_equal_runs, differing_tensors
from safetensors.torch import load_file
from test_resume import rewind
from torch import nn
from uae_kernels.mmdit import Quantized, quantize_rows

from uae_fast.checkpoint import checkpoints
from uae_fast.cli import main
from uae_fast.config import ConfigError, load_config
from uae_fast.data import ImageFolder
from uae_fast.models import e4m3
from uae_fast.models.e4m3 import E4M3Linear, widen
from uae_fast.models.loading import load_models, load_run
from uae_fast.models.offload import Offloader
from uae_fast.models.quantize import quantized
from uae_fast.trainer import STAGES, train

CAPTION = "a red circle top-left on white"
ADAPTERS = ("models.encoder=lora", "models.decoder=lora")
BOTH = {kind: (*ADAPTERS, *(f"models.{part}_quantization={kind}" for part in ("encoder", "decoder")))
        for kind in ("none", "nf4", "int8", "fp8")}  # fmt: skip


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


@pytest.mark.parametrize(
    "number, kind", [(1, "nf4"), (2, "nf4"), (3, "nf4"), (2, "int8"), (3, "int8"), (1, "fp8"), (2, "fp8"), (3, "fp8")]
)
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


# ---- e4m3 -----------------------------------------------------------------------------------------------------------


def uneven(rows=48, columns=80):
    """A layer whose rows and columns are of very different sizes."""
    layer, generator = nn.Linear(columns, rows), torch.Generator().manual_seed(0)
    layer.weight.data = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, rows)[:, None]
    layer.weight.data *= torch.logspace(0, 1.5, columns)[torch.randperm(columns, generator=generator)]
    return layer


def beyond_the_bound(layer):
    """How far a weight in e4m3 is from the layer's, in half units of its last place."""
    made, exact = E4M3Linear(layer, torch.device("cpu")), layer.weight.double()
    scale = exact.abs().amax(1, keepdim=True) / 448
    half_unit = torch.maximum(exact.abs() / 16, scale / 1024)  # of three bits; below scale/64 the steps are scale/512
    return ((widen(made.weight, made.scales, torch.float64) - exact).abs() / half_unit).max().item()


def one_scale_for_all(x, **options):
    return quantize_rows(x.reshape(1, -1), **options)._replace(scales=x.abs().max().view(1, 1).expand(len(x), 1) / 448)


def a_scale_for_each_column(x, **options):
    values, scales, _ = quantize_rows(x.t(), **options)
    return Quantized(values.t().contiguous(), scales[: len(x)])


def the_next_rows_scale(x, **options):
    made = quantize_rows(x, **options)
    return made._replace(scales=made.scales.roll(1, 0))


def test_a_weight_in_e4m3_is_within_half_a_unit(monkeypatch):
    assert 0.5 < beyond_the_bound(uneven()) < 1 + 1e-6
    for wrong in (one_scale_for_all, a_scale_for_each_column, the_next_rows_scale):
        monkeypatch.setattr(e4m3, "quantize_rows", wrong)
        assert beyond_the_bound(uneven()) > 1.5, wrong.__name__


def test_products_with_a_weight_in_e4m3_are_as_exact_as_any():
    """Against the same weights in fp64, in bf16 and fp32; and the original's, where the format itself shows."""
    layer, generator = uneven(), torch.Generator().manual_seed(1)
    made, x = E4M3Linear(layer, torch.device("cpu")), torch.randn(64, 80, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        rows, bias = x.to(dtype), layer.bias.detach().to(dtype)
        made.bias = nn.Parameter(bias, requires_grad=False)
        exact = nn.functional.linear(rows.double(), widen(made.weight, made.scales, torch.float64), bias.double())
        plain = nn.functional.linear(rows, widen(made.weight, made.scales, torch.float64).to(dtype), bias)
        ours = made(rows)
        assert ours.dtype == dtype and (ours - exact).norm() <= 2 * (plain - exact).norm() and torch.equal(ours, plain)
        original = nn.functional.linear(rows.double(), layer.weight.double(), bias.double())
        assert 0.005 < (((ours - original).norm(dim=0)) / original.norm(dim=0)).max() < 0.05


def test_e4m3_keeps_no_wider_weight_and_has_the_gradient_of_its_own(monkeypatch):
    made = E4M3Linear(uneven(), torch.device("cpu"))
    x, kept = torch.randn(3, 80, dtype=torch.float64, requires_grad=True), []
    made.bias = nn.Parameter(made.bias.double(), requires_grad=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    assert {t.dtype for t in kept} == {torch.uint8, torch.int32} and sum(t.nbytes for t in kept) == 48 * (80 + 4)
    assert torch.autograd.gradcheck(made, (x,))
    one = torch.randn(2, 3, 80, requires_grad=True)
    plain = nn.Linear(80, 48)
    plain.weight.data, plain.bias.data = widen(made.weight, made.scales, torch.float32), made.bias.float()
    made.bias = nn.Parameter(plain.bias.data, requires_grad=False)
    for layer in (made, plain.requires_grad_(False)):
        (gradient,) = torch.autograd.grad(layer(one).square().sum(), one)
        kept.append(gradient)
    assert torch.equal(kept[-1], kept[-2])


def test_no_cast_changes_a_weight_in_e4m3_and_nothing_is_merged_into_it():
    models = load_models(load_config("tiny", list(BOTH["fp8"])))
    layers = [layer for layer in linears(models) if isinstance(layer, E4M3Linear)]
    assert len(layers) == len(list(linears(models))) - 8 == 3 * 7 + 53 - 8  # the others wait behind a table
    before = [(layer.weight.clone(), layer.scales.clone()) for layer in layers]
    again = load_models(load_config("tiny", list(BOTH["fp8"])))
    for part in (models.encoder.model, models.decoder.transformer):
        part.bfloat16().float()
    adapted = models.decoder.transformer.transformer_blocks[0].attn.to_q
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="must match the size"):
            adapted.merge(safe_merge=safe)
    assert not adapted.merged
    for mine, (weight, scales), other in zip(layers, before, linears_in_e4m3(again), strict=True):
        assert torch.equal(mine.weight, weight) and torch.equal(mine.scales, scales)
        assert torch.equal(other.weight, weight) and torch.equal(other.scales, scales)  # quantised anew, the same bits


def linears_in_e4m3(models):
    return (layer for layer in linears(models) if isinstance(layer, E4M3Linear))


@pytest.mark.parametrize("accelerate", [True, False])
def test_a_model_in_e4m3_computes_with_the_weights_they_stand_for(accelerate):
    models, reference, exact = (
        load_models(load_config("tiny", [*options, f"same_sampler.accelerate={accelerate}"]))
        for options in (BOTH["fp8"], ADAPTERS, ADAPTERS)
    )
    with torch.no_grad():
        for layer in linears(reference):
            made = E4M3Linear(layer, torch.device("cpu"))
            layer.weight.data = widen(made.weight, made.scales, torch.float32)
    if accelerate:
        reference.decoder._use_table(False)
        reference.decoder._table = None
    for found, expected, plain in zip(outputs(models), outputs(reference), outputs(exact), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert 0.002 < (plain - expected).norm() / plain.norm() < 0.1


def test_a_resumed_run_over_e4m3_is_the_same(world, small_config, tmp_path):
    options = (*BOTH["fp8"], "checkpoint.every=1", "checkpoint.keep=20", "evaluate.images=2", "render.batch=8")
    whole = train(small_config(world, *options, run="whole"))
    parts = rewind(whole, 5, tmp_path / "parts")
    (parts / "summary.json").unlink()
    train(small_config(world, *options, run="parts"), resume=True)
    assert_equal_runs(whole, parts)
    for ours, theirs in zip(checkpoints(whole / "checkpoints"), checkpoints(parts / "checkpoints"), strict=True):
        assert differing_tensors(ours, theirs) == []


def test_a_table_stands_in_for_modulations_in_e4m3():
    """The images are those of diffusers' modules; in training too their layers wait in the host's memory."""
    models, plain = (
        load_models(load_config("tiny", [*BOTH["fp8"], f"same_sampler.accelerate={on}"])) for on in (True, False)
    )
    decoder = models.decoder
    assert decoder.table is not None and plain.decoder.attention is None
    latents = torch.randn(2, *decoder.latent_shape(32), generator=torch.Generator().manual_seed(0))
    context = plain.condition([CAPTION, "a blue square"])
    for _ in range(2):
        with torch.no_grad():
            found, expected = (m.decoder.velocity(latents, m.decoder.sigmas(8)[3], context) for m in (models, plain))
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
            other, expected = (m.decoder.velocity(latents, torch.tensor(0.4321), context) for m in (models, plain))
        assert decoder.table is None and (other - expected).abs().max() < 1e-5 * expected.abs().max()
        decoder.trainable()
    with torch.no_grad():
        decoder.velocity(latents, decoder.sigmas(8)[3], context)
    decoder.to("meta")  # as to a GPU
    waiting = {name for name, p in decoder.transformer.named_parameters() if not p.is_meta}
    assert {name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[2] for name in waiting} == {
        "norm1", "norm1_context", "norm_out",
    }  # fmt: skip
    assert sum(name.endswith(".scales") for name in waiting) == 8


def test_random_weights_are_quantised_as_they_are_made():
    models = load_models(load_config("tiny", [*BOTH["nf4"], "models.load=dummy", "models.dtype=bfloat16"]))
    kinds = {type(layer).__name__ for layer in linears(models) if layer.weight.dtype == torch.uint8}
    assert kinds == {"Linear4bit"}
    assert all(part.isfinite().all() for part in outputs(models))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["models.encoder_quantization=nf4"], "set models.encoder to lora"),
        (["models.decoder_quantization=fp8"], "set models.decoder to lora"),
        (["models.decoder_quantization=fp4"], "nf4"),
        ([*BOTH["fp8"], "device=mps"], "mps does not have"),
        ([*BOTH["fp8"], "same_sampler.fp8=true"], "keeps them in e4m3 and multiplies in models.dtype"),
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


@pytest.mark.parametrize("number, kind", [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "fp8"), (3, "fp8")])
def test_parts_take_turns_and_none_computes_while_it_waits(world, small_config, number, kind):
    by_diffusers = "same_sampler.accelerate=false"  # as it is with models.offload
    config = small_config(world, *BOTH[kind], "models.gradient_checkpointing=true", by_diffusers)
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
