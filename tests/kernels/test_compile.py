"""torch.compile takes every op as it is, and once for all values of a number; torch.library finds no fault."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from uae_kernels import (
    flow_grpo_loss,
    flow_step,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    segment_attention,
    shared_prefix_attention,
    token_logprobs,
)

B, T, H, V = 4, 6, 8, 20


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


# Each makes inputs, and returns one that needs a gradient and a differentiable function of the number of that name.


def token_case(number, **options):
    logits, targets = leaf(B, T, V), torch.randint(-1, V, (B, T))

    def call(s):
        out = token_logprobs(logits, targets, **{"logit_scale": 1.2, **options, number: s})
        return sum(x.sum() for x in out) if options.get("return_entropy") else out.sum()

    return logits, call


def linear_case(number, train=False, **options):
    hidden, weight, bias = leaf(B, T, H), leaf(V, H), leaf(V)
    weight.requires_grad_(train), bias.requires_grad_(train)
    targets = torch.randint(-1, V, (B, T))

    def call(s):
        out = linear_logprobs(hidden, weight, targets, bias=bias, **{"softcap": 5.0, **options, number: s})
        return sum(x.sum() for x in out) if options.get("return_entropy") else out.sum()

    return hidden, call


def linear_grpo_case(number):
    hidden, weight, targets = leaf(B, T, H), torch.randn(V, H), torch.randint(0, V, (B, T))
    rewards, old = torch.randn(B), torch.full((B, T), -3.0)

    def call(s):
        given = {"rewards": rewards, "group_size": 2, "old_logprobs": old, "entropy_coef": 0.1, number: s}
        return linear_grpo_loss(hidden, weight, targets, **given).loss

    return hidden, call


def advantages_case(number, **options):
    rewards = leaf(B, 2)
    return rewards, lambda s: group_advantages(rewards, 2, **options, **{number: s}).square().sum()


def grpo_case(number, **options):
    logp, a, mask = leaf(B, T), torch.tensor([1.0, -0.5, 0.8, -1.2]), torch.rand(B, T) > 0.3
    old, ref, sampler = (logp.detach() + torch.randn(B, T) for _ in range(3))
    tensors = dict(mask=mask, old_logprobs=old, ref_logprobs=ref, sampling_logprobs=sampler)
    values = dict(beta=0.1, entropies=torch.rand(B, T)) | options
    several = {"sapo_temperature": lambda s: (s, 2 * s), "vespo": lambda s: (s, 1.0, s, s)}.get(number, lambda s: s)
    return logp, lambda s: grpo_loss(logp, a, **tensors, **{**values, number: several(s)}).loss


def step_case(number, **options):
    v, x, u = leaf(3, 2, 5), torch.randn(3, 2, 5), torch.randn(3, 2, 5)

    def call(s):
        given = {"sigma_next": 0.1, "noise_level": 0.4, "guidance_scale": 2.0, "seed": 7, **options, number: s}
        step = flow_step(v, x, 0.9, velocity_uncond=u, **given)
        return step.log_prob.sum() + step.next_sample.square().sum()

    return v, call


def flow_case(number, **options):
    v, x, taken, ref = leaf(3, 2, 5), *(torch.randn(3, 2, 5) for _ in range(3))
    a, old = torch.randn(3), torch.full((3,), -1.0)

    def call(s):
        given = {"sigma": 0.9, "noise_level": 0.4, "clip_range": 0.3, "beta": 0.2, **options, number: s}
        return flow_grpo_loss(v, x, taken, old, a, sigma_next=0.1, ref_velocity=ref, **given).loss

    return v, call


def shared_prefix_case(number):
    q, k, v, prefix_k, prefix_v = leaf(4, 3, 4, 8), *(leaf(n, 3, 2, 8) for n in (4, 4, 2, 2))
    counts = dict(lengths=torch.tensor([3, 0, 2, 1]), prefix_lengths=torch.tensor([1, 3]))

    def call(s):
        out = shared_prefix_attention(q, k, v, prefix_k, prefix_v, group_size=2, **counts, **{number: s})
        return out.square().sum()

    return q, call


def segment_case(number):
    inputs = [leaf(2, n, 3, 8) for n in (5, 5, 5, 2, 2, 2)]
    weights = {name: torch.rand(8) for name in ("q_weight", "k_weight", "q2_weight", "k2_weight")}
    return inputs[0], lambda s: sum(o.square().sum() for o in segment_attention(*inputs, **weights, **{number: s}))


ENTROPY = dict(return_entropy=True, entropy_grad=True)
KINDS = ("flow_sde", "dance_sde", "cps")
CASES = [
    *((token_case, name, {}) for name in ("temperature", "softcap")),
    (token_case, "temperature", dict(inplace_backward=True)),
    *((linear_case, name, {}) for name in ("temperature", "softcap")),
    (linear_case, "temperature", dict(train=True) | ENTROPY),
    *((linear_grpo_case, name, {}) for name in ("temperature", "clip_low")),
    *((advantages_case, name, {}) for name in ("eps", "clip")),
    *((grpo_case, name, {}) for name in (
        "clip_low", "clip_high", "delta", "beta", "importance_cap", "off_policy_threshold", "entropy_quantile",
        "entropy_coef",
    )),
    (grpo_case, "normalizer", dict(loss_type="dapo")),
    (grpo_case, "sapo_temperature", dict(loss_type="sapo")),
    (grpo_case, "vespo", dict(loss_type="vespo")),
    *((step_case, name, {}) for name in ("sigma_next", "guidance_scale")),
    *((step_case, "noise_level", dict(kind=kind)) for kind in KINDS),
    *((flow_case, name, {}) for name in ("sigma", "clip_range", "beta", "advantage_clip")),
    *((flow_case, "noise_level", dict(kind=kind)) for kind in KINDS),
    (shared_prefix_case, "scale", {}),
    (segment_case, "eps", {}),
]  # fmt: skip


@pytest.mark.parametrize("case, number, options", CASES)
def test_compiles_once_for_all_values_of_a_number(case, number, options):
    tensor, call = case(number, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    seen = set()
    for i in range(12):  # the ninth recompilation would raise
        value = 0.15 + i / 23  # scaled outside: Dynamo of PyTorch 2.11 compiles what it computes with a number in
        value = {"normalizer": 9 * value, "off_policy_threshold": 5 * value - 2}.get(number, value)
        results = [(loss, *torch.autograd.grad(loss, tensor)) for loss in (compiled(value), call(value))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        seen.add(tuple(x.double().norm().item() for x in results[0]))
    assert counter.frame_count <= 2  # for the first number, and for any number
    assert len(seen) > 1  # the number is not compiled in


def test_compiles_once_for_all_seeds():
    _, call = step_case("seed")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in range(3, 13):
        assert torch.equal(compiled(seed), call(seed))
    assert counter.frame_count <= 2


def test_noise_is_computed_as_it_is():
    """Fused into what surrounds it, every use of a word would run the generator again."""
    _, call = step_case("seed")
    graphs = []
    torch.compile(call, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(3)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("philox_normal" in name for name in names) == 1 and len(names) < 100, names


def test_inductor():
    hidden, call = linear_grpo_case("temperature")
    results = [(o, *torch.autograd.grad(o, hidden)) for o in (torch.compile(call, fullgraph=True)(0.9), call(0.9))]
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


VARIANTS = [
    ("token_logprobs", token_case, "temperature", {}),
    ("token_logprobs", token_case, "softcap", ENTROPY),
    ("token_logprobs", token_case, "temperature", dict(inplace_backward=True) | ENTROPY),
    ("linear_logprobs", linear_case, "temperature", {}),
    ("linear_logprobs", linear_case, "temperature", ENTROPY),
    ("linear_logprobs", linear_case, "temperature", dict(train=True)),
    ("linear_logprobs", linear_case, "temperature", dict(train=True) | ENTROPY),
    ("linear_logprobs", linear_grpo_case, "clip_low", {}),
]


@pytest.mark.parametrize("name, case, number, options", VARIANTS)
def test_opcheck(name, case, number, options, monkeypatch):
    """torch.library's own checks on the flat ops, with the arguments that the public function gives them."""
    module, calls = importlib.import_module(f"uae_kernels.{name}"), []
    for part in ("_forward", "_backward", "_backward_"):
        op, called = getattr(module, part, None), f"_direct{part.removeprefix('_forward')}"
        record = lambda *given, op=op: calls.append((op, [*map(copied, given)])) or op(*given)  # noqa: E731
        monkeypatch.setattr(module, called if hasattr(module, called) else part, record, raising=False)
    tensor, call = case(number, **options)
    torch.autograd.grad(call(0.4), tensor)
    frozen = name == "linear_logprobs" and not options.get("train")  # its backward pass is a row scaling
    assert len(calls) == 2 - frozen
    for op, arguments in list(calls):  # checking the forward pass calls the backward
        if op is not calls[0][0]:  # the backward pass is not differentiable itself
            arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(op, arguments)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch does not know the tag")
