import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED, ON_GPU
from test_flow_step import SDE
from torch._dynamo.testing import CompileCounterWithBackend
from uae_kernels import _flow, flow_step, reference
from uae_kernels.reference.flow_step import philox, philox_normal

KINDS = ["ode", *SDE]
LEAVES = ("velocity", "velocity_uncond", "sample")
SHAPE = (2, 5, 32) if INTERPRETED else (16, 48, 48)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several programs a sample, and several blocks of sums, at the interpreter's small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            for name, size in (("BLOCK", 64), ("BLOCKS", 2), ("SUMS", 32)):
                patch.setattr(_flow, name, size)
        yield


def batch(device, B=3, shape=SHAPE, dtype=torch.float32, uncond=True):
    """Velocities in the model's dtype, samples in fp32."""
    velocity, velocity_uncond, sample = (torch.randn(B, *shape) for _ in range(3))
    b = dict(velocity=velocity.to(dtype), velocity_uncond=velocity_uncond.to(dtype), sample=sample)
    if not uncond:
        del b["velocity_uncond"]
    return {k: v.to(device) for k, v in b.items()}


def sigmas(device, B=3):
    sigma = torch.linspace(1.0, 0.3, B, device=device)
    return dict(sigma=sigma, sigma_next=sigma - 0.1, sigma_max=0.95)


def outputs(function, given, options):
    """What a step returns and the gradients of a random function of it."""
    given = {k: v.detach().requires_grad_() if k in LEAVES else v for k, v in given.items()}
    leaves = [given[k] for k in LEAVES if k in given]
    step = function(**given, **options)
    heads = [x for x in step[:3] if x is not None and x.requires_grad]
    generator = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=generator).to(x) for x in heads]
    if step.log_prob is not None:
        ups[[x is step.log_prob for x in heads].index(True)] *= step.mean.shape[1:].numel()
    grads = torch.autograd.grad(heads, leaves, ups)
    return [x.detach() for x in step if x is not None] + list(grads)


def double(values):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


def run_triton(*args, **kwargs):
    return flow_step(*args, impl="triton", **kwargs)


def check(given, options, tolerance=4e-7, function=run_triton):
    """The error against the fp64 definition is at most twice that of the definition in the inputs' own dtype."""
    actual, plain = (outputs(f, given, options) for f in (function, reference.flow_step))
    truth = outputs(reference.flow_step, double(given), double(options))
    for i, (x, y, z) in enumerate(zip(actual, plain, truth, strict=True)):
        assert x.dtype == y.dtype and x.shape == z.shape
        assert torch.equal(x.isnan(), y.isnan())
        x, y, z = (v.double().nan_to_num() for v in (x, y, z))
        if not z.numel():
            continue
        error, allowed = (x - z).abs().max(), 2 * (y - z).abs().max() + tolerance * z.abs().max().clamp(min=1)
        assert error <= allowed, f"output {i}: {error} > {allowed}"
    return actual


def equal(*results):
    return all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("kind, form", [("ode", "gaussian"), *itertools.product(SDE, ("gaussian", "cps"))])
@pytest.mark.parametrize("uncond", [False, True])
@pytest.mark.parametrize("source", ["noise", "next_sample"])
def test_accuracy(kind, form, uncond, source, device, poisoned):
    b = batch(device, uncond=uncond)
    options = sigmas(device) | dict(kind=kind, log_prob=form, guidance_scale=2.5)
    *_, d_velocity, d_sample = check(b, options | {source: torch.randn(3, *SHAPE, device=device)})
    assert d_velocity.abs().sum() > 0 and d_sample.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype, device):
    b = batch(device, dtype=dtype)
    b["sample"] = b["sample"].to(dtype)
    options = sigmas(device) | dict(kind=kind, next_sample=torch.randn(3, *SHAPE, device=device, dtype=dtype))
    results = check(b, options)
    assert all(x.dtype == torch.float32 for x in results[:-3]) and all(x.dtype == dtype for x in results[-3:])


