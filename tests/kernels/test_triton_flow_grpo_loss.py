import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED, ON_GPU
from test_flow_step import SDE
from test_triton_flow_step import LEAVES, SHAPE, double, equal, sigmas
from test_triton_flow_step import batch as step_batch
from torch._dynamo.testing import CompileCounterWithBackend
from uae_kernels import _flow, flow_grpo_loss, flow_step, reference
from uae_kernels._triton import launch

KERNELS = importlib.import_module("uae_kernels.flow_grpo_loss")
KLS = ["gaussian", "flow_grpo", "velocity"]
FORMS = ["gaussian", "cps"]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several programs a sample, several blocks of sums and of samples at the interpreter's small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            for module, name, size in (
                (_flow, "BLOCK", 64), (_flow, "BLOCKS", 2), (_flow, "SUMS", 32), (KERNELS, "SAMPLES", 4),
            ):  # fmt: skip
                patch.setattr(module, name, size)
        yield


def run_triton(*args, **kwargs):
    return flow_grpo_loss(*args, impl="triton", **kwargs)


def batch(device, B=3, shape=SHAPE, dtype=torch.float32, uncond=True, ref=True, **options):
    """Every tensor the loss takes; the ratios lie within and beyond the default of `check`'s clip range."""
    b = step_batch(device, B, shape, dtype, uncond) | sigmas(device, B)
    options = dict(kind="flow_sde", guidance_scale=1.5) | options
    b["next_sample"] = reference.flow_step(**b, **options, noise=torch.randn(B, *shape, device=device)).next_sample
    if options["kind"] == "cps":
        b["next_sample"] += 0.3 * torch.randn(B, *shape, device=device)
    log_prob = reference.flow_step(**b, **options | dict(noise=None)).log_prob
    b["old_log_prob"] = log_prob + torch.tensor([0.02, 0.3, -0.4, -0.05], device=device)[torch.arange(B) % 4]
    b["advantages"] = torch.tensor([1.3, -0.7, 7.0, -1.5, 0.0], device=device)[torch.arange(B) % 5]
    if ref:
        b["ref_velocity"] = b["velocity"] + 0.1 * torch.randn(B, *shape, device=device).to(dtype)
    return b, options


def outputs(function, given, options, weights=None):
    """Loss, per sample, metrics, log-probs, and the gradients of a random function of loss and per sample."""
    given = {k: v.detach().requires_grad_() if k in LEAVES else v for k, v in given.items()}
    out = function(**given, **options)
    heads, ups = [out.loss], [torch.full_like(out.loss, 1.7)]
    if weights is not None:
        heads, ups = [*heads, out.per_token], [*ups, weights.to(out.loss)]
    grads = torch.autograd.grad(heads, [given[k] for k in LEAVES if k in given], ups)
    values = out.loss.detach(), out.per_token.detach(), torch.stack(list(out.metrics.values())), out.logprobs
    return [*values, *grads]


def check(given, options, tolerance=4e-7, function=run_triton):
    """The error against the fp64 definition is at most twice that of the definition in the inputs' own dtype."""
    weights = torch.randn(len(given["sample"]), device=given["sample"].device)
    actual, plain = (outputs(f, given, options, weights) for f in (function, reference.flow_grpo_loss))
    truth = outputs(reference.flow_grpo_loss, double(given), double(options), weights)
    names = ("loss", "per sample", "metrics", "log-probs", *(f"d {k}" for k in LEAVES if k in given))
    for name, x, y, z in zip(names, actual, plain, truth, strict=True):
        assert x.dtype == y.dtype and x.shape == z.shape, name
        assert torch.equal(x.isnan(), y.isnan()), name
        x, y, z = (v.double().nan_to_num() for v in (x, y, z))
        if not z.numel():
            continue
        least = 1 if not name.startswith("d ") else 1e-30
        error, allowed = (x - z).abs().max(), 2 * (y - z).abs().max() + tolerance * z.abs().max().clamp(min=least)
        assert error <= allowed, f"{name}: {error} > {allowed}"
    return actual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("uncond", [False, True])
def test_accuracy(uncond, kind, kl, form, device, poisoned):
    b, options = batch(device, uncond=uncond, kind=kind, log_prob=form)
    results = check(b, options | dict(kl=kl, beta=0.3, clip_range=0.1))
    _, _, (kld, *_, low, high), _, *grads = results
    assert kld > 0 and low == high == torch.tensor(1 / 3) and all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SDE)
