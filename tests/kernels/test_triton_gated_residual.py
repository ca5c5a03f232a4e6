"""Gates, residuals, norms and modulations as a Triton kernel, against the definition in fp64."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import ON_GPU
from streams import DTYPES, compare, leaves, mapped, opcheck, run, same_anywhere
from uae_kernels.mmdit import Stream, gated_residual, layer_norm_modulate
from uae_kernels.reference import mmdit as definitions

CASES = [(1, 0), (2, 0), (1, 1), (2, 2), (0, 1), (2, 1), (1, 2)]  # modulations, branches


def stream(tokens, width, modulations, branches, dtype, *, batch=2, biased=True, shared=False, device="cpu"):
    """Modulations and gates are slices of one row (B, ·), as an adaLN layer gives them; `shared` expands one row."""
    rows = torch.randn(1 if shared else batch, 6 * width).to(device, dtype).expand(batch, -1).chunk(6, 1)
    wide = [torch.randn(batch, tokens, width).to(device, dtype) for _ in range(1 + branches)]
    biases = [torch.randn(width).to(device, dtype) if biased else None for _ in range(branches)]
    return Stream(
        wide[0],
        tuple((rows[2 * i], rows[2 * i + 1]) for i in range(modulations)),
        tuple((wide[1 + i], rows[4 + i], biases[i]) for i in range(branches)),
    )


def x_and_ys(s):
    return [s.x, *(y for y, _, _ in s.branches)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulations, branches", CASES)
def test_close_to_fp64(modulations, branches, dtype, poisoned, device):
    for shared in (False, True):
        streams = [
            stream(5, 24, modulations, branches, dtype, shared=shared, device=device),
            stream(3, 24, 1, min(branches, 1), dtype, biased=False, shared=not shared, device=device),
        ]
        compare(gated_residual, definitions.gated_residual, streams, x_and_ys, dtype)
        compare(gated_residual, definitions.gated_residual, streams[:1], x_and_ys, dtype)


def test_layer_norm_modulate_is_the_formula(device):
    x, scale, shift = torch.randn(2, 3, 20, device=device), *torch.randn(2, 2, 20, device=device)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 0.1).sqrt()
    expected = expected * (1 + scale[:, None]) + shift[:, None]
    for function in (partial(layer_norm_modulate, impl="triton"), definitions.layer_norm_modulate):
        torch.testing.assert_close(function(x, scale, shift, eps=0.1), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_output_alone_has_its_gradient(wanted, device):
    """Of x', the first and the second normal."""
    s = stream(4, 16, 2, 2, torch.float32, device=device)
    found = []
    for function in (partial(gated_residual, impl="triton"), definitions.gated_residual):
        leaf = mapped(s, lambda x: x.detach())
        inputs = [x.requires_grad_() for x in x_and_ys(leaf)]
        outputs = leaves(function(leaf))
        found.append(torch.autograd.grad(sum(outputs[k].square().sum() for k in wanted), inputs))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_normals_are_of_the_rounded_sum(device):
    s = stream(6, 40, 1, 1, torch.bfloat16, device=device)
    (fused,) = gated_residual(s, impl="triton")
    (apart,) = gated_residual(Stream(fused.x, s.modulations), impl="triton")
    assert torch.equal(fused.normalized[0], apart.normalized[0])


def test_branches_of_another_dtype(device):
    """As autocast gives them: the residual stream in fp32, the products in bf16."""
    s = stream(4, 16, 1, 2, torch.float32, device=device)
    s = s._replace(branches=tuple((y.bfloat16(), gate, bias) for y, gate, bias in s.branches))
    found = []
    for function in (partial(gated_residual, impl="triton"), definitions.gated_residual):
        leaf = mapped(s, lambda x: x.detach())
        inputs = [x.requires_grad_() for x in x_and_ys(leaf)]
        outputs = leaves(function(leaf))
        grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)
        assert [x.dtype for x in (*outputs, *grads)] == [torch.float32] * 3 + [torch.bfloat16] * 2
        found.append([*outputs, *grads])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5)


