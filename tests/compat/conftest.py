import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED


def pytest_ignore_collect(collection_path):
    """test_triton_*.py run the rivals' kernels: on a GPU, or interpreted in a process of their own."""
    name = collection_path.name
    if not name.startswith("test_"):
        return None
    runs_kernels = name.startswith("test_triton_")
    return True if runs_kernels != INTERPRETED and not (runs_kernels and ON_GPU) else None


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"
