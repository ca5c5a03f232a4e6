"""compat.flow_grpo against Flow-GRPO's mathematics, written out anew through x0, x1 and the score."""

import inspect
import math

import pytest
import torch
from torch.testing import assert_close
from uae_kernels.compat import flow_grpo as compat

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler

B, SHAPE = 3, (4, 5, 6)
STEPS = [0, 4, 9]  # σ = 1, one between, and the last to σ' = 0


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[10] == 0
    return scheduler


def definition(scheduler, step, v, x, level, sde_type):
    """Mean, the standard deviation of the noise, and what is called std_dev_t, of one sample, in fp64."""
    sigma, sigma_next, second = (scheduler.sigmas[i].double() for i in (step, step + 1, 1))
    v, x, dt = v.double(), x.double(), sigma_next - sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    if sde_type == "cps":
        std = sigma_next * math.sin(level * math.pi / 2)
        return (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1, std, std
    s = level * (sigma / (1 - (second if sigma == 1 else sigma))).sqrt()
    score = -(x - (1 - sigma) * x0) / sigma**2
    return x + v * dt - s**2 / 2 * score * dt, s * (-dt).sqrt(), s


def log_density(taken, mean, std, sde_type):
    if sde_type == "cps":
        return -(taken - mean).square().mean()
    return torch.distributions.Normal(mean, std).log_prob(taken).mean()


def test_public_signature():
    """Flow-GRPO's, as written down from its source."""
    parameters = inspect.signature(compat.sde_step_with_logprob).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == (
        "self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None, sde_type='sde', "
        "return_sqrt_dt=False"
    )


def inputs(dtype=torch.float32):
    v, x = torch.randn(B, *SHAPE).to(dtype), torch.randn(B, *SHAPE)
    return v.requires_grad_(), x.requires_grad_(), torch.randn(B, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sde_type, level", [("sde", 0.7), ("sde", 0.3), ("cps", 0.8)])
def test_log_prob_of_a_given_step(sde_type, level, dtype, scheduler):
    v, x, taken = inputs(dtype)
    steps = STEPS if sde_type == "cps" else [0, 4, 8]
    timestep = scheduler.timesteps[steps]
    prev, log_prob, mean, std_dev_t, sqrt_dt = compat.sde_step_with_logprob(
        scheduler, v, timestep, x, level, taken, sde_type=sde_type, return_sqrt_dt=True
    )
    assert torch.equal(prev, taken) and log_prob.shape == (B,) and mean.dtype == log_prob.dtype == torch.float32
    assert std_dev_t.shape == sqrt_dt.shape == (B, 1, 1, 1)
    expected = [definition(scheduler, s, v[i], x[i], level, sde_type) for i, s in enumerate(steps)]
    logs = [log_density(taken[i].double(), m, std, sde_type) for i, (m, std, _) in enumerate(expected)]
    assert_close(mean, torch.stack([m for m, _, _ in expected]), check_dtype=False, rtol=1e-5, atol=2e-6)
    assert_close(log_prob, torch.stack(logs), check_dtype=False, rtol=1e-5, atol=2e-6)
    assert_close(std_dev_t.flatten(), torch.stack([s for *_, s in expected]), check_dtype=False, rtol=1e-6, atol=0)
    dt = scheduler.sigmas[steps] - scheduler.sigmas[[s + 1 for s in steps]]
    assert_close(sqrt_dt.flatten(), dt.sqrt())
    grads = [torch.autograd.grad(value.sum(), (v, x)) for value in (log_prob, torch.stack(logs))]
    for a, e in zip(*grads, strict=True):
        assert e.abs().sum() > 0
        assert_close(a, e, rtol=2e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)
    same = compat.sde_step_with_logprob(scheduler, v, timestep, x, level, taken, sde_type=sde_type)
    assert all(torch.equal(a, e) for a, e in zip(same, (prev, log_prob, mean, std_dev_t), strict=True))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_drawn_steps(sde_type, scheduler):
    """The noise is torch's, from the generators that diffusers would ask; one timestep serves all samples."""
    v, x, _ = inputs()
    timestep = scheduler.timesteps[3].unsqueeze(0)

    def generators():
        return [torch.Generator().manual_seed(7 + i) for i in range(B)]

    torch.manual_seed(7)
    plain = torch.randn(B, *SHAPE)
    alone = torch.cat([torch.randn(1, *SHAPE, generator=g) for g in generators()])
    for generator, noise in ((None, plain), (generators()[0], plain), (generators()[:1], plain), (generators(), alone)):
        torch.manual_seed(7)
        prev, log_prob, mean, std_dev_t = compat.sde_step_with_logprob(
            scheduler, v, timestep, x, generator=generator, sde_type=sde_type
        )
        assert std_dev_t.shape == (1, 1, 1, 1)
        for i in range(B):
            m, std, s = definition(scheduler, 3, v[i], x[i], 0.7, sde_type)
            assert_close(prev[i], m + std * noise[i], check_dtype=False, rtol=1e-5, atol=2e-6)
            assert std_dev_t.item() == pytest.approx(s.item())
        replay = compat.sde_step_with_logprob(scheduler, v, timestep, x, prev_sample=prev, sde_type=sde_type)
        assert torch.equal(replay[1], log_prob) and torch.equal(replay[2], mean)


def test_packed_latents_and_numbers(scheduler):
    v, x, taken = (torch.randn(B, 7, 8) for _ in range(3))
    by_row, *rest = (
        compat.sde_step_with_logprob(scheduler, v, t, x, prev_sample=taken)
        for t in (scheduler.timesteps[[2] * B], scheduler.timesteps[2], scheduler.timesteps[2].item())
    )
    for one in rest:
        assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(by_row, one, strict=True))
        assert one[3].shape == (1, 1, 1)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_a_deterministic_step(sde_type, scheduler):
    v, x, _ = inputs()
    state = torch.get_rng_state()
    prev, log_prob, mean, std_dev_t = compat.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[:1], x, noise_level=0, sde_type=sde_type, generator=torch.Generator()
    )
    dt = scheduler.sigmas[1] - scheduler.sigmas[0]
    assert_close(prev, x + dt * v)
    assert torch.equal(prev, mean) and (log_prob == 0).all() and (std_dev_t == 0).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_schedule_is_searched_on_the_device(scheduler):
    """The path of timesteps that are not on the CPU."""
    steps = [4, 0, 9, 4]
    timestep = torch.cat([scheduler.timesteps[steps], torch.tensor([123.4])])
    sigma, sigma_next = compat._search(scheduler.timesteps, scheduler.sigmas, timestep)
    assert torch.equal(sigma[:4], scheduler.sigmas[steps]) and sigma[4].isnan()
    assert torch.equal(sigma_next[:4], scheduler.sigmas[[5, 1, 10, 5]]) and sigma_next[4].isnan()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("kl", ["flow_grpo", "gaussian", "velocity"])
