"""What diffusers' own accelerators do to SD3, and that ours does not; a failure after an upgrade is good news."""

import diffusers
import pytest
import sd3
import torch
from measures import relative_error
from uae_kernels.mmdit import accelerate_sd3


@pytest.fixture
def given():
    return sd3.inputs()


@torch.no_grad()
def test_fused_projections_lose_the_norms_of_queries_and_keys(given):
    model = sd3.transformer("large")
    expected = model(**given).sample
    model.fuse_qkv_projections()
    assert relative_error(model(**given).sample, expected) > 1e-3  # silently
    model.unfuse_qkv_projections()
    accelerate_sd3(model)
    assert relative_error(model(**given).sample, expected) <= 1e-5
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="an attention processor was set since"):
        model(**given)


@torch.no_grad()
def test_fused_projections_crash_on_dual_attention(given):
    model = sd3.transformer("medium")
    expected = model(**given).sample
    model.fuse_qkv_projections()
    with pytest.raises(AttributeError, match="'NoneType' object"):
        model(**given)
    model.unfuse_qkv_projections()
    accelerate_sd3(model)
    assert relative_error(model(**given).sample, expected) <= 1e-5


def test_the_attention_backend_is_not_set():
    """set_attention_backend raises nothing and reaches no processor: `accelerate_sd3(attention=...)` does."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, active = sd3.transformer("large"), _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend("_native_math")
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(active))
    assert not any(hasattr(processor, "_attention_backend") for processor in model.attn_processors.values())


def test_there_is_no_cache():
    from diffusers.models.cache_utils import CacheMixin

    assert not issubclass(diffusers.SD3Transformer2DModel, CacheMixin)
    assert not hasattr(sd3.transformer("large"), "enable_cache")


@torch.no_grad()
def test_the_first_block_cache_raises(given):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model = sd3.transformer("large", layers=4)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    _set_cache_context(model, CacheContext("cond"))
    with pytest.raises(TypeError, match="NoneType"):  # the last block gives None for the text
        model(**given)
    with pytest.raises(ValueError, match="hook"):
        accelerate_sd3(model)
