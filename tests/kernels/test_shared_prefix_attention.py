import importlib

import pytest
import torch
from measures import relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from uae_kernels import reference, shared_prefix_attention

module = importlib.import_module("uae_kernels.shared_prefix_attention")
B, G, T, P = 2, 3, 9, 7
LENGTHS, PREFIX_LENGTHS = [9, 5, 0, 1, 9, 8], [7, 4]


def problem(dtype=torch.float64, batch=B, group=G, tokens=T, prefix=P, heads=4, kv_heads=2, width=6, device="cpu"):
    generator = torch.Generator().manual_seed(batch + 10 * group + 100 * tokens + 1000 * prefix + width)
    own, shared = (batch * group, tokens, kv_heads), (batch, prefix, kv_heads)
    shapes = [(batch * group, tokens, heads), own, own, shared, shared]
    return [torch.randn(*shape, width, generator=generator).to(device, dtype) for shape in shapes]


def rows_apart(q, k, v, prefix_k, prefix_v, *, group_size, lengths=None, prefix_lengths=None, scale=None):
    """Every continuation in a row of its own behind a copy of its prefix, causal, by torch's own attention."""
    rows, tokens, heads, _ = q.shape
    share, results = heads // k.shape[2], []
    for row in range(rows):
        sample = row // group_size
        length = tokens if lengths is None else int(lengths[row])
        prefix = prefix_k.shape[1] if prefix_lengths is None else int(prefix_lengths[sample])
        keys, values = (
            torch.cat([shared[sample, :prefix], own[row, :length]]).repeat_interleave(share, 1).transpose(0, 1)
            for shared, own in ((prefix_k, k), (prefix_v, v))
        )
        # The prefix stands in for its own queries: only the continuation's rows of the result are kept.
        queries = torch.cat([keys.detach()[:, :prefix], q[row, :length].transpose(0, 1)], 1)
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(queries[None], keys[None], values[None], is_causal=True, scale=scale)
        out = out[0, :, prefix:].transpose(0, 1)
        results.append(torch.cat([out, out.new_zeros(tokens - length, *out.shape[1:])]))
    return torch.stack(results)


