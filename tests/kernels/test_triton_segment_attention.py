import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED, ON_GPU, relative_error
from test_segment_attention import NAMES, plain, problem, values_and_gradients
from uae_kernels import _attention, reference, segment_attention

module = importlib.import_module("uae_kernels.segment_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(inputs, **options):
    return values_and_gradients(segment_attention, inputs, impl="triton", **options)


def check(actual, inputs, weights, times=2, **options):
    """Errors against fp64 at most twice those of torch's attention in the same dtype."""
    exact = {name: w.double() for name, w in weights.items()}
    truth = values_and_gradients(plain, [x.double() for x in inputs], **exact, **options)
    theirs = values_and_gradients(plain, inputs, **weights, **options)
    for a, p, t in zip(actual, theirs, truth, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape
        assert relative_error(a, t) <= times * relative_error(p, t) + 2e-7


CASES = [
    dict(tokens=45, tokens2=19),  # several blocks, the last ones ragged
    dict(tokens=32, tokens2=16, norms=False, scale=0.7),  # whole blocks
    dict(tokens=7, tokens2=37, width=20, eps=1e-2),  # a width that is no power of two
    dict(tokens=35, tokens2=None),
    dict(tokens=33, tokens2=None, norms=False),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_fp64(case, dtype, poisoned, device):
    options = {name: case[name] for name in ("scale", "eps") if name in case}
    shape = {name: value for name, value in case.items() if name not in options}
    inputs, weights = problem(dtype, device=device, **{"width": 16, "heads": 2} | shape)
    check(run(inputs, **weights, **options), inputs, weights, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_bitwise_independent_of_mates_and_position(dtype, device):
    inputs, weights = problem(dtype, batch=3, heads=1, tokens=20, tokens2=9, width=16, device=device)

    def results(inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = segment_attention(*leaves, **weights, impl="triton")
        return *outputs, *torch.autograd.grad(sum(o.float().square().sum() for o in outputs), leaves)

    whole = results(inputs)
    for order in ([1], [2, 0]):
        part = results([x[order] for x in inputs])
        assert all(torch.equal(p, w[order]) for p, w in zip(part, whole, strict=True))


def test_strides(device):
    inputs, weights = problem(torch.bfloat16, tokens=20, tokens2=9, width=16, device=device)
    expected = run(inputs, **weights)
    packed = [torch.cat(inputs[:3], 2), torch.cat(inputs[3:], 2)]
    views = [part[:, :, start : start + 3] for part in packed for start in (0, 3, 6)]
    views[2] = inputs[2].transpose(1, 2).contiguous().transpose(1, 2)
    views[4] = inputs[4].transpose(1, 3).contiguous().transpose(1, 3)
    assert not any(x.is_contiguous() for x in views)
    mixed = {name: torch.stack([w, w], 1)[:, 0] for name, w in weights.items()}
    actual = run(inputs, **mixed)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    actual = run(views, **weights)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(o.is_contiguous() for o in actual[:2])
    leaves, grads = [x.requires_grad_() for x in inputs], []
    for transposed in (False, True):
        g = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) if transposed else x.detach() for x in actual[:2]]
        grads.append(torch.autograd.grad(segment_attention(*leaves, **weights, impl="triton"), leaves, g))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_norm_weights_of_other_dtypes(device):
    inputs, weights = problem(torch.bfloat16, tokens=5, tokens2=3, width=16, device=device)
    weights = {name: w.to(torch.float32 if "q" in name else torch.float16) for name, w in weights.items()}
    check(run(inputs, **weights), inputs, weights)


def test_one_output_may_be_left_unused(device):
    inputs, weights = problem(torch.float32, tokens=20, tokens2=9, width=16, device=device)
    leaves, doubles = [x.requires_grad_() for x in inputs], [x.detach().double().requires_grad_() for x in inputs]
    for which in (0, 1):
        out = segment_attention(*leaves, **weights, impl="triton")[which]
        exact = plain(*doubles, **{name: w.double() for name, w in weights.items()})[which]
        grads = [torch.autograd.grad(o.square().sum(), x) for o, x in ((out, leaves), (exact, doubles))]
        assert all(relative_error(a, e) < 1e-5 for a, e in zip(*grads, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim, device):
    inputs, weights = problem(torch.bfloat16, batch=3, tokens=3, tokens2=3, heads=3, width=16, device=device)
    expected = run(inputs, **weights)
    memory = torch.empty(2**31 + 8192, dtype=torch.bfloat16, device=device)  # on a CPU only what is touched exists
    far = []
    for i, x in enumerate(inputs):
        strides = list(x.stride())
        strides[dim] = 2**30 + 16
        far.append(memory.as_strided(x.shape, strides, 1024 * i).copy_(x))
    assert all(torch.equal(a, e) for a, e in zip(run(far, **weights), expected, strict=True))


def test_empty(poisoned, device):
    for case in ({"batch": 0}, {"tokens": 0, "tokens2": 0}, {"tokens": 0, "tokens2": None}):
        inputs, weights = problem(torch.float32, device=device, **case)
        assert all(x.numel() == 0 for x in run(inputs, **weights))
    for case in ({"tokens": 0}, {"tokens2": 0}):
        inputs, weights = problem(torch.float32, device=device, **case)
        check(run(inputs, **weights), inputs, weights)


def test_large_scores_and_nan(device):
    inputs, weights = problem(torch.float32, tokens=20, tokens2=9, norms=False, width=16, device=device)
    inputs[0] *= 100
    check(run(inputs), inputs, weights, times=8)  # a log-sum-exp of 1,000 in one fp32 number has fewer digits
    inputs[4][1, 3, 2, 0] = torch.nan  # one key of head 2: every query of that head in that sample
    for out in segment_attention(*inputs, impl="triton"):
        seen = torch.zeros(out.shape, dtype=torch.bool, device=device)
        seen[1, :, 32:48] = True
        assert torch.equal(out.isnan(), seen)


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's products")
def test_products(monkeypatch):
    """Two a pair of blocks forward, seven backward, and the tail of a segment is one block."""
    (inputs, weights), products = problem(torch.float32, batch=1, heads=1, tokens=70, tokens2=20, width=16), []
    monkeypatch.setattr(_attention, "dot", lambda a, b, c, dot=_attention.dot: products.append(1) or dot(a, b, c))
    leaves = [x.requires_grad_() for x in inputs]
    outputs = segment_attention(*leaves, **weights, impl="triton")
    plan = _attention.plan_for(inputs[0], 16)

    def pairs(tile):
        return sum(-(-n // tile.rows) for n in (70, 20)) * sum(-(-n // tile.columns) for n in (70, 20))

    assert len(products) == 2 * pairs(plan.forward)
    products.clear()
    sum(o.sum() for o in outputs).backward()
    assert len(products) == 3 * pairs(plan.queries) + 4 * pairs(plan.keys)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_of_sd35(dtype, device):
    """1024² pixels and 333 text tokens, heads of 64: against fp64, repeatable, without synchronisation."""
    inputs, weights = problem(dtype, batch=2, tokens=4096, tokens2=333, heads=4, width=64, device=device)
    expected = run(inputs, **weights)
    check(expected, inputs, weights)
    leaves, g = [x.requires_grad_() for x in inputs], [torch.randn_like(o) for o in expected[:2]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [
            torch.autograd.grad(segment_attention(*leaves, **weights, impl="triton"), leaves, g) for _ in range(10)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_impl(device):
    inputs, weights = problem(device=device)
    with pytest.raises(RuntimeError, match="does not support fp64"):
        run(inputs, **weights)
    wide, _ = problem(torch.float32, tokens=1, tokens2=1, width=130, norms=False, device=device)
    with pytest.raises(RuntimeError, match=r"torch\.float32 heads of more than 64 channels"):
        run(wide)
    assert torch.equal(segment_attention(*wide)[0], reference.segment_attention(*wide)[0])
    inputs, weights = problem(torch.float32, device=device)
    weights["k2_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="does not support gradients of the norms' weights"):
        run(inputs, **weights)
    out = segment_attention(*inputs, **weights)[1]
    assert torch.autograd.grad(out.sum(), weights["k2_weight"])[0].abs().sum() > 0
    with torch.no_grad():
        segment_attention(*inputs, **weights, impl="triton")


def test_compiles_for_all_numbers(device):
    inputs, weights = problem(torch.float32, batch=1, heads=1, tokens=3, tokens2=2, device=device)
    inputs[0].requires_grad_()

    def loss(number):
        outputs = segment_attention(*inputs, **weights, scale=number, eps=number / 10, impl="triton")
        return sum(o.square().sum() for o in outputs)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(10):  # the ninth recompilation would raise
        results = [(y, *torch.autograd.grad(y, inputs[0])) for y in (compiled(0.1 + i / 7), loss(0.1 + i / 7))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [{}, {"tokens2": None, "norms": False}])
def test_opcheck(case, device, monkeypatch):
    calls = []
    for name in ("_forward", "_backward"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, op=op: calls.append((op, args)) or op(*args))
    shape = dict(batch=1, heads=1, tokens=3, tokens2=2) | case
    inputs, weights = problem(torch.float32, device=device, **shape)
    run(inputs, **weights)
    for op, arguments in calls:
        first = op is calls[0][0]
        arguments = [x.detach().requires_grad_(first and x.dim() == 4) if isinstance(x, torch.Tensor) else x
                     for x in arguments]  # fmt: skip
        torch.library.opcheck(op, arguments, **({} if first else {"test_utils": ("test_schema", "test_faketensor")}))


@given(
    batch=st.integers(0, 2), tokens=st.integers(0, 40), tokens2=st.none() | st.integers(0, 40), heads=st.integers(1, 2),
    width=st.integers(1, 20), norms=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fuzz(impl, batch, tokens, tokens2, heads, width, norms, dtype):
    device = "cuda" if ON_GPU else "cpu"
    inputs, weights = problem(dtype, batch, tokens, tokens2, heads, width, norms, device)
    actual = values_and_gradients(segment_attention, inputs, impl=impl, **weights)
    exact = {name: w.double() for name, w in weights.items()}
    truth = values_and_gradients(plain, [x.double() for x in inputs], **exact)
    theirs = values_and_gradients(plain, inputs, **weights)
    eps = torch.finfo(dtype).eps
    for a, p, t in zip(actual, theirs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - t).norm() <= 2 * (p.double() - t).norm() + 3 * eps * t.norm() + 4 * eps


def segment(tokens, dtype, width, heads=38):
    """q, k, v as slices of one packed projection."""
    packed = torch.zeros(2, tokens, 3 * heads * width, dtype=dtype, requires_grad=True)
    return [x.unflatten(-1, (heads, width)) for x in packed.chunk(3, -1)]


def calls():
    """Every kernel variant, on CPU tensors."""
    for dtype, width, two, norms in (
        (torch.bfloat16, 64, True, True), (torch.bfloat16, 64, True, False), (torch.bfloat16, 64, False, True),
        (torch.bfloat16, 64, False, False), (torch.float16, 64, True, True), (torch.bfloat16, 128, True, True),
        (torch.float32, 64, True, True),
    ):  # fmt: skip

        def call(dtype=dtype, width=width, two=two, norms=norms):
            inputs = segment(4096, dtype, width) + (segment(333, dtype, width) if two else [])
            weights = {name: torch.ones(width, dtype=dtype) for name in NAMES[: 2 + 2 * two] if norms}
            outputs = segment_attention(*inputs, **weights, impl="triton")
            (outputs[0].sum() + outputs[1].sum() if two else outputs.sum()).backward()

        yield f"{dtype} width {width} two {two} norms {norms}", call


def numbers():
    for tokens, tokens2, scale, eps in ((4096, 333, None, 1e-6), (1024, 77, 0.2, 1e-5), (1357, 512, 0.3, 1e-3)):

        def call(tokens=tokens, tokens2=tokens2, scale=scale, eps=eps):
            weights = {name: torch.ones(64, dtype=torch.bfloat16) for name in NAMES}
            inputs = [*segment(tokens, torch.bfloat16, 64), *segment(tokens2, torch.bfloat16, 64)]
            outputs = segment_attention(*inputs, **weights, scale=scale, eps=eps, impl="triton")
            (outputs[0].sum() + outputs[1].sum()).backward()

        yield call
