import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED, ON_GPU, relative_error
from test_shared_prefix_attention import problem, ragged, rows_apart, strided, values_and_gradients
from uae_kernels import _attention, reference, shared_prefix_attention

module = importlib.import_module("uae_kernels.shared_prefix_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
G = 3


def run(inputs, **options):
    return values_and_gradients(shared_prefix_attention, inputs, impl="triton", **{"group_size": G} | options)


def check(actual, inputs, times=2, **options):
    """Errors against fp64 at most twice those of torch's attention on separate rows in the same dtype."""
    truth = values_and_gradients(rows_apart, [x.double() for x in inputs], **options)
    plain = values_and_gradients(rows_apart, inputs, **options)
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape
        assert relative_error(a, t) <= times * relative_error(p, t) + 2e-7


CASES = [
    dict(tokens=37, prefix=40, group=2, heads=2, kv_heads=1),  # several blocks, the last ones ragged
    dict(tokens=32, prefix=32, heads=2, kv_heads=2, scale=0.7),  # whole blocks
    dict(tokens=5, prefix=3, kv_heads=1, width=20),  # a width that is no power of two
    dict(tokens=20, prefix=0, group=1),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_fp64(case, dtype, poisoned, device):
    case = {"width": 16} | case
    options = dict(group_size=case.get("group", G), scale=case.pop("scale", None))
    inputs = problem(dtype, device=device, **case)
    check(run(inputs, **options), inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_ragged_rows(dtype, kind, poisoned, device):
    inputs = problem(dtype, tokens=40, prefix=40, heads=2, kv_heads=1, width=16, device=device)
    options = dict(
        lengths=torch.tensor([40, 17, 0, 1, 33, 16], device=device, dtype=kind),
        prefix_lengths=torch.tensor([40, 13], device=device, dtype=kind),
    )
    expected = [x.clone() for x in inputs]
    for x, lengths in zip(inputs, [options["lengths"]] * 3 + [options["prefix_lengths"]] * 2, strict=True):
        for row, length in enumerate(lengths.tolist()):
            x[row, length:] = torch.nan
    actual = run(inputs, **options)
    check(actual, expected, group_size=G, **options)
    for a, lengths in zip(actual, [options["lengths"]] * 4 + [options["prefix_lengths"]] * 2, strict=True):
        assert all((a[row, length:] == 0).all() for row, length in enumerate(lengths.tolist()))


def test_lengths_outside_the_row_are_clipped(device):
    inputs = problem(torch.float32, device=device)
    expected = run(inputs)
    lengths, prefix_lengths = (torch.full((rows,), 99, device=device) for rows in (6, 2))
    actual = run(inputs, lengths=lengths, prefix_lengths=prefix_lengths)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    out = shared_prefix_attention(*inputs, group_size=G, lengths=-lengths, impl="triton")
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_separate_rows(dtype, device):
    """Bit for bit, but for the prefix's, which are sums over the rows."""
    inputs = problem(dtype, tokens=20, prefix=18, width=16, device=device)
    shared = run(inputs)
    apart = run([*inputs[:3], *(x.repeat_interleave(G, 0) for x in inputs[3:])], group_size=1)
    assert all(torch.equal(a, b) for a, b in zip(shared[:4], apart[:4], strict=True))
    for a, b in zip(shared[4:], apart[4:], strict=True):
        total = b.double().unflatten(0, (-1, G)).sum(1)
        assert relative_error(a, total) <= (3e-7 if dtype == torch.float32 else 6e-3)


def test_a_sample_is_bitwise_independent_of_mates_position_and_padding(device):
    inputs = problem(torch.bfloat16, batch=3, tokens=20, prefix=18, heads=2, kv_heads=1, width=16, device=device)
    options = dict(
        lengths=torch.tensor([20, 9, 3, 20, 1, 0, 7, 19, 16], device=device),
        prefix_lengths=torch.tensor([18, 5, 16], device=device),
    )
    whole = run(inputs, **options)
    order = [2, 0]
    rows = [G * sample + member for sample in order for member in range(G)]
    some = [x[rows] for x in inputs[:3]] + [x[order] for x in inputs[3:]]
    part = run(some, lengths=options["lengths"][rows], prefix_lengths=options["prefix_lengths"][order])
    # The random weights of the gradients follow the shape: only results can be compared across shapes.
    assert torch.equal(part[0], whole[0][rows])
    padded = [
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, extra)) for x, extra in zip(inputs, [23] * 3 + [31] * 2, strict=True)
    ]
    assert torch.equal(run(padded, **options)[0][:, :20], whole[0])

    def gradients(inputs, **options):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = shared_prefix_attention(*leaves, group_size=G, impl="triton", **options)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    whole = gradients(inputs, **options)
    part = gradients(some, lengths=options["lengths"][rows], prefix_lengths=options["prefix_lengths"][order])
    assert all(torch.equal(p, w[rows]) for p, w in zip(part[:3], whole[:3], strict=True))
    assert all(torch.equal(p, w[order]) for p, w in zip(part[3:], whole[3:], strict=True))
    far = gradients(padded, **options)
    assert all(torch.equal(f[:, : w.shape[1]], w) for f, w in zip(far, whole, strict=True))


def test_more_continuations_than_parts_of_a_group(device):
    inputs = problem(torch.float32, batch=2, group=6, tokens=5, prefix=4, device=device)
    check(run(inputs, group_size=6), inputs, group_size=6)
    assert module.SPLITS < 6


def test_strides(device):
    inputs = problem(torch.bfloat16, tokens=20, prefix=18, width=16, device=device)
    expected, views = run(inputs), strided(*inputs)
    assert all(torch.equal(a, e) for a, e in zip(run(views), expected, strict=True))
    leaves, grads = [x.requires_grad_() for x in inputs], []
    for g in (expected[0].detach(), expected[0].detach().transpose(1, 2).contiguous().transpose(1, 2)):
        out = shared_prefix_attention(*leaves, group_size=G, impl="triton")
        grads.append(torch.autograd.grad(out, leaves, g))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    one = [x[:, :, :1].expand(-1, -1, 2, -1) for x in inputs[1:]]  # heads without memory of their own
    out = shared_prefix_attention(inputs[0], *one, group_size=G, impl="triton")
    expected = reference.shared_prefix_attention(inputs[0], *one, group_size=G)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim, device):
    shape = dict(batch=3, group=1, tokens=3, prefix=3, heads=3, kv_heads=3, width=16)
    inputs = problem(torch.bfloat16, device=device, **shape)
    expected = run(inputs, group_size=1)
    memory = torch.empty(2**31 + 8192, dtype=torch.bfloat16, device=device)  # on a CPU only what is touched exists
    far = []
    for i, x in enumerate(inputs):
        strides = list(x.stride())
        strides[dim] = 2**30 + 16
        far.append(memory.as_strided(x.shape, strides, 1024 * i).copy_(x))
    assert all(torch.equal(a, e) for a, e in zip(run(far, group_size=1), expected, strict=True))


