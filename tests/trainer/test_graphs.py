"""Recorded loops draw what unrecorded ones draw, bit for bit, and never with weights that are no longer there.

In a CUDA graph's place stands a tape: the operations of a call, with the very memory they read and wrote, done again on
that memory. Like a graph it knows nothing of what Python does later.
"""

import json
from contextlib import contextmanager
from functools import partial

import pytest
import test_decoder
import torch
from equal_runs import assert_equal_runs, rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from uae_kernels.mmdit import patch

from uae_fast.cli import main
from uae_fast.config import ConfigError, OptimizerConfig, load_config
from uae_fast.models import loading
from uae_fast.models.loading import load_models
from uae_fast.optim import RunningMean, build_optimizer
from uae_fast.rollout import graphs
from uae_fast.rollout.graphs import Loops, fingerprint
from uae_fast.rollout.renders import Guidance, Shortcuts, euler, render
from uae_fast.trainer import train

MODES = ["full", "lora"]
LENGTHS = [28, 20, 24, 20, 28, 24, 24, 20, 20, 28]
SHORT = Shortcuts(guided_part=0.5, reuse=(2, 5))


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Aliases: a parameter that is given other memory later has the old one here
        self.operations.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.operations:
            found = function(*args, **kwargs)
            if all(result.alias_info is None for result in function._schema.returns):
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Tapes:
    """A recorder for the CPU."""

    def __init__(self, *_):
        self.bytes = self.count = 0

    def warm_up(self, function):
        function()

    def record(self, function):
        self.count += 1
        self.bytes += 1000
        with capturing(), Tape() as tape:
            output = function()
        return tape.replay, output


@contextmanager
def capturing():
    """As while a CUDA graph is recorded."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(patch, "_is_captured", lambda x: True)
        yield


def build(mode="full", *options):
    """A decoder with an adapter, if it has one, that does something; its recorder."""
    return test_decoder.build(mode, True, *options), Tapes()


def drawn(decoder, recorder=None, *, scale=3.0, steps=8, seed=0, batch=4, lengths=None, shortcuts=SHORT, shared=True):
    """Images of ten contexts, some of one noise if `shared`; from recorded loops or, without a recorder, from calls."""
    context = torch.randn(10, 28, 96, generator=torch.Generator().manual_seed(seed))
    if recorder is None:
        decoder.loops = None
    elif decoder.loops is None or decoder.loops.recorder is not recorder:
        decoder.loops = Loops(recorder)
    seeds = [seed] * 5 + [*range(5)] if shared else [*range(10)]
    return render(
        decoder, context, seeds, resolution=32, steps=steps, batch=batch, lengths=lengths,
        guidance=Guidance(scale, context[:1, :24] / 2), shortcuts=shortcuts,
    )  # fmt: skip


def same(decoder, recorder, recordings, **settings):
    """Whether a draw by recorded loops has the bits of plain calls, and how many recordings there are after it."""
    recorded = drawn(decoder, recorder, **settings)
    assert recorder.count == recordings
    loops = decoder.loops
    plain = drawn(decoder, None, **settings)
    decoder.loops = loops
    assert torch.equal(recorded, plain)
    return plain


@pytest.mark.parametrize(
    "options",
    [(), ("same_sampler.attention=segments",), ("same_sampler.accelerate=false",), ("same_sampler.fp8=true",)],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_replays_have_the_bits_of_calls(mode, scale, options):
    decoder, recorder = build(mode, *options)
    first = same(decoder, recorder, 1, scale=scale)
    other = same(decoder, recorder, 1, scale=scale, seed=3)  # other noise and contexts in the same buffers
    assert not torch.equal(first, other)
    same(decoder, recorder, 3, scale=scale, lengths=LENGTHS)  # a loop for each length, of which 28 is the whole
    same(decoder, recorder, 3, scale=scale, lengths=LENGTHS, seed=4)
    same(decoder, recorder, 3, scale=scale, seed=5)


def test_a_loop_for_each_setting():
    decoder, recorder = build()
    drawings = [
        same(decoder, recorder, count, **settings)
        for count, settings in enumerate(
            [
                {"shortcuts": Shortcuts()}, {"shortcuts": SHORT}, {"shortcuts": Shortcuts(0.5)},
                {"shortcuts": Shortcuts(1.0, (2, 5))}, {"scale": 2.0}, {"scale": 1.0}, {"batch": 5}, {"shared": False},
            ],
            1,
        )
    ]  # fmt: skip
    assert len({tuple(images.flatten().tolist()) for images in drawings[:6]}) == 6
    for settings in ({}, {"scale": 2.0}, {"batch": 5}):
        same(decoder, recorder, 8, **settings)
    same(decoder, recorder, 9, steps=5)  # takes the table out of use


def test_what_was_drawn_stays_when_more_is_drawn():
    decoder, recorder = build()
    first = drawn(decoder, recorder)
    kept = first.clone()
    drawn(decoder, recorder, seed=1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("mode", MODES)
def test_replays_see_what_an_optimiser_wrote(mode, name):
    decoder, recorder = build(mode)
    parameters = decoder.trainable()
    before = same(decoder, recorder, 1)
    optimizer = build_optimizer([{"params": parameters, "lr": 0.02}], OptimizerConfig(name=name))
    mean = RunningMean(parameters, 0.9)
    generator, addresses = torch.Generator().manual_seed(1), fingerprint(decoder)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        mean.update()
        optimizer.zero_grad()
    trained = same(decoder, recorder, 1)
    saved = {name: value.clone() for name, value in mean.tensors().items()}
    mean.adopt()
    adopted = same(decoder, recorder, 1)
    assert fingerprint(decoder) == addresses
    mean.restore(saved)
    assert fingerprint(decoder) == addresses
    assert (trained - before).abs().max() > 1e-2 < (adopted - trained).abs().max()


def moved(decoder):
    """A weight elsewhere, with other values."""
    weight = decoder.transformer.transformer_blocks[1].ff.net[2].weight
    weight.data = weight.data * 1.5


def replaced(decoder):
    state = {name: value.clone() for name, value in decoder.transformer.state_dict().items()}
    state["proj_out.weight"] *= 1.5
    decoder.transformer.load_state_dict(state, assign=True)


def modulated(decoder):
    """A modulation layer's weights change in place, under the table."""
    with torch.no_grad():
        decoder.transformer.transformer_blocks[0].norm1.linear.weight.mul_(1.5)