@triton.jit
def draw_kernel(seeds, ours, theirs, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    tl.store(ours + row * BLOCK + i, _flow._randn(seed, i))
    tl.store(theirs + row * BLOCK + i, tl.randn(seed, i))
    tl.store(words + row * BLOCK + i, tl.randint(seed, i).to(tl.int64) & 0xFFFFFFFF)


def test_noise_is_tritons(device):
    seeds = torch.tensor([0, 1, 123456789, 2**31, 2**32 + 7, 2**40 - 1, 2**62 + 12345, -3], device=device)
    n = 4096
    ours, theirs = (torch.empty(len(seeds), n, device=device) for _ in range(2))
    words = torch.empty(len(seeds), n, dtype=torch.int64, device=device)
    draw_kernel[(len(seeds),)](seeds, ours, theirs, words, n)
    assert torch.equal(words, philox(seeds, n)[0])
    definition = philox_normal(seeds, n)
    assert (ours - theirs).abs().max() < 1e-6 and (ours - definition).abs().max() < 1e-6
    assert (ours - theirs).norm() < 1e-7 * ours.norm() and ours.std() > 0.98


@pytest.mark.parametrize("kind", SDE)
def test_drawn_from_seeds(kind, device, poisoned):
    """What is drawn is mean + std·noise with the definition's noise, whatever the sample's row."""
    b, seeds = batch(device), torch.tensor([5, 2**40 + 1, -7], device=device)
    options = sigmas(device) | dict(kind=kind, seed=seeds)
    step, plain = (f(**b, **options) for f in (run_triton, reference.flow_step))
    assert (step.next_sample - plain.next_sample).abs().max() < 2e-6 and (step.next_sample != step.mean).any()
    for x, y in zip(step, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    by_number = run_triton(**b, **options | dict(seed=11))
    keys = 11 * 2**20 + torch.arange(3, device=device)
    assert equal(by_number, run_triton(**b, **options | dict(seed=keys)))
    torch.manual_seed(4)
    noise = torch.randn(3, *SHAPE, device=device)
    torch.manual_seed(4)
    del options["seed"]
    assert equal(run_triton(**b, **options), run_triton(**b, **options, noise=noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["gaussian", "cps"])
@pytest.mark.parametrize("kind", SDE)
def test_replay_returns_the_same_bits(kind, form, dtype, device):
    b, options = batch(device, dtype=dtype), sigmas(device) | dict(kind=kind, log_prob=form, guidance_scale=4.5)
    step = run_triton(**b, **options, seed=3)
    replay = run_triton(**b, **options, next_sample=step.next_sample)
    assert equal(step, replay)
    given = {k: v.requires_grad_() for k, v in b.items() if k == "velocity"} | b
    grads = [
        torch.autograd.grad(run_triton(**given, **options, **source).log_prob.sum(), given["velocity"])
        for source in (dict(seed=3), dict(next_sample=step.next_sample))
    ]
    assert equal(*grads) and grads[0][0].abs().sum() > 0


@pytest.mark.parametrize("source", ["seed", "noise", "next_sample"])
@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_a_sample_has_the_same_bits_alone_and_in_any_batch(kind, source, device):
    b = batch(device, 5, dtype=torch.bfloat16)
    source = {source: torch.arange(5, device=device) if source == "seed" else torch.randn(5, *SHAPE, device=device)}
    rows_of = b | source | {k: v for k, v in sigmas(device, 5).items() if k != "sigma_max"}
    whole = run_triton(**rows_of, kind=kind, sigma_max=0.95)

    def head(step):
        return step.next_sample.square().sum() + step.mean.sin().sum() + step.log_prob.square().sum()

    for rows in ([0, 1, 2, 3, 4], [3], [4, 0], [1, 2, 3]):
        part = {k: v[rows] for k, v in rows_of.items()}
        assert equal(run_triton(**part, kind=kind, sigma_max=0.95), [x[rows] for x in whole])
        results = []
        for values in (part, rows_of):
            leaves = {k: v.detach().requires_grad_() for k, v in values.items() if k in LEAVES}
            step = run_triton(**values | leaves, kind=kind, sigma_max=0.95)
            results.append(torch.autograd.grad(head(step), list(leaves.values())))
        assert equal(results[0], [x[rows] for x in results[1]])


def test_strides(device):
    """Layouts and alignments change no bit; the halves of a guided batch and expanded samples are read in place."""
    b, keys = batch(device, 4, (2, 6, 32)), dict(seed=torch.arange(8, device=device)[::2])
    b["sample"] = b["sample"][:1].expand(4, -1, -1, -1)
    contiguous = {k: v.contiguous() for k, v in b.items()}
    expected = outputs(run_triton, contiguous | dict(seed=keys["seed"].contiguous()), sigmas(device, 4))
    both = torch.cat([contiguous["velocity_uncond"], contiguous["velocity"]])
    halves = dict(zip(("velocity_uncond", "velocity"), both.chunk(2), strict=True))
    off = {}
    for k, v in contiguous.items():  # no multiple of 16 bytes
        off[k] = torch.empty(v.numel() + 1, device=device)[1:].view(v.shape).copy_(v)
    for strided in (
        b,
        b | halves,
        off,
        {k: v.to(memory_format=torch.channels_last) for k, v in contiguous.items()},
        {k: torch.stack([v, v], -1)[..., 1] for k, v in b.items()},
        {k: torch.cat([v, v], 2)[:, :, 6:] for k, v in contiguous.items()},
    ):
        assert equal(outputs(run_triton, strided | keys, sigmas(device, 4)), expected)
    assert (
        not _flow._rows(b["sample"]).is_contiguous() and _flow._rows(halves["velocity"]).data_ptr() != both.data_ptr()
    )


def test_gradient_of_any_strides(device):
    b = batch(device)
    b["velocity"].requires_grad_()
    step, weights = run_triton(**b, **sigmas(device), seed=1), torch.randn(*SHAPE, 3, device=device)
    for up in (weights.movedim(-1, 0), weights[..., :1].movedim(-1, 0).expand(3, *SHAPE)):
        grads = [torch.autograd.grad(step.mean, b["velocity"], g, retain_graph=True) for g in (up, up.contiguous())]
        assert equal(*grads) and grads[0][0].abs().sum() > 0


@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 65, 127, 128, 129, 257])
def test_sizes_around_a_block(size, device, poisoned):
    check(batch(device, 2, (size,)), sigmas(device, 2) | dict(noise=torch.randn(2, size, device=device)))


def test_offsets_beyond_32_bits(device):
    """Samples 2^31 elements apart; only the pages in use are touched."""
    b, noise = batch(device, 2, (40,), torch.bfloat16), torch.randn(2, 40, device=device)
    expected = outputs(run_triton, b | dict(noise=noise), sigmas(device, 2))
    for name in ("velocity", "velocity_uncond", "sample", "noise"):
        dtype = torch.float32 if name in ("sample", "noise") else torch.bfloat16
        memory = torch.empty(2**31 + 64, dtype=dtype, device=device)
        far = memory.as_strided((2, 40), (2**31, 1)).copy_((b | dict(noise=noise))[name])
        assert equal(outputs(run_triton, b | dict(noise=noise) | {name: far}, sigmas(device, 2)), expected)


def test_numbers_and_tensors_of_sigma_are_the_same(device):
    b = batch(device)
    expected = outputs(run_triton, b, dict(sigma=1.0, sigma_next=0.7, sigma_max=0.9, seed=1))
    for make in (
        lambda x: torch.tensor(x, device=device),
        lambda x: torch.tensor([x], device=device).expand(3),
        lambda x: torch.full((6,), x, device=device)[::2],
        lambda x: torch.full((3,), x, device=device, dtype=torch.float64),
    ):
        given = dict(sigma=make(1.0), sigma_next=make(0.7), sigma_max=make(0.9), seed=1)
        assert equal(outputs(run_triton, b, given), expected)
    short = run_triton(**b, sigma=1.0, sigma_next=0.9, seed=1)
    assert equal(short, run_triton(**b, sigma=1.0, sigma_next=0.9, sigma_max=0.9, seed=1))
    with pytest.raises(ValueError, match="shape"):
        run_triton(**b, sigma=torch.rand(2, device=device), sigma_next=0.7)


def test_step_to_sigma_zero_is_defined(device):
    b = batch(device)
    b["velocity"].requires_grad_()
    step = run_triton(**b, sigma=0.1, sigma_next=torch.tensor([0.0, 0.05, 0.0], device=device), kind="cps", seed=1)
    (grad,) = torch.autograd.grad(step.log_prob.sum(), b["velocity"])
    assert (step.std.flatten() == 0).tolist() == [True, False, True] and step.next_sample.isfinite().all()
    assert (step.log_prob[[0, 2]] == 0).all() and (grad[[0, 2]] == 0).all() and grad[1].abs().sum() > 0


@pytest.mark.parametrize("options", [dict(kind="ode"), *(dict(kind=kind, noise_level=0.0) for kind in SDE)])
def test_deterministic_steps(options, device, poisoned):
    b = batch(device)
    results = check(b, sigmas(device) | options)
    step = run_triton(**b, **sigmas(device), **options)
    assert step.log_prob is None and (step.std == 0).all() and torch.equal(step.next_sample, step.mean)
    assert len(results) == 6
    euler = b["sample"] - 0.1 * (b["velocity_uncond"] + (b["velocity"] - b["velocity_uncond"]))
    torch.testing.assert_close(step.mean, euler, rtol=1e-5, atol=1e-6)
    given = torch.randn(3, *SHAPE, device=device)
    replay = run_triton(**b, **sigmas(device), **options, next_sample=given)
    assert torch.equal(replay.next_sample, given) and replay.log_prob is None


def test_only_what_is_needed(device):
    """The gradient of one input, and of one output, is the same as among all."""
    b, options = batch(device), sigmas(device) | dict(seed=1, guidance_scale=3.0)
    *_, d_velocity, d_uncond, d_sample = outputs(run_triton, b, options)
    for name, expected in zip(LEAVES, (d_velocity, d_uncond, d_sample), strict=True):
        leaf = b[name].clone().requires_grad_()
        assert torch.equal(outputs_of(b | {name: leaf}, options, leaf), expected)
    leaves = {k: v.clone().requires_grad_() for k, v in b.items()}
    step, plain = (f(**leaves, **options) for f in (run_triton, reference.flow_step))
    for x, y in zip(step[:3], plain[:3], strict=True):
        for actual, expected in zip(
            *(torch.autograd.grad(z.sum(), list(leaves.values()), retain_graph=True) for z in (x, y)), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not step.std.requires_grad


def outputs_of(given, options, leaf):
    """The last entry of `outputs`, with `leaf` the one input that needs a gradient."""
    step = run_triton(**given, **options)
    generator = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=generator).to(x) for x in step[:3]]
    ups[1] *= step.mean.shape[1:].numel()
    return torch.autograd.grad(step[:3], leaf, ups)[0]