def test_no_cuda_graph_keeps_the_numbers_of_its_recording():
    ops = {name: op._opoverload for name, op in OPDEFS.items() if name.startswith("uae_kernels::")}
    reads = {n for n, op in ops.items() if "packed" in {argument.name for argument in op._schema.arguments}}
    assert len(reads) > 10 and reads == {n for n, op in ops.items() if torch.Tag.cudagraph_unsafe in op.tags}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "uae_kernels":
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


def test_plain_tensors_on_a_cpu_go_past_the_dispatcher():
    tensor, call = linear_case("temperature")
    with Names() as names:
        torch.autograd.grad(call(0.4), tensor)
    assert not names.ours


FAKE = {
    token_case: "temperature",
    advantages_case: "eps",
    grpo_case: "beta",
    step_case: "sigma_next",
    flow_case: "beta",
}


@pytest.mark.parametrize("case, number", FAKE.items())
def test_fake_tensors(case, number):
    """Neither definitions nor ops read their values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensor, call = case(number)
        (grad,) = torch.autograd.grad(call(0.4), tensor)
    assert grad.shape == tensor.shape


def copied(given):
    """An argument as it was before an op that writes to it."""
    return given.detach().clone().requires_grad_(given.requires_grad) if isinstance(given, torch.Tensor) else given


@pytest.mark.parametrize("case, number, options", {case[0]: case for case in reversed(CASES)}.values())
def test_gradients_inside_a_dispatch_mode(case, number, options):
    tensor, call = case(number, **options)
    expected = torch.autograd.grad(call(0.4), tensor)
    with FlopCounterMode(display=False):
        actual = torch.autograd.grad(call(0.4), tensor)
    assert torch.equal(*expected, *actual) and expected[0].abs().sum() > 0