def unadapted(decoder):
    decoder.transformer.disable_adapters()


def scaled(decoder):
    from peft.tuners.lora import LoraLayer

    for module in decoder.transformer.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 7.0)


def converted(decoder):
    decoder.transformer.to(torch.float64)


@pytest.mark.parametrize("mode, change", [
    *((mode, change) for mode in MODES for change in (moved, modulated)),
    ("full", replaced), ("full", converted), ("lora", unadapted), ("lora", scaled),
])  # fmt: skip
def test_a_loop_that_would_be_stale_is_recorded_anew(mode, change, monkeypatch):
    decoder, recorder = build(mode)
    before = same(decoder, recorder, 1, shared=False)
    change(decoder)
    with monkeypatch.context() as patches:  # without the fingerprint, what was recorded is drawn
        (loop,) = decoder.loops.loops.values()
        patches.setattr(graphs, "fingerprint", lambda decoder: loop.read)
        if change is not converted:  # its contexts have another dtype
            assert torch.equal(drawn(decoder, recorder, shared=False), before)
    after = same(decoder, recorder, 2, shared=False)
    assert (after - before).abs().max() > (0 if change is converted else 1e-3)
    same(decoder, recorder, 2, shared=False, seed=1)


def test_after_training_in_full_the_new_table_is_drawn_with():
    decoder, recorder = build("full")
    before = same(decoder, recorder, 1)
    assert decoder.table is not None
    decoder.trainable()
    same(decoder, recorder, 2)
    with torch.no_grad():
        for parameter in decoder.transformer.parameters():
            parameter.mul_(1.01)
    assert decoder.table is None
    trained = same(decoder, recorder, 2)
    decoder.freeze()
    after = same(decoder, recorder, 3)
    assert decoder.table is not None
    assert (after - trained).abs().max() < 1e-4 < (after - before).abs().max()


