import math
import os
import subprocess
import sys

import pytest
import torch
from uae_kernels import flow_step, reference
from uae_kernels.reference.flow_step import philox, philox_normal, transition

SDE = ["flow_sde", "dance_sde", "cps"]
SHAPE = (3, 2, 5, 7)


def problem(dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def by_hand(kind, v, x, sigma, sigma_next, level, sigma_max=None):
    """Mean and std of one sample, as the papers write them: through x0, x1 and the score."""
    dt = sigma_next - sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    if kind == "cps":
        std = sigma_next * math.sin(level * math.pi / 2)
        return (1 - sigma_next) * x0 + math.sqrt(sigma_next**2 - std**2) * x1, std
    if kind == "dance_sde":
        s = level
    else:
        s = level * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    score = -(x - (1 - sigma) * x0) / sigma**2
    return x + v * dt - 0.5 * s**2 * score * dt, s * math.sqrt(-dt)


@pytest.mark.parametrize("kind, level", [("flow_sde", None), ("dance_sde", None), ("cps", None), ("cps", 0.4)])
@pytest.mark.parametrize("sigmas", [(0.9, 0.7), (1.0, 0.93), (0.2, 0.05)])
def test_mean_std_and_log_prob(kind, level, sigmas):
    v, x = problem()
    used = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}[kind] if level is None else level
    step = flow_step(v, x, *sigmas, kind=kind, noise_level=level, seed=5)
    mean, std = by_hand(kind, v, x, *sigmas, used, sigmas[1])
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, torch.full((3, 1, 1, 1), std, dtype=torch.float64))
    log_prob = torch.distributions.Normal(mean, std).log_prob(step.next_sample).mean((1, 2, 3))
    torch.testing.assert_close(step.log_prob, log_prob)
    cps = flow_step(v, x, *sigmas, kind=kind, noise_level=level, next_sample=step.next_sample, log_prob="cps")
    torch.testing.assert_close(cps.log_prob, -(step.next_sample - mean).square().mean((1, 2, 3)))


def test_sigma_max_and_sigmas_per_sample():
    v, x = problem()
    given = flow_step(v, x, 1.0, 0.95, sigma_max=0.9, seed=1)
    assert given.std[0].item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.05))
    sigma, sigma_next = torch.tensor([0.9, 1.0, 0.5]), torch.tensor([0.8, 0.95, 0.2])
    together = flow_step(v, x, sigma, sigma_next, seed=torch.tensor([4, 5, 6]))
    for i in range(3):
        alone = flow_step(v[i : i + 1], x[i : i + 1], sigma[i].item(), sigma_next[i], seed=torch.tensor([4 + i]))
        for a, t in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], t[i], atol=1e-7, rtol=1e-6)


def test_identities():
    v, x = problem()
    s = torch.tensor([0.8, 0.5, 0.3], dtype=torch.float64)
    n = s - 0.1
    for kind in ("flow_sde", "cps", "dance_sde"):
        still = flow_step(v, x, s, n, kind=kind, noise_level=0.0)
        euler = flow_step(v, x, s, n, kind="ode")
        torch.testing.assert_close(still.next_sample, euler.next_sample)
        torch.testing.assert_close(euler.next_sample, x - 0.1 * v)
        assert still.log_prob is None and euler.log_prob is None and (still.std == 0).all() and (euler.std == 0).all()
    # dance_sde is flow_sde with a noise level that makes s constant
    for i in range(3):
        level = 0.3 / math.sqrt(s[i] / (1 - s[i]))
        a = transition(v[i : i + 1], x[i : i + 1], s[i], n[i], n[i], "flow_sde", level)
        b = transition(v[i : i + 1], x[i : i + 1], s[i], n[i], n[i], "dance_sde", 0.3)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)
    # cps: (coefficient of x1)² + std² = σ'², with x0 = 0 and x1 = 1
    one = torch.ones(1, 1, dtype=torch.float64)
    sigma, sigma_next = torch.tensor([0.7]), torch.tensor([0.4])
    mean, std, _ = transition(one, 0.7 * one, sigma.double(), sigma_next.double(), sigma, "cps", 0.6)
    assert (mean.square() + std.square()).item() == pytest.approx(sigma_next.double().item() ** 2)