def test_half_precision(kind, dtype, device):
    b, options = batch(device, dtype=dtype, kind=kind)
    b = {k: v.to(dtype) if k in ("sample", "next_sample", "old_log_prob", "advantages") else v for k, v in b.items()}
    results = check(b, options | dict(beta=0.1))
    assert all(x.dtype == dtype for x in results[-3:]) and all(x.dtype == torch.float32 for x in results[:-3])


@pytest.mark.parametrize("B", [1, 4, 9])
def test_several_blocks_of_samples(B, device):
    B *= 100 if ON_GPU else 1
    b, options = batch(device, B, (3, 11))
    check(b, options | dict(beta=0.2, clip_range=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SDE)
def test_the_first_ratio_is_exactly_one(kind, form, dtype, device):
    """σ as a rollout has it, a number, and as an update has it, one a sample; micro-batches of another size."""
    b = step_batch(device, 6, dtype=dtype)
    options = dict(kind=kind, log_prob=form, guidance_scale=4.5)
    parts = [
        flow_step(
            **{k: v[rows] for k, v in b.items()}, **options, sigma=0.8, sigma_next=0.7, impl="triton",
            seed=torch.arange(6, device=device)[rows],
        )
        for rows in torch.arange(6, device=device).split(2)
    ]  # fmt: skip
    taken, old = (torch.cat([getattr(part, name) for part in parts]) for name in ("next_sample", "log_prob"))
    a = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.5], device=device)
    for rows in (slice(0, 6), slice(3, 6), slice(0, 3)):
        given = {k: v[rows].detach().requires_grad_(k == "velocity") for k, v in b.items()}
        n = len(given["sample"])
        out = run_triton(
            **given, next_sample=taken[rows], old_log_prob=old[rows], advantages=a[rows], clip_range=0.0, **options,
            sigma=torch.full((n,), 0.8, device=device), sigma_next=torch.full((n,), 0.7, device=device),
            ref_velocity=given["velocity"].detach(), beta=0.1,
        )  # fmt: skip
        metrics = {name: value.item() for name, value in out.metrics.items()}
        assert metrics == dict(kl=0, ratio_mean=1, ratio_max=1, clip_fraction_low=0, clip_fraction_high=0)
        assert torch.equal(out.logprobs, old[rows]) and torch.equal(out.per_token, -a[rows])
        out.loss.backward()
        grad = given["velocity"].grad
        assert grad.dtype == dtype and grad.isfinite().all() and (grad.flatten(1).abs().sum(1) > 0).all()


def test_a_first_update_over_a_window(device):
    """Rollout and update of a small model: three steps drawn in micro-batches, replayed in the update's."""
    model = torch.nn.Conv2d(4, 4, 3, padding=1).to(device)
    x, levels = torch.randn(8, 4, 8, 9, device=device), torch.tensor([1.0, 0.9, 0.75, 0.5], device=device)
    path, old, a = [x], [], torch.randn(8, device=device)
    with torch.no_grad():
        for step in range(3):
            drawn = [
                flow_step(
                    model(path[-1][rows]), path[-1][rows], levels[step], levels[step + 1], sigma_max=levels[1],
                    seed=1000 * step + rows, impl="triton",
                )
                for rows in torch.arange(8, device=device).split(4)
            ]  # fmt: skip
            path.append(torch.cat([part.next_sample for part in drawn]))
            old.append(torch.cat([part.log_prob for part in drawn]))
    for step, rows in itertools.product(range(3), torch.arange(8, device=device).split(4)):
        out = run_triton(
            model(path[step][rows]), path[step][rows], path[step + 1][rows], old[step][rows], a[rows],
            levels[step].expand(4), levels[step + 1].expand(4), sigma_max=levels[1], clip_range=0.0,
        )  # fmt: skip
        assert [value.item() for value in out.metrics.values()] == [0, 1, 1, 0, 0]
        assert torch.equal(out.logprobs, old[step][rows])


