"""Accelerated SD3 transformers against diffusers' own modules, in fp32 on the CPU."""

import copy

import pytest
import sd3
import torch
from measures import relative_error
from uae_kernels.mmdit import ModulationTable, accelerate_sd3, restore_sd3

KINDS = list(sd3.FAMILY)
SIGMAS = torch.linspace(1, 0, 11)
ATTENTIONS = ["auto", "segments"]


def tabled(model, given):
    return ModulationTable(model, 1000 * SIGMAS[:-1], given["pooled_projections"][0])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_with_guidance(kind, table, attention):
    model, given = sd3.transformer(kind, layers=3), sd3.inputs(4)
    expected = sd3.sampled(model, SIGMAS, given)
    accelerate_sd3(model, modulation_table=tabled(model, given) if table else None, attention=attention)
    assert relative_error(sd3.sampled(model, SIGMAS, given), expected) <= 1e-5
    assert relative_error(expected, given["hidden_states"][:2]) > 0.1  # the velocities matter


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_ten_steps_at_full_width(kind, attention):
    model, given = sd3.transformer(kind, full_width=True), sd3.inputs(2, (4, 4), 3)
    expected = sd3.sampled(model, SIGMAS, given)
    accelerate_sd3(model, modulation_table=tabled(model, given), attention=attention)
    assert relative_error(sd3.sampled(model, SIGMAS, given), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_eps_of_the_norms_is_theirs(attention):
    model, given = sd3.transformer("medium", layers=3), sd3.inputs()
    before = model(**given).sample
    for name, module in model.named_modules():
        if ".attn" in name and "norm" in name:
            module.eps = 0.5
    expected = model(**given).sample
    assert relative_error(expected, before) > 1e-3
    assert relative_error(accelerate_sd3(model, attention=attention)(**given).sample, expected) <= 1e-5


def gradients(model, given, parameters):
    """Output, and gradients of a fixed combination of it in latents, context and `parameters`."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    out = model(**(given | leaves), return_dict=False)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return [out, *torch.autograd.grad(out, [*leaves.values(), *parameters], weights, allow_unused=True)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("what", ["inputs", "lora", "all linear lora", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, what, checkpointed, attention):
    model, given = sd3.transformer(kind), sd3.inputs()
    if what == "weights":
        parameters = list(model.parameters())
    else:
        model.requires_grad_(False)
        everywhere = [*sd3.LORA_TARGETS, "linear", "net.0.proj", "net.2", "proj_out", "context_embedder"]
        parameters = [] if what == "inputs" else sd3.add_lora(model, everywhere if "all" in what else sd3.LORA_TARGETS)
    expected = gradients(model, given, parameters)
    accelerate_sd3(model, attention=attention)
    if checkpointed:
        model.enable_gradient_checkpointing()
    actual, used = gradients(model, given, parameters), 0
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)  # such as the last block's text queries, which nothing reads
        if e is not None:
            assert relative_error(a, e) <= 1e-5 or e.norm() < 1e-5
            used += bool(e.norm() > 0)
    assert used >= 0.9 * len(expected)


def test_checkpointing_computes_every_block_twice(monkeypatch):
    model, given = sd3.transformer("large", layers=4), sd3.inputs()
    accelerate_sd3(model).enable_gradient_checkpointing()
    count = []
    model.transformer_blocks[1].ff.net[2].register_forward_hook(lambda *_: count.append(1))
    gradients(model, given, [])
    assert len(count) == 2
    with torch.no_grad():
        model(**given)
    assert len(count) == 3


@pytest.fixture
def adapted():
    """A transformer with a LoRA adapter on its attention, and what it gives with and without."""
    model, given = sd3.transformer("medium"), sd3.inputs()
    sd3.add_lora(model)
    with torch.no_grad():
        on = model(**given).sample
        model.disable_adapters()
        off = model(**given).sample
        model.enable_adapters()
    assert relative_error(on, off) > 1e-2
    return model, given, on, off


@torch.no_grad()
def test_adapters_stay_apart_and_switch(adapted):
    model, given, on, off = adapted
    weights = {name: p.clone() for name, p in model.named_parameters()}
    accelerate_sd3(model)
    for _ in range(2):
        assert relative_error(model(**given).sample, on) <= 1e-5
        model.disable_adapters()
        assert relative_error(model(**given).sample, off) <= 1e-5
        model.enable_adapters()
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name])
    for name, p in model.named_parameters():
        if ".lora_B" in name:
            p.zero_()
    assert relative_error(model(**given).sample, off) <= 1e-5


@torch.no_grad()
def test_an_adapter_may_come_and_go_while_accelerated():
    model, given = sd3.transformer("large"), sd3.inputs()
    accelerate_sd3(model)
    plain = model(**given).sample  # the projections lie together now
    sd3.add_lora(model)
    with_adapter = model(**given).sample
    restore_sd3(model)
    assert relative_error(with_adapter, model(**given).sample) <= 1e-5 < relative_error(with_adapter, plain)
    accelerate_sd3(model)
    model.delete_adapters("default")
    assert relative_error(model(**given).sample, plain) <= 1e-6


@torch.no_grad()
def test_a_copy_is_independent(adapted):
    model, given, on, off = adapted
    restored = [p.clone() for p in model.parameters()]
    table = ModulationTable(model, given["timestep"][:1], given["pooled_projections"][0])
    accelerate_sd3(model, modulation_table=table)
    model(**given)
    made = copy.deepcopy(model)
    made.disable_adapters()
    assert relative_error(made(**given).sample, off) <= 1e-5
    assert relative_error(model(**given).sample, on) <= 1e-5
    assert made._uae.table is not None and made._uae.table is not model._uae.table
    for p in made.parameters():
        p.zero_()
    assert (made(**given).sample == 0).all() and relative_error(model(**given).sample, on) <= 1e-5
    restore_sd3(made)
    restore_sd3(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), restored, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("table", [False, True])
def test_restoring_gives_everything_back(table, tmp_path):
    model, given = sd3.transformer("medium"), sd3.inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, expected, entries = dict(model.named_parameters()), model(**given).sample, set(vars(model))
    classes = {name: type(module) for name, module in model.named_modules()}
    accelerate_sd3(model, modulation_table=tabled(model, given) if table else None)
    given["timestep"].fill_(1000 * SIGMAS[3])
    model(**given)

    def unchanged():
        state = model.state_dict()
        assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)
        assert all(p is parameters[name] for name, p in model.named_parameters())

    unchanged()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    restore_sd3(model)
    unchanged()
    given["timestep"].fill_(711)
    assert torch.equal(model(**given).sample, expected)
    assert set(vars(model)) == entries and {n: type(m) for n, m in model.named_modules()} == classes
    with pytest.raises(ValueError, match="is not accelerated"):
        restore_sd3(model)


@torch.no_grad()
def test_loaded_weights_are_used():
    model, other, given = sd3.transformer("large"), sd3.transformer("large"), sd3.inputs()
    accelerate_sd3(model)
    model(**given)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert relative_error(model(**given).sample, other(**given).sample) <= 1e-5
        other = sd3.transformer("large")


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_moves_and_dtypes(attention):
    model, given = sd3.transformer("medium"), sd3.inputs()
    accelerate_sd3(model, attention=attention)
    single = model(**given).sample
    model.to(torch.float64)
    double = model(**{name: value.double() for name, value in given.items()}).sample
    assert double.dtype == torch.float64 and relative_error(single, double) <= 1e-6
    model.to(torch.bfloat16)
    half = model(**{name: value.bfloat16() for name, value in given.items()}).sample
    assert half.dtype == torch.bfloat16 and 1e-4 < relative_error(half, double) <= 3e-2
    model.to("meta")
    assert model(**{name: value.to("meta", torch.bfloat16) for name, value in given.items()}).sample.is_meta


@torch.no_grad()
def test_projections_take_no_memory_twice():
    model = sd3.transformer("medium")
    size = sum(p.nbytes for p in model.parameters())
    accelerate_sd3(model)(**sd3.inputs())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(storages) < len(list(model.parameters())) and sum(storages.values()) == size


@torch.no_grad()
def test_the_context_is_embedded_once():
    model, given, count = sd3.transformer("large"), sd3.inputs(4), []
    layer, expected = model.context_embedder, sd3.sampled(model, SIGMAS, given)
    layer._call_impl = lambda x: count.append(1) or layer.forward(x)
    accelerate_sd3(model)
    assert relative_error(sd3.sampled(model, SIGMAS, given), expected) <= 1e-5
    assert len(count) == 1
    for change in (given["encoder_hidden_states"].neg_, layer.weight.neg_, layer.bias.neg_):  # in place
        change()
        before = len(count)
        model(**given), model(**given)
        assert len(count) == before + 1
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    model(**given), model(**given)
    assert len(count) == 5
    with torch.inference_mode():  # where PyTorch counts no changes, nothing is kept
        given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        model(**given), model(**given)
    assert len(count) == 7
    hook = layer.register_forward_hook(lambda *_: None)
    model(**given), model(**given)
    assert len(count) == 9  # a hook runs as often as it would have
    hook.remove()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sample_is_bitwise_the_same_anywhere_in_a_batch(attention):
    model, given = sd3.transformer("medium"), sd3.inputs(8)
    given["timestep"] = torch.linspace(100, 900, 8)
    accelerate_sd3(model, attention=attention)
    with torch.no_grad():
        out = model(**given).sample
        for order in (torch.arange(8).flip(0), torch.tensor([3, 3, 0, 3, 7, 1, 1, 2])):
            moved = model(**{name: value[order] for name, value in given.items()}).sample
            assert torch.equal(moved, out[order])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast(attention):
    model, given = sd3.transformer("medium"), sd3.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**given).sample
        accelerate_sd3(model, attention=attention)
        assert relative_error(model(**given).sample, expected) < 2e-2


def test_one_timestep_for_the_batch_and_a_dictionary():
    model, given = sd3.transformer("large"), sd3.inputs()
    with torch.no_grad():
        expected = model(**given).sample
        accelerate_sd3(model)
        assert relative_error(model(**(given | {"timestep": given["timestep"][:1]})).sample, expected) <= 1e-5
        positional = model(*given.values(), return_dict=False)
    assert isinstance(positional, tuple) and relative_error(positional[0], expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_pipeline(guidance):
    """A whole StableDiffusion3Pipeline, with its skip-layer guidance, on the same latents and embedded prompts."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(f"{name}{k}" for name in ("text_encoder", "tokenizer") for k in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline(sd3.transformer("medium"), scheduler, vae.eval(), **parts)
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": torch.randn(2, 7, sd3.CONTEXT),
        "negative_prompt_embeds": torch.randn(2, 7, sd3.CONTEXT),
        "pooled_prompt_embeds": torch.randn(2, sd3.POOLED),
        "negative_pooled_prompt_embeds": torch.randn(2, sd3.POOLED),
        "latents": torch.randn(2, 4, 16, 16),
    }
    given |= {"num_inference_steps": 10, "guidance_scale": guidance, "height": 16, "width": 16}
    given |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.5}

    def drawn(kind):
        return torch.as_tensor(pipe(**given, output_type=kind).images)

    expected = drawn("latent"), drawn("np")
    accelerate_sd3(pipe.transformer)
    assert relative_error(drawn("latent"), expected[0]) <= 1e-5 and relative_error(drawn("np"), expected[1]) <= 1e-5


