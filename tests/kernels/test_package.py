"""What holds for every function of the package, and for the package itself."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uae_kernels
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from uae_kernels import flow_grpo_loss, flow_step, group_advantages, grpo_loss, reference

FUNCTIONS = [
    "flow_grpo_loss", "flow_step", "group_advantages", "grpo_loss", "linear_grpo_loss", "linear_logprobs",
    "token_logprobs",
]  # fmt: skip


def test_public_names():
    assert uae_kernels.__all__ == sorted(["FlowStep", "GRPOLoss", "reference", *FUNCTIONS])
    assert reference.__all__ == FUNCTIONS
    for name in FUNCTIONS:
        file = {"group_advantages": "advantages"}.get(name, name)
        assert getattr(uae_kernels, name).__module__ == f"uae_kernels.{file}"
        assert getattr(reference, name).__module__ == f"uae_kernels.reference.{file}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_public_signature(name):
    public, definition = getattr(uae_kernels, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(definition)
    assert inspect.signature(public).parameters["impl"].default == "auto"
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in public.__doc__


CALLS = {
    "group_advantages": lambda f, impl: f(torch.rand(4), 2, impl=impl),
    "token_logprobs": lambda f, impl: f(torch.rand(4, 5), torch.zeros(4, dtype=torch.int64), impl=impl),
    "linear_logprobs": lambda f, impl: f(
        torch.rand(4, 3), torch.rand(5, 3), torch.zeros(4, dtype=torch.int64), impl=impl
    ),
    "grpo_loss": lambda f, impl: f(torch.rand(4, 5), torch.rand(4), impl=impl).loss,
    "linear_grpo_loss": lambda f, impl: (
        f(torch.rand(4, 2, 3), torch.rand(5, 3), torch.zeros(4, 2).long(), torch.rand(4), impl=impl).loss
    ),
    "flow_step": lambda f, impl: f(torch.rand(2, 3), torch.rand(2, 3), 0.9, 0.8, seed=1, impl=impl).mean,
    "flow_grpo_loss": lambda f, impl: (
        f(*(torch.rand(2, 3) for _ in range(3)), torch.rand(2), torch.rand(2), 0.9, 0.8, impl=impl).loss
    ),
}


WITHOUT_TRITON = ("flow_step", "flow_grpo_loss")


@pytest.mark.parametrize("module", [uae_kernels, reference])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_impl(module, name):
    call, function = CALLS[name], getattr(module, name)
    for impl in ("auto", "torch"):
        assert call(function, impl).isfinite().all()
    without = module is reference or name in WITHOUT_TRITON
    with pytest.raises(RuntimeError, match="no Triton kernel" if without else 'impl="triton" needs tensors on a GPU'):
        call(function, "triton")
    with pytest.raises(ValueError, match="impl must be"):
        call(function, "cuda")


def test_import_loads_only_torch_and_changes_no_environment():
    code = """
import os, sys
import torch
before, environment = set(sys.modules), dict(os.environ)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import uae_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert dict(os.environ) == environment
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
assert not torch.cuda.is_initialized()
loaded = {name.partition(".")[0] for name in sys.modules}
assert not {"transformers", "diffusers", "peft", "trl", "liger_kernel"} & loaded
known = {*sys.stdlib_module_names, "uae_kernels", "torch", "triton"}
others = {name for name in new - known if not name.startswith("_sysconfigdata")}
assert not others, others
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_names_every_function_and_its_example_runs(capsys):
    card = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    assert [name for name in FUNCTIONS if f"| `{name}(" not in card] == []
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["out"].loss.isfinite() and names["hidden"].grad.abs().sum() > 0
    assert "clip" in example and capsys.readouterr().out


B, T = 4, 6


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def advantages_case(number, **options):
    rewards = leaf(B, 2)
    return rewards, lambda s: group_advantages(rewards, 2, **options, **{number: s}).square().sum()


def grpo_case(number, **options):
    logp, a, mask = leaf(B, T), torch.randn(B), torch.rand(B, T) > 0.3
    old, ref, sampler = (logp.detach() + torch.randn(B, T) / 3 for _ in range(3))
    tensors = dict(mask=mask, old_logprobs=old, ref_logprobs=ref, sampling_logprobs=sampler)
    values = dict(beta=0.1, entropies=torch.rand(B, T)) | options
    return logp, lambda s: grpo_loss(logp, a, **tensors, **(values | {number: s})).loss


