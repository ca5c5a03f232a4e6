import math

import pytest
import torch
from test_flow_step import SDE, by_hand, problem
from uae_kernels import flow_grpo_loss, flow_step, reference


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("log_prob", ["gaussian", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_ratio_is_exactly_one(kind, log_prob, dtype):
    """σ as the rollout had it, a number, and as an update has it, one a sample."""
    v, x = problem(torch.float32, (4, 16, 31, 9))
    v = v.to(dtype)
    step = flow_step(v, x, 0.8, 0.7, kind=kind, seed=11, log_prob=log_prob)
    leaf, sigma, sigma_next = v.clone().requires_grad_(), torch.full((4,), 0.8), torch.full((4,), 0.7)
    a = torch.tensor([1.0, -2.0, 0.5, -0.1])
    out = flow_grpo_loss(
        leaf,
        x,
        step.next_sample,
        step.log_prob,
        a,
        sigma,
        sigma_next,
        kind=kind,
        log_prob=log_prob,
        clip_range=0.0,
    )
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics == dict(kl=0, ratio_mean=1, ratio_max=1, clip_fraction_low=0, clip_fraction_high=0)
    assert torch.equal(out.logprobs, step.log_prob) and torch.equal(out.per_token, -a)
    out.loss.backward()
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all() and (leaf.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("kl", ["gaussian", "flow_grpo", "velocity"])
@pytest.mark.parametrize("log_prob", ["gaussian", "cps"])
def test_loss_by_hand(kind, kl, log_prob):
    v, x = problem()
    ref, u, taken = (torch.randn_like(v) for _ in range(3))
    old, a = torch.randn(3, dtype=torch.float64), torch.tensor([7.0, -2.0, 0.5], dtype=torch.float64)
    options = dict(kind=kind, log_prob=log_prob, velocity_uncond=u, guidance_scale=1.5)
    new = flow_step(v, x, 0.8, 0.7, next_sample=taken, **options).log_prob
    old = new + torch.tensor([0.02, 0.3, -0.4], dtype=torch.float64)
    out = flow_grpo_loss(
        v,
        x,
        taken,
        old,
        a,
        0.8,
        0.7,
        ref_velocity=ref,
        beta=0.3,
        kl=kl,
        clip_range=0.1,
        normalizer=5,
        **options,
    )
    level = dict(flow_sde=0.7, dance_sde=0.3, cps=0.8)[kind]
    losses, kls = [], []
    for i in range(3):
        gv, gr = (u[i] + 1.5 * (z[i] - u[i]) for z in (v, ref))
        (mean, std), (mean_ref, _) = (by_hand(kind, g, x[i], 0.8, 0.7, level) for g in (gv, gr))
        if log_prob == "gaussian":
            logp = torch.distributions.Normal(mean, std).log_prob(taken[i]).mean().item()
        else:
            logp = -(taken[i] - mean).square().mean().item()
        assert logp == pytest.approx(new[i].item())
        if kl == "velocity":
            kls.append((gv - gr).square().mean().item())
        else:
            width = std / math.sqrt(0.1) if kl == "flow_grpo" and kind != "cps" else std
            kls.append((mean - mean_ref).square().mean().item() / (2 * width**2))
        r, adv = math.exp(logp - old[i].item()), min(max(a[i].item(), -5), 5)
        losses.append(max(-adv * r, -adv * min(max(r, 0.9), 1.1)) + 0.3 * kls[-1])
    torch.testing.assert_close(out.per_token, torch.tensor(losses, dtype=torch.float64))
    assert out.loss.item() == pytest.approx(sum(losses) / 5)
    ratio = (new - old).exp()
    expected = [sum(kls) / 3, ratio.mean(), ratio.max(), 1 / 3, 1 / 3]
    torch.testing.assert_close(torch.stack(list(out.metrics.values())), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("kl", ["gaussian", "flow_grpo", "velocity"])
@pytest.mark.parametrize("loss_of", [flow_grpo_loss, reference.flow_grpo_loss])
def test_gradcheck(kind, kl, loss_of):
    v, u, x = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    taken, ref = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    options = dict(kind=kind, guidance_scale=1.5)
    old = flow_step(v, x, 0.8, 0.7, next_sample=taken, velocity_uncond=u, **options).log_prob.detach() + 0.01
    options |= dict(clip_range=0.2, ref_velocity=ref, beta=0.2, kl=kl)

    def outputs(v, u):
        out = loss_of(v, x.detach(), taken, old, a, 0.8, 0.7, velocity_uncond=u, **options)
        return out.loss, out.per_token

    assert torch.autograd.gradcheck(lambda v: outputs(v, u.detach()), v)
    # The reference policy is a constant, guided or not: with beta 0 everything else is differentiable too.
    options |= dict(beta=0.0)
    assert torch.autograd.gradcheck(outputs, (v, u))
    assert torch.autograd.gradcheck(
        lambda x: loss_of(v.detach(), x, taken, old, a, 0.8, 0.7, velocity_uncond=u.detach(), **options).loss,
        x,
    )


def test_step_to_sigma_zero_is_defined():
    v, x = problem(torch.float32)
    v.requires_grad_()
    step = flow_step(v, x, 0.1, 0.0, kind="cps", seed=1)
    assert (step.std == 0).all() and (step.log_prob == 0).all()
    out = flow_grpo_loss(
        v, x, step.next_sample.detach(), step.log_prob.detach(), torch.ones(3), 0.1, 0.0, kind="cps",
        ref_velocity=x, beta=0.1,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, v)
    assert out.loss == -1 and (grad == 0).all() and out.metrics["kl"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="ode"), "deterministic"),
        (dict(noise_level=0.0), "deterministic"),
        (dict(kl="k3"), "kl"),
        (dict(beta=0.1), "ref_velocity"),
    ],
)
def test_errors(change, message):
    v, x = problem()
    with pytest.raises(ValueError, match=message):
        flow_grpo_loss(v, x, x, torch.zeros(3), torch.zeros(3), 0.8, 0.7, **change)
    with pytest.raises(ValueError, match="advantages"):
        flow_grpo_loss(v, x, x, torch.zeros(3), torch.zeros(2), 0.8, 0.7)


def test_huge_ratios_and_normalizers():
    v, x = problem(torch.float32)
    taken, a = torch.randn_like(v), torch.tensor([1.0, -1.0, 1.0])
    v.requires_grad_()
    old = torch.tensor([-200.0, -200.0, 200.0])
    out = flow_grpo_loss(v, x, taken, old, a, 0.8, 0.7, clip_range=0.1, normalizer=2)
    assert out.metrics["ratio_max"] == torch.tensor(20.0).exp() and out.per_token[0] == torch.tensor(-1.1)
    (grad,) = torch.autograd.grad(out.loss, v)
    assert grad.isfinite().all() and out.metrics["clip_fraction_high"] == torch.tensor(1 / 3)
    again = flow_grpo_loss(v, x, taken, old, a, 0.8, 0.7, clip_range=0.1, normalizer=torch.tensor(2))
    assert torch.equal(again.loss, out.loss)
    torch.testing.assert_close(out.loss, out.per_token.sum() / 2)