def test_ties_and_boundaries(device):
    """Where a maximum or a clamp turns: slopes of the log-probability as autograd has them."""
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 20.0, -20.0, 20.5, -20.5, 40.0], device=device)
    for a, clip, limit in itertools.product((1.5, -1.5, 0.0, 9.0), (0.0, 0.25, 1.0), (math.inf, 1.0)):
        advantages = torch.full((8,), a, device=device)
        low, high = 1 - clip, 1 + clip
        leaf = log_ratio.clone().requires_grad_()
        ratio = leaf.clamp(-20, 20).exp()
        clamped = advantages.clamp(-limit, limit)
        expected = torch.maximum(-clamped * ratio, -clamped * ratio.clamp(low, high))
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        values, slopes = (torch.empty(8, device=device) for _ in range(2))
        loss, metrics, divisor = (torch.empty(n, device=device) for n in (1, 5, 1))
        launch(
            KERNELS._loss_kernel, (1,), log_ratio, torch.zeros(8, device=device), 1, advantages, 1, None, None, None,
            loss, values, metrics, slopes, divisor, 8, math.nan, low, high, limit, 0.0, SAMPLES=4,
        )  # fmt: skip
        torch.testing.assert_close(values, expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(slopes, slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["velocity", "old_log_prob", "advantages", "ref_velocity"])
def test_nan_reaches_the_loss(name, device):
    b, options = batch(device)
    b[name] = b[name].clone()
    b[name].view(-1)[0] = torch.nan
    actual, expected = (f(**b, **options, beta=0.1) for f in (run_triton, reference.flow_grpo_loss))
    assert actual.loss.isnan() and torch.equal(actual.per_token.isnan(), expected.per_token.isnan())
    for key, value in expected.metrics.items():
        assert torch.equal(actual.metrics[key].isnan(), value.isnan()), key


def test_step_to_sigma_zero_is_defined(device):
    b, options = batch(device, kind="cps")
    b |= dict(sigma=0.1, sigma_next=0.0, sigma_max=0.9, old_log_prob=torch.zeros(3, device=device))
    for kl in ("gaussian", "flow_grpo"):
        loss, per_sample, metrics, log_probs, *grads = outputs(run_triton, b, options | dict(kl=kl, beta=0.1))
        assert torch.equal(per_sample, -b["advantages"].clamp(max=5)) and loss.isfinite()
        assert metrics[0] == 0 and (log_probs == 0).all() and all((g == 0).all() for g in grads)
    check(b, options | dict(kl="velocity", beta=0.1))


def test_normalizer(device):
    b, options = batch(device)
    for normalizer in (7, 0.25, *(torch.tensor(7.0, dtype=d, device=device) for d in (torch.float16, torch.int64))):
        actual, expected = (
            outputs(f, b, options | dict(normalizer=normalizer)) for f in (run_triton, reference.flow_grpo_loss)
        )
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SDE)
def test_samples_are_independent(kind, device):
    """A sample's bits depend neither on the others nor on its place, and a second run gives the same."""
    b, options = batch(device, 5, dtype=torch.bfloat16, kind=kind)
    options |= dict(sigma_max=b.pop("sigma_max"), normalizer=5.0, beta=0.2, clip_range=0.1)
    weights = torch.randn(5, device=device)
    whole = outputs(run_triton, b, options, weights)
    for rows in ([0, 1, 2, 3, 4], [3], [4, 0], [1, 2, 3]):
        part = outputs(run_triton, {k: v[rows] for k, v in b.items()}, options, weights[rows])
        for i in (1, 3, 4, 5, 6):
            assert torch.equal(part[i], whole[i][rows])


def test_strides(device):
    b, options = batch(device, 4, (2, 6, 32))
    del b["sigma_max"]
    b["sample"] = b["sample"][:1].expand(4, -1, -1, -1)
    options |= dict(beta=0.2)
    expected = outputs(run_triton, {k: v.contiguous() for k, v in b.items()}, options)
    for strided in (
        b,
        {k: torch.stack([v, v], -1)[..., 1] for k, v in b.items()},
        {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in b.items()},
        {k: torch.cat([v, v])[len(v) :] for k, v in b.items()},
    ):
        assert equal(outputs(run_triton, strided, options), expected)
    out = run_triton(**b | dict(velocity=b["velocity"].requires_grad_()), **options)
    ups = torch.randn(8, device=device)[::2], torch.randn(1, device=device).expand(4)
    for up in ups:
        grads = [torch.autograd.grad(out.per_token, b["velocity"], g, retain_graph=True) for g in (up, up.contiguous())]
        assert equal(*grads) and grads[0][0].abs().sum() > 0


