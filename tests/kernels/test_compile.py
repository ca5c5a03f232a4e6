import pytest
import torch
import uae_kernels as u
from torch._dynamo.testing import CompileCounterWithBackend
from uae_kernels._common import pack_head

OPS = torch.ops.uae_kernels
B, T, H, V = 4, 6, 8, 20


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tensors():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    logp = torch.randn(B, T, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (B, T)), logp, torch.randn(B), torch.randn(B, T)


def cases():
    """name -> a differentiable function of one number, which must not be compiled in."""
    hidden, weight, targets, logp, a, other = tensors()
    trainable = weight.clone().requires_grad_()
    logits = torch.randn(B, T, V, requires_grad=True)
    v, x, w = (torch.randn(3, 2, 5, requires_grad=i == 0) for i in range(3))
    grpo = dict(old_logprobs=other, ref_logprobs=other * 1.1, sampling_logprobs=other * 0.9, entropies=-other)
    yield "token temperature", logits, lambda s: u.token_logprobs(logits, targets, temperature=s).sum()
    yield "token softcap", logits, lambda s: u.token_logprobs(logits, targets, softcap=s, logit_scale=s).sum()
    yield (
        "token inplace",
        logits,
        lambda s: u.token_logprobs(logits, targets, temperature=s, inplace_backward=True).sum(),
    )
    yield (
        "linear",
        hidden,
        lambda s: u.linear_logprobs(hidden, weight, targets, temperature=s, softcap=s + 1).sum(),
    )
    yield (
        "entropy",
        hidden,
        lambda s: sum(
            o.sum()
            for o in u.linear_logprobs(
                hidden, trainable, targets, temperature=s, return_entropy=True, entropy_grad=True
            )
        ),
    )
    yield (
        "linear_grpo",
        hidden,
        lambda s: (
            u.linear_grpo_loss(
                hidden, weight, targets, rewards=a, group_size=2, temperature=s, clip_low=s, entropy_coef=0.1
            ).loss
        ),
    )
    for key in ("clip_low", "clip_high", "delta", "beta", "importance_cap", "off_policy_threshold",
                "entropy_quantile", "entropy_coef", "normalizer"):  # fmt: skip
        yield key, logp, lambda s, key=key: u.grpo_loss(logp, a, **grpo, **{key: s}).loss
    yield (
        "sapo",
        logp,
        lambda s: u.grpo_loss(logp, a, old_logprobs=other, loss_type="sapo", sapo_temperature=(s, 2 * s)).loss,
    )
    yield (
        "vespo",
        logp,
        lambda s: u.grpo_loss(logp, a, old_logprobs=other, loss_type="vespo", vespo=(s, 1.0, s, s)).loss,
    )
    rewards = torch.randn(B, requires_grad=True)
    for key in ("eps", "clip"):
        yield key, rewards, lambda s, key=key: u.group_advantages(rewards, 2, **{key: s}).square().sum()
    for kind in ("flow_sde", "dance_sde", "cps"):
        yield (
            kind,
            v,
            lambda s, kind=kind: u.flow_step(
                v, x, s + 0.3, s, kind=kind, noise_level=s, velocity_uncond=w, guidance_scale=s, seed=7
            ).log_prob.sum(),
        )
        yield (
            kind + " loss",
            v,
            lambda s, kind=kind: (
                u.flow_grpo_loss(
                    v,
                    x,
                    w,
                    a[:3] * 0 - 1,
                    a[:3],
                    s + 0.3,
                    s,
                    kind=kind,
                    clip_range=s,
                    ref_velocity=w,
                    beta=s,
                    advantage_clip=s,
                ).loss
            ),
        )


CASES = {name: (leaf, function) for name, leaf, function in cases()}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_every_number(name):
    leaf, function = CASES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for i in range(12):  # the ninth recompilation would raise
        number = 0.15 + i / 23
        results = [(out, *torch.autograd.grad(out, leaf)) for out in (compiled(number), function(number))]
        for c, e in zip(*results, strict=True):
            torch.testing.assert_close(c, e)
    assert counter.frame_count <= 2  # once for the first number, once for any number


def test_no_recompilation_for_seeds():
    v, x = torch.randn(3, 8), torch.randn(3, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s: u.flow_step(v, x, 0.8, 0.7, seed=s).next_sample, fullgraph=True, backend=counter)
    for i in range(10):
        assert torch.equal(compiled(i + 3), u.flow_step(v, x, 0.8, 0.7, seed=i + 3).next_sample)
    assert counter.frame_count <= 2


def test_inductor():
    hidden, weight, targets, _, a, other = tensors()

    def step(hidden):
        return u.linear_grpo_loss(hidden, weight, targets, a, old_logprobs=other, temperature=0.9).loss

    results = [
        (o, torch.autograd.grad(o, hidden)[0]) for o in (torch.compile(step, fullgraph=True)(hidden), step(hidden))
    ]
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def flat(*, train=False, bias=True):
    hidden = torch.randn(5, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=train)
    b = torch.randn(V, requires_grad=train) if bias else None
    return hidden, weight, torch.tensor([1, 5, -100, 3, 19]), b, pack_head(0.7, 5.0, 1.2)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_linear_logprobs(order, bias):
    *inputs, packed = flat(train=order == 0, bias=bias)
    active = torch.tensor([True, False, True, True, False]) if bias else None
    arguments = (*inputs, active, packed, -100, order == 2, order, False)
    torch.library.opcheck(OPS.linear_logprobs.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_linear_logprobs_backward(need):
    hidden, weight, targets, bias, packed = (x.detach() for x in flat())
    rows = [torch.randn(5) for _ in range(5)]
    arguments = (*rows[:2], hidden, weight, targets, bias, packed, *rows[2:], -100, True, *need, False)
    torch.library.opcheck(OPS.linear_logprobs_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("entropy", [True, False])
def test_opcheck_token_logprobs(entropy):
    logits, targets = torch.randn(2, 3, V, requires_grad=True), torch.randint(-1, V, (2, 3))
    packed = pack_head(0.7, None, 1.2)
    forward = OPS.token_logprobs.default
    torch.library.opcheck(forward, (logits, targets, packed, -100, entropy, False, False), test_utils=CHECKS)
    saved = forward(logits.detach(), targets, packed, -100, entropy, False, False)
    grads = torch.randn(2, 3), torch.randn(2, 3) if entropy else None
    arguments = (*grads, logits.detach(), targets, packed, *saved, -100, False)
    torch.library.opcheck(OPS.token_logprobs_backward.default, arguments, test_utils=CHECKS)
    torch.library.opcheck(OPS.token_logprobs_backward_.default, arguments, test_utils=CHECKS)
