"""Products in e4m3, alone and in SD3 transformers; emulated in fp32 on the CPU."""

import copy
import dataclasses
import itertools

import pytest
import sd3
import torch
from measures import relative_error
from torch import nn
from uae_kernels import _triton
from uae_kernels.mmdit import (
    Fp8Calibration,
    ModulationTable,
    Quantized,
    accelerate_sd3,
    calibrate,
    fp8_linear,
    patch,
    quantize_rows,
    restore_sd3,
)
from uae_kernels.mmdit import fp8 as fp8_ops
from uae_kernels.mmdit.calibration import _spread, passes
from uae_kernels.mmdit.products import InFp8, fingerprint, products, static

LEVELS = (900.0, 711.0, 300.0)


def e4m3_numbers():
    """Every e4m3 number by its code, from its sign, exponent and mantissa; NaN at 127 and 255."""
    found = []
    for sign, exponent, mantissa in itertools.product((1, -1), range(16), range(8)):
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        found.append(sign * size)
    found[127] = found[255] = float("nan")
    return torch.tensor(found, dtype=torch.float64)


def nearest(x):
    """The code of the e4m3 number nearest to each x, of two equally near ones the even one."""
    positive = e4m3_numbers()[:127]
    distance = (x.abs()[..., None] - positive).abs()
    least = distance.amin(-1, keepdim=True)
    odd = torch.arange(127) % 2
    codes = torch.where(distance == least, odd, 2).argmin(-1)
    return codes + 128 * torch.signbit(x)


def test_values_are_the_nearest_and_scales_the_largest_over_448():
    x = torch.cat([torch.randn(6, 40), 1e-4 * torch.randn(6, 40), torch.randn(6, 40) ** 5])
    x[3] = 0.0
    x[4, :3] = torch.tensor([0.0, -0.0, -1e-9])
    made = quantize_rows(x)
    amax = x.abs().amax(1, keepdim=True)
    live = (amax > 0).flatten()
    assert torch.equal(made.scales[live], amax[live] / 448) and made.scales[3] == 2.0**-126
    assert (made.values.float().abs().amax(1)[live] == 448).all() and (made.values[3].float() == 0).all()
    expected = nearest((x * (1 / made.scales)).double().clamp(-448, 448))
    assert torch.equal(made.values.view(torch.uint8).long(), expected)
    numbers = e4m3_numbers()[made.values.view(torch.uint8).long()]
    assert torch.equal(numbers, made.values.double())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)])
def test_the_product_is_that_of_the_quantised_numbers(dtype, bound):
    x, weight, bias = torch.randn(2, 5, 96), torch.randn(48, 96), torch.randn(48).to(dtype)
    x[..., 7] *= 30
    a, b = quantize_rows(x), quantize_rows(weight)
    numbers = e4m3_numbers()
    wide, wide_weight = (
        numbers[q.values.view(torch.uint8).long()] * (plain.double().abs().amax(-1, keepdim=True) / 448)
        for q, plain in ((a, x), (b, weight))
    )
    out = fp8_linear(a, b, bias, dtype=dtype)
    assert out.dtype == dtype and relative_error(out, wide @ wide_weight.t() + bias.double()) <= bound
    assert relative_error(fp8_linear(a, b, dtype=dtype), wide @ wide_weight.t()) <= bound
    assert 1e-2 < relative_error(out, x @ weight.t() + bias) < 6e-2  # what three bits of mantissa cost


