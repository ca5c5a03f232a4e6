import pytest
import torch
from measures import relative_error
from torch.profiler import ProfilerActivity, profile
from uae_kernels import grpo_loss, linear_grpo_loss, reference

B, T, H, V = 6, 7, 12, 40
BOTH = pytest.mark.parametrize("module", [reference.linear_grpo_loss, linear_grpo_loss])


def problem(dtype=torch.float32):
    hidden = torch.randn(B, T, H).to(dtype).requires_grad_()
    return hidden, torch.randn(V, H).to(dtype), torch.randint(0, V, (B, T)), torch.randn(B)


def per_token():
    mask = torch.arange(T) < torch.tensor([7, 3, 5, 1, 0, 6])[:, None]
    names = ("old_logprobs", "ref_logprobs", "sampling_logprobs")
    return dict(mask=mask, **{name: -3 - torch.rand(B, T) for name in names})


@BOTH
def test_clipped_loss_by_hand(module):
    hidden, weight, targets, advantages = problem(torch.float64)
    given = per_token()
    mask, old = given["mask"].double(), given["old_logprobs"].double()
    out = module(
        hidden, weight, targets, advantages, mask=given["mask"], old_logprobs=old,
        clip_low=0.1, clip_high=0.3, temperature=0.7,
    )  # fmt: skip
    logp = torch.log_softmax(hidden @ weight.T / 0.7, -1).gather(-1, targets[..., None])[..., 0]
    ratio, a = (logp - old).exp(), advantages[:, None]
    per_token_loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a) * mask
    loss = (per_token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.per_token, per_token_loss)
    torch.testing.assert_close(out.logprobs, logp.detach() * mask)
    assert not out.logprobs.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (out.loss, loss)))


OPTIONS = [
    *({"loss_type": t} for t in ("bnpo", "dr_grpo", "dapo", "luspo", "luspo_legacy", "sapo", "vespo")),
    {"loss_type": "cispo", "clip_high": 1.1},
    {"importance_level": "sequence"},
    {"clip_low": 0.01},
    {"clip_high": 0.01},
    {"delta": 1.05},
    {"beta": 0.3},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"loss_type": "sapo", "sapo_temperature": (0.5, 2.0)},
    {"loss_type": "vespo", "vespo": (1.0, 2.0, 2.0, 1.0)},
    {"importance_mode": "sequence_mask", "importance_cap": 1.5},
    {"importance_floor": 0.9},
    {"importance_cap": 1.1},
    {"off_policy_threshold": 0.01},
    {"entropy_quantile": 0.3},
    {"entropy_coef": 0.2},
    {"normalizer": 3.5},
    {"loss_type": "dr_grpo", "max_length": 50},
]


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("own_entropies", [True, False])
def test_every_option_reaches_the_loss(module, options, own_entropies):
    hidden, weight, targets, advantages = problem()
    given, head = per_token(), dict(bias=torch.randn(V), temperature=0.8, softcap=9.0, logit_scale=1.2)
    logp, entropies = reference.linear_logprobs(hidden, weight, targets, return_entropy=True, entropy_grad=True, **head)
    if not own_entropies:
        entropies = torch.rand(B, T)
        given["entropies"] = entropies
    with torch.no_grad():  # close to the policy, so that neither side of a clip is everywhere
        shift = 0.1 * torch.randn(3, B, T)
        for name, s in zip(("old_logprobs", "ref_logprobs", "sampling_logprobs"), shift, strict=True):
            given[name] = logp + s
    out = module(hidden, weight, targets, advantages, **given, **head, **options)
    expected = grpo_loss(logp, advantages, **{**given, "entropies": entropies}, **options)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.per_token, expected.per_token, atol=1e-5, rtol=1e-5)
    for name, metric in expected.metrics.items():
        torch.testing.assert_close(out.metrics[name], metric, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(x.loss, hidden)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    plain = module(hidden, weight, targets, advantages, **given, **head)
    assert abs(plain.loss - out.loss) > 1e-5  # the option does something to this batch


@BOTH
def test_group_advantages_are_computed_from_rewards(module):
    hidden, weight, targets, rewards = problem()
    groups = rewards.view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    mask = per_token()["mask"]
    inside = module(hidden, weight, targets, rewards=rewards, group_size=3, mask=mask)
    outside = module(hidden, weight, targets, advantages, mask=mask)
    torch.testing.assert_close(inside.loss, outside.loss)
    torch.testing.assert_close(inside.per_token, outside.per_token)


@BOTH
def test_masked_positions_and_ids_outside_the_vocabulary_do_not_count(module):
    hidden, weight, targets, advantages = problem()
    mask = per_token()["mask"]
    expected = module(hidden, weight, targets, advantages, mask=mask)
    (expected_grad,) = torch.autograd.grad(expected.loss, hidden)
    spoilt = hidden.detach().clone()
    spoilt[~mask] = torch.nan
    ids = torch.where(mask, targets, torch.tensor([-100, -1, V, 10**6]).repeat(B * T)[: B * T].view(B, T))
    for m, y in ((mask, targets), (None, ids), (mask.to(torch.float32), ids.int())):
        spoilt.requires_grad_()
        out = module(spoilt, weight, y, advantages, mask=m)
        (grad,) = torch.autograd.grad(out.loss, spoilt)
        assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)
        assert (out.logprobs[~mask] == 0).all() and (out.per_token[~mask] == 0).all()
        assert all(torch.equal(out.metrics[k], v) for k, v in expected.metrics.items())


