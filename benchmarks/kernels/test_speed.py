"""Every contestant of every case, timed: `make bench`."""

from importlib import import_module

import pytest
import torch

from .harness import OutOfTime

NAMES = (
    "group_advantages", "token_logprobs", "linear_logprobs", "grpo_loss", "linear_grpo_loss", "flow_step",
    "flow_grpo_loss", "shared_prefix_attention", "scaling",
)  # fmt: skip
OPS = [import_module(f".{name}", __package__) for name in NAMES]


def pytest_generate_tests(metafunc):
    """Case by case, and within a case visit by visit: forth, back, forth, back."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    turns = []
    for op in metafunc.module.OPS:
        for case in op.cases(device, metafunc.config.option.quick):
            names = [str(contestant) for contestant in op.contestants(case)]
            for visit in range(case.passes):
                turns += [(op, case, name, visit) for name in (reversed(names) if visit % 2 else names)]
    ids = [f"{case}-{name}-{visit}" for _, case, name, visit in turns]
    metafunc.parametrize("turn", turns, ids=ids)


def test_speed(turn, contests, benchmark):
    op, case, name, _ = turn
    try:
        reason = contests.visit(contests.enter(op, case), name, benchmark)
    except OutOfTime:
        reason = "out of time"
    if reason:
        benchmark.skipped = True
        pytest.skip(reason)
