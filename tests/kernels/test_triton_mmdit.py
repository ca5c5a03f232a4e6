"""Accelerated SD3 transformers whose ops are the Triton kernels, against diffusers' own modules in fp32."""

from collections import Counter

import pytest
import sd3
import torch
from measures import ON_GPU, needs_fp8, relative_error
from uae_kernels.mmdit import ModulationTable, accelerate_sd3, calibrate

SIGMAS = torch.linspace(1, 0, 11)
ATTENTIONS = ["auto", "segments"]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    import importlib

    names = []
    for module in ("mmdit.fp8", "mmdit.gated_residual", "mmdit.qk_norm", "segment_attention"):
        module = importlib.import_module(f"uae_kernels.{module}")
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda k, *a, f=launch, **o: names.append(k.__name__) or f(k, *a, **o))
    return names


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", list(sd3.FAMILY))
def test_ten_steps_with_guidance(kind, attention, launched, device):
    model = sd3.transformer(kind, layers=2, num_attention_heads=2).to(device)
    given = {name: value.to(device) for name, value in sd3.inputs(2, (4, 6), 3).items()}
    sigmas = SIGMAS.to(device)
    expected = sd3.sampled(model, sigmas, given)
    table = ModulationTable(model, 1000 * sigmas[:-1], given["pooled_projections"][0])
    accelerate_sd3(model, modulation_table=table, attention=attention)
    model._uae.impl = "triton"
    assert relative_error(sd3.sampled(model, sigmas, given), expected) <= 1e-5
    attentions = 10 * (3 if kind == "medium" else 2)
    expected = {"_gated_residual_kernel": 10 * 5}
    if attention == "segments":
        expected |= {"_forward_kernel": attentions} | ({} if kind == "sd3" else {"_norm_kernel": attentions})
    else:
        expected |= {"_qk_norm_kernel": attentions}
    assert Counter(launched) == expected


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", list(sd3.FAMILY))
def test_gradients_of_inputs_and_adapter(kind, checkpointed, attention, launched, device):
    model = sd3.transformer(kind, layers=2, num_attention_heads=2).to(device)
    given = {name: value.to(device) for name, value in sd3.inputs(2, (4, 6), 3).items()}
    parameters = sd3.add_lora(model, [*sd3.LORA_TARGETS, "net.2"])
    leaves = [given[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")]

    def gradients():
        out = model(**given).sample
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *parameters], allow_unused=True)]

    expected = gradients()
    accelerate_sd3(model, attention=attention)
    model._uae.impl = "triton"
    if checkpointed:
        model.enable_gradient_checkpointing()
    for a, e in zip(gradients(), expected, strict=True):
        assert (a is None) == (e is None) and (e is None or relative_error(a, e) <= 1e-5 or e.norm() < 1e-5)
    backward = ["_qk_norm_backward_kernel"] if attention == "auto" else ["_queries_kernel", "_keys_kernel"]
    assert {"_gated_residual_backward_kernel", *backward} <= set(launched)
    assert any("qk_norm" in name for name in launched) == (attention == "auto")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sample_is_the_same_anywhere_in_a_batch(attention, device):
    """Bitwise by these kernels, each of whose tests says so; cuBLAS may split sums elsewhere for rows elsewhere."""
    model = sd3.transformer("medium", layers=2, num_attention_heads=2).to(device)
    accelerate_sd3(model, attention=attention)
    model._uae.impl = "triton"
    given = {name: value.to(device) for name, value in sd3.inputs(4, (4, 4), 3, same_pooled=False).items()}
    with torch.no_grad():
        out = model(**given).sample
        for order in (torch.arange(4).flip(0), torch.tensor([2, 2, 0, 3])):
            moved = model(**{name: value[order] for name, value in given.items()}).sample
            assert relative_error(moved, out[order]) <= 1e-6 if ON_GPU else torch.equal(moved, out[order])


@needs_fp8
@torch.no_grad()
@pytest.mark.parametrize("kind", list(sd3.FAMILY))
def test_in_fp8(kind, launched, device):
    """Next to the definitions: a number next to a tie may round the other way."""
    model = sd3.transformer(kind, layers=2, num_attention_heads=2).to(device)
    given = {name: value.to(device) for name, value in sd3.inputs(2, (4, 6), 3).items()}
    sd3.add_lora(model, ["to_q", "to_out.0", "net.2"])
    accelerate_sd3(model, fp8=calibrate(model, [given], threshold=1.0))
    model._uae.impl = "torch"
    expected = model(**given).sample
    model._uae.impl = "triton"
    launched.clear()  # calibrating launches them too, where there is a GPU
    assert relative_error(model(**given).sample, expected) <= 2e-3
    # After attention and GELU: of the image's tokens in each block, and of the text's in all but the last
    assert launched.count("_quantize_kernel") == (2 + 1) * 2 + (kind == "medium")