@pytest.mark.parametrize("kind", SDE)
def test_replay_returns_the_same_bits(kind):
    v, x = problem(torch.float32, (4, 16, 31, 9))
    step = flow_step(v, x, 0.8, 0.7, kind=kind, seed=11)
    replay = flow_step(v, x, 0.8, 0.7, kind=kind, next_sample=step.next_sample)
    assert torch.equal(step.log_prob, replay.log_prob) and torch.equal(step.next_sample, replay.next_sample)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_row(threads):
    torch.set_num_threads(threads)
    v, x = problem(torch.float32, (6, 4, 65, 63))
    seeds = torch.tensor([3, 2**40 + 1, 7, -5, 0, 2**62])
    whole = flow_step(v, x, 0.8, 0.7, seed=seeds)
    for rows in ([4], [5, 0], [1, 2, 3, 5]):
        part = flow_step(v[rows], x[rows], 0.8, 0.7, seed=seeds[rows])
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))
    same = flow_step(v, x, 0.8, 0.7, seed=torch.full((6,), 9))
    noise = (same.next_sample - same.mean) / same.std
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-5, rtol=0)
    assert noise.mean().abs() < 0.03 and abs(noise.std() - 1) < 0.03


def test_sources_of_noise():
    v, x = problem(torch.float32)
    step = flow_step(v, x, 0.8, 0.7, seed=3)
    keys = 3 * 2**20 + torch.arange(3)
    assert torch.equal(step.next_sample, flow_step(v, x, 0.8, 0.7, seed=keys).next_sample)
    assert not torch.equal(step.next_sample, flow_step(v, x, 0.8, 0.7, seed=4).next_sample)
    noise = torch.randn(SHAPE)
    given = flow_step(v, x, 0.8, 0.7, noise=noise)
    torch.testing.assert_close(given.next_sample, given.mean + given.std * noise)
    torch.manual_seed(1)
    first = flow_step(v, x, 0.8, 0.7)
    torch.manual_seed(1)
    assert torch.equal(first.next_sample, flow_step(v, x, 0.8, 0.7).next_sample)
    assert not torch.equal(first.next_sample, flow_step(v, x, 0.8, 0.7).next_sample)
    with pytest.raises(ValueError, match="at most one"):
        flow_step(v, x, 0.8, 0.7, noise=noise, seed=3)


TRITON = """
import torch, triton, triton.language as tl
@triton.jit
def draw(seeds, words, normals, n: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, n)
    seed = tl.load(seeds + row)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(words + (row * 4 + 0) * n + i, a.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + (row * 4 + 1) * n + i, b.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + (row * 4 + 2) * n + i, c.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + (row * 4 + 3) * n + i, d.to(tl.int64) & 0xFFFFFFFF)
    tl.store(normals + row * n + i, tl.randn(seed, i))
seeds = torch.tensor([0, 1, 123456789, 2**31, 2**32 + 7, 2**40 - 1, 2**62 + 12345, -3])
words, normals = torch.empty(8, 4, 2048, dtype=torch.int64), torch.empty(8, 2048)
draw[(8,)](seeds, words, normals, 2048)
torch.save((seeds, words, normals), PATH)
"""


