"""Kernels write their outputs and nothing else, and read their inputs and nothing else."""

import pytest
import torch
from bands import Bands
from small import CASES


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_is_written_or_read(name, shift, device, monkeypatch):
    """What lies around inputs, outputs and scratch memory stays, and no result depends on it, nor on what an
    allocation held."""
    make, call = CASES[name]
    results = []
    for byte in (0xFF, 0):  # NaN, −1 and True; and 0
        torch.manual_seed(0)
        bands = Bands(byte)
        inputs = {key: bands.inside(value, shift) for key, value in make(device, 7).items()}
        before = {key: bits(value) for key, value in inputs.items()}
        with monkeypatch.context() as patch:
            bands.patch(patch)
            results.append([bits(value) for value in call("triton", **inputs)])
        assert len(bands.buffers) > len(inputs)
        bands.check()
        assert all(torch.equal(bits(inputs[key]), kept) for key, kept in before.items())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu  # the interpreter runs one program after the other: no race can show
@pytest.mark.parametrize("name", CASES)
def test_fifty_calls_give_one_result(name, device):
    make, call = CASES[name]
    inputs = make(device, 700)
    first = [bits(value) for value in call("triton", **inputs)]
    for _ in range(49):
        again = call("triton", **inputs)
        assert all(torch.equal(bits(a), f) for a, f in zip(again, first, strict=True))
