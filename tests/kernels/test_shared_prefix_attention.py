import pytest
import torch
from measures import relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from uae_kernels import reference, shared_prefix_attention

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


CASES = [{}, {"scale": 0.7}, {"group": 1}, {"prefix": 0}, {"kv_heads": 4}, {"kv_heads": 1}, {"tokens": 1, "prefix": 1}]


@pytest.mark.parametrize("module", [shared_prefix_attention, reference.shared_prefix_attention])
@pytest.mark.parametrize("case", CASES)
def test_equals_rows_apart(module, case):
    case = dict(case)
    options = {"scale": case.pop("scale", None), "group_size": case.get("group", G)}
    inputs = problem(**case)
    actual = values_and_gradients(module, inputs, **options)
    expected = values_and_gradients(rows_apart, inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("module", [shared_prefix_attention, reference.shared_prefix_attention])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ragged_rows(module, dtype):
    inputs, options = problem(), ragged(dtype=dtype) | {"group_size": G}
    expected = values_and_gradients(rows_apart, inputs, **options)
    q, k, v, prefix_k, prefix_v = inputs
    for row, length in enumerate(LENGTHS):  # what stands behind a row's end is never seen
        for x in (q, k, v):
            x[row, length:] = torch.nan
    for sample, length in enumerate(PREFIX_LENGTHS):
        prefix_k[sample, length:] = prefix_v[sample, length:] = torch.nan
    actual = values_and_gradients(module, inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
    assert (actual[0][2] == 0).all() and (actual[4][1, 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_pytorch(dtype):
    inputs = problem(dtype, tokens=40, prefix=60, width=32)
    truth = values_and_gradients(rows_apart, [x.double() for x in inputs], group_size=G)
    plain = values_and_gradients(rows_apart, inputs, group_size=G)
    for a, p, t in zip(values_and_gradients(shared_prefix_attention, inputs, group_size=G), plain, truth, strict=True):
        assert a.dtype == dtype and relative_error(a, t) <= 2 * relative_error(p, t) + 1e-7


def test_gradcheck():
    inputs = [x.requires_grad_() for x in problem(batch=1, group=2, tokens=2, prefix=2, heads=2, kv_heads=1, width=2)]
    options = dict(group_size=2, lengths=torch.tensor([2, 1]), prefix_lengths=torch.tensor([1]))
    assert torch.autograd.gradcheck(lambda *x: shared_prefix_attention(*x, **options), inputs)


def test_empty():
    for case in ({"batch": 0}, {"tokens": 0}, {"tokens": 0, "prefix": 0}):
        inputs = problem(**case)
        out, *grads = values_and_gradients(shared_prefix_attention, inputs, group_size=G)
        assert out.shape == inputs[0].shape
        assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, inputs, strict=True))


def test_rows_of_other_lengths_change_no_bit():
    inputs = problem(torch.float32)
    lengths = torch.tensor([9, 5, 3, 1, 9, 8])
    expected = shared_prefix_attention(*inputs, group_size=G, lengths=lengths)
    for x in inputs[:3]:
        x[0], x[5] = 3.0, -x[5]
    lengths[0] = 2
    assert torch.equal(shared_prefix_attention(*inputs, group_size=G, lengths=lengths)[1:5], expected[1:5])


def test_the_prefix_is_held_once():
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
    assert saved(reference.shared_prefix_attention) <= 2 * prefix + 3 * scores
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
