from pathlib import Path

import pytest
import torch
from uae_kernels._triton import INTERPRETED

from .kernels.harness import Contest
from .kernels.report import show
from .rows import RESULTS, append, environment


class Contests:
    """One contest at a time; its rows are written when it is left."""

    def __init__(self, environment, folder):
        self.environment, self.folder, self.rows = environment, folder, []
        self.case = self.contest = self.failure = None

    def enter(self, op, case):
        if case != self.case:
            self.leave()
            self.case = case
            try:
                self.contest = getattr(op, "Contest", Contest)(op, case)
            except Exception as error:
                self.failure = error
        if self.failure:
            raise self.failure
        return self.contest

    def leave(self):
        if self.contest:
            rows = self.contest.rows(self.environment)
            self.rows += rows
            if self.folder:
                append(self.folder / f"{self.case.op}-{self.environment['kind']}.jsonl", rows)
        self.case = self.contest = self.failure = None


CONTESTS = pytest.StashKey[Contests]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--quick", action="store_true", help="small cases, within a minute; writes no rows")
    group.addoption("--rows", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows are appended")
    group.addoption("--commit", help="hash, with -dirty behind it where it is: for a copy without .git")


def pytest_configure(config):
    if INTERPRETED:
        raise pytest.UsageError("unset TRITON_INTERPRET: interpreted kernels are not worth timing")
    option = config.option
    option.benchmark_quiet = True  # its table knows neither memory nor errors, and each visit apart
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.stash[CONTESTS] = Contests(environment(device, option.commit), None if option.quick else option.rows)


@pytest.fixture
def contests(pytestconfig):
    return pytestconfig.stash[CONTESTS]


def pytest_sessionfinish(session):
    session.config.stash[CONTESTS].leave()


def pytest_terminal_summary(config):
    show(config.stash[CONTESTS].rows)
