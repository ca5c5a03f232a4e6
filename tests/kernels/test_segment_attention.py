import pytest
import torch
from measures import relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from uae_kernels import reference, segment_attention

NAMES = "q_weight", "k_weight", "q2_weight", "k2_weight"


def problem(dtype=torch.float64, batch=2, tokens=11, tokens2=5, heads=3, width=6, norms=True, device="cpu"):
    """q, k, v, q2, k2, v2 (no second segment: None tokens) and the norms' weights by name."""
    generator = torch.Generator().manual_seed(tokens + 100 * (tokens2 or 0) + width)
    counts = [tokens] * 3 + ([] if tokens2 is None else [tokens2] * 3)
    inputs = [torch.randn(batch, n, heads, width, generator=generator).to(device, dtype) for n in counts]
    names = NAMES[: 2 if tokens2 is None else 4] if norms else ()
    weights = {name: (torch.rand(width, generator=generator) + 0.5).to(device, dtype) for name in names}
    return inputs, weights


def plain(*inputs, eps=1e-6, scale=None, **weights):
    """The formula written out: norms, joined segments, torch's plainest attention, segments apart again."""

    def norm(x, weight):
        root = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x if weight is None else (x / root * weight).to(x.dtype)

    segments = [inputs[:3], inputs[3:]] if len(inputs) > 3 else [inputs]
    q, k, v = (
        torch.cat(
            [norm(s[i], weights.get(f"{'qkv'[i]}{n}_weight")) for n, s in zip(("", "2"), segments, strict=False)], 1
        )
        for i in range(3)
    )
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    out = out.transpose(1, 2).flatten(2).split([s[0].shape[1] for s in segments], 1)
    return out if len(segments) == 2 else out[0]


def values_and_gradients(function, inputs, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    g = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]
    return *outputs, *torch.autograd.grad(outputs, inputs, g)


@pytest.mark.parametrize("module", [segment_attention, reference.segment_attention])
@pytest.mark.parametrize("case", [{}, {"norms": False}, {"tokens2": None}, {"tokens2": 0}, {"tokens": 1, "tokens2": 1}])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "eps": 1e-2}])
def test_equals_the_formula(module, case, options):
    inputs, weights = problem(**case)
    actual = values_and_gradients(module, inputs, **weights, **options)
    expected = values_and_gradients(plain, inputs, **weights, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-11, rtol=1e-11)
    assert all(x.is_contiguous() for x in actual[: len(inputs) // 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_pytorch(dtype):
    inputs, weights = problem(dtype, tokens=90, tokens2=40, width=32)
    truth = values_and_gradients(plain, [x.double() for x in inputs], **{k: w.double() for k, w in weights.items()})
    rounded = values_and_gradients(plain, inputs, **weights)
    for a, p, t in zip(values_and_gradients(segment_attention, inputs, **weights), rounded, truth, strict=True):
        assert a.dtype == dtype and relative_error(a, t) <= 2 * relative_error(p, t) + 1e-7


def test_weights_learn_through_pytorch():
    inputs, weights = problem(width=4, tokens=3, tokens2=2, heads=1, batch=1)
    leaves = [x.requires_grad_() for x in [*inputs, *weights.values()]]
    assert torch.autograd.gradcheck(
        lambda *x: segment_attention(*x[:6], **dict(zip(NAMES, x[6:], strict=True))), leaves
    )


def test_order_of_segments_does_not_matter():
    inputs, weights = problem()
    swapped = {name.replace("_", "2_") if "2" not in name else name.replace("2", ""): w for name, w in weights.items()}
    a, b = segment_attention(*inputs, **weights)
    b2, a2 = segment_attention(*inputs[3:], *inputs[:3], **swapped)
    torch.testing.assert_close((a, b), (a2, b2), atol=1e-12, rtol=1e-12)


def test_errors():
    inputs, weights = problem()
    q, k, v, *second = inputs
    with pytest.raises(ValueError, match="a second segment needs q2, k2 and v2"):
        segment_attention(q, k, v, second[0], second[1])
    with pytest.raises(ValueError, match="a second segment needs"):
        segment_attention(q, k, v, **weights)
    with pytest.raises(ValueError, match=r"v2 must be \(B, N, H, D\) like the others, got \(2, 4, 3, 6\)"):
        segment_attention(q, k, v, second[0], second[1], second[2][:, :4])
    with pytest.raises(ValueError, match="k must be"):
        segment_attention(q, k[:, :, :2], v)
    with pytest.raises(TypeError, match=r"k2 must be fp64, fp32, bf16 or fp16 like the others, got torch\.float32"):
        segment_attention(q, k, v, second[0], second[1].float(), second[2])
    with pytest.raises(TypeError, match="q must be"):
        segment_attention(*(x.long() for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"k_weight must be \(6,\) floats"):
        segment_attention(q, k, v, q_weight=weights["q_weight"], k_weight=weights["k_weight"][:3])
    with pytest.raises(ValueError, match="for all of q, k, q2 and k2, or for none"):
        segment_attention(*inputs, **{"q_weight": weights["q_weight"]})
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        segment_attention(q, k, v, scale=-1)
