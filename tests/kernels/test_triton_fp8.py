"""Rows of e4m3 numbers from the Triton kernels: alone, after GELU, and out of gates, residuals and norms."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import ON_GPU, needs_fp8
from streams import DTYPES, leaves, mapped
from test_triton_gated_residual import stream
from uae_kernels.mmdit import Quantized, gated_residual, quantize_rows
from uae_kernels.reference import mmdit as definitions

pytestmark = needs_fp8
FORMS = ("plain", "fp8", "both")


def bits(x):
    return x.view(torch.uint8)


def codes(values):
    """e4m3 numbers counted from the smallest to the largest: neighbours differ by 1."""
    code = bits(values).int()
    return torch.where(code < 128, code, 128 - code)


def steps(a, b):
    """How far apart two tensors of e4m3 numbers are, in numbers."""
    return (codes(a) - codes(b)).abs()


def assert_close(actual, exact):
    """Scales to an ulp of fp32's sums; a value may be a neighbour where the exact one lies next to a tie."""
    torch.testing.assert_close(actual.scales, exact.scales.float(), rtol=1e-5, atol=0)
    apart = steps(actual.values, exact.values)
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
def test_bitwise_the_definition(dtype, static, poisoned, device):
    x = (torch.randn(3, 5, 72) * torch.logspace(-6, 3, 15).view(3, 5, 1)).to(device, dtype)
    scale = torch.tensor([0.01, 1.0, 300.0], device=device) if static else None
    for rows in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[..., ::2], x[:, 1:4, 8:40]):
        actual, expected = (
            quantize_rows(rows, scale=scale, impl=impl) if impl else definitions.quantize_rows(rows, scale=scale)
            for impl in ("triton", None)
        )
        assert actual.values.dtype == torch.float8_e4m3fn and actual.scales.dtype == torch.float32
        assert torch.equal(bits(actual.values), bits(expected.values)) and torch.equal(actual.scales, expected.scales)
    flat = quantize_rows(x[1], scale=None if scale is None else scale[1], impl="triton")
    whole = quantize_rows(x, scale=scale, impl="triton")
    assert torch.equal(bits(flat.values), bits(whole.values[1])) and torch.equal(flat.scales, whole.scales[1])


@pytest.mark.parametrize("static", [False, True])
def test_after_gelu(static, device):
    x = 4 * torch.randn(2, 7, 50, device=device)
    scale = torch.tensor([0.02, 0.3], device=device) if static else None
    actual = quantize_rows(x, scale=scale, gelu=True, impl="triton")
    exact = quantize_rows(torch.nn.functional.gelu(x.double(), approximate="tanh"), scale=scale)
    assert_close(actual, exact)
    assert_close(definitions.quantize_rows(x, scale=scale, gelu=True), exact)


EDGES = [0.0, -0.0, 1e-3, -1e-3, 2**-9, 2**-10, 1.5 * 2**-10, 17, 19, -25, 448, -448, 463.9, -470, 1e9, 2**-6 * 0.97]


def test_every_rounding(device):
    """Ties to even, subnormals, −0, and the largest number for what is larger; at a scale of 1."""
    x = torch.tensor([EDGES], device=device)
    one = torch.ones((), device=device)
    expected = [0, -0.0, 2**-9, -(2**-9), 2**-9, 0, 2**-9, 16, 20, -24, 448, -448, 448, -448, 448, 2**-6]
    for impl in ("triton", "torch"):
        made = quantize_rows(x, scale=one, impl=impl)
        assert torch.equal(bits(made.values[0]), bits(torch.tensor(expected, device=device).to(torch.float8_e4m3fn)))
        assert (made.scales == 1).all()
    every = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()[None]
    inside = every.abs() <= 448
    halves = torch.where(inside, every * 1.03125, 0.0)
    for rows in (torch.where(inside, every, 0.0), halves):
        triton, plain = (quantize_rows(rows, scale=one, impl=impl) for impl in ("triton", "torch"))
        assert torch.equal(bits(triton.values), bits(plain.values))


