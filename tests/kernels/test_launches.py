"""What the Triton path of the head costs at full size, counted on its launches: products, memory, rows left out."""

from unittest import mock

import launches
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from uae_kernels import linear_logprobs

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


@pytest.mark.parametrize("rows, megabytes", [(2400, 200), (16_384, 400)])
def test_peak_memory_at_full_size(rows, megabytes):
    hidden, weight = head(rows)
    targets = torch.zeros(rows, dtype=torch.int64)
    # A launch that were kept would keep its scratch memory alive.
    with (
        launches.recorded(90),
        mock.patch.object(launches, "Launch", lambda *_: None),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        linear_logprobs(hidden, weight, targets, impl="triton").sum().backward()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert rows * H * 6 < peak <= megabytes * 1e6, peak
