"""The attention over all tokens, and its choice of backend."""

import sys
from types import ModuleType

import pytest
import torch
from uae_kernels.mmdit import joint_attention
from uae_kernels.mmdit.joint_attention import BACKENDS, check_backend


@pytest.fixture
def qkv():
    """(B, heads, S, D) views of (B, S, heads, D)."""
    return [torch.randn(2, 7, 3, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3)]


def by_formula(q, k, v):
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.fixture
def installed(monkeypatch):
    """Packages that look like flash-attn and xformers: (B, S, heads, D) in memory in one piece, in and out."""
    called = []

    def attention(name):
        def function(q, k, v):
            assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and q.shape == (2, 7, 3, 8)
            called.append(name)
            return by_formula(*(x.transpose(1, 2) for x in (q, k, v))).unflatten(-1, (3, 8))

        return function

    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    flash.flash_attn_func = attention("flash-attn")
    ops.memory_efficient_attention, xformers.ops = attention("xformers"), ops
    for module in (flash, xformers, ops):
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    check_backend.cache_clear()
    yield called
    check_backend.cache_clear()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_backend_is_the_formula(backend, qkv, installed):
    out = joint_attention(*qkv, backend=backend)
    assert out.shape == (2, 7, 24) and out.is_contiguous()
    torch.testing.assert_close(out, by_formula(*qkv))
    assert installed == ([backend] if backend in ("flash-attn", "xformers") else [])


def test_what_is_refused(qkv):
    with pytest.raises(ValueError, match="must be one of auto, sdpa, segments, flash-attn, xformers"):
        joint_attention(*qkv, backend="flash")
    for backend in ("flash-attn", "xformers"):
        with pytest.raises(RuntimeError, match=f'backend "{backend}" needs the package {BACKENDS[backend]}'):
            joint_attention(*qkv, backend=backend)