def test_rows_of_zeros_and_tiny_ones(device):
    x = torch.zeros(4, 32, device=device)
    x[1, 3], x[2, 5] = -0.0, 1e-40
    x[3] = 1e-30
    made = quantize_rows(x, impl="triton")
    assert made.scales[:3].flatten().tolist() == [2.0**-126] * 3 and made.values[:2].float().abs().max() == 0
    assert (made.values[3].float() == 448).all() and made.scales[3] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad, device):
    x = torch.randn(3, 20, device=device)
    x[1, 7] = bad
    for impl in ("triton", "torch"):
        product = quantize_rows(x, impl=impl)
        rows = product.values.float() * product.scales
        assert not rows[1].isfinite().all() and rows[[0, 2]].isfinite().all()
    still = quantize_rows(torch.full((1, 20), float("nan"), device=device), scale=torch.ones((), device=device))
    assert still.values.float().isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulations, branches", [(1, 0), (2, 1), (1, 2), (2, 2)])
def test_out_of_gates_and_norms(modulations, branches, dtype, poisoned, device):
    streams = [
        stream(5, 24, modulations, branches, dtype, device=device),
        stream(3, 24, 1, min(branches, 1), dtype, device=device),
    ]
    plain = gated_residual(*streams, impl="triton")
    for first in FORMS:
        forms = (first, "both")[:modulations]
        wanted = [streams[0]._replace(forms=forms), streams[1]._replace(forms=("fp8",))]
        actual = gated_residual(*wanted, impl="triton")
        # Of the rounded sum, as the op's own definition of a normal has it
        wide = [mapped(Stream_of(s, a), torch.Tensor.double) for s, a in zip(wanted, actual, strict=True)]
        exact = definitions.gated_residual(*wide)
        for a, e, p, s in zip(actual, exact, plain, wanted, strict=True):
            assert torch.equal(a.x, p.x)
            for mine, truth, normal, form in zip(a.normalized, e.normalized, p.normalized, s.forms, strict=True):
                if form == "plain":
                    assert torch.equal(mine, normal)
                    continue
                assert isinstance(mine, Quantized) and (mine.plain is None) == (form == "fp8")
                assert mine.plain is None or torch.equal(mine.plain, normal)
                assert mine.scales.shape == (*normal.shape[:2], 1)
                assert_close(mine, truth)


def Stream_of(s, made):
    """What the norm sees of a stream: the sum, without branches."""
    return s._replace(x=made.x, branches=())


def test_scales_are_the_largest_over_448(device):
    s = stream(6, 40, 1, 0, torch.float32, device=device)._replace(forms=("both",))
    (made,) = gated_residual(s, impl="triton")
    normal = made.normalized[0]
    largest = normal.plain.abs().amax(-1, keepdim=True)
    assert torch.equal(normal.scales, largest / torch.full_like(largest, 448))  # see the definition
    assert (normal.values.float().abs().amax(-1) == 448).all()
    alone = quantize_rows(normal.plain, impl="triton")
    assert torch.equal(bits(alone.values), bits(normal.values)) and torch.equal(alone.scales, normal.scales)


def test_a_row_is_bitwise_the_same_anywhere(device):
    s = stream(7, 40, 2, 2, torch.bfloat16, batch=5, device=device)._replace(forms=("fp8", "both"))
    whole = leaves(gated_residual(s, impl="triton"))
    for rows in ([3], [4, 1], [2, 0, 4, 3, 1]):
        some = mapped(s, lambda x, rows=rows: x[rows] if len(x) == 5 else x)
        for a, w in zip(leaves(gated_residual(some, impl="triton")), whole, strict=True):
            assert torch.equal(a.float(), w[rows].float())


