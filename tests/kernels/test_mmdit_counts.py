"""What a block of SD3.5 launches and moves: diffusers' own beside ours, counted at full size on meta tensors."""

import sys
from collections import Counter
from pathlib import Path

import launches
import pytest
import sd3
import torch
from torch.profiler import ProfilerActivity, profile
from uae_kernels.mmdit import ModulationTable, accelerate_sd3, restore_sd3

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.counts import NO_KERNEL, counted, one_attention

BATCH, TOKENS = 2, 333  # one image with guidance, 77 + 256 text tokens
POOLED = torch.empty(2048, device="meta", dtype=torch.bfloat16)


def build(kind, layers, dual=()):
    with torch.device("meta"):
        changes = sd3.PUBLISHED | {"dual_attention_layers": tuple(range(dual))} if dual else sd3.PUBLISHED
        return sd3.transformer(kind, layers=layers, full_width=True, **changes).bfloat16()


def full_size(pixels):
    return {
        name: torch.empty(BATCH, *shape, device="meta", dtype=torch.bfloat16)
        for name, shape in (
            ("hidden_states", (16, pixels // 8, pixels // 8)),
            ("encoder_hidden_states", (TOKENS, 4096)),
            ("timestep", ()),
        )
    } | {"pooled_projections": POOLED.expand(BATCH, -1)}


def meta_table(model, steps=40):
    """A table for meta tensors, whose values nobody can compare: a look-up that waited for one would raise."""
    return ModulationTable(model, torch.empty(steps, device="meta"), POOLED)


def counts_of(model, given, capability=90):
    with torch.no_grad():
        model(**given)  # what happens the first time alone is not counted
        return counted(lambda: model(**given), capability)


def one_block(models, given, capability=90):
    """A block is what the model with one more of them has more."""
    fewer, more = (counts_of(model, given, capability) for model in models)
    return more - fewer


# launches of diffusers' block, of ours, and of ours with a modulation table
LAUNCHES = {"large": (83, 14, 12), "medium": (109, 18, 16)}


@pytest.mark.parametrize("pixels", [512, 1024])
@pytest.mark.parametrize("kind", ["large", "medium"])
def test_launches_and_bytes_of_a_block(kind, pixels):
    """SD3.5-medium's with dual attention."""
    models, given = [build(kind, layers, 9 if kind == "medium" else 0) for layers in (3, 4)], full_size(pixels)
    theirs = one_block(models, given)
    for model in models:
        accelerate_sd3(model)
    ours = one_block(models, given)
    assert (theirs.launches, ours.launches) == LAUNCHES[kind][:2]
    assert ours.other_bytes <= 0.2 * theirs.other_bytes
    assert ours.flops == theirs.flops
    for model in models:
        restore_sd3(model)
        accelerate_sd3(model, modulation_table=meta_table(model))
    fewer, more = (counts_of(model, given).launches for model in models)
    assert more - fewer == LAUNCHES[kind][2]


@pytest.mark.parametrize("pixels", [512, 1024])
@pytest.mark.parametrize("kind", ["large", "medium"])
def test_segments_read_keys_alone_before_the_attention(kind, pixels):
    """As many launches as `qk_norm` and PyTorch's attention, but q and v are neither read nor written beside it."""
    dual, given, blocks = kind == "medium", full_size(pixels), {}
    for attention in ("sdpa", "segments"):
        models = [build(kind, layers, 9 if dual else 0) for layers in (3, 4)]
        blocks[attention] = one_block([accelerate_sd3(model, attention=attention) for model in models], given)
    joined, apart = blocks["sdpa"], blocks["segments"]
    assert apart.launches == joined.launches == LAUNCHES[kind][1]
    assert apart.flops == joined.flops
    names = {kernel.name for kernel in apart.kernels}
    assert {"_norm_kernel", "_forward_kernel"} <= names and not {"_qk_norm_kernel", "attention"} & names
    images, width = (pixels // 16) ** 2, models[0].inner_dim
    # Queries and values are read and written no more, of a second attention the queries; nor are their norms' weights
    # read, and the products of the out-projections add their biases
    passed = BATCH * (4 * (images + TOKENS) + 2 * images * dual) * width + (2 + dual) * 64 + 2 * width
    assert joined.other_bytes - apart.other_bytes == 2 * passed


def test_gelu_has_its_own_launch_where_the_epilogue_does_not_pay():
    models = [accelerate_sd3(build("large", layers)) for layers in (2, 3)]
    given = full_size(512)
    names = [[kernel.name for kernel in one_block(models, given, capability).kernels] for capability in (80, 90, 120)]
    assert [found.count("_addmm_activation") for found in names] == [2, 2, 0]
    assert [found.count("gelu") for found in names] == [0, 0, 2] and len(names[2]) == len(names[1]) + 2


def test_parameters_on_the_device():
    """SD3.5-large in bf16 with the table of 40 steps, all its layers."""
    model = build("large", 38)
    everything = sum(p.nbytes for p in model.parameters())
    table = meta_table(model)
    accelerate_sd3(model, modulation_table=table)
    waiting = {id(p) for layer in model._uae.table.waiting for p in layer.parameters()}
    resident = sum(p.nbytes for p in model.parameters() if id(p) not in waiting)
    assert everything > 16.1e9 and resident <= 10.8e9
    assert table.values.nbytes < 0.09e9 and resident + table.values.nbytes < 10.85e9


def test_parameters_on_the_device_in_fp8():
    """The same with its blocks' products in e4m3: their numbers, a scale a row, and what is not theirs."""
    model = build("large", 38)
    accelerate_sd3(model, fp8=True, modulation_table=meta_table(model))
    state = model._uae
    waiting = {id(p) for layer in state.table.waiting for p in layer.parameters()}
    waiting |= {id(layer.weight) for layer in state.fp8.layers()}
    resident = sum(p.nbytes for p in model.parameters() if id(p) not in waiting)
    weights = [product.weight for product in state.fp8.products]
    assert {(w.values.dtype, w.scales.dtype) for w in weights} == {(torch.float8_e4m3fn, torch.float32)}
    quantised = sum(w.values.nbytes + w.scales.nbytes for w in weights)
    assert sum(w.values.numel() for w in weights) > 5.3e9 and quantised + resident <= 5.6e9


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", list(sd3.FAMILY))
def test_the_profiler_sees_nothing_else(kind, accelerated):
    """torch.profiler, which looks into every op, finds the same kernels in a small model on the CPU."""
    model, given = sd3.transformer(kind), sd3.inputs()
    if accelerated:
        accelerate_sd3(model)
    with torch.no_grad():
        model(**given)
        expected = counted(lambda: model(**given))
        with launches.recorded(90) as made, one_attention(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(**given)
    known = {kernel.name for kernel in expected.kernels}
    found, rest = Counter(launch.name for launch in made), []

    def visit(event):
        space, _, name = event.name.partition("::")
        name = "add" if name == "add_" else name  # a bias is added in place unless a dispatch mode looks on
        if space in ("aten", "uae_counts") and name in known:
            found[name] += 1
        elif event.cpu_children:
            for child in event.cpu_children:
                visit(child)
        elif space == "aten" and name not in NO_KERNEL and not is_view(name):
            rest.append(name)

    for event in profiler.events():
        if event.cpu_parent is None:
            visit(event)
    assert rest == []
    assert found == Counter(kernel.name for kernel in expected.kernels)


def is_view(name):
    if name == "dropout":  # returns its input in a model that is evaluated
        return True
    packet = getattr(torch.ops.aten, name)
    return all(
        r.alias_info is not None and not r.alias_info.is_write
        for r in getattr(packet, packet.overloads()[0])._schema.returns
    )


def test_counts_of_known_functions():
    x, w = torch.empty(6, 8, device="meta"), torch.empty(5, 8, device="meta")
    counts = counted(lambda: torch.relu(x @ w.t()).add_(1).view(-1))
    assert [(k.name, k.bytes, k.flops) for k in counts.kernels] == [
        ("mm", 4 * (48 + 40 + 30), 2 * 6 * 8 * 5),
        ("relu", 4 * 60, 0),
        ("add_", 4 * 60, 0),
    ]
    assert counts.launches == 3 and counts.other_bytes == 4 * 120
    row = torch.empty(1, 8, device="meta").expand(6, 8)
    assert counted(lambda: x * row).other_bytes == 4 * (48 + 8 + 48)  # an expanded row is read once
    q = torch.empty(2, 3, 7, 4, device="meta")
    (attention,) = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)).kernels
    assert attention.flops == 2 * 2 * (2 * 3 * 7 * 7 * 4)
    assert (counted(lambda: (x @ w.t(), torch.relu(x))) - counted(lambda: torch.relu(x))).launches == 1
