"""The fused parts of an SD3 block as Triton kernels, against their definitions in fp64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import ON_GPU, relative_error
from uae_kernels import reference  # noqa: F401
from uae_kernels.mmdit import Projections, Stream, gated_residual, qk_norm
from uae_kernels.reference import mmdit as definitions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(made):
    """The tensors of (nested) streams, in order."""
    if isinstance(made, torch.Tensor):
        return [made]
    return [] if made is None else [x for part in made for x in leaves(part)]


def mapped(made, function):
    if made is None or isinstance(made, torch.Tensor):
        return None if made is None else function(made)
    parts = [mapped(part, function) for part in made]
    return type(made)(*parts) if hasattr(made, "_fields") else type(made)(parts)


def stream(tokens, width, modulations, branches, dtype, *, batch=2, biased=True, shared=False):
    """Modulations and gates are slices of one row (B, ·), as an adaLN layer gives them; `shared` expands one row."""
    rows = torch.randn(1 if shared else batch, 6 * width).to(dtype).expand(batch, -1).chunk(6, 1)
    return Stream(
        torch.randn(batch, tokens, width).to(dtype),
        tuple((rows[2 * i], rows[2 * i + 1]) for i in range(modulations)),
        tuple(
            (torch.randn(batch, tokens, width).to(dtype), rows[4 + i], torch.randn(width).to(dtype) if biased else None)
            for i in range(branches)
        ),
    )


def gradients(function, streams, wanted, **options):
    """Outputs, and gradients of a random combination of them in the tensors that `wanted` picks of each stream."""
    flags = []

    def leaf(x):
        x = x.detach().clone() if x.is_contiguous() else x.detach()
        flags.append(x)
        return x

    streams = [mapped(s, leaf) for s in streams]
    inputs = [x.requires_grad_() for s in streams for x in wanted(s)]
    outputs = leaves(function(*streams, **options))
    generator = torch.Generator().manual_seed(1)
    g = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return outputs, torch.autograd.grad([o for o in outputs if o.requires_grad], inputs,
                                        [w for w, o in zip(g, outputs, strict=True) if o.requires_grad])  # fmt: skip


def x_and_ys(s):
    return [s.x, *(y for y, _, _ in s.branches)]


def projections(s):
    return s[:3]


def compare(op, definition, streams, wanted, dtype, **options):
    """No less exact than the definition in fp32 or in the inputs' dtype, and rounded once."""
    actual, grads = gradients(op, streams, wanted, impl="triton", **options)
    wide = [mapped(s, torch.Tensor.double) for s in streams]
    exact, exact_grads = gradients(definition, wide, wanted, **options)
    plain, plain_grads = gradients(definition, streams, wanted, **options)
    half = 0.5 * torch.finfo(dtype).eps
    for a, e, p in zip([*actual, *grads], [*exact, *exact_grads], [*plain, *plain_grads], strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert relative_error(a, e) <= max(2 * relative_error(p, e), 1e-6 if dtype == torch.float32 else half)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulations, branches", [(1, 0), (2, 0), (1, 1), (2, 2), (0, 1), (2, 1), (1, 2)])
def test_gated_residual(modulations, branches, dtype, poisoned, device):
    for shared in (False, True):
        streams = [
            stream(5, 24, modulations, branches, dtype, shared=shared),
            stream(3, 24, 1, min(branches, 1), dtype, biased=False, shared=not shared),
        ]
        streams = [mapped(s, lambda x: x.to(device)) for s in streams]
        compare(gated_residual, definitions.gated_residual, streams, x_and_ys, dtype)
        compare(gated_residual, definitions.gated_residual, streams[:1], x_and_ys, dtype)


def qkv(tokens, heads, width, dtype, *, batch=2, normed=True, packed=True):
    parts = torch.randn(batch, tokens, 3 * heads * width).to(dtype).chunk(3, -1)
    weights = [torch.randn(width).to(dtype) if normed else None for _ in range(2)]
    return Projections(*(parts if packed else (x.contiguous() for x in parts)), *weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", [(3, 16), (9, 8), (8, 12), (1, 64)])
@pytest.mark.parametrize("normed, packed", [(True, True), (True, False), (False, True)])
def test_qk_norm(heads, width, normed, packed, dtype, poisoned, device):
    streams = [qkv(n, heads, width, dtype, normed=normed, packed=packed) for n in (5, 3)]
    streams = [mapped(s, lambda x: x.to(device)) for s in streams]
    compare(qk_norm, definitions.qk_norm, streams, projections, dtype, heads=heads)
    compare(qk_norm, definitions.qk_norm, streams[:1], projections, dtype, heads=heads)


def test_a_sample_is_bitwise_the_same_anywhere(device):
    streams = [mapped(stream(n, 40, 2, 2, torch.bfloat16, batch=5), lambda x: x.to(device)) for n in (7, 3)]
    whole = leaves(gated_residual(*streams, impl="triton"))
    projected = [mapped(qkv(n, 3, 16, torch.bfloat16, batch=5), lambda x: x.to(device)) for n in (7, 3)]
    joined = qk_norm(*projected, heads=3, impl="triton")
    for rows in ([3], [4, 1], [2, 0, 4, 3, 1]):
        some = [mapped(s, lambda x, rows=rows: x[rows] if len(x) == 5 else x) for s in streams]
        assert all(
            torch.equal(a, w[rows]) for a, w in zip(leaves(gated_residual(*some, impl="triton")), whole, strict=True)
        )
        some = [mapped(s, lambda x, rows=rows: x[rows] if len(x) == 5 else x) for s in projected]
        assert all(
            torch.equal(a, w[rows]) for a, w in zip(qk_norm(*some, heads=3, impl="triton"), joined, strict=True)
        )


def test_constant_rows_and_zeros_stay_finite(device):
    x = torch.full((1, 2, 16), 3.0, device=device)
    row = torch.zeros(1, 16, device=device)
    (out,) = gated_residual(Stream(x, ((row, row),)), impl="triton")
    assert out.x is x and (out.normalized[0].abs() < 1e-3).all()
    zeros, weight = torch.zeros(1, 2, 16, device=device), torch.ones(8, device=device)
    q, k, _ = qk_norm(Projections(zeros, zeros, zeros, weight, weight), heads=2, impl="triton")
    assert (q == 0).all() and (k == 0).all()


def test_what_triton_does_not_serve(device):
    s = mapped(stream(3, 16, 1, 1, torch.float32), lambda x: x.to(device).contiguous())
    s.branches[0][1].requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of gates"):
        gated_residual(s, impl="triton")
    with pytest.raises(RuntimeError, match="fp64"):
        qk_norm(mapped(qkv(3, 2, 8, torch.float64), lambda x: x.to(device)), heads=2, impl="triton")
    parts = mapped(qkv(3, 2, 8, torch.float32), lambda x: x.to(device))
    parts.q_weight.requires_grad_()
    with pytest.raises(RuntimeError, match="the norms' weights"):
        qk_norm(parts, heads=2, impl="triton")


@given(
    tokens=st.tuples(st.integers(1, 6), st.integers(0, 4)), width=st.integers(1, 70), batch=st.integers(1, 3),
    modulations=st.integers(0, 2), branches=st.integers(0, 2), dtype=st.sampled_from(DTYPES), shared=st.booleans(),
)  # fmt: skip
def test_fuzz(tokens, width, batch, modulations, branches, dtype, shared):
    if not (modulations or branches) or width < 2:
        return
    device = "cuda" if ON_GPU else "cpu"
    made = [
        mapped(
            stream(n, width, modulations, branches, dtype, batch=batch, shared=shared, biased=i == 0),
            lambda x: x.to(device),
        )
        for i, n in enumerate(tokens)
        if n
    ]
    actual = leaves(gated_residual(*made, impl="triton"))
    exact = leaves(definitions.gated_residual(*(mapped(s, torch.Tensor.double) for s in made)))
    for a, e in zip(actual, exact, strict=True):
        # Two tokens' mean and variance may cancel: an absolute bound, of a normal's size
        torch.testing.assert_close(
            a.double(), e, atol=20 * torch.finfo(dtype).eps * max(width**0.5, 1), rtol=4 * torch.finfo(dtype).eps
        )


def block_calls(dtype, width, heads, batch=2, tokens=(64, 32), train=True):
    """The launches of a block: the joint one, a dual-attention one, the last one."""

    def call(*streams, op, wanted, **options):
        streams = [mapped(s, torch.Tensor.detach) for s in streams]
        for s in streams if train else ():
            for x in wanted(s):
                x.requires_grad_()
        outputs = [x for x in leaves(op(*streams, impl="triton", **options)) if x.requires_grad]
        if outputs:
            sum(x.sum() for x in outputs).backward()

    def tensors(n, modulations, branches):
        return stream(n, width, modulations, branches, dtype, batch=batch)

    for modulations, branches in ((1, 0), (2, 0), (1, 1), (1, 2), (2, 1)):
        pair = tensors(tokens[0], modulations, branches), tensors(tokens[1], 1, min(branches, 1))
        yield f"{dtype} {modulations}/{branches}", lambda p=pair: call(*p, op=gated_residual, wanted=x_and_ys)
        yield f"{dtype} {modulations}/{branches} alone", lambda p=pair: call(p[0], op=gated_residual, wanted=x_and_ys)
    for normed in (True, False):
        pair = [qkv(n, heads, width // heads, dtype, batch=batch, normed=normed) for n in tokens]
        yield f"{dtype} qk_norm {normed}", lambda p=pair: call(*p, op=qk_norm, wanted=projections, heads=heads)
        yield f"{dtype} qk_norm {normed} alone", lambda p=pair: call(p[0], op=qk_norm, wanted=projections, heads=heads)


def calls():
    """SD3.5-medium's and -large's widths."""
    for dtype, (width, heads) in itertools.product((torch.float32, torch.bfloat16, torch.float16), ((2432, 38),)):
        yield from block_calls(dtype, width, heads)
    yield from block_calls(torch.bfloat16, 1536, 24)


def numbers():
    for batch, tokens in ((1, (1, 1)), (2, (64, 16)), (3, (17, 5)), (16, (33, 77)), (1, (1024, 333))):
        made = list(block_calls(torch.bfloat16, 256, 4, batch=batch, tokens=tokens))
        yield from (made[k][1] for k in (4, 10))
