"""The PyTorch implementations on several threads: fifty calls, one result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CASES
from test_aot import OPS


def test_every_op_with_kernels_has_a_small_call():
    """What stands in small.py is what the canaries, the repetitions and `make sanitize` run."""
    assert {name.split(",")[0].split()[0] for name in CASES} == set(OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sanitize_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, Path(__file__).with_name("sanitize.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "sanitize runs the kernels on a GPU; PyTorch finds none here\n")


@pytest.mark.parametrize("name", CASES)
def test_fifty_calls_give_one_result(name):
    make, call = CASES[name]
    inputs = make("cpu", 700)
    torch.set_num_threads(3)
    try:
        first = call("torch", **inputs)
        for _ in range(49):
            again = call("torch", **inputs)
            assert all(torch.equal(a.nan_to_num(7), f.nan_to_num(7)) for a, f in zip(again, first, strict=True))
    finally:
        torch.set_num_threads(1)