@BOTH
def test_empty_mask(module):
    hidden, weight, targets, advantages = problem()
    out = module(hidden, weight, targets, advantages, mask=torch.zeros(B, T), entropy_coef=0.1)
    out.loss.backward()
    assert out.loss == 0 and (hidden.grad == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_ratio_is_exactly_one_whatever_the_micro_batch(dtype):
    hidden, weight, targets, advantages = problem(dtype)
    with torch.no_grad():
        old = torch.cat(
            [linear_grpo_loss(hidden[i : i + 1], weight, targets[i : i + 1], advantages[:1]).logprobs
             for i in range(B)]
        )  # fmt: skip
    out = linear_grpo_loss(hidden, weight, targets, advantages, old_logprobs=old)
    assert out.metrics["ratio_max"] == 1 and out.metrics["ratio_mean"] == 1


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("train", [False, True])
def test_gradients_close_to_fp64(dtype, bound, train):
    hidden, weight, targets = torch.randn(4, 50, 64), torch.randn(500, 64) / 4, torch.randint(0, 500, (4, 50))
    given = dict(advantages=torch.randn(4), beta=0.05, ref_logprobs=-6 - torch.rand(4, 50))

    def run(function, *inputs):
        h, w = (x.detach().clone().requires_grad_() for x in inputs)
        out = function(h, w.requires_grad_(train), targets, **given)
        return torch.autograd.grad(out.loss, [h, w] if train else [h])

    inputs = hidden.to(dtype), weight.to(dtype)
    exact = run(reference.linear_grpo_loss, *(x.double() for x in inputs))
    for a, e in zip(run(linear_grpo_loss, *inputs), exact, strict=True):
        assert a.dtype == dtype and relative_error(a, e) <= bound


@pytest.mark.parametrize("entropy_coef, count", [(0.0, 4), (0.1, 6)])
def test_flops(entropy_coef, count):
    b, t, h, v = 4, 64, 64, 4096
    hidden, weight = torch.randn(b, t, h, requires_grad=True), torch.randn(v, h)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        out = linear_grpo_loss(hidden, weight, torch.randint(0, v, (b, t)), torch.randn(b), entropy_coef=entropy_coef)
        out.loss.backward()
    flops = sum(e.flops for e in profiler.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm"))
    assert (count - 0.05) * b * t * h * v <= flops <= (count + 0.05) * b * t * h * v


@pytest.mark.parametrize("beta, entropy_coef, products", [(0.0, 0.0, 3), (0.1, 0.0, 4), (0.0, 0.1, 6)])
def test_a_group_of_equal_rewards_takes_no_part_in_the_second_product(beta, entropy_coef, products):
    """Unless a KL or an entropy bonus brings it a gradient."""
    b, t, h, v = 4, 128, 64, 4096
    hidden, weight = torch.randn(b, t, h, requires_grad=True), torch.randn(v, h)
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        out = linear_grpo_loss(
            hidden, weight, torch.randint(0, v, (b, t)), rewards=rewards, group_size=2, beta=beta,
            entropy_coef=entropy_coef, ref_logprobs=torch.zeros(b, t) if beta else None,
        )  # fmt: skip
        out.loss.backward()
    flops = sum(e.flops for e in profiler.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm"))
    assert (products - 0.05) * b * t * h * v <= flops <= (products + 0.05) * b * t * h * v


@BOTH
def test_errors(module):
    hidden, weight, targets, advantages = problem()
    with pytest.raises(TypeError, match="got Linear"):
        module(hidden, torch.nn.Linear(H, V), targets, advantages)
    for mask in (torch.ones(B, 1), torch.ones(T), torch.ones(2 * B, T)):
        with pytest.raises(ValueError, match="mask must be"):
            module(hidden, weight, targets, advantages, mask=mask)
    with pytest.raises(ValueError, match="expected hidden"):
        module(hidden, weight, targets[:, 1:], advantages)
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        module(hidden[0], weight, targets[0], advantages)
    with pytest.raises(ValueError, match="exactly one"):
        module(hidden, weight, targets)
    with pytest.raises(ValueError, match="ref_logprobs"):
        module(hidden, weight, targets, advantages, beta=0.1)