def test_the_backend_is_logged_once(caplog):
    from uae_kernels.mmdit import patch

    patch._announce.cache_clear()
    with caplog.at_level("INFO", logger="uae_kernels"):
        for _ in range(2):
            accelerate_sd3(sd3.transformer("large"))
    assert [record.getMessage() for record in caplog.records] == ["joint attention of SD3 transformers: sdpa"]


REFUSED = {
    "backend": (lambda m: accelerate_sd3(m, attention="fast"), ValueError, "sdpa, segments, flash-attn, xformers"),
    "twice": (lambda m: accelerate_sd3(accelerate_sd3(m)), ValueError, "accelerated already"),
    "another model": (lambda m: accelerate_sd3(m.transformer_blocks), TypeError, "got ModuleList"),
    "restore": (restore_sd3, ValueError, "not accelerated"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(sd3.transformer("large"))


def hooked_block(model):
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)


def hooked_attention(model):
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_: None)


def other_processor(model):
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

    model.transformer_blocks[0].attn.set_processor(FusedJointAttnProcessor2_0())


@pytest.mark.parametrize(
    "change, message",
    [(hooked_block, "hook"), (hooked_attention, "hook"), (other_processor, "[Pp]rocessor")],
)
def test_what_would_be_passed_over_is_refused(change, message):
    """Before it is accelerated, and in the call after a change."""
    for accelerated in (False, True):
        model = sd3.transformer("large")
        if accelerated:
            accelerate_sd3(model)
        change(model)
        with pytest.raises(ValueError, match=message):
            model(**sd3.inputs()) if accelerated else accelerate_sd3(model)