def test_what_is_refused(device):
    x = torch.randn(2, 3, 16, device=device)
    with pytest.raises(RuntimeError, match="no gradient"):
        quantize_rows(x.clone().requires_grad_(), impl="triton")
    s = stream(3, 16, 1, 1, torch.float32, device=device)._replace(forms=("fp8",))
    with pytest.raises(RuntimeError, match="no gradient"):
        gated_residual(mapped(s, lambda t: t.detach().clone().requires_grad_()), impl="triton")
    with torch.no_grad():
        gated_residual(mapped(s, lambda t: t.detach().clone().requires_grad_()), impl="triton")
    with pytest.raises(ValueError, match="plain, fp8, both; got 'int8'"):
        gated_residual(s._replace(forms=("int8",)))
    with pytest.raises(ValueError, match="1 modulations, but forms"):
        gated_residual(s._replace(forms=("fp8", "fp8")))
    with pytest.raises(ValueError, match=r"scale must be \(\) or \(2,\)"):
        quantize_rows(x, scale=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="x must be floats"):
        quantize_rows(x[0, 0])


def test_opcheck_and_compile(device):
    x = torch.randn(2, 3, 16, device=device)
    for scale in (None, torch.ones(2, device=device)):
        torch.library.opcheck(torch.ops.uae_kernels.quantize_rows.default, (x, scale, True))
    s = stream(3, 16, 2, 1, torch.float32, device=device)._replace(forms=("both", "fp8"))
    torch._dynamo.reset()

    def call(x, s):
        x_, (normal, other) = gated_residual(s, impl="triton")[0]
        made = quantize_rows(x + x_, gelu=True, impl="triton")
        return made.values.float() * made.scales + normal.plain + other.values.float()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, s), call(x, s))


@given(
    width=st.integers(1, 90), tokens=st.integers(1, 4), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from(DTYPES), static=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fuzz(width, tokens, size, dtype, static, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, tokens, width, generator=generator) * size).to(dtype).to("cuda" if ON_GPU else "cpu")
    scale = torch.tensor([0.5, 4.0], device=x.device) if static else None
    if not x.isfinite().all():
        return
    actual, expected = quantize_rows(x, scale=scale, impl="triton"), definitions.quantize_rows(x, scale=scale)
    assert torch.equal(bits(actual.values), bits(expected.values)) and torch.equal(actual.scales, expected.scales)


def calls():
    """SD3.5-large's and -medium's widths: normals, attention's outputs as they lie, and what GELU is taken of."""
    for dtype, width in ((torch.float32, 2432), (torch.bfloat16, 2432), (torch.float16, 2432), (torch.bfloat16, 1536)):
        for modulations, branches in ((1, 0), (2, 0), (1, 1), (2, 1), (1, 2)):
            for form in ("fp8", "both"):
                pair = [
                    stream(64, width, modulations, branches, dtype)._replace(forms=(form,) * modulations),
                    stream(32, width, 1, min(branches, 1), dtype)._replace(forms=(form,)),
                ]
                yield f"{dtype} {width} {modulations}/{branches} {form}", partial(drawn, gated_residual, *pair)
        joint = torch.empty(2, 96, width, dtype=dtype)
        for scale in (None, torch.ones(2)):
            given = {"scale": scale, "impl": "triton"}
            yield f"{dtype} {width} attention", partial(quantize_rows, joint[:, :64], **given)
            yield (
                f"{dtype} {width} gelu",
                partial(quantize_rows, torch.empty(2, 64, 4 * width, dtype=dtype), gelu=True, **given),
            )


def drawn(op, *streams):
    with torch.no_grad():
        return op(*streams, impl="triton")


def numbers():
    for batch, tokens in ((1, 1), (2, 64), (3, 17), (16, 33), (1, 1024)):
        s = stream(tokens, 256, 1, 1, torch.bfloat16, batch=batch)._replace(forms=("fp8",))
        yield partial(drawn, gated_residual, s)
        yield partial(quantize_rows, s.x, scale=torch.ones(batch), impl="triton")
