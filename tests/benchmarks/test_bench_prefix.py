"""The counts of stage 2's update: formulas against the products a CPU runs, and what sharing a prompt must save."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import set_checkpoint_early_stop
from uae_kernels import linear_grpo_loss, reference

from benchmarks.kernels.harness import _flops
from benchmarks.trainer.prefix_flops import MODES, pretended, qwen, table_row, update
from uae_fast.config import load_config
from uae_fast.models.encoder import Prompt
from uae_fast.models.loading import load_models

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
P, CAPTIONS = 11, [9, 4, 6]


def products(step):
    """FLOPs of matrix products that a step runs on a CPU: of linear layers, and of attention in plain products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, sdpa_kernel(SDPBackend.MATH):
        step()
    events = [event for event in profiler.events() if event.name in ("aten::mm", "aten::addmm", "aten::bmm")]
    batched = [event for event in events if event.name == "aten::bmm"]
    angles = [event for event in batched if event.input_shapes[0][-1] == 1]  # of the rotary positions
    attention = sum(map(_flops, batched)) - sum(map(_flops, angles))
    return sum(map(_flops, events)) - sum(map(_flops, batched)), attention


def small(mode, checkpointing):
    options = [f"models.encoder={mode}", f"models.gradient_checkpointing={checkpointing}", "models.lora_rank=4"]
    return load_models(load_config("tiny", ["device=cpu", "models.load=dummy", *options])).encoder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mode, checkpointing", MODES.values())
def test_an_updates_products_are_those_a_cpu_runs(mode, checkpointing, shared):
    encoder = small(mode, checkpointing)
    encoder.trainable()
    encoder.prefix_attention = reference.shared_prefix_attention  # in plain products
    ids = torch.zeros(len(CAPTIONS), max(CAPTIONS), dtype=torch.long)
    mask = torch.arange(max(CAPTIONS)) < torch.tensor(CAPTIONS)[:, None]
    asked = torch.zeros(1, P, dtype=torch.long)
    prompt = Prompt(asked, asked == 0, torch.arange(P).expand(3, 1, -1), (torch.zeros(1, 128),), (P,))

    def step():
        if shared:
            encoder.group_states(prompt, ids, CAPTIONS).sum().backward()
        else:
            encoder.caption_states(prompt.repeat(len(CAPTIONS)), ids, mask).sum().backward()

    fake = pretended(small(mode, checkpointing).to("meta"))
    with set_checkpoint_early_stop(False):  # the product it stops at counts for the profiler, though it never runs
        counted = update(fake, shared, checkpointing=checkpointing, prompt=P, captions=CAPTIONS)
        assert products(step) == (counted.linear, counted.attention)
    assert counted.tokens == (P + sum(CAPTIONS) - 3 if shared else 3 * (P + max(CAPTIONS)))


def test_the_heads_products_are_those_a_cpu_runs():
    """Of as many rows as its tiles have."""
    rows, width, vocabulary = (8, 16), 32, 64
    hidden, weight = torch.randn(*rows, width, requires_grad=True), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, rows)
    run, _ = products(lambda: linear_grpo_loss(hidden, weight, targets, torch.arange(1.0, 9.0)).loss.backward())
    assert run == 4 * 128 * width * vocabulary


def test_a_shared_prompt_halves_the_update_at_full_size():
    """Eight captions of 300 tokens on 504 × 504 pixels, by Qwen2.5-VL-3B; and the table of docs/models.md says so."""
    table = DOCS.read_text()
    for name, (mode, checkpointing) in MODES.items():
        encoder = qwen(mode, checkpointing)
        rows, row = (update(encoder, shared, checkpointing=checkpointing) for shared in (False, True))
        assert rows.tokens == 8 * (402 + 300) and row.tokens == 402 + 8 * 299
        assert row.head == rows.head
        assert row.total <= 0.52 * rows.total, name
        assert row.with_kernels < 0.54 * rows.with_kernels, name
        assert table_row(name, rows, row) in re.sub(" +", " ", table), name
