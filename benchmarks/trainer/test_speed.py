"""The trainer's steps, and its updates beside their peers, timed."""

from ..kernels.test_speed import pytest_generate_tests, test_speed
from . import stage2_update, stage3_update, steps

OPS = [steps, stage2_update, stage3_update]

__all__ = ["OPS", "pytest_generate_tests", "test_speed"]