def test_a_table_out_of_use_comes_back_for_a_replay():
    """Another level's velocity in between takes it out of use."""
    decoder, recorder = build("full")
    same(decoder, recorder, 1)
    x, context = torch.randn(4, 4, 8, 8), torch.randn(4, 28, 96)
    with torch.no_grad():
        decoder.velocity(x, torch.tensor(0.4321), context)
    assert decoder.table is None
    images = drawn(decoder, recorder)
    assert decoder.table is not None and torch.equal(images, drawn(decoder))


class NoTransfers(TorchDispatchMode):
    """Every operation has all its tensors on the device, but for the numbers that kernels are called with."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if function.namespace != "uae_kernels":  # these read their numbers on the host, from a tensor of the host
            assert len({x.device for x in tensors}) <= 1, function
        return out


@pytest.mark.parametrize("attention", ["sdpa", "segments"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_recorded_never_waits_for_the_device(mode, attention, monkeypatch):
    """On meta tensors whatever asks for a value raises; the warm-up may, for the table's pooled condition."""
    decoder = build(mode, "same_sampler.accelerate=false")[0].to("meta")
    decoder.accelerate(attention, (8,))

    class Recorder(Tapes):
        def warm_up(self, function):
            with monkeypatch.context() as patches:
                patches.setattr(torch, "equal", lambda a, b: True)
                function()

        def record(self, function):
            with capturing(), NoTransfers():
                output = function()
            return (lambda: None), output

    decoder.loops = Loops(Recorder())
    context = torch.empty(4, 28, 96, device="meta")
    settings = {"resolution": 32, "steps": 8, "batch": 2, "guidance": Guidance(3.0, context[:1])}
    with monkeypatch.context() as patches:
        patches.setattr(torch, "equal", lambda a, b: True)  # the first step's shared pass may ask as well
        images = render(decoder, context, [1, 1, 2, 3], **settings)
    assert images.is_meta and decoder.table is not None and len(decoder.loops.loops) == 1
    loop = partial(euler, decoder, decoder.sigmas(8), settings["guidance"], SHORT)
    buffers = next(iter(decoder.loops.loops.values())).buffers
    with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():  # a value asked for would be noticed
        loop(*buffers).max().item()


def test_a_whole_run_is_the_same(world, small_config, monkeypatch):
    """All stages, trained with recorded loops and without: every weight and every metric, bit for bit."""
    options = ("render.guidance_scale=2", "stage3.updates=2", "cheaper_sampler.reuse=[3]", "stage3.ema_decay=0.9")
    plain = train(small_config(world, *options, run="plain"))
    made = []
    monkeypatch.setattr(loading, "records_graphs", lambda config: True)
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: made.append(Tapes()) or made[-1])
    recorded = train(small_config(world, *options, run="recorded"))
    assert [recorder.count > 4 for recorder in made] == [True]
    sizes = [row["memory/graphs_gb"] for row in rows(recorded)]
    assert sizes == sorted(sizes) and 0 < sizes[0] < sizes[-1] <= made[0].bytes / 1e9
    kept = [{key: value for key, value in row.items() if key != "memory/graphs_gb"} for row in rows(recorded)]
    (recorded / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert_equal_runs(plain, recorded)


def test_a_graph_elsewhere_than_on_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "same_sampler.graph: records CUDA graphs, but device = auto is cpu here"
    assert main(["check", "tiny", "same_sampler.graph=true"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=message):
        load_models(load_config("tiny", ["same_sampler.graph=true"]))
    for option, reason in (
        ("device=cpu", r"but device = cpu: choose a CUDA device, or false"),
        ("models.offload=true", r"models\.offload moves them"),
        ("models.decoder_quantization=nf4", r"models\.decoder_quantization is nf4"),
    ):
        overrides = ["same_sampler.graph=true", "models.encoder=lora", "models.decoder=lora", option]
        with pytest.raises(ConfigError, match=rf"command line: same_sampler\.graph: .*{reason}"):
            load_config("tiny", overrides)
    assert main(["check", "tiny", "device=cuda"]) == 0  # without a graph, checking needs no GPU
