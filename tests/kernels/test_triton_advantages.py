import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED
from uae_kernels import advantages, group_advantages, reference
from uae_kernels._common import pack

WEIGHTS = [1.0, 0.5, -2.0]
GDPO = {"aggregation": "normalize_then_sum"}
OPTIONS = [
    {},
    {"scale": "batch"},
    {"scale": "none", "leave_one_out": True},
    {"leave_one_out": True, "unbiased": False, "eps": 1e-6},
    {"scale": "batch", "leave_one_out": True, "clip": 0.7},
    {"clip": 0.5},
    GDPO,
    GDPO | {"clip": 0.8, "unbiased": False},
]


def run(function, rewards, weights, *group, **options):
    """The advantages, and the gradient of their sum with weights."""
    leaf = rewards.detach().requires_grad_()
    out = function(leaf, *group, **options)
    (grad,) = torch.autograd.grad((out * weights.to(out)).sum(), leaf)
    return out.detach(), grad


def rewards_with_gaps(*shape, dtype=torch.float32, device="cpu"):
    """Random rewards, some missing, and seven in a row constant."""
    rewards = torch.randn(shape)
    rewards[4], rewards[-1], rewards.view(-1)[9] = torch.nan, -torch.inf, torch.inf
    rewards[14:21] = 0.3
    return rewards.to(device, dtype)


