"""The modulation table, and a transformer that looks its modulations up."""

import logging

import pytest
import sd3
import torch
from measures import relative_error
from uae_kernels.mmdit import ModulationTable, accelerate_sd3, restore_sd3

TIMES = 1000 * torch.linspace(1, 0, 8)[:-1]


@pytest.fixture
def model():
    return sd3.transformer("medium", layers=3)


def modulations(model, given):
    """What each adaLN layer gives, in the order they run in."""
    seen = []
    layers = [m for name, m in model.named_modules() if name.endswith(("norm1.linear", "norm1_context.linear"))]
    hooks = [m.register_forward_hook(lambda _, __, out: seen.append(out)) for m in [*layers, model.norm_out.linear]]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def one_by_one(model, given):
    """`modulations` at each of TIMES alone."""
    rows = [modulations(model, given | {"timestep": time}) for time in TIMES.split(1)]
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind", ["sd3", "medium", "large"])
def test_bitwise_the_modules_own_for_one_row(kind):
    model, given = sd3.transformer(kind, layers=3), sd3.inputs(1)
    table = ModulationTable(model, TIMES, given["pooled_projections"][0])
    expected = one_by_one(model, given)
    found = table.rows(TIMES)
    assert len(found) == len(expected) == 7
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e) and a.std() > 0
    for place in (0, 4):  # one timestep for the batch: one row, not copied
        for a, e in zip(table.rows(TIMES[place].expand(3)), expected, strict=True):
            assert a.stride(0) == 0 and torch.equal(a, e[place].expand(3, -1))


def test_of_a_bf16_model():
    model = sd3.transformer("large").bfloat16()
    given = {name: value.bfloat16() for name, value in sd3.inputs(1).items()}
    table = ModulationTable(model, TIMES, given["pooled_projections"][0])
    for a, e in zip(table.rows(TIMES), one_by_one(model, given), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, e)


def test_a_row_has_the_same_bits_whatever_else_is_in_the_table(model):
    pooled = torch.randn(sd3.POOLED)
    few, many = (ModulationTable(model, times, pooled) for times in (TIMES[2:4], torch.cat([TIMES, TIMES + 1])))
    assert torch.equal(few.values, many.values[2:4])


@torch.no_grad()
def test_is_used_and_frees_the_devices_memory(model, caplog):
    given = sd3.inputs(2)
    table = ModulationTable(model, TIMES, given["pooled_projections"][0])
    given["timestep"] = TIMES[3].expand(2)
    expected = model(**given).sample
    accelerate_sd3(model, modulation_table=table)
    for norm in (model.transformer_blocks[0].norm1, model.norm_out):
        norm.linear._call_impl = lambda *_: pytest.fail("a modulation layer ran")
    assert relative_error(model(**given).sample, expected) <= 1e-5
    table.values.mul_(2)
    assert relative_error(model(**given).sample, expected) > 1e-2
    model.to("meta")  # as to a GPU
    waiting = [name for name, p in model.named_parameters() if not p.is_meta]
    assert {name.rpartition(".linear.")[0].rpartition(".")[2] for name in waiting} == {
        "norm1", "norm1_context", "norm_out",
    }  # fmt: skip
    assert len(waiting) == 2 * 7 and not caplog.records


@torch.no_grad()
def test_pooled_is_compared_once(model, monkeypatch):
    pooled, compared = torch.randn(sd3.POOLED), []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(1) or equal(a, b))
    table = ModulationTable(model, TIMES, pooled)
    cond, uncond = pooled.expand(3, -1), pooled.repeat(3, 1)
    for _ in range(4):
        assert table.serves(cond) and table.serves(uncond) and table.serves(pooled.expand(3, -1))
    assert len(compared) == 1  # the one that it was made for is known
    uncond[2, 5] += 1e-6
    assert not table.serves(uncond) and table.serves(cond) and not table.serves(torch.randn(2, sd3.POOLED))
    for _ in range(20):
        assert table.serves(pooled.repeat(3, 1))
    assert len(table._known) <= 8
    with torch.inference_mode():
        other = pooled.repeat(3, 1)
        assert table.serves(other)
        other += 1
        assert not table.serves(other)
    pooled += 1
    assert not table.serves(cond) and not table.serves(pooled[None])


def another_pooled(model, given):
    given["pooled_projections"] = torch.randn(2, sd3.POOLED)


def one_other_row(model, given):
    given["pooled_projections"] = given["pooled_projections"].clone()
    given["pooled_projections"][1] *= 1.5


def an_adapter(model, given):
    sd3.add_lora(model, ["norm1.linear"])


def an_adapter_on_the_embedding(model, given):
    sd3.add_lora(model, ["timestep_embedder.linear_2"])


def other_weights(model, given):
    model.load_state_dict(sd3.transformer("medium", layers=3).state_dict())


