"""Normalised, joined queries and keys as a Triton kernel, against the definition in fp64."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import ON_GPU
from streams import DTYPES, compare, mapped, opcheck, run, same_anywhere
from uae_kernels.mmdit import Projections, qk_norm
from uae_kernels.reference import mmdit as definitions


def qkv(tokens, heads, width, dtype, *, batch=2, normed=True, packed=True, device="cpu"):
    parts = torch.randn(batch, tokens, 3 * heads * width).to(device, dtype).chunk(3, -1)
    weights = [torch.randn(width).to(device, dtype) if normed else None for _ in range(2)]
    return Projections(*(parts if packed else (x.contiguous() for x in parts)), *weights)


def q_k_v(s):
    return s[:3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", [(3, 16), (9, 8), (8, 12), (1, 64)])
@pytest.mark.parametrize("normed, packed", [(True, True), (True, False), (False, True)])
def test_close_to_fp64(heads, width, normed, packed, dtype, poisoned, device):
    streams = [qkv(n, heads, width, dtype, normed=normed, packed=packed, device=device) for n in (5, 3)]
    compare(qk_norm, definitions.qk_norm, streams, q_k_v, dtype, heads=heads)
    compare(qk_norm, definitions.qk_norm, streams[:1], q_k_v, dtype, heads=heads)


def test_is_the_formula_and_the_streams_follow_each_other(device):
    a, b = (qkv(n, 2, 8, torch.float32, device=device) for n in (4, 3))
    for function in (partial(qk_norm, impl="triton"), definitions.qk_norm):
        q, k, v = function(a, b, heads=2, eps=0.1)
        assert q.shape == k.shape == v.shape == (2, 2, 7, 8)
        head = b.k[1, 2, 8:]  # the last token's second head
        torch.testing.assert_close(k[1, 1, 6], head / (head.square().mean() + 0.1).sqrt() * b.k_weight)
        assert torch.equal(v[0, 1, 3], a.v[0, 3, 8:])


def test_a_sample_is_bitwise_the_same_anywhere(device):
    same_anywhere(qk_norm, [qkv(n, 3, 16, torch.bfloat16, batch=5, device=device) for n in (7, 3)], heads=3)


def test_edges(device):
    zeros, weight = torch.zeros(1, 2, 16, device=device), torch.ones(8, device=device)
    q, k, v = qk_norm(Projections(zeros, zeros, zeros, weight, weight), heads=2, impl="triton")
    assert (q == 0).all() and (k == 0).all() and v.data_ptr() == zeros.data_ptr()
    full, empty = qkv(3, 2, 8, torch.float32, device=device), qkv(0, 2, 8, torch.float32, device=device)
    for a, b in zip(qk_norm(full, empty, heads=2, impl="triton"), qk_norm(full, heads=2, impl="triton"), strict=True):
        assert torch.equal(a, b)


def test_what_triton_does_not_serve(device):
    with pytest.raises(RuntimeError, match="fp64"):
        qk_norm(qkv(3, 2, 8, torch.float64, device=device), heads=2, impl="triton")
    parts = qkv(3, 2, 8, torch.float32, device=device)
    parts.k_weight.requires_grad_()
    with pytest.raises(RuntimeError, match="the norms' weights"):
        qk_norm(parts, heads=2, impl="triton")
    with torch.no_grad():
        qk_norm(parts, heads=2, impl="triton")


@pytest.mark.parametrize("count", [1, 2])
def test_opcheck_and_compile(count, device, monkeypatch):
    streams = [qkv(n, 2, 8, torch.float32, device=device) for n in (3, 2)[:count]]
    opcheck("qk_norm", partial(run, qk_norm, streams, q_k_v, heads=2), monkeypatch)
    torch._dynamo.reset()
    eager = qk_norm(*streams, heads=2, impl="triton")
    compiled = torch.compile(partial(qk_norm, heads=2, impl="triton"), fullgraph=True, backend="aot_eager")
    for a, e in zip(compiled(*streams), eager, strict=True):
        assert torch.equal(a, e)


@given(
    tokens=st.tuples(st.integers(1, 6), st.integers(0, 4)), heads=st.integers(1, 10), width=st.integers(1, 40),
    batch=st.integers(1, 3), dtype=st.sampled_from(DTYPES), packed=st.booleans(),
)  # fmt: skip
def test_fuzz(tokens, heads, width, batch, dtype, packed):
    device = "cuda" if ON_GPU else "cpu"
    made = [qkv(n, heads, width, dtype, batch=batch, packed=packed, device=device) for n in tokens if n]
    exact = definitions.qk_norm(*(mapped(s, torch.Tensor.double) for s in made), heads=heads)
    for a, e in zip(qk_norm(*made, heads=heads, impl="triton"), exact, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), e, atol=8 * torch.finfo(torch.float32).eps, rtol=2 * eps)


def calls():
    """SD3.5-large's and -medium's widths."""
    for dtype, heads in ((torch.float32, 38), (torch.bfloat16, 38), (torch.float16, 38), (torch.bfloat16, 24)):
        for normed in (True, False):
            pair = [qkv(n, heads, 64, dtype, normed=normed) for n in (64, 32)]
            name = f"{dtype} {heads} heads, {'normed' if normed else 'as they are'}"
            yield name, partial(run, qk_norm, pair, q_k_v, heads=heads)
            yield f"{name}, alone", partial(run, qk_norm, pair[:1], q_k_v, heads=heads)


def numbers():
    for batch, tokens in ((1, (1, 1)), (2, (64, 16)), (3, (17, 5)), (16, (33, 77)), (1, (1024, 333))):
        pair = [qkv(n, 4, 64, torch.bfloat16, batch=batch) for n in tokens]
        yield partial(run, qk_norm, pair, q_k_v, heads=4)
