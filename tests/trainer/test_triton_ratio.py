"""Stages 2 and 3 by Triton, in its interpreter: what the rollout stores is what the update computes."""

import sys

import pytest
from test_stages import build, examples, parameters_of
from uae_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def launched(monkeypatch):
    """Every op takes its kernel wherever that can serve; the names of those that did."""
    seen = set()

    def use_triton(op, impl, tensor, unsupported=None):
        if unsupported is None:
            seen.add(op)
        return unsupported is None

    for name, module in list(sys.modules.items()):
        if name.startswith("uae_kernels.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", use_triton)
    return seen


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_first_ratio_is_exactly_one(world, small_config, launched, mode):
    config = small_config(
        world, f"models.decoder={mode}", "render.steps=3", "render.batch=2", "stage3.images=1", "stage3.group_size=2",
        "stage3.micro_batch=2", "stage3.window=1", "stage3.window_end=1", "data.resolution=16",
    )  # fmt: skip
    stage = build(3, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, 3), 0)
    rollout.advantages += 1  # two drawings of one caption may be worth the same
    loss, metrics = stage.loss(rollout, slice(0, 2))
    assert metrics["ratio/mean"].item() == metrics["ratio/max"].item() == 1.0
    assert metrics["clip_ratio/low"].item() == metrics["clip_ratio/high"].item() == 0.0
    loss.backward()
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in parameters) >= len(parameters) // 3
    if mode == "lora":
        assert {"gated_residual", "qk_norm"} <= launched


def test_the_first_ratio_of_captions_is_exactly_one(world, small_config, launched):
    """Of a group that shares its prompt."""
    config = small_config(
        world, "models.encoder=lora", "caption.max_new_tokens=4", "stage2.images=1", "stage2.group_size=2",
        "stage2.micro_batch=2", "same_sampler.accelerate=false", "render.batch=2", "data.resolution=16",
    )  # fmt: skip
    stage = build(2, config)
    parameters = parameters_of(stage)
    rollout = stage.rollout(examples(config, 2), 0)
    rollout.advantages += 1
    stage.loss(rollout, slice(0, 2))  # leaves the log-probs that the next pass must repeat
    loss, metrics = stage.loss(rollout, slice(0, 2))
    assert metrics["ratio/mean"].item() == metrics["ratio/max"].item() == 1.0
    loss.backward()
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in parameters) >= len(parameters) // 3
    assert "shared_prefix_attention" in launched
