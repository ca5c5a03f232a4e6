"""The accelerated decoder is diffusers' decoder: the same function, the same parameters, whatever trains."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uae_fast.config import ConfigError, OptimizerConfig, load_config
from uae_fast.models.loading import load_models
from uae_fast.optim import build_optimizer
from uae_fast.rollout.renders import Guidance, initial_noise, ode_path, render

MODES = ["full", "lora"]
VIEWS = {
    "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "split", "split_with_sizes",
    "unsqueeze", "unbind", "alias", "detach", "as_strided",
}  # fmt: skip


def build(mode, accelerate=True, *options):
    """A decoder whose adapter, if it has one, does something."""
    given = [f"models.decoder={mode}", f"same_sampler.accelerate={accelerate}", *options]
    decoder = load_models(load_config("tiny", given)).decoder
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return decoder


def inputs(batch=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 28, 96, generator=generator)


def drawn(decoder, steps=8):
    return render(decoder, inputs()[1], range(4), resolution=32, steps=steps, batch=4, guidance=Guidance())


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def change(decoder, amount=0.02):
    """Every parameter that trains moves."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.trainable():
            parameter += amount * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [8, 10], ids=["tabulated", "computed"])
def test_ten_guided_steps_are_those_of_diffusers(mode, steps):
    _, context = inputs()
    found = []
    for accelerate in (True, False):
        decoder = build(mode, accelerate)
        noise = initial_noise(range(4), decoder.latent_shape(32), decoder.device)
        found.append(ode_path(decoder, noise, context, decoder.sigmas(steps), 4, Guidance(5.0, context[:1] / 2)))
        assert decoder._uses_table == (accelerate and steps == 8)
    assert 0 < relative(*found) < 1e-5  # not bit for bit: the accelerated one is another computation


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_diffusers(mode):
    (x, context), found = inputs(), []
    for accelerate in (True, False):
        decoder = build(mode, accelerate)
        c = context.clone().requires_grad_()
        velocity = decoder.velocity(x, decoder.sigmas(8)[3], c)
        found.append(torch.autograd.grad(velocity.square().mean(), [c, *decoder.trainable()], allow_unused=True))
        velocity = decoder.velocity(x, decoder.sigmas(8)[3], c)
        found[-1] = torch.autograd.grad(velocity.square().mean(), [c, *decoder.trainable()], allow_unused=True)
    scale = max(g.abs().max() for g in found[1] if g is not None)
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("each", [False, True], ids=["one level", "levels"])
@torch.no_grad()
def test_rows_of_several_lengths_find_their_places(each):
    decoder, (x, context) = build("full"), inputs(5)
    lengths = [20, 28, 20, 24, 28]
    levels = torch.linspace(0.2, 0.9, 5)
    sigma = levels if each else levels[2]
    together = decoder.velocity(x, sigma, context, lengths)
    for i, length in enumerate(lengths):
        alone = decoder.velocity(x[i : i + 1], levels[i] if each else sigma, context[i : i + 1, :length])
        assert relative(together[i : i + 1], alone) < 1e-5
    assert relative(decoder.velocity(x, sigma, context), together) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_parameters_keep_names_and_values(mode, tmp_path):
    from diffusers import SD3Transformer2DModel

    decoder, plain = build(mode), build(mode, accelerate=False)
    drawn(decoder)
    assert decoder._uses_table
    ours, theirs = decoder.transformer.state_dict(), plain.transformer.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if mode == "full":
        decoder.transformer.save_pretrained(tmp_path, max_shard_size="2MB")
        saved = SD3Transformer2DModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(saved[name], theirs[name]) for name in theirs)


