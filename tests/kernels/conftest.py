import pytest
import torch
from bands import Bands
from hypothesis import settings
from measures import INTERPRETED, ON_GPU

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None)  # make fuzz
settings.load_profile("ci")


def pytest_ignore_collect(collection_path):
    """test_triton_*.py run kernels: interpreted, in a process of their own (it cannot compile ahead of time), or on
    a GPU."""
    name = collection_path.name
    if not name.startswith("test_"):
        return None
    runs_kernels = name.startswith("test_triton_")
    return True if runs_kernels != INTERPRETED and not (runs_kernels and ON_GPU) else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu-check"))


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the interpreter on the CPU."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an op allocates without filling holds NaN, and lies between bands that nobody may touch."""
    bands = Bands(0xFF)
    bands.patch(monkeypatch)
    yield
    bands.check()