def test_nothing_to_do(device):
    b = batch(device, 0)
    for options in (dict(seed=1), dict(kind="ode"), dict(noise=torch.empty(0, *SHAPE, device=device))):
        results = outputs(run_triton, b, dict(sigma=0.8, sigma_next=0.7) | options)
        assert [len(x) for x in results] == [0] * len(results)


@pytest.mark.parametrize("options, count", [({}, 2), (dict(kind="ode"), 1), (dict(noise_level=0.0), 1)])
def test_launches(options, count, device, monkeypatch):
    kernels, launch = [], _flow.launch
    monkeypatch.setattr(
        _flow, "launch", lambda kernel, *args, **kw: (kernels.append(kernel), launch(kernel, *args, **kw))
    )
    b = batch(device)
    b["velocity"].requires_grad_()
    step = run_triton(**b, **sigmas(device), seed=1, **options)
    assert len(kernels) == count
    step.next_sample.sum().backward()
    assert len(kernels) == count + 1


@pytest.mark.parametrize("kind", SDE)
def test_compiles(kind, device):
    b = batch(device)
    b["velocity"].requires_grad_()
    seed = torch.arange(3, device=device)

    def loss(number, scale):
        step = run_triton(
            **b,
            sigma=1 - number,
            sigma_next=0.5 - number,
            kind=kind,
            noise_level=number,
            guidance_scale=scale,
            seed=seed,
        )
        return step.log_prob.sum() + step.next_sample.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for i in range(10):  # the ninth recompilation would raise
        number = 0.1 + i / 40
        values = [
            (x, *torch.autograd.grad(x, b["velocity"])) for x in (f(number, 3 * number) for f in (compiled, loss))
        ]
        for x, y in zip(*values, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


def test_opcheck(device, monkeypatch):
    import importlib

    module, calls = importlib.import_module("uae_kernels.flow_step"), []
    for name in ("_forward", "_backward"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, op=op: calls.append((op, given)) or op(*given))
    outputs(run_triton, batch(device, 2, (3, 4)), dict(sigma=0.8, sigma_next=torch.tensor(0.7, device=device), seed=1))
    outputs(run_triton, batch(device, 2, (3, 4), uncond=False), dict(sigma=0.8, sigma_next=0.7, kind="ode"))
    assert len(calls) == 4
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for op, arguments in calls:
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        if op is calls[0][0]:
            arguments[0].requires_grad_()
        torch.library.opcheck(op, arguments, test_utils=checks)


def test_dispatch(device):
    b = batch(device)
    for wide in ("velocity", "sample"):
        with pytest.raises(RuntimeError, match="fp64"):
            run_triton(**b | {wide: b[wide].double()}, sigma=0.8, sigma_next=0.7)
        step = flow_step(**b | {wide: b[wide].double()}, sigma=0.8, sigma_next=0.7, seed=1)
        assert {x.dtype for x in step} == {torch.float64}
    b = batch("cpu")
    assert equal(*(flow_step(**b, sigma=0.8, sigma_next=0.7, seed=1, impl=impl) for impl in ("auto", "torch")))
    with pytest.raises(ValueError, match="impl must be"):
        flow_step(**b, sigma=0.8, sigma_next=0.7, impl="cuda")


@pytest.mark.gpu
def test_repeatable_without_synchronisation(device):
    b, seed = batch(device, 64, (16, 128, 128), torch.bfloat16), torch.arange(64, device=device)
    options = sigmas(device, 64) | dict(seed=seed, guidance_scale=4.5)
    expected = run_triton(**b, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [run_triton(**b, **options) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(equal(expected, result) for result in results)


@pytest.mark.gpu
def test_a_graph_replays_with_other_seeds_and_sigmas(device):
    b, seed = batch(device, 4), torch.arange(4, device=device)
    options = sigmas(device, 4) | dict(seed=seed)
    run_triton(**b, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = run_triton(**b, **options)
    for shift in (0, 17):
        seed += shift
        options["sigma"].sub_(shift / 1000)
        graph.replay()
        assert equal(step, run_triton(**b, **options))


@st.composite
def problems(draw):
    choose = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 999)))
    B, shape = draw(st.integers(0, 4)), choose((1,), (5,), (64,), (2, 33), (3, 2, 16), (130,), (4, 4, 4, 4))
    b = batch("cpu", B, shape, choose(torch.float32, torch.bfloat16, torch.float16), choose(True, False))
    kind = choose(*KINDS)
    sigma = torch.rand(B) * 0.9 + 0.1
    sigma[torch.rand(B) < 0.2] = 1.0
    sigma_next = sigma * torch.rand(B) * 0.9
    if kind == "cps":
        sigma_next[torch.rand(B) < 0.2] = 0.0
    options = dict(
        kind=kind,
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_max=choose(None, 0.9, torch.tensor(0.8)),
        noise_level=choose(None, 0.0, 0.25, 1.0),
        guidance_scale=choose(1.0, 0.0, 4.5),
        log_prob=choose("gaussian", "cps"),
    )
    options[choose("noise", "next_sample")] = torch.randn(B, *shape)
    if choose(False, True):
        options |= dict(sigma=0.75, sigma_next=0.5)
    if choose(False, False, True):
        b = {k: torch.stack([v, v], -1)[..., 0] for k, v in b.items()}
    return b, options


@pytest.mark.parametrize("impl", ["torch", "triton"])
@given(problem=problems())
def test_fuzz(impl, problem):
    device = "cuda" if ON_GPU else "cpu"
    b, options = ({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.items()} for x in problem)
    check(b, options, 1e-6, lambda **kwargs: flow_step(**kwargs, impl=impl))


def call(B=4, shape=(16, 4, 4), dtype=torch.bfloat16, uncond=True, train=True, **options):
    """Forward and backward pass on the CPU, for ahead-of-time compilation."""
    b = {k: v.requires_grad_(train) for k, v in batch("cpu", B, shape, dtype, uncond).items()}
    step = run_triton(**b, **dict(sigma=0.8, sigma_next=torch.tensor(0.7), guidance_scale=2.0) | options)
    if train:
        heads = [x for x in step[:3] if x is not None and x.requires_grad]
        torch.autograd.backward(heads, [torch.zeros_like(x) for x in heads])


def calls():
    torch.manual_seed(0)
    sources = {"seed": torch.arange(4), "noise": torch.randn(4, 16, 4, 4), "next_sample": torch.randn(4, 16, 4, 4)}
    for kind, (name, value), form in itertools.product(SDE, sources.items(), ("gaussian", "cps")):
        yield f"{kind} {name} {form}", lambda k=kind, n=name, v=value, f=form: call(kind=k, log_prob=f, **{n: v})
    for dtype, uncond in itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False)):
        yield f"{dtype} {uncond}", lambda d=dtype, u=uncond: call(dtype=d, uncond=u, seed=1)
        yield f"ode {dtype} {uncond}", lambda d=dtype, u=uncond: call(dtype=d, uncond=u, kind="ode")
    yield "unaligned", lambda: call(shape=(5, 3), seed=1)
    yield "unaligned replay", lambda: call(shape=(5, 3), next_sample=torch.zeros(4, 5, 3))
    yield "sigmas of samples", lambda: call(sigma=torch.rand(4), sigma_next=torch.rand(4).double(), seed=1)
    yield "no gradient", lambda: call(train=False, seed=1)


def numbers():
    for i, (B, shape) in enumerate(((1, (16,)), (1, (16, 128, 128)), (17, (4, 64, 64)), (64, (3, 5)), (3, (1,)))):
        for seed in (0, 2**40 + i):
            yield lambda b=B, s=shape, n=i, k=seed: call(
                b, s, seed=k, sigma=1 - n / 10, sigma_next=n / 20, noise_level=0.1 + n / 5, guidance_scale=float(n)
            )