def replaced_weights(model, given):
    model.load_state_dict(sd3.transformer("medium", layers=3).state_dict(), assign=True)


CHANGES = [another_pooled, one_other_row, an_adapter, an_adapter_on_the_embedding, other_weights, replaced_weights]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_falls_back_to_live_modulation(model, change, caplog):
    given = sd3.inputs(2)
    given["timestep"] = TIMES[3].expand(2)
    accelerate_sd3(model, modulation_table=ModulationTable(model, TIMES, given["pooled_projections"][0]))
    with torch.no_grad():
        before = model(**given).sample
        change(model, given)
        with caplog.at_level(logging.WARNING, "uae_kernels"):
            actual = model(**given).sample
            model(**given)
        assert len(caplog.records) == 1 and "modulations are computed" in caplog.text
        restore_sd3(model)
        assert {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("uae")} == set()
        assert relative_error(actual, model(**given).sample) <= 1e-5 < relative_error(before, actual)


def test_training_the_modulations_falls_back(model):
    given = sd3.inputs(2) | {"timestep": TIMES[3].expand(2)}
    accelerate_sd3(model, modulation_table=ModulationTable(model, TIMES, given["pooled_projections"][0]))
    with torch.no_grad():
        model(**given)
    assert model._uae.table is not None  # weights that require gradients do not count where none are taken
    model(**given).sample.sum().backward()
    assert model._uae.table is None and model.norm_out.linear.weight.grad.abs().sum() > 0


def test_a_frozen_one_trains_its_adapter(model):
    given = sd3.inputs(2) | {"timestep": TIMES[3].expand(2)}
    parameters = sd3.add_lora(model)
    expected = torch.autograd.grad(model(**given).sample.square().sum(), parameters, allow_unused=True)
    accelerate_sd3(model, modulation_table=ModulationTable(model, TIMES, given["pooled_projections"][0]))
    actual = torch.autograd.grad(model(**given).sample.square().sum(), parameters, allow_unused=True)
    assert model._uae.table is not None
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None) and (e is None or relative_error(a, e) <= 1e-5)


class Halved(torch.nn.Linear):
    """Keeps half of its weight."""

    def forward(self, x):
        return torch.nn.functional.linear(x, 2 * self.weight, self.bias)


@torch.no_grad()
def test_a_layer_that_keeps_its_weight_in_another_way_waits_and_comes_back(model):
    given = sd3.inputs(2) | {"timestep": TIMES[3].expand(2)}
    expected = model(**given).sample
    layers = [block.norm1.linear for block in model.transformer_blocks]
    for layer in layers:
        layer.__class__ = Halved
        layer.weight /= 2
    accelerate_sd3(model, modulation_table=ModulationTable(model, TIMES, given["pooled_projections"][0]))
    assert relative_error(model(**given).sample, expected) <= 1e-5 and model._uae.table is not None
    restore_sd3(model)
    assert {type(layer) for layer in layers} == {Halved}
    assert relative_error(model(**given).sample, expected) <= 1e-5


def test_a_timestep_that_is_not_there(model):
    table = ModulationTable(model, TIMES, torch.randn(sd3.POOLED))
    for timestep in (torch.tensor([TIMES[0], 3.0]), torch.tensor(500.5).expand(4)):
        with pytest.raises(RuntimeError, match="a timestep is not in the table"):
            table.rows(timestep)


def test_what_is_refused(model):
    pooled = torch.randn(sd3.POOLED)
    for times, given in ((TIMES[:, None], pooled), (TIMES[:0], pooled), (TIMES, pooled.expand(2, -1))):
        with pytest.raises(ValueError, match=r"expected timesteps \(S,\) and pooled \(D,\)"):
            ModulationTable(model, times, given)
    table = ModulationTable(model, TIMES, pooled)
    with pytest.raises(ValueError, match="another transformer"):
        accelerate_sd3(sd3.transformer("medium", layers=3), modulation_table=table)
    with torch.no_grad():
        model.norm_out.linear.weight.mul_(1)
    with pytest.raises(ValueError, match="have changed since"):
        accelerate_sd3(model, modulation_table=table)
    accelerate_sd3(model, modulation_table=ModulationTable(model, TIMES, pooled))
    with pytest.raises(ValueError, match="restore_sd3"):
        ModulationTable(model, TIMES, pooled)
    restore_sd3(model)
    table = ModulationTable(model, TIMES, pooled)
    sd3.add_lora(model, ["norm1.linear"])
    with pytest.raises(
        ValueError, match=r"an adapter or a quantised layer stands at transformer_blocks.0.norm1.linear"
    ):
        accelerate_sd3(model, modulation_table=table)
    with pytest.raises(ValueError, match=r"SD35AdaLayerNormZeroX.linear is a Linear"):
        ModulationTable(model, TIMES, pooled)
