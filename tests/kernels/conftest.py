import fcntl
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bands import Bands
from hypothesis import settings
from measures import INTERPRETED, ON_GPU

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None)  # make fuzz
settings.load_profile("ci")

MUCH_MEMORY = ("beyond_32_bits", "beyond_int32", "more_than")  # in the names of tests that take gigabytes


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
    if ON_GPU:
        items.sort(key=worth)


def worth(item):
    """On a GPU each op runs once before all else, then its accuracy is measured; at random inputs it runs last."""
    names = ("nothing_outside", "accuracy", "close_to_fp64", "bitwise_the_definition", "the_first_ratio")
    if any(name in item.name for name in names):
        return 0 if "nothing_outside" in item.name else 1
    return 3 if "fuzz" in item.name else 2


@pytest.fixture(autouse=True, scope="session")
def the_arithmetic_of_a_gpu():
    """Interpreted, kernels compute no more exactly than compiled."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from chip import imitate

            imitate(patch)
        yield


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def a_gpu_as_the_tests_want_it(request):
    """Convolutions without TF32; memory is given back after a test, and a broken context ends the process."""
    if not ON_GPU:
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    with alone(any(part in request.node.name for part in MUCH_MEMORY)):
        yield
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # whatever follows in this process would fail as well
            print(f"{request.node.nodeid} broke the device's context: {error}", file=sys.stderr, flush=True)
            os._exit(1)


@contextmanager
def alone(wanted):
    """One process at a time within."""
    with open(Path(tempfile.gettempdir()) / f"uae-kernels-{os.getuid()}.lock", "w") as file:
        if wanted:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
