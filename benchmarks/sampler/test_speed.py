"""Every contestant of every case of the sampler, timed: `make bench` on a GPU."""

from ..kernels.test_speed import pytest_generate_tests, test_speed
from . import denoise

OPS = [denoise]

__all__ = ["OPS", "pytest_generate_tests", "test_speed"]
