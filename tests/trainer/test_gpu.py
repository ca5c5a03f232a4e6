"""What `test_pretend_gpu.py` does, on a GPU that is there: `make gpu-check`."""

import math
import os

import pytest
import torch
from test_pretend_gpu import CASES, LORA, RUNS, run_and_use, steps

from uae_fast.determinism import set_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu-check"),
]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of the GPU
BF16 = (*LORA, "models.dtype=bfloat16")


@pytest.fixture
def repeatable():
    """Algorithms that repeat alone, and fp32 without TF32."""
    set_deterministic(True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number, options", [*CASES, *((number, BF16) for number in range(4))])
def test_steps_repeat_and_are_those_on_a_cpu(number, options, world, small_config, repeatable):
    more = ("stage2.micro_batch=4", "stage3.micro_batch=4", *options)
    found, again = (list(steps(number, small_config(world, *more, "device=cuda"))) for _ in range(2))
    assert found == again
    for values in found:
        assert all(map(math.isfinite, values.values())) and values.get("ratio/max", 1) == 1
    if "int8" not in str(options) and options != BF16:  # else tokens differ
        config = small_config(world, *(option for option in more if "graph" not in option), "device=cpu")
        assert found[0] == pytest.approx(next(steps(number, config)), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("stage, options", RUNS)
def test_a_run_is_measured_goes_on_and_is_used(stage, options, world, small_config):
    if "same_sampler.fp8=true" in options and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that has e4m3 numbers, sm_89 or newer")
    run_and_use(stage, options, world, small_config, rel=1e-3)
