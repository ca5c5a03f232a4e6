"""The interpreter's arithmetic made as inexact as a GPU's: else a test on a CPU would promise what no chip keeps.

NumPy's max and min keep a NaN that PTX's drop, and its quotients, roots and exponentials are rounded to nearest. Here
they err by as much as the instructions that Triton emits may err (PTX ISA, "Floating Point Instructions": div.full
2 ulp, sqrt.approx 2⁻²³, ex2.approx 2⁻²²·⁵ after a rounded product with log₂e), by a share that the result's bits
choose: equal operands still give equal bits. What a kernel takes by `div_rn` or `sqrt_rn`, and fp64, stays exact.
Sums are trees, as of registers, lanes and warps, where NumPy's add up runs of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

LOG2E = np.float32(1.4426950408889634)


def off(exact: np.ndarray, most: float) -> np.ndarray:
    """fp64 numbers as fp32, at most so far off, relatively."""
    nearest = np.asarray(exact, np.float32)
    share = (nearest.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) / 2.0**23 - 1
    return np.where(np.isfinite(nearest), exact * (1 + most * share), exact).astype(np.float32)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    exact = np.divide(a, b, dtype=np.float64)
    power = np.frexp(b)[0] == 0.5  # its reciprocal is exact
    return np.where(power, exact.astype(np.float32), off(exact, 2.0**-22))


def _exp2(x: np.ndarray) -> np.ndarray:
    exact = np.exp2(x, dtype=np.float64)
    return np.where(x == np.floor(x), exact.astype(np.float32), off(exact, 2.0**-22.5))


def _sqrt(x: np.ndarray) -> np.ndarray:
    exact = np.sqrt(np.where(np.abs(x) < 2.0**-126, 0, x), dtype=np.float64)  # subnormal numbers are flushed
    return off(exact, 2.0**-23)


def _sum(self: ReduceOps, given: Any) -> Any:
    x = given.handle.data
    x = x.reshape(-1) if self.axis is None else np.moveaxis(x, self.axis, -1)
    while x.shape[-1] > 1:  # a power of two
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    if not self.keep_dims:
        x = x[..., 0]
    elif self.axis is not None:
        x = np.moveaxis(x, -1, self.axis)
    else:
        x = x.reshape((1,) * given.handle.data.ndim)
    return self.to_tensor(x, given.dtype)


def _fp32(approximate: Callable[..., np.ndarray], exact: Callable[..., Any]) -> Callable[..., TensorHandle]:
    """An operation of the interpreter that is approximate in fp32 alone."""

    def run(self: InterpreterBuilder, *given: TensorHandle) -> TensorHandle:
        if given[0].data.dtype != np.float32:
            return exact(self, *given)
        with np.errstate(all="ignore"):
            return TensorHandle(approximate(*(x.data for x in given)), given[0].dtype.scalar)

    return run


def imitate(patch: pytest.MonkeyPatch) -> None:
    """From now on the interpreter computes as a GPU may."""
    for name, ignoring_nan in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        patch.setattr(InterpreterBuilder, name, lambda self, a, b, op=ignoring_nan: self.binary_op(a, b, op))
    patch.setattr(ReduceOps, "sum", _sum)
    for name, approximate in (
        ("create_fdiv", _divide),
        ("create_sqrt", _sqrt),
        ("create_exp2", _exp2),
        ("create_exp", lambda x: _exp2(x * LOG2E)),
    ):
        patch.setattr(InterpreterBuilder, name, _fp32(approximate, getattr(InterpreterBuilder, name)))