def test_what_a_product_refuses():
    a, b = quantize_rows(torch.randn(3, 32)), quantize_rows(torch.randn(16, 32))
    for x, weight, bias, message in (
        (a, quantize_rows(torch.randn(16, 48)), None, "do not fit"),
        (a, b, torch.zeros(15), "do not fit"),
        (a, Quantized(b.values, b.scales[:, 0]), None, "with scales"),
        (Quantized(a.values.float(), a.scales), b, None, "e4m3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_linear(x, weight, bias)


class Quantising(nn.Module):
    """A linear layer that quantises its input's rows and its weight's, written out."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        def rounded(rows):
            scale = rows.abs().amax(-1, keepdim=True) / 448
            return (rows / scale).to(torch.float8_e4m3fn).float() * scale

        return nn.functional.linear(rounded(x), rounded(self.layer.weight), self.layer.bias)


@torch.no_grad()
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("kind", list(sd3.FAMILY))
def test_every_product_of_the_blocks_is_quantised_and_nothing_else(kind, table):
    model, given = sd3.transformer(kind, layers=3), sd3.inputs(4)
    plain = model(**given).sample
    by_hand = copy.deepcopy(model)
    for block in by_hand.transformer_blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and name != "linear":  # those of the norms
                    setattr(parent, name, Quantising(layer))
    expected = by_hand(**given).sample
    made = ModulationTable(model, torch.tensor([711.0, 3.0]), given["pooled_projections"][0]) if table else None
    accelerate_sd3(model, fp8=True, modulation_table=made)
    # A number next to a tie may round the other way
    assert relative_error(model(**given).sample, expected) <= 2e-3
    assert 5e-3 < relative_error(expected, plain) < 5e-2


@torch.no_grad()
def test_restoring_gives_everything_back_bit_for_bit(tmp_path):
    model, given = sd3.transformer("medium"), sd3.inputs()
    sd3.add_lora(model, [*sd3.LORA_TARGETS, "net.2"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, expected, entries = dict(model.named_parameters()), model(**given).sample, set(vars(model))
    inside = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    mark = fingerprint(model)
    accelerate_sd3(model, fp8=True)
    model(**given)
    assert any(isinstance(module, InFp8) for module in model.modules())

    def unchanged():
        state = model.state_dict()
        assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert fingerprint(model) == mark

    unchanged()
    restore_sd3(model)
    unchanged()
    assert torch.equal(model(**given).sample, expected) and set(vars(model)) == entries
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == inside


@torch.no_grad()
def test_weights_wait_on_the_host_and_what_is_small_moves():
    model = accelerate_sd3(sd3.transformer("large"), fp8=True)
    layers = {id(p) for product in model._uae.fp8.products for layer in product.layers for p in [layer.weight]}
    model.to("meta")  # as to a GPU
    waiting = {id(p) for p in model.parameters() if not p.is_meta}
    assert waiting == layers
    given = {name: value.to("meta") for name, value in sd3.inputs().items()}
    assert model(**given).sample.is_meta


@torch.no_grad()
def test_of_a_bf16_model():
    model, given = sd3.transformer("large").bfloat16(), sd3.inputs()
    given = {name: value.bfloat16() for name, value in given.items()}
    exact = model(**given).sample
    out = accelerate_sd3(model, fp8=True)(**given).sample
    assert out.dtype == torch.bfloat16 and 5e-3 < relative_error(out, exact) < 5e-2


def test_a_policy_is_refused():
    model, given = sd3.transformer("large"), sd3.inputs()
    accelerate_sd3(model, fp8=True)
    with pytest.raises(RuntimeError, match=r"pos_embed.* requires one.* never a policy's\. restore_sd3 it"):
        model(**given)
    model.requires_grad_(False)
    with torch.no_grad():
        drawn = model(**given).sample
    assert torch.equal(model(**given).sample, drawn)  # frozen: gradients may be enabled around it
    given["encoder_hidden_states"].requires_grad_()
    with pytest.raises(RuntimeError, match="an input requires one"):
        model(**given)
    restore_sd3(model)
    sd3.add_lora(model)
    accelerate_sd3(model, fp8=True)
    with pytest.raises(RuntimeError, match=r"lora_A.* requires one"):
        model(**sd3.inputs())
    with torch.no_grad():
        model(**sd3.inputs())


def lora(layer, x):
    """What a layer's adapter adds."""
    name = "default"
    return layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]


@torch.no_grad()
def test_adapters_read_what_is_not_quantised():
    model = sd3.transformer("medium")
    sd3.add_lora(model, [*sd3.LORA_TARGETS, "net.2"])
    accelerate_sd3(model, fp8=True)
    block, state = model.transformer_blocks[0], model._uae
    attn, x = block.attn, torch.randn(2, 6, 48)
    layers = attn.to_q, attn.to_k, attn.to_v
    assert patch._form(*layers) == "both" and patch._form(block.ff.net[0].proj) == "fp8"
    rows = quantize_rows(x)._replace(plain=x)
    on = patch._project(layers, rows)
    out = patch._project_out(state, attn.to_out[0], x)[0]
    ff = patch._feed_forward(state, block.ff, quantize_rows(x))
    hidden = nn.functional.gelu(patch._multiply((block.ff.net[0].proj,), quantize_rows(x))[0], approximate="tanh")
    model.disable_adapters()
    off = patch._project(layers, rows)
    for a, b, layer in zip(on, off, layers, strict=True):
        torch.testing.assert_close(a - b, lora(layer, x), rtol=1e-4, atol=1e-5)
    branch = out - patch._project_out(state, attn.to_out[0], x)[0]
    torch.testing.assert_close(branch, lora(attn.to_out[0], x), rtol=1e-4, atol=1e-5)
    branch = ff - patch._feed_forward(state, block.ff, quantize_rows(x))
    torch.testing.assert_close(branch, lora(block.ff.net[2], hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_come_through_a_whole_pass():
    model, given = sd3.transformer("medium"), sd3.inputs()
    sd3.add_lora(model)
    on = model(**given).sample
    model.disable_adapters()
    off = model(**given).sample
    accelerate_sd3(model, fp8=True)
    assert relative_error(model(**given).sample, off) < 3e-2
    model.enable_adapters()
    assert relative_error(model(**given).sample, on) < 3e-2 < relative_error(on, off)


def drawn(batch=4, levels=LEVELS):
    return [sd3.inputs(batch) | {"timestep": torch.full((batch,), level)} for level in levels]


@torch.no_grad()
def test_calibration_records_the_largest_inputs_of_each_level():
    model, runs = sd3.transformer("medium", layers=3), drawn() + drawn(levels=LEVELS[1:])
    expected, names = {}, {id(layers[0]): name for name, layers in products(model).items()}
    for layer in model.modules():
        if id(layer) in names:
            layer.register_forward_pre_hook(
                lambda m, args: seen.append((names[id(m)], args[0].abs().max().item())), prepend=True
            )
    for run in runs:
        seen = []
        model(**run)
        for name, size in seen:
            key = name, run["timestep"][0].item()
            expected[key] = max(size, expected.get(key, 0.0))
    for layer in model.modules():
        layer._forward_pre_hooks.clear()
    done = []
    made = calibrate(model, runs, margin=1.25, sweep=2, progress=lambda: done.append(1))
    assert len(done) == passes(model, runs, 2) and "_uae" not in vars(model)
    assert made.timesteps.tolist() == sorted(LEVELS, reverse=True)
    assert set(made.scales) == set(static(products(model))) and len(made.scales) == 3 * 4 + 1 - 2
    for name, scales in made.scales.items():
        sizes = torch.tensor([expected[name, level] for level in made.timesteps.tolist()])
        torch.testing.assert_close(scales, 1.25 * sizes / 448, rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_sweep_tries_each_product_alone():
    model, runs = sd3.transformer("large"), drawn(levels=LEVELS[:1])
    made = calibrate(model, runs, threshold=0.003, sweep=1)
    assert set(made.errors) == set(products(model)) and made.fingerprint == fingerprint(model)
    assert set(made.fallback) == {name for name, error in made.errors.items() if error > 0.003}
    assert 0 < len(made.fallback) < len(made.errors)
    exact = accelerate_sd3(model)(**runs[0]).sample
    restore_sd3(model)
    for name, fallback in (
        *((name, tuple(other for other in made.errors if other != name)) for name in made.errors),
        ("", made.fallback),
    ):
        one = Fp8Calibration(made.timesteps, made.scales, fallback, made.fingerprint)
        error = relative_error(accelerate_sd3(model, fp8=one)(**runs[0]).sample, exact)
        restore_sd3(model)
        assert error == pytest.approx(made.errors[name] if name else made.error, rel=1e-4, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("sweep", [1, 2, 5])
def test_batches_do_not_decide_which_levels_are_tried(sweep):
    """Of one set of drawings: as it is, in two and in four batches, level by level or batch by batch."""
    model, levels = sd3.transformer("large"), torch.linspace(900.0, 100.0, 8).tolist()
    first = drawn(2, levels=levels)
    made = [
        calibrate(model, runs, sweep=sweep)
        for runs in (first, first * 2, first * 4, [run for run in first for _ in range(3)])
    ]
    assert len(set(made[0].errors.values())) > 3
    assert all(other.errors == made[0].errors and other.fallback == made[0].fallback for other in made[1:])
    tried = [i % 8 for i in _spread(levels * 4, sweep)]
    assert tried == {1: [4], 2: [2, 6], 5: [0, 2, 4, 5, 7]}[sweep]
    assert passes(model, first * 4, sweep) == 32 + sweep * (len(products(model)) + 1)


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_scales_that_are_none_are_refused(value):
    model = sd3.transformer("large")
    made = calibrate(model, drawn(), sweep=1)
    name = next(iter(made.scales))
    broken = made.scales[name].clone()
    if value is None:
        broken = broken[1:]
    else:
        broken[1] = value
    made = dataclasses.replace(made, scales=made.scales | {name: broken})
    with pytest.raises(ValueError, match=f"no positive scale at each level for {name}"):
        accelerate_sd3(model, fp8=made)


@torch.no_grad()
def test_what_falls_back_is_computed_as_ever():
    model, runs = sd3.transformer("large"), drawn()
    made = calibrate(model, runs, threshold=0.0)
    assert set(made.fallback) == {name for name, error in made.errors.items() if error > 0}
    everything = Fp8Calibration(made.timesteps, made.scales, tuple(made.errors), made.fingerprint)
    exact = accelerate_sd3(model)(**runs[0]).sample
    restore_sd3(model)
    assert torch.equal(accelerate_sd3(model, fp8=everything)(**runs[0]).sample, exact)
    assert not any(isinstance(module, InFp8) for module in model.modules())


@torch.no_grad()
def test_a_level_has_its_own_scales():
    model, runs = sd3.transformer("large"), drawn()
    made = calibrate(model, runs)
    exact = [model(**run).sample for run in runs]
    level = made.timesteps.tolist().index(LEVELS[1])
    cut = {name: scales.clone() for name, scales in made.scales.items()}
    for scales in cut.values():
        scales[level] /= 1000  # everything at this level is cut to next to nothing
    accelerate_sd3(model, fp8=Fp8Calibration(made.timesteps, cut, fingerprint=made.fingerprint))
    errors = [relative_error(model(**run).sample, e) for run, e in zip(runs, exact, strict=True)]
    assert errors[0] < 3e-2 and errors[2] < 3e-2 < 0.1 < errors[1]
    # Samples of different levels in a batch
    mixed = runs[0] | {"timestep": torch.tensor([LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[0]])}
    out = model(**mixed).sample
    restore_sd3(model)
    found = [relative_error(a, e) for a, e in zip(out, model(**mixed).sample, strict=True)]
    assert max(found[0], found[2], found[3]) < 3e-2 < 0.1 < found[1]


@torch.no_grad()
def test_a_level_that_is_not_there():
    model, runs = sd3.transformer("large"), drawn()
    accelerate_sd3(model, fp8=calibrate(model, runs))
    with pytest.raises(RuntimeError, match="a timestep is not among its levels"):
        model(**sd3.inputs() | {"timestep": torch.full((2,), 123.0)})


@torch.no_grad()
def test_changed_weights_are_refused():
    model, runs = sd3.transformer("large"), drawn()
    made, mark = calibrate(model, runs), fingerprint(model)
    accelerate_sd3(model, fp8=made)
    weight = model.transformer_blocks[1].ff.net[2].weight
    weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"weights of transformer_blocks\.1\.ff\.down have changed"):
        model(**runs[0])
    restore_sd3(model)
    with pytest.raises(ValueError, match="made with other weights"):
        accelerate_sd3(model, fp8=made)
    weight[0, 0] -= 1
    weight[:2] = weight[:2].flip(0)  # the same numbers at other places
    weight[:, :2] = weight[:, :2].flip(1)
    assert fingerprint(model) != mark
    with pytest.raises(ValueError, match="of another transformer"):
        accelerate_sd3(sd3.transformer("large", layers=3), fp8=made)
    sd3.add_lora(model)
    adapted = fingerprint(model)
    next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.01)
    assert fingerprint(model) != adapted


@torch.no_grad()
def test_a_copy_is_independent():
    model, given = sd3.transformer("medium"), sd3.inputs()
    accelerate_sd3(model, fp8=True)
    out = model(**given).sample
    made = copy.deepcopy(model)
    assert torch.equal(made(**given).sample, out)
    restore_sd3(made)
    for p in made.parameters():
        p.zero_()
    assert (made(**given).sample == 0).all() and torch.equal(model(**given).sample, out)


def test_older_gpus_are_refused_before_anything_changes(monkeypatch):
    model = sd3.transformer("large")
    monkeypatch.setattr(_triton, "capability", lambda tensor: 86)
    with pytest.raises(RuntimeError, match=r"compute capability 8\.9 or newer .* this GPU has 8\.6: use fp8=False"):
        accelerate_sd3(model, fp8=True)
    with pytest.raises(RuntimeError, match=r"8\.9 or newer"):
        calibrate(model, drawn())
    monkeypatch.undo()
    assert "_uae" not in vars(model) and not any(isinstance(module, InFp8) for module in model.modules())


def odd(model):
    model.transformer_blocks[1].ff.net[2] = nn.Linear(192, 40)


def without_bias(model):
    model.transformer_blocks[1].attn.to_q = nn.Linear(48, 48, bias=False)


@pytest.mark.parametrize("change, message", [(odd, "multiples of 16"), (without_bias, "with a bias")])
def test_other_layers_are_refused_before_anything_changes(change, message):
    model = sd3.transformer("large")
    change(model)
    with pytest.raises(ValueError, match=message):
        accelerate_sd3(model, fp8=True)
    assert "_uae" not in vars(model) and not any(isinstance(module, InFp8) for module in model.modules())


@torch.no_grad()
def test_hooks_that_would_not_run_are_refused():
    model = accelerate_sd3(sd3.transformer("large"), fp8=True)
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="would not run"):
        model(**sd3.inputs())


def test_fp8_is_a_switch_or_a_calibration():
    with pytest.raises(TypeError, match="False, True or an Fp8Calibration, got str"):
        accelerate_sd3(sd3.transformer("large"), fp8="e4m3")


@torch.no_grad()
def test_emulation_is_logged_once(caplog):
    fp8_ops._announce.cache_clear()
    model = accelerate_sd3(sd3.transformer("large"), fp8=True)
    with caplog.at_level("INFO", logger="uae_kernels"):
        model(**sd3.inputs()), model(**sd3.inputs())
    assert [record.getMessage() for record in caplog.records if "fp8" in record.getMessage()] == [
        "fp8 products are emulated on this device: e4m3 numbers, multiplied in fp32"
    ]


@torch.no_grad()
def test_a_sample_is_bitwise_the_same_anywhere_in_a_batch():
    model, given = accelerate_sd3(sd3.transformer("medium"), fp8=True), sd3.inputs(8)
    out = model(**given).sample
    for order in (torch.arange(8).flip(0), torch.tensor([3, 3, 0, 3, 7, 1, 1, 2])):
        assert torch.equal(model(**{name: value[order] for name, value in given.items()}).sample, out[order])