@pytest.mark.parametrize("kind", ["group_size", "group_ids"])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_accuracy(options, columns, kind, device, poisoned):
    n = 28 if device == "cpu" else 7000
    rewards, weights = (
        rewards_with_gaps(*(n, columns)[: 1 + bool(columns)], device=device),
        torch.randn(n, device=device),
    )
    group = {"group_size": 7} if kind == "group_size" else {"group_ids": torch.randint(-2, n // 9, (n,), device=device)}
    options = options | group | ({"reward_weights": WEIGHTS} if columns else {})
    ours = run(group_advantages, rewards, weights, impl="triton", **options)
    plain = run(reference.group_advantages, rewards, weights, **options)
    truth = run(reference.group_advantages, rewards.double(), weights, **options)
    for o, p, t in zip(ours, plain, truth, strict=True):
        assert o.dtype == torch.float32 and t.abs().max() > 0.1
        assert (o - t).abs().max() <= 2 * (p - t).abs().max() + 1e-7 * t.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device, poisoned):
    rewards, weights = rewards_with_gaps(28, 2, dtype=dtype, device=device), torch.randn(28, device=device)
    actual, grad = run(group_advantages, rewards, weights, 7, impl="triton")
    expected, expected_grad = run(reference.group_advantages, rewards.double(), weights, 7)
    assert actual.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("size, options", [(3, {}), (8, {"leave_one_out": True}), (40, {}), (300, {"scale": "none"})])
def test_a_group_has_the_same_bits_alone_and_in_any_batch(size, options, device):
    groups = 5 if size < 100 else 3
    rewards, weights = torch.randn(groups, size, device=device), torch.randn(groups, size, device=device)
    whole = run(group_advantages, rewards.flatten(), weights.flatten(), size, impl="triton", **options)
    for chosen in ([1], [2, 0], list(range(groups))[::-1]):
        part = run(
            group_advantages, rewards[chosen].flatten(), weights[chosen].flatten(), size, impl="triton", **options
        )
        for p, w in zip(part, whole, strict=True):
            assert torch.equal(p.view(-1, size), w.view(-1, size)[chosen])


@pytest.mark.parametrize("kind", ["group_size", "group_ids"])
def test_groups_longer_than_a_block(kind, device, poisoned):
    n = 2 * 264
    rewards, weights = torch.randn(n, device=device) + 100, torch.randn(n, device=device)
    group = {"group_size": 264} if kind == "group_size" else {"group_ids": torch.arange(n, device=device) // 264}
    for options in (OPTIONS[0], OPTIONS[4]):
        actual = run(group_advantages, rewards, weights, impl="triton", **group, **options)
        expected = run(reference.group_advantages, rewards.double(), weights, **group, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -7e-9, 3e38])
def test_zero_variance_is_exactly_zero(value, device):
    rewards = torch.full((12, 2), value, device=device)
    rewards[:6] += rewards[0, 0].abs().sqrt() * torch.arange(6, device=device)[:, None]
    for options in ({}, {"scale": "batch"}, {"leave_one_out": True}):
        found, grad = run(
            group_advantages, rewards, torch.randn(12, device=device), 6, eps=1e-12, impl="triton",
            reward_weights=[0.3, 0.1], **options,
        )  # fmt: skip
        assert (found[6:] == 0).all() and grad.isfinite().all()
        assert (found[:6] != 0).any() or value == 3e38  # 3e38 + 1e19 is 3e38


@pytest.mark.parametrize("options", OPTIONS)
def test_groups_of_one_and_of_nan(options, device, poisoned):
    rewards, weights = torch.randn(5, device=device), torch.randn(5, device=device)
    found, grad = run(group_advantages, rewards, weights, 1, impl="triton", **options)
    assert (found == 0).all() and (grad == 0).all()
    nan = torch.nan
    rewards = torch.tensor([nan, nan, nan, 1.0, 2.0, nan], device=device)
    found, grad = run(group_advantages, rewards, torch.randn(6, device=device), 3, impl="triton", **options)
    assert (found[[0, 1, 2, 5]] == 0).all() and found[3] < 0 < found[4]
    assert grad.isfinite().all() and (grad[[0, 1, 2, 5]] == 0).all()
    everything = group_advantages(torch.full((4,), nan, device=device), 2, impl="triton", **options)
    assert (everything == 0).all()


def test_gradient_where_the_clip_is_met_exactly(device):
    rewards = torch.tensor([0.0, 2.0, 0.0, 3.0], device=device)
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
    results = [run(f, rewards, weights, 2, scale="none", clip=1.0) for f in (reference.group_advantages,)]
    results.append(run(group_advantages, rewards, weights, 2, scale="none", clip=1.0, impl="triton"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].tolist() == [-1, 1, -1, 1] and (results[0][1][:2] != 0).all()


def test_strides_and_weights(device, poisoned):
    base, weights = torch.randn(8, 6, device=device), torch.randn(8, device=device)
    ids = torch.tensor([7, 7, 1, 1, 7, 1, 1, 7], device=device)
    for name, rewards in {
        "column": base[:, 1],
        "columns": base[:, 1::2],
        "transposed": base.T.contiguous().T,
        "expanded columns": base[:, :1].expand(8, 3),
        "expanded rows": base[:1].expand(8, 6),
        "reversed by a flip": base.flip(0)[::2].repeat(2, 1),
    }.items():
        given = torch.randn(rewards.shape[1], device=device) if rewards.dim() == 2 else None
        for group in ({"group_size": 4}, {"group_ids": ids.repeat_interleave(3)[::3].to(torch.int32)}):
            options = group | {"reward_weights": given}
            actual = run(group_advantages, rewards, weights, impl="triton", **options)
            expected = run(reference.group_advantages, rewards.double(), weights, **options)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.double(), e, atol=2e-6, rtol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("far", ["rows", "columns"])
def test_offsets_beyond_int32(far, device):
    shape, strides = {"rows": ((3, 2), (2**30 + 16, 3)), "columns": ((4, 2), (2, 2**31 + 16))}[far]
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    rewards = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    values, weights = torch.randn(shape, device=device).bfloat16(), torch.randn(shape[0], device=device)
    rewards.copy_(values)
    for options in ({}, GDPO):
        results = [run(group_advantages, r, weights, shape[0], impl="triton", **options) for r in (values, rewards)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, GDPO])
def test_no_samples(options, device):
    for shape in ((0,), (0, 3)):
        out, grad = run(
            group_advantages, torch.empty(shape, device=device), torch.empty(0), 4, impl="triton", **options
        )
        assert out.shape == (0,) and grad.shape == shape


@pytest.mark.parametrize("options, count", [({}, 1), ({"scale": "batch", "clip": 1.0}, 1), (GDPO, 2)])
def test_launches(options, count, device, monkeypatch):
    kernels, launch = [], advantages.launch
    monkeypatch.setattr(
        advantages, "launch", lambda kernel, *args, **kw: (kernels.append(kernel), launch(kernel, *args, **kw))
    )
    group_advantages(torch.randn(6, 2, device=device), 3, impl="triton", **options)
    assert len(kernels) == count


def test_dispatch(device):
    rewards = torch.randn(4, device=device)
    with pytest.raises(RuntimeError, match="fp64"):
        group_advantages(rewards.double(), 2, impl="triton")
    assert group_advantages(rewards.double(), 2).dtype == torch.float64
    with pytest.raises(ValueError, match="impl must be"):
        group_advantages(rewards, 2, impl="cuda")


@pytest.mark.parametrize("options", [{"clip": 1.0}, GDPO])
def test_compiles(options, device):
    rewards = torch.randn(6, 2, device=device, requires_grad=True)

    def loss(eps):
        return group_advantages(rewards, 3, eps=eps, reward_weights=[1.0, eps], impl="triton", **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for eps in (0.1, 0.2, 0.3):
        for a, b in zip(*((x, *torch.autograd.grad(x, rewards)) for x in (compiled(eps), loss(eps))), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["group_size", "group_ids"])
def test_opcheck(kind, device):
    rewards = torch.randn(4, 2, device=device)
    ids = torch.tensor([0, 1, 0, 1], device=device)
    group = (None, 2) if kind == "group_size" else (ids, None)
    options = group[0], None, pack(1e-4, None, 0.5, 2.0), group[1], "normalize_then_sum", "group", True, False
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(advantages._forward, (rewards.requires_grad_(), *options), test_utils=checks)
    inputs = torch.randn(4, device=device), rewards.detach(), *options
    torch.library.opcheck(advantages._backward, inputs, test_utils=checks)


@st.composite
def problems(draw):
    size, groups, columns = draw(st.sampled_from([1, 2, 3, 5, 17])), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    n, generator = size * groups, torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rewards = torch.randn(n, columns or 1, generator=generator)
    if draw(st.booleans()):  # few different values
        rewards = rewards.mul(2).round().div(4)
    rewards = rewards * draw(st.sampled_from([1.0, 2.0**-20, 1024.0]))
    for _ in range(draw(st.integers(0, 4))):
        rewards[draw(st.integers(0, n - 1)), draw(st.integers(0, max(columns, 1) - 1))] = draw(
            st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0])
        )
    if draw(st.booleans()):
        rewards[: draw(st.integers(1, n))] = 0.125
    options = dict(draw(st.sampled_from(OPTIONS)), eps=draw(st.sampled_from([1e-4, 1e-6])))
    if columns:
        options["reward_weights"] = [0.5, 2.0, -1.25][:columns]
    if draw(st.booleans()):
        options["group_ids"] = torch.randint(0, groups, (n,), generator=generator)
    else:
        options["group_size"] = size
    rewards = rewards if columns else rewards[:, 0]
    return rewards, torch.randn(n, generator=generator), options