def test_after_training_the_table_is_that_of_the_new_weights():
    decoder, plain = build("full"), build("full", accelerate=False)
    before = drawn(decoder)
    for part in (decoder, plain):
        parameters = part.trainable()
        config = OptimizerConfig(name="adamw8bit", weight_decay=0.5)
        optimizer = build_optimizer([{"params": parameters, "lr": 0.1}], config)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert relative(drawn(decoder), drawn(plain)) < 1e-5  # while it trains
    assert not decoder._uses_table
    decoder.freeze()
    after = drawn(decoder)
    assert decoder._uses_table
    assert relative(after, drawn(plain)) < 1e-5 < relative(after, before)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_drawing_is_does_not_depend_on_what_was_computed_before(mode):
    """Levels outside the table take it out of use, for themselves alone."""
    decoder, (x, context) = build(mode), inputs()
    first = drawn(decoder)
    with torch.no_grad():
        other = decoder.velocity(x, torch.tensor(0.4321), context)
        again = decoder.velocity(x, torch.full((4,), 0.4321), context)
    assert relative(other, again) < 1e-5
    assert torch.equal(drawn(decoder), first)
    plain = build(mode, accelerate=False)
    assert relative(other, plain.velocity(x, torch.tensor(0.4321), context)) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_stays_what_it_was(mode):
    decoder, (x, context) = build(mode), inputs()
    drawn(decoder)
    decoder.keep_reference()
    sigma = decoder.sigmas(8)[2]
    with torch.no_grad():
        with decoder.acting_as_reference():
            before = decoder.velocity(x, sigma, context)
        change(decoder)
        policy = decoder.velocity(x, sigma, context)
        with decoder.acting_as_reference():
            after = decoder.velocity(x, sigma, context)
    assert torch.equal(before, after)
    assert relative(policy, after) > 1e-3


def test_of_full_weights_the_reference_has_the_bits_of_the_policy_it_was():
    decoder, (x, context) = build("full"), inputs()
    drawn(decoder)
    decoder.keep_reference()
    decoder.trainable()
    with torch.no_grad():
        policy = decoder.velocity(x, decoder.sigmas(8)[2], context)
        with decoder.acting_as_reference():
            assert torch.equal(decoder.velocity(x, decoder.sigmas(8)[2], context), policy)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_without_gradients_has_the_bits_of_one_with_them(mode):
    decoder, (x, context) = build(mode), inputs()
    decoder.trainable()
    with_gradients = decoder.velocity(x, decoder.sigmas(8)[2], context)
    with torch.no_grad():
        assert torch.equal(decoder.velocity(x, decoder.sigmas(8)[2], context), with_gradients)


class Counting(TorchDispatchMode):
    """Counts the ATen operations that compute or copy."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(count for name, count in self.seen.items() if name not in VIEWS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trains", [False, True])
def test_it_takes_fewer_operations_than_diffusers(mode, trains):
    x, context = inputs()
    totals = []
    for accelerate in (True, False):
        decoder = build(mode, accelerate)
        if trains:
            decoder.trainable()
        with torch.set_grad_enabled(trains):
            decoder.velocity(x, decoder.sigmas(8)[2], context)
            with Counting() as counting:
                decoder.velocity(x, decoder.sigmas(8)[2], context)
        totals.append(counting.total)
    assert totals[0] < totals[1]


@pytest.mark.parametrize("scale, count", [(1.0, 2), (3.0, 3)])
@torch.no_grad()
def test_a_context_is_embedded_once_for_all_steps(scale, count, monkeypatch):
    """Of two batches that draw with one negative prompt."""
    decoder, calls, linear = build("full"), [], torch.nn.Linear.forward

    def forward(layer, x):
        if layer is decoder.transformer.context_embedder:
            calls.append(len(x))
        return linear(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    _, context = inputs(8)
    noise = initial_noise(range(8), decoder.latent_shape(32), decoder.device)
    ode_path(decoder, noise, context, decoder.sigmas(8), 4, Guidance(scale, context[:1] + 1))
    assert calls == [4] * count


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_of_one_level_modulations_are_one_row(mode, monkeypatch):
    """A row's bits do not depend on how many there are, and the work not either."""
    decoder, rows, linear = build(mode), [], torch.nn.Linear.forward
    decoder.trainable()
    layers = [module for name, module in decoder.transformer.named_modules() if name.endswith("norm1.linear")]

    def forward(layer, x):
        if layer in layers:
            rows.append(len(x))
        return linear(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    x, context = inputs()
    decoder.velocity(x, decoder.sigmas(5)[2], context)
    assert rows == [1] * 4


def test_a_copy_is_accelerated_and_apart():
    decoder = build("full")
    first = drawn(decoder)
    other = copy.deepcopy(decoder)
    assert torch.equal(drawn(other), first)
    change(decoder)
    assert torch.equal(drawn(other), first)
    assert not torch.equal(drawn(decoder), first)


def test_an_attention_backend_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"same_sampler\.attention.*flash_attn"):
        load_models(load_config("tiny", ["same_sampler.attention=flash-attn"]))
    with pytest.raises(ConfigError, match=r"same_sampler\.attention.*accelerate is false"):
        load_config("tiny", ["same_sampler.attention=sdpa", "same_sampler.accelerate=false"])