def test_empty(poisoned, device):
    for case in ({"batch": 0}, {"tokens": 0}, {"tokens": 0, "prefix": 0}):
        inputs = problem(torch.float32, device=device, **case)
        out, *grads = run(inputs)
        assert out.shape == inputs[0].shape
        assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, inputs, strict=True))


def test_large_scores_and_nan(device):
    inputs = problem(torch.float32, tokens=20, prefix=18, device=device)
    inputs[0] *= 100
    check(run(inputs), inputs, times=8, group_size=G)  # a log-sum-exp of 1,000 in one fp32 number has fewer digits
    inputs[1][4, 7, 0, 0] = torch.nan
    out = shared_prefix_attention(*inputs, group_size=G, impl="triton")
    seen = torch.zeros(out.shape, dtype=torch.bool, device=device)
    seen[4, 7:, :2] = True
    assert torch.equal(out.isnan(), seen)


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's products")
@pytest.mark.parametrize("lengths, prefix_lengths", [(None, None), ([70, 33, 0], [20])])
def test_hidden_blocks_are_skipped(lengths, prefix_lengths, monkeypatch):
    inputs, products = problem(torch.float32, batch=1, tokens=70, prefix=36, heads=2, kv_heads=1, width=16), []
    monkeypatch.setattr(_attention, "dot", lambda a, b, c, dot=_attention.dot: products.append(1) or dot(a, b, c))
    leaves = [x.requires_grad_() for x in inputs]
    given = [None if x is None else torch.tensor(x) for x in (lengths, prefix_lengths)]
    out = shared_prefix_attention(*leaves, group_size=G, lengths=given[0], prefix_lengths=given[1], impl="triton")
    plan, count, share = _attention.plan_for(inputs[0], 16), len(products), 2
    lengths, prefix = lengths or [70] * G, (prefix_lengths or [36])[0]

    def seen(tile):  # pairs of blocks with a query that sees a key
        total = 0
        for length in lengths:
            for first in range(0, length * share, tile.rows):
                last = min((first + tile.rows - 1) // share, length - 1)
                total += -(-prefix // tile.columns) + -(-(last + 1) // tile.columns)
        return total

    assert count == 2 * seen(plan.forward)
    products.clear()
    out.sum().backward()
    own, tile = 0, plan.keys
    for length in lengths:
        for first in range(0, length, tile.columns):
            own += -(-length * share // tile.rows) - first * share // tile.rows
    shared = sum(-(-length * share // tile.rows) for length in lengths) * -(-prefix // tile.columns)
    assert len(products) == 3 * seen(plan.queries) + 4 * (own + shared)


@pytest.mark.gpu
def test_repeatable_without_synchronisation(device):
    inputs = problem(torch.bfloat16, batch=4, group=8, tokens=300, prefix=384, heads=16, width=128, device=device)
    lengths = torch.randint(1, 301, (32,), device=device)
    expected = run(inputs, group_size=8, lengths=lengths)
    leaves, weight = [x.requires_grad_() for x in inputs], torch.randn_like(expected[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [
            torch.autograd.grad(
                shared_prefix_attention(*leaves, group_size=8, lengths=lengths, impl="triton"), leaves, weight
            )
            for _ in range(10)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    check(expected, inputs, group_size=8, lengths=lengths)


def test_impl(device):
    inputs = problem(device=device)
    with pytest.raises(RuntimeError, match="does not support fp64"):
        run(inputs)
    wide = problem(torch.float32, tokens=1, prefix=1, width=130, device=device)
    with pytest.raises(RuntimeError, match=r"torch\.float32 heads of more than 64 channels"):
        run(wide)
    for given_ in (inputs, wide):
        out = shared_prefix_attention(*given_, group_size=G)
        assert torch.equal(out, shared_prefix_attention(*given_, group_size=G, impl="torch"))
        torch.testing.assert_close(out, reference.shared_prefix_attention(*given_, group_size=G))


def test_compiles_for_all_scales(device):
    q, *rest = problem(torch.float32, batch=1, group=1, tokens=3, prefix=2, heads=1, kv_heads=1, device=device)
    q.requires_grad_()

    def loss(scale):
        return shared_prefix_attention(q, *rest, group_size=1, scale=scale, impl="triton").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(10):  # the ninth recompilation would raise
        results = [(y, *torch.autograd.grad(y, q)) for y in (compiled(0.1 + i / 7), loss(0.1 + i / 7))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck(device, monkeypatch):
    calls = []
    for name in ("_forward", "_backward"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, op=op: calls.append((op, args)) or op(*args))
    shape = dict(batch=1, group=2, tokens=2, prefix=2, heads=1, kv_heads=1)
    run(problem(torch.float32, device=device, **shape), group_size=2)
    run(problem(torch.float32, device=device, heads=2, kv_heads=1), **ragged(device))
    for op, arguments in calls[:2] + calls[2:3]:
        first = op is calls[0][0]
        arguments = [x.detach().requires_grad_(first and x.dim() == 4) if isinstance(x, torch.Tensor) else x
                     for x in arguments]  # fmt: skip
        torch.library.opcheck(op, arguments, **({} if first else {"test_utils": ("test_schema", "test_faketensor")}))


@given(
    batch=st.integers(0, 2), group=st.integers(1, 5), tokens=st.integers(0, 24), prefix=st.integers(0, 24),
    kv_heads=st.integers(1, 2), share=st.integers(1, 3), width=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
    data=st.data(),
)  # fmt: skip
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fuzz(impl, batch, group, tokens, prefix, kv_heads, share, width, dtype, data):
    device = "cuda" if ON_GPU else "cpu"
    inputs = problem(dtype, batch, group, tokens, prefix, kv_heads * share, kv_heads, width, device)
    options = dict(group_size=group)
    for name, count, limit in (("lengths", batch * group, tokens), ("prefix_lengths", batch, prefix)):
        if data.draw(st.booleans()):
            drawn = data.draw(st.lists(st.integers(0, limit), min_size=count, max_size=count))
            options[name] = torch.tensor(drawn, dtype=torch.int64, device=device)
    actual = values_and_gradients(shared_prefix_attention, inputs, impl=impl, **options)
    exact = [x.double() for x in inputs]
    truth = values_and_gradients(reference.shared_prefix_attention, exact, **options)
    plain = values_and_gradients(reference.shared_prefix_attention, inputs, **options)
    eps = torch.finfo(dtype).eps
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - t).norm() <= 2 * (p.double() - t).norm() + 3 * eps * t.norm() + 4 * eps


def calls():
    """Every kernel variant, on CPU tensors."""
    for dtype, width, lengths in (
        (torch.bfloat16, 128, True), (torch.bfloat16, 128, False), (torch.bfloat16, 64, True),
        (torch.bfloat16, 80, True), (torch.float16, 128, True), (torch.float32, 64, True),
    ):  # fmt: skip

        def call(dtype=dtype, width=width, lengths=lengths):
            shapes = [(8, 300, 16)] + [(8, 300, 2)] * 2 + [(2, 384, 2)] * 2
            inputs = [torch.zeros(*shape, width, dtype=dtype, requires_grad=True) for shape in shapes]
            counts = dict(lengths=torch.zeros(8).long(), prefix_lengths=torch.zeros(2).long()) if lengths else {}
            shared_prefix_attention(*inputs, group_size=4, impl="triton", **counts).sum().backward()

        yield f"{dtype} width {width} lengths {lengths}", call


def numbers():
    for batch, group, tokens, prefix, scale in ((1, 8, 300, 384, 0.1), (2, 8, 1, 17, 0.2), (3, 4, 512, 1429, None)):

        def call(batch=batch, group=group, tokens=tokens, prefix=prefix, scale=scale):
            shapes = [(batch * group, tokens, 16)] + [(batch * group, tokens, 2)] * 2 + [(batch, prefix, 2)] * 2
            inputs = [torch.zeros(*shape, 128, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
            lengths = torch.full((batch * group,), tokens)
            out = shared_prefix_attention(*inputs, group_size=group, lengths=lengths, scale=scale, impl="triton")
            out.sum().backward()

        yield call