def test_loss(kl, sde_type, scheduler):
    v, x, taken = inputs()
    ref, steps = torch.randn(B, *SHAPE), [0, 4, 7]
    timestep, a = scheduler.timesteps[steps], torch.tensor([9.0, -2.0, 0.5])
    parts = [definition(scheduler, s, v[i], x[i], 0.7, sde_type) for i, s in enumerate(steps)]
    logp = torch.stack([log_density(taken[i].double(), m, std, sde_type) for i, (m, std, _) in enumerate(parts)])
    old = logp.detach() + torch.tensor([0.3, 0.02, -0.4])
    ratio, clamped = (logp - old).exp(), a.clamp(-5, 5)
    policy = torch.maximum(-clamped * ratio, -clamped * ratio.clamp(0.9, 1.1)).mean()
    kls = []
    for i, (mean, std, s) in enumerate(parts):
        other = definition(scheduler, steps[i], ref[i], x[i].detach(), 0.7, sde_type)[0]
        width = s if kl == "flow_grpo" else std
        value = (mean - other).square().mean() / (2 * width**2)
        kls.append((v[i] - ref[i]).double().square().mean() if kl == "velocity" else value)
    expected = policy + 0.2 * torch.stack(kls).mean()
    loss, info = compat.grpo_loss(
        scheduler, v, timestep, x, taken, old.float(), a, ref,
        sde_type=sde_type, clip_range=0.1, beta=0.2, kl=kl,
    )  # fmt: skip
    assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    for g, e in zip(*(torch.autograd.grad(z, (v, x)) for z in (loss, expected)), strict=True):
        assert_close(g, e, rtol=2e-5, atol=1e-7)
    beyond = ratio.detach() - 1
    wanted = {
        "policy_loss": policy.detach(),
        "approx_kl": 0.5 * (logp - old).detach().square().mean(),
        "clipfrac": (beyond.abs() > 0.1).double().mean(),
        "clipfrac_gt_one": (beyond > 0.1).double().mean(),
        "clipfrac_lt_one": (beyond < -0.1).double().mean(),
        "kl_loss": torch.stack(kls).mean().detach(),
    }
    assert info.keys() == wanted.keys() and not any(value.requires_grad for value in info.values())
    for name, value in wanted.items():
        assert_close(
            info[name], value, check_dtype=False, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_defaults_are_those_of_its_config(scheduler):
    defaults = {p.name: p.default for p in inspect.signature(compat.grpo_loss).parameters.values()}
    for name, value in dict(noise_level=0.7, adv_clip_max=5, clip_range=1e-4, beta=0.0, sde_type="sde").items():
        assert defaults[name] == value
    v, x, _ = inputs()
    step = compat.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x)
    prev, log_prob = (part.detach() for part in step[:2])
    loss, info = compat.grpo_loss(scheduler, v, scheduler.timesteps[:1], x, prev, log_prob, torch.ones(B))
    assert loss == -1 and info["clipfrac"] == info["approx_kl"] == 0 and "kl_loss" not in info


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sde_type="dance"), "sde_type must be one of sde, cps"),
        (dict(sde_type=None), "sde_type must be one of sde, cps"),
        (dict(prev_sample=torch.zeros(B, *SHAPE), generator=torch.Generator()), "generator: nothing is drawn"),
        (dict(prev_sample=torch.zeros(B, *SHAPE), noise_level=0), "noise_level: a deterministic step"),
        (dict(generator=[torch.Generator()] * 2), "generator: one, or one for each of 3 samples, got 2"),
    ],
)
def test_unsupported_arguments_raise(change, message, scheduler):
    v, x, _ = inputs()
    with pytest.raises(ValueError, match=message):
        compat.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, **change)
    with pytest.raises(IndexError):
        compat.sde_step_with_logprob(scheduler, v, torch.tensor([123.4]), x)