def test_only_what_is_needed(device):
    b, options = batch(device)
    options |= dict(beta=0.2, clip_range=0.1)
    *_, d_velocity, d_uncond, d_sample = outputs(run_triton, b, options)
    for name, expected in zip(LEAVES, (d_velocity, d_uncond, d_sample), strict=True):
        leaf = b[name].clone().requires_grad_()
        out = run_triton(**b | {name: leaf}, **options)
        assert torch.equal(torch.autograd.grad(1.7 * out.loss, leaf)[0], expected)
        assert not any(x.requires_grad for x in (*out.metrics.values(), out.logprobs))
    constant = {k: v.clone().requires_grad_() for k, v in b.items() if isinstance(v, torch.Tensor)}
    run_triton(**b | constant, **options).loss.backward()
    assert [k for k, v in constant.items() if v.grad is not None] == list(LEAVES)


def test_nothing_to_do(device):
    b, options = batch(device, 0)
    loss, per_sample, metrics, *rest = outputs(run_triton, b, options | dict(beta=0.1))
    assert loss == 0 and (metrics == 0).all() and all(len(x) == 0 for x in (per_sample, *rest))


@pytest.mark.parametrize("ref, count", [(False, 3), (True, 4)])
def test_launches(ref, count, device, monkeypatch):
    kernels = []
    for module in (_flow, KERNELS):
        launch = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *a, _launch=launch, **kw: (kernels.append(kernel), _launch(kernel, *a, **kw)),
        )
    b, options = batch(device, ref=ref)
    out = run_triton(**b | dict(velocity=b["velocity"].requires_grad_()), **options)
    assert len(kernels) == count
    out.loss.backward()
    assert len(kernels) == count + 1