def layer_normed(model):
    model.transformer_blocks[0].attn.norm_added_k = torch.nn.LayerNorm(16)


def unweighted(model):
    model.transformer_blocks[0].attn.norm_q.weight = None


def other_eps(model):
    model.transformer_blocks[0].attn.norm_k.eps = 1e-5


def other_layer_norm(model):
    model.transformer_blocks[1].norm2.eps = 1e-5


def dropping(model):
    model.transformer_blocks[0].attn.to_out[1].p = 0.1


def erf(model):
    model.transformer_blocks[0].ff.net[0].approximate = "none"


def offloaded(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())


@pytest.mark.parametrize(
    "change",
    [layer_normed, unweighted, other_eps, other_layer_norm, dropping, erf, offloaded],
    ids=lambda f: f.__name__,
)
def test_other_transformers_are_refused(change):
    model = sd3.transformer("large")
    change(model)
    with pytest.raises(ValueError, match="accelerate_sd3: "):
        accelerate_sd3(model)


def test_offloading_may_follow():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, given = sd3.transformer("large"), sd3.inputs()
    with torch.no_grad():
        expected = model(**given).sample
        accelerate_sd3(model)
        add_hook_to_module(model, ModelHook())
        assert relative_error(model(**given).sample, expected) <= 1e-5
        with pytest.raises(ValueError, match="remove it first"):
            restore_sd3(model)
        remove_hook_from_module(model)
        restore_sd3(model)
        assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("name, value", [("block_controlnet_hidden_states", [torch.zeros(1)]),
                                         ("joint_attention_kwargs", {"scale": 0.5})])  # fmt: skip
def test_arguments_that_are_refused(name, value):
    model = accelerate_sd3(sd3.transformer("large"))
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        model(**sd3.inputs(), **{name: value})