@pytest.mark.parametrize("impl", ["torch", "triton"])
@given(problem=problems())
def test_fuzz(impl, problem):
    rewards, weights, options = problem
    device = "cpu" if INTERPRETED or impl == "torch" else "cuda"
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    rewards, weights = rewards.to(device), weights.to(device)
    given, tolerance = (rewards, 2e-6) if impl == "triton" else (rewards.double(), 1e-9)
    actual = run(group_advantages, given, weights, impl=impl, **options)
    expected = run(reference.group_advantages, rewards.double(), weights, **options)
    for a, e in zip(actual, expected, strict=True):
        assert ((a - e).abs() <= tolerance * (1e-6 + e.abs().max())).all()
        assert (a[e == 0] == 0).all() or a is actual[1]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, GDPO])
def test_large_batches_without_synchronization(options):
    rewards = torch.randn(100_000, 2, device="cuda")
    expected = reference.group_advantages(rewards.double(), 8, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [group_advantages(rewards, 8, impl="triton", **options) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(results[0].double(), expected, atol=1e-6, rtol=1e-6)


def call(*shape, dtype=torch.float32, **options):
    """Forward and backward pass on the CPU, for ahead-of-time compilation."""
    rewards = torch.zeros(shape, dtype=dtype, requires_grad=True)
    group_advantages(rewards, impl="triton", **options).sum().backward()


def calls():
    ids = torch.zeros(8, dtype=torch.int64)
    ways = {"group_size": 4}, {"group_ids": ids}
    for group, options, weights in itertools.product(ways, OPTIONS, (None, [1.0, 2.0])):
        yield (
            f"{group}, {options}, {weights}",
            lambda g=group, o=options, w=weights: call(8, 2, reward_weights=w, **g, **o),
        )
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype}", lambda d=dtype: call(8, dtype=d, group_size=4)
    yield "int32 ids", lambda: call(8, group_ids=ids.to(torch.int32))


def numbers():
    for batch, size in ((1, 1), (3, 1), (16, 16), (17, 17), (96, 6), (4096, 8), (100_000, 5), (70_000, 70_000)):
        yield lambda b=batch, g=size: call(b, group_size=g)
    for columns, eps, clip in ((1, 0.0, None), (2, 1e-9, 1.0), (16, 1.0, 0.5)):
        yield lambda c=columns, e=eps, k=clip: call(8, c, group_size=4, eps=e, clip=k, unbiased=False)