def step_case(number, **options):
    v, x, u = leaf(3, 2, 5), torch.randn(3, 2, 5), torch.randn(3, 2, 5)

    def call(s):
        given = dict(sigma_next=0.1, noise_level=0.4, guidance_scale=2.0, seed=7) | options | {number: s}
        step = flow_step(v, x, 0.9, velocity_uncond=u, **given)
        return step.log_prob.sum() + step.next_sample.square().sum()

    return v, call


def flow_case(number, **options):
    v, x, taken, ref = leaf(3, 2, 5), *(torch.randn(3, 2, 5) for _ in range(3))
    a, old = torch.randn(3), torch.full((3,), -1.0)

    def call(s):
        given = dict(sigma=0.9, noise_level=0.4, clip_range=0.3, beta=0.2) | options | {number: s}
        return flow_grpo_loss(v, x, taken, old, a, sigma_next=0.1, ref_velocity=ref, **given).loss

    return v, call


CASES = {
    "group_advantages": [(advantages_case, name) for name in ("eps", "clip")],
    "grpo_loss": [(grpo_case, name) for name in (
        "clip_low", "clip_high", "delta", "beta", "importance_cap", "entropy_quantile", "entropy_coef",
    )],
    "flow_step": [(step_case, name) for name in ("sigma_next", "noise_level", "guidance_scale")],
    "flow_grpo_loss": [(flow_case, name) for name in ("sigma", "noise_level", "clip_range", "beta")],
}  # fmt: skip


@pytest.mark.parametrize("case, number", [case for cases in CASES.values() for case in cases])
def test_compiles_once_for_all_values_of_a_number(case, number):
    torch._dynamo.reset()
    tensor, call = case(number)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    losses = set()
    for i in range(10):
        value = 0.15 + i / 23
        results = [(loss, *torch.autograd.grad(loss, tensor)) for loss in (compiled(value), call(value))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        losses.add(results[0][0].item())
    assert counter.frame_count <= 2  # for the first number, and for any number
    assert len(losses) > 1  # the number is not compiled in


def test_compiles_once_for_all_seeds():
    torch._dynamo.reset()
    _, call = step_case("seed")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in range(3, 12):
        assert torch.equal(compiled(seed), call(seed))
    assert counter.frame_count <= 2


VARIANTS = [
    ("advantages", advantages_case, "eps", {}),
    ("advantages", advantages_case, "clip", dict(aggregation="normalize_then_sum")),
    ("advantages", advantages_case, "eps", dict(reward_weights=torch.rand(2), scale="batch")),
    ("grpo_loss", grpo_case, "clip_low", {}),
    ("grpo_loss", grpo_case, "entropy_coef", dict(entropies=leaf(B, T))),
    ("grpo_loss", grpo_case, "delta", dict(loss_type="vespo", normalizer=torch.tensor(3.0), max_length=9)),
    ("flow_step", step_case, "noise_level", {}),
    ("flow_step", step_case, "noise_level", dict(next_sample=torch.randn(3, 2, 5), seed=None, kind="cps")),
    ("flow_step", step_case, "guidance_scale", dict(noise=torch.randn(3, 2, 5), seed=None)),
    ("flow_grpo_loss", flow_case, "beta", {}),
    ("flow_grpo_loss", flow_case, "beta", dict(velocity_uncond=leaf(3, 2, 5), normalizer=torch.tensor(7.0))),
]


@pytest.mark.parametrize("name, case, number, options", VARIANTS)
def test_opcheck(name, case, number, options):
    """torch.library's own checks on the flat ops, with the arguments that the public function gives them."""
    module, calls = importlib.import_module(f"uae_kernels.{name}"), []
    forward, backward = module._forward, module._backward
    tensor, call = case(number, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_forward", lambda *given: calls.append(given) or forward(*given))
        patch.setattr(module, "_backward", lambda *given: calls.append(given) or backward(*given))
        torch.autograd.grad(call(0.4), tensor)
    torch.library.opcheck(forward, calls[0])
    # The backward pass is not differentiable itself.
    torch.library.opcheck(backward, [x.detach() if isinstance(x, torch.Tensor) else x for x in calls[1]])


@pytest.mark.parametrize("case, number", [cases[0] for cases in CASES.values()])
def test_gradients_inside_a_dispatch_mode(case, number):
    tensor, call = case(number)
    expected = torch.autograd.grad(call(0.4), tensor)
    with FlopCounterMode(display=False):
        actual = torch.autograd.grad(call(0.4), tensor)
    assert torch.equal(*expected, *actual) and expected[0].abs().sum() > 0