def values_and_gradients(function, inputs, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    return out, *torch.autograd.grad(out, inputs, g)


def ragged(device="cpu", dtype=torch.int64):
    return dict(
        lengths=torch.tensor(LENGTHS, device=device, dtype=dtype),
        prefix_lengths=torch.tensor(PREFIX_LENGTHS, device=device, dtype=dtype),
    )


@pytest.fixture(params=["flash", "rows"])
def ours(request, monkeypatch):
    """`shared_prefix_attention` as a CPU runs it, and as everything does that neither a CPU nor Triton serves."""
    if request.param == "rows":
        monkeypatch.setattr(module, "GROUPED_HEADS", "99")
    return shared_prefix_attention


@pytest.fixture(params=["flash", "rows", "definition"])
def attend(request, monkeypatch):
    """`ours`, and the definition."""
    if request.param == "rows":
        monkeypatch.setattr(module, "GROUPED_HEADS", "99")
    return (reference if request.param == "definition" else module).shared_prefix_attention


CASES = [{}, {"scale": 0.7}, {"group": 1}, {"prefix": 0}, {"kv_heads": 4}, {"kv_heads": 1}, {"tokens": 1, "prefix": 1}]


@pytest.mark.parametrize("case", CASES)
def test_equals_rows_apart(attend, case):
    case = dict(case)
    options = {"scale": case.pop("scale", None), "group_size": case.get("group", G)}
    inputs = problem(**case)
    actual = values_and_gradients(attend, inputs, **options)
    expected = values_and_gradients(rows_apart, inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ragged_rows(attend, dtype):
    inputs, options = problem(), ragged(dtype=dtype) | {"group_size": G}
    expected = values_and_gradients(rows_apart, inputs, **options)
    q, k, v, prefix_k, prefix_v = inputs
    for row, length in enumerate(LENGTHS):  # what stands behind a row's end is never seen
        for x in (q, k, v):
            x[row, length:] = torch.nan
    for sample, length in enumerate(PREFIX_LENGTHS):
        prefix_k[sample, length:] = prefix_v[sample, length:] = torch.nan
    actual = values_and_gradients(attend, inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
    assert (actual[0][2] == 0).all() and (actual[4][1, 4:] == 0).all()


def test_lengths_outside_the_row_are_clipped(attend):
    inputs = problem()
    expected = values_and_gradients(attend, inputs, group_size=G)
    counts = dict(lengths=torch.full((B * G,), 99), prefix_lengths=torch.full((B,), 99))
    for a, e in zip(values_and_gradients(attend, inputs, group_size=G, **counts), expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
    alone = values_and_gradients(attend, inputs[:3] + [x[:, :0] for x in inputs[3:]], group_size=G)
    actual = values_and_gradients(attend, inputs, group_size=G, prefix_lengths=torch.full((B,), -1))
    for a, e in zip(actual[:4], alone[:4], strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
    assert all((grad == 0).all() for grad in actual[4:])
    out = attend(*inputs, group_size=G, lengths=torch.full((B * G,), -1))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_pytorch(ours, dtype):
    inputs = problem(dtype, tokens=40, prefix=60, width=32)
    truth = values_and_gradients(rows_apart, [x.double() for x in inputs], group_size=G)
    plain = values_and_gradients(rows_apart, inputs, group_size=G)
    for a, p, t in zip(values_and_gradients(ours, inputs, group_size=G), plain, truth, strict=True):
        assert a.dtype == dtype and relative_error(a, t) <= 2 * relative_error(p, t) + 1e-7


def test_gradcheck(ours):
    inputs = [x.requires_grad_() for x in problem(batch=2, group=2, tokens=2, prefix=2, heads=2, kv_heads=1, width=2)]
    options = dict(group_size=2, lengths=torch.tensor([2, 1, 0, 2]), prefix_lengths=torch.tensor([1, 2]))
    assert torch.autograd.gradcheck(lambda *x: ours(*x, **options), inputs)


def strided(q, k, v, prefix_k, prefix_v):
    """The same numbers, none of them contiguous, of 4 heads and 2 of keys."""
    packed = torch.cat([q, k, v], 2)
    views = [
        packed[:, :, :4], packed[:, :, 4:6], v.transpose(1, 2).contiguous().transpose(1, 2),
        prefix_k.transpose(1, 3).contiguous().transpose(1, 3), prefix_v.transpose(0, 1).contiguous().transpose(0, 1),
    ]  # fmt: skip
    assert not any(x.is_contiguous() for x in views)
    return views


def test_strides(ours):
    inputs = problem(torch.float32)
    expected = values_and_gradients(ours, inputs, group_size=G)
    actual = values_and_gradients(ours, strided(*inputs), group_size=G)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.is_contiguous()


def test_empty(attend):
    for case in ({"batch": 0}, {"tokens": 0}, {"tokens": 0, "prefix": 0}):
        inputs = problem(**case)
        out, *grads = values_and_gradients(attend, inputs, group_size=G)
        assert out.shape == inputs[0].shape
        assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("width", [6, 32])
def test_what_other_rows_hold_changes_no_bit(ours, width):
    inputs = problem(torch.float32, tokens=40, prefix=21, width=width)
    counts = dict(lengths=torch.tensor([40, 33, 0, 1, 40, 17]), prefix_lengths=torch.tensor([21, 9]))
    expected = values_and_gradients(ours, inputs, group_size=G, **counts)
    for x in inputs[:3]:
        x[0], x[2:] = 3.0, -x[2:]
    for x in inputs[3:]:
        x[1] = 7.0
    counts = dict(lengths=torch.tensor([2, 33, 40, 40, 0, 5]), prefix_lengths=torch.tensor([21, 1]))
    actual = values_and_gradients(ours, inputs, group_size=G, **counts)
    assert all(torch.equal(a[1], e[1]) for a, e in zip(actual[:4], expected[:4], strict=True))


def test_runs_agree_bit_for_bit(ours):
    torch.set_num_threads(2)
    inputs = problem(torch.float32, group=8, tokens=40, prefix=60, heads=8, width=32)
    runs = [values_and_gradients(ours, inputs, group_size=8) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def peak_of(call):
    """Bytes that are allocated at one time in a call, and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, kept


def test_no_more_scores_than_a_block_or_a_continuation(ours):
    """Of 32 continuations of 48 tokens; their scores together are five times as much as each bound leaves for them."""
    group, tokens, prefix, heads, kv_heads, width = 16, 48, 160, 8, 2, 16
    inputs = problem(torch.float32, 2, group, tokens, prefix, heads, kv_heads, width)
    inputs = [x.requires_grad_() for x in inputs]
    own, shared = (sum(x.nbytes for x in part) for part in (inputs[:3], inputs[3:]))
    result = inputs[0].nbytes
    numbers = result // width
    scores = 4 * heads * tokens * (prefix + tokens)  # of one continuation
    # Forward: the result of each part. Backward: gradients, of the queries twice, and the result's gradient as a copy
    bound = 2 * result + 6 * numbers + 4 * scores, 3 * result + own + 2 * shared + 4 * numbers + 4 * scores

    def step(function):
        forward, out = peak_of(lambda: function(*inputs, group_size=group))
        backward, _ = peak_of(lambda: torch.autograd.grad(out, inputs, torch.ones_like(out)))
        return forward, backward

    found = step(ours)
    assert found[0] <= bound[0] and found[1] <= bound[1], (found, bound)
    for peak, most in zip(step(reference.shared_prefix_attention), bound, strict=True):
        assert peak > 2 * most


def test_the_prefix_is_held_once(attend):
    """Saved for backward: the inputs, one prefix an image, against one a continuation where rows stand apart."""
    inputs = [x.requires_grad_() for x in problem(torch.float32, batch=1, group=8, tokens=2, prefix=300, kv_heads=4)]
    prefix = inputs[3].numel()

    def saved(function, **options):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage().data_ptr(): (x, x.untyped_storage().nbytes() // 4)}) or x,
            lambda x: x,
        ):
            function(*inputs, group_size=8, **options)
        return sum(size for _, size in sizes.values() if size >= prefix)

    scores = 8 * 2 * 302 * 4
    definition = attend is reference.shared_prefix_attention
    assert saved(attend) <= 2 * prefix + (3 * scores if definition else 0)
    assert saved(rows_apart) >= 8 * 2 * prefix


def test_errors():
    q, k, v, prefix_k, prefix_v = problem()
    rest = dict(group_size=G)
    with pytest.raises(ValueError, match="6 rows are not 2 prefixes × group_size 2"):
        shared_prefix_attention(q, k, v, prefix_k, prefix_v, group_size=2)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        shared_prefix_attention(q, k, v, prefix_k, prefix_v, group_size=0)
    with pytest.raises(ValueError, match="3 query heads do not share 2 heads"):
        shared_prefix_attention(q[:, :, :3], k, v, prefix_k, prefix_v, **rest)
    for bad in ((q, k[:, :1], v, prefix_k), (q, k, v, prefix_k[..., :3]), (q[0], k, v, prefix_k)):
        with pytest.raises(ValueError, match="expected q"):
            shared_prefix_attention(*bad, prefix_v, **rest)
    with pytest.raises(TypeError, match=r"k must be fp64, fp32, bf16 or fp16 like q, got torch\.float32"):
        shared_prefix_attention(q, k.float(), v, prefix_k, prefix_v, **rest)
    with pytest.raises(TypeError, match="q must be"):
        shared_prefix_attention(q.long(), k, v, prefix_k, prefix_v, **rest)
    with pytest.raises(TypeError, match=r"lengths must be int64 or int32, got torch\.float32"):
        shared_prefix_attention(q, k, v, prefix_k, prefix_v, lengths=torch.ones(6), **rest)
    with pytest.raises(ValueError, match=r"prefix_lengths must be \(2,\)"):
        shared_prefix_attention(q, k, v, prefix_k, prefix_v, prefix_lengths=torch.ones(6).long(), **rest)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        shared_prefix_attention(q, k, v, prefix_k, prefix_v, scale=0, **rest)