def test_noise_is_tritons(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "draw.py").write_text(TRITON.replace("PATH", repr(str(tmp_path / "out.pt"))))
    subprocess.run([sys.executable, str(tmp_path / "draw.py")], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    seeds, words, normals = torch.load(tmp_path / "out.pt")
    assert torch.equal(torch.stack(philox(seeds, 2048), 1), words)
    assert words.min() >= 0 and words.max() > 2**31
    assert (philox_normal(seeds, 2048) - normals).abs().max() < 2e-6


@pytest.mark.parametrize("shape", [(3, 1), (5, 1023), (9, 2**14), (2, 2**16 + 77), (1, 0)])
def test_noise_is_box_muller_on_philox(shape):
    """Of samples that share a piece, and of ones that take several, bit for bit."""
    seeds = torch.randint(-(2**62), 2**62, shape[:1])
    u1, u2 = (
        torch.where(word < 2**31, word, 2**32 - 1 - word).to(torch.float32) * 4.6566127342e-10
        for word in philox(seeds, shape[1])[:2]
    )
    expected = (-2 * u1.clamp(min=1e-7).log()).sqrt() * (2 * math.pi * u2).cos()
    assert torch.equal(philox_normal(seeds, shape[1]), expected)


def test_philox_known_answer():
    """Random123's published vector for philox4x32-10 with key and counter 0."""
    words = [int(w[0, 0]) for w in philox(torch.tensor([0]), 1)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("log_prob", ["gaussian", "cps"])
@pytest.mark.parametrize("step_of", [flow_step, reference.flow_step])
def test_gradcheck(kind, log_prob, step_of):
    v, x, u, noise = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    noise = noise.detach()
    options = dict(kind=kind, velocity_uncond=None, guidance_scale=2.5, log_prob=log_prob)

    def drawn(v, u, x):
        step = step_of(v, x, 0.8, 0.7, noise=noise, **(options | dict(velocity_uncond=u)))
        return step.next_sample, step.mean

    def replayed(v, u, x):
        return step_of(v, x, 0.8, 0.7, next_sample=noise, **(options | dict(velocity_uncond=u))).log_prob

    assert torch.autograd.gradcheck(drawn, (v, u, x)) and torch.autograd.gradcheck(replayed, (v, u, x))
    step = step_of(v, x, 0.8, 0.7, noise=noise, **options)
    replay = step_of(v, x, 0.8, 0.7, next_sample=step.next_sample.detach(), **options)
    grads = [torch.autograd.grad(s.log_prob.sum(), v)[0] for s in (step, replay)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_guidance():
    v, x = problem()
    u = torch.randn_like(v)
    guided = flow_step(v, x, 0.8, 0.7, velocity_uncond=u, guidance_scale=4.5, seed=1)
    plain = flow_step(u + 4.5 * (v - u), x, 0.8, 0.7, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(guided, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SDE)
def test_half_inputs_are_computed_in_fp32(dtype, kind):
    v, x = (z.to(dtype) for z in problem())
    taken = torch.randn(SHAPE)
    step = flow_step(v, x, 0.8, 0.7, kind=kind, next_sample=taken)
    exact = flow_step(v.double(), x.double(), 0.8, 0.7, kind=kind, next_sample=taken.double())
    for a, e in zip(step, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, atol=3e-6, rtol=3e-6)


def test_strides():
    v, x = problem(torch.float32)
    expected = flow_step(v, x, 0.8, 0.7, seed=1)
    strided = flow_step(v.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0], 0.8, 0.7, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="sde"), "kind"),
        (dict(log_prob="normal"), "log_prob"),
        (dict(noise_level=-0.1), "negative"),
        (dict(kind="cps", noise_level=1.2), "at most 1"),
        (dict(velocity_uncond=torch.zeros(3)), "velocity_uncond"),
        (dict(noise=torch.zeros(3)), "noise"),
        (dict(seed=torch.zeros(3)), "int64"),
        (dict(seed=-1), "at least 0"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed"),
    ],
)
def test_errors(change, message):
    v, x = problem()
    with pytest.raises(ValueError, match=message):
        flow_step(v, x, 0.8, 0.7, **change)
    with pytest.raises(ValueError, match="shape"):
        flow_step(v, x, torch.rand(2), 0.7)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)])
def test_one_fp64_input_makes_everything_fp64(dtypes):
    v, x = (torch.randn(SHAPE).to(dtype) for dtype in dtypes)
    for module in (flow_step, reference.flow_step):
        assert {part.dtype for part in module(v, x, 0.8, 0.7, seed=1)} == {torch.float64}