def test_a_sample_is_bitwise_the_same_anywhere(device):
    same_anywhere(gated_residual, [stream(n, 40, 2, 2, torch.bfloat16, batch=5, device=device) for n in (7, 3)])


def test_edges(device):
    x, row = torch.full((1, 2, 16), 3.0, device=device), torch.zeros(1, 16, device=device)
    (out,) = gated_residual(Stream(x, ((row, row),)), impl="triton")
    assert out.x is x and (out.normalized[0].abs() < 1e-3).all()
    empty = stream(0, 16, 1, 1, torch.float32, device=device)
    full = stream(3, 16, 1, 1, torch.float32, device=device)
    (_, alone), (both, _) = gated_residual(empty, full, impl="triton"), gated_residual(full, empty, impl="triton")
    assert torch.equal(alone.x, both.x) and torch.equal(alone.normalized[0], both.normalized[0])


def test_what_triton_does_not_serve(device):
    s = mapped(stream(3, 16, 1, 1, torch.float32, device=device), torch.Tensor.contiguous)
    for row in (s.branches[0][1], s.branches[0][2], *s.modulations[0]):
        row.requires_grad_()
        with pytest.raises(RuntimeError, match="gradients of gates"):
            gated_residual(s, impl="triton")
        with torch.no_grad():
            gated_residual(s, impl="triton")
        row.requires_grad_(False)
    with pytest.raises(RuntimeError, match="fp64"):
        gated_residual(mapped(s, torch.Tensor.double), impl="triton")


@pytest.mark.parametrize("modulations, branches", [(2, 2), (1, 0), (0, 1)])
def test_opcheck_and_compile(modulations, branches, device, monkeypatch):
    streams = [stream(3, 16, modulations, branches, torch.float32, device=device) for _ in range(2)]
    opcheck("gated_residual", partial(run, gated_residual, streams, x_and_ys), monkeypatch)
    torch._dynamo.reset()
    eager = leaves(gated_residual(*streams, impl="triton"))
    compiled = torch.compile(partial(gated_residual, impl="triton"), fullgraph=True, backend="aot_eager")
    for a, e in zip(leaves(compiled(*streams)), eager, strict=True):
        assert torch.equal(a, e)


@given(
    tokens=st.tuples(st.integers(1, 6), st.integers(0, 4)), width=st.integers(2, 70), batch=st.integers(1, 3),
    case=st.sampled_from(CASES), dtype=st.sampled_from(DTYPES), shared=st.booleans(),
)  # fmt: skip
def test_fuzz(tokens, width, batch, case, dtype, shared):
    device = "cuda" if ON_GPU else "cpu"
    made = [
        stream(n, width, *case, dtype, batch=batch, shared=shared, biased=i == 0, device=device)
        for i, n in enumerate(tokens)
        if n
    ]
    actual = leaves(gated_residual(*made, impl="triton"))
    exact = leaves(definitions.gated_residual(*(mapped(s, torch.Tensor.double) for s in made)))
    for a, e in zip(actual, exact, strict=True):
        # A normal is of the size √width at most; two close numbers have a mean and a variance that cancel
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), e, atol=20 * eps * width**0.5, rtol=4 * eps)


def calls():
    """SD3.5-large's and -medium's widths: all that a block asks for."""
    for dtype, width in ((torch.float32, 2432), (torch.bfloat16, 2432), (torch.float16, 2432), (torch.bfloat16, 1536)):
        for modulations, branches in CASES:
            pair = [stream(64, width, modulations, branches, dtype), stream(32, width, 1, min(branches, 1), dtype)]
            name = f"{dtype} {width} {modulations}/{branches}"
            yield name, partial(run, gated_residual, pair, x_and_ys)
            yield f"{name} alone", partial(run, gated_residual, pair[:1], x_and_ys)


def numbers():
    for batch, tokens in ((1, (1, 1)), (2, (64, 16)), (3, (17, 5)), (16, (33, 77)), (1, (1024, 333))):
        yield partial(
            run, gated_residual, [stream(n, 256, 1, 1, torch.bfloat16, batch=batch) for n in tokens], x_and_ys
        )