@pytest.mark.parametrize("kind", SDE)
def test_compiles(kind, device):
    b, options = batch(device, kind=kind)
    del b["sigma"], b["sigma_next"], options["guidance_scale"]
    b["velocity"].requires_grad_()

    def loss(x):
        numbers = dict(sigma=1 - x, sigma_next=0.5 - x, noise_level=x, guidance_scale=3 * x, beta=x, clip_range=x)
        return run_triton(**b, **options, **numbers, advantage_clip=5 * x, normalizer=1 + x).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for i in range(10):  # the ninth recompilation would raise
        losses = [f(0.1 + i / 40) for f in (compiled, loss)]
        values = [(x, *torch.autograd.grad(x, b["velocity"])) for x in losses]
        for x, y in zip(*values, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


def test_opcheck(device, monkeypatch):
    calls = []
    for name in ("_forward", "_backward"):
        op = getattr(KERNELS, name)
        monkeypatch.setattr(KERNELS, name, lambda *given, op=op: calls.append((op, given)) or op(*given))
    for uncond in (True, False):
        b, options = batch(device, 2, (3, 4), uncond=uncond, ref=uncond)
        options |= dict(normalizer=torch.tensor(3.0, device=device)) if uncond else dict(sigma_max=0.9)
        outputs(run_triton, {k: v for k, v in b.items() if k not in options}, options)
    assert len(calls) == 4
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for op, arguments in calls:
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        if op is calls[0][0]:
            arguments[0].requires_grad_()
        torch.library.opcheck(op, arguments, test_utils=checks)


def test_dispatch(device):
    b, options = batch(device)
    for wide in ("velocity", "sample"):
        with pytest.raises(RuntimeError, match="fp64"):
            run_triton(**b | {wide: b[wide].double()}, **options)
        assert flow_grpo_loss(**b | {wide: b[wide].double()}, **options).loss.dtype == torch.float64
    b, options = batch("cpu")
    assert torch.equal(*(flow_grpo_loss(**b, **options, impl=impl).loss for impl in ("auto", "torch")))
    with pytest.raises(ValueError, match="impl must be"):
        flow_grpo_loss(**b, **options, impl="cuda")


@pytest.mark.gpu
def test_repeatable_without_synchronisation(device):
    b, options = batch(device, 64, (16, 128, 128), torch.bfloat16)
    options |= dict(beta=0.1)
    expected = outputs(run_triton, b, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [outputs(run_triton, b, options) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(equal(expected, result) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_ratio_is_exactly_one_at_full_size(dtype, device):
    """Compiled: the two ops' kernels read their inputs in layouts of their own, and must sum in one order."""
    for kind, uncond in itertools.product(SDE, (False, True)):
        b = step_batch(device, 24, (16, 64, 64), dtype, uncond)
        options = dict(kind=kind, sigma=0.8, sigma_next=0.7, guidance_scale=4.5)
        step = flow_step(**b, **options, seed=torch.arange(24, device=device), impl="triton")
        out = run_triton(
            **{k: v[7:] for k, v in b.items()}, **options, next_sample=step.next_sample[7:], beta=0.1,
            old_log_prob=step.log_prob[7:], advantages=torch.ones(17, device=device), ref_velocity=b["velocity"][7:],
        )  # fmt: skip
        assert torch.equal(out.logprobs, step.log_prob[7:]) and out.metrics["ratio_max"] == 1


@st.composite
def problems(draw):
    choose = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 999)))
    B, shape = draw(st.integers(0, 6)), choose((1,), (5,), (64,), (2, 33), (3, 2, 16), (130,))
    dtype, ref = choose(torch.float32, torch.bfloat16, torch.float16), choose(True, False)
    b, options = batch(
        "cpu", B, shape, dtype, choose(True, False), ref, kind=choose(*SDE), log_prob=choose(*FORMS),
        guidance_scale=choose(1.0, 0.0, 4.5),
    )  # fmt: skip
    options |= dict(
        kl=choose(*KLS),
        beta=choose(0.0, 0.5) if ref else 0.0,
        clip_range=choose(0.0, 1e-4, 0.17),
        advantage_clip=choose(None, 1.0, 5.0),
        normalizer=choose(None, 0.5, torch.tensor(3)),
    )
    if choose(False, True):
        b |= dict(sigma=0.75, sigma_next=0.5)
    if choose(False, False, True):
        b = {k: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v for k, v in b.items()}
    return b, options


@pytest.mark.parametrize("impl", ["torch", "triton"])
@given(problem=problems())
def test_fuzz(impl, problem):
    device = "cuda" if ON_GPU else "cpu"
    b, options = ({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.items()} for x in problem)
    check(b, options, 1e-5, lambda **kwargs: flow_grpo_loss(**kwargs, impl=impl))


def call(B=4, shape=(16, 4, 4), dtype=torch.bfloat16, uncond=True, ref=True, **options):
    """Forward and backward pass on the CPU, for ahead-of-time compilation."""
    b = step_batch("cpu", B, shape, dtype, uncond)
    b = {k: v.requires_grad_() for k, v in b.items()}
    if ref:
        b["ref_velocity"] = b["velocity"].detach()
    given = dict(sigma=0.8, sigma_next=torch.tensor(0.7), guidance_scale=2.0) | options
    rows = torch.zeros(B)
    out = run_triton(**b, **given, next_sample=b["sample"].detach(), old_log_prob=rows, advantages=rows)
    (out.loss + out.per_token.sum()).backward()


def calls():
    torch.manual_seed(0)
    for kind, kl, form in itertools.product(SDE, KLS, FORMS):
        yield f"{kind} {kl} {form}", lambda k=kind, n=kl, f=form: call(kind=k, kl=n, log_prob=f, beta=0.1)
    for dtype, uncond, ref in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (True, False), (True, False)
    ):
        yield f"{dtype} {uncond} {ref}", lambda d=dtype, u=uncond, r=ref: call(dtype=d, uncond=u, ref=r)
    yield "unaligned", lambda: call(shape=(5, 3))
    yield "normalizer", lambda: call(normalizer=torch.tensor(3))


def numbers():
    for i, (B, shape) in enumerate(((1, (16,)), (1, (16, 128, 128)), (17, (4, 64, 64)), (64, (3, 5)), (300, (1,)))):
        yield lambda b=B, s=shape, n=i: call(
            b, s, sigma=1 - n / 10, sigma_next=n / 20, noise_level=0.1 + n / 5, guidance_scale=float(n), beta=n / 3,
            clip_range=n / 9, advantage_clip=None if n == 1 else n + 1.0, normalizer=None if n == 2 else n + 0.5,
        )  # fmt: skip
