"""What the Triton paths cost at full size, counted on their launches: products, programs and memory."""

from unittest import mock

import launches
import pytest
import torch
from measures import peak_bytes
from torch.profiler import ProfilerActivity, profile
from uae_kernels import flow_grpo_loss, flow_step, linear_logprobs, shared_prefix_attention
from uae_kernels.shared_prefix_attention import SPLITS

H, V = 2048, 151_936


def head(rows, dtype=torch.bfloat16):
    """A policy's hidden states and head: no launch reads them, so the head's 0.6 GB are never touched."""
    return torch.zeros(rows, H, dtype=dtype, requires_grad=True), torch.empty(V, H, dtype=dtype)


def flops(launch):
    """Of the matrix products in one launch, padding included."""
    a, options = launch.arguments, launch.arguments
    if launch.name == "_product_kernel":
        row_tiles, column_tiles = a["row_tiles"], -(-a["columns"] // options["COLUMNS"])
        return 2 * row_tiles * options["ROWS"] * column_tiles * options["COLUMNS"] * a["depth"]
    if launch.name in ("_exponentials_kernel", "_dlogits_kernel"):
        return 2 * launch.programs * options["ROWS"] * options["COLUMNS"] * a["width"]
    return 0


@pytest.mark.parametrize("entropy_grad, train, count", [(False, False, 4), (True, False, 6), (False, True, 8)])
def test_flops(entropy_grad, train, count):
    rows = 4096
    hidden, weight = head(rows)
    targets = torch.zeros(rows, dtype=torch.int64)
    with launches.recorded(90) as made:
        logp, entropy = linear_logprobs(
            hidden, weight.requires_grad_(train), targets, return_entropy=True, entropy_grad=entropy_grad, impl="triton"
        )
        (logp.sum() + entropy.sum() if entropy_grad else logp.sum()).backward()
    total = sum(map(flops, made))
    assert count * rows * H * V <= total <= (count + 0.05) * rows * H * V


def peak_of(call):
    """Bytes that are allocated at one time on the way to the launches, which are not made."""
    # A launch that were kept would keep its scratch memory alive.
    with (
        launches.recorded(90),
        mock.patch.object(launches, "Launch", lambda *_: None),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        kept = call()
    del kept
    return peak_bytes(profiler)


@pytest.mark.parametrize("rows, megabytes", [(2400, 200), (16_384, 400)])
def test_peak_memory_at_full_size(rows, megabytes):
    hidden, weight = head(rows)
    targets = torch.zeros(rows, dtype=torch.int64)
    peak = peak_of(lambda: linear_logprobs(hidden, weight, targets, impl="triton").sum().backward())
    assert rows * H * 6 < peak <= megabytes * 1e6, peak


@pytest.mark.parametrize("samples, side", [(8, 128), (64, 64)])
def test_one_pass_over_the_latents(samples, side):
    """Three programs for each of a B200's 148 multiprocessors, and no memory but results and partial sums."""
    shape = samples, 16, side, side
    velocity, sample = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape)
    leaf, rows, seeds = velocity.clone().requires_grad_(), torch.zeros(samples), torch.arange(samples)

    def step():
        return flow_step(velocity, sample, 0.8, 0.7, velocity_uncond=velocity, seed=seeds, impl="triton")

    def loss():
        return flow_grpo_loss(
            leaf, sample, sample, rows, rows, 0.8, 0.7, ref_velocity=velocity, beta=0.1, impl="triton"
        ).loss

    with launches.recorded(90) as made:
        step()
        loss().backward()
    names = "forward", "log_prob", "forward", "log_prob", "log_prob", "loss", "backward"
    assert [launch.name for launch in made] == [f"_{name}_kernel" for name in names]
    assert all(made[i].programs >= 3 * 148 for i in (0, 2, 6))
    elements = sample.numel()
    assert 8 * elements <= peak_of(step) <= 8.26 * elements  # next sample and mean, a partial sum for 16 elements
    assert peak_of(loss) <= 0.52 * elements
    assert 2 * elements <= peak_of(lambda: loss().backward()) <= 2.52 * elements


def test_a_prefix_is_held_once():
    """8 continuations of 300 tokens behind a prompt of 1,429, Qwen2.5-VL-3B's heads: nothing the size of 8 prefixes."""
    group, tokens, prefix = 8, 300, 1429
    shapes = [(group, tokens, 16), (group, tokens, 2), (group, tokens, 2), (1, prefix, 2), (1, prefix, 2)]
    inputs = [torch.zeros(*shape, 128, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    own, shared = (sum(x.nbytes for x in part) for part in (inputs[:3], inputs[3:]))
    result, statistics = inputs[0].nbytes, 4 * group * tokens * 16

    def attend():
        return shared_prefix_attention(*inputs, group_size=group, impl="triton")

    assert peak_of(attend) <= result + statistics + 1000
    with launches.recorded(90):
        out = attend()
    # The gradients, the gradient of the result, and the prefix's sums in fp32 over the parts of the group
    bound = own + shared + result + statistics + SPLITS * 2 * shared + 1000
    peak = peak_of(lambda: torch.autograd.grad(out, inputs, torch.zeros_like(out)))
    assert peak <= bound < own + result + group * 2 * shared
