import time
from pathlib import Path

import pytest
import torch
from uae_kernels._triton import INTERPRETED

from .heap import keep_freed
from .kernels.harness import Contest, OutOfTime, failed
from .kernels.report import show
from .rows import RESULTS, append, case_of, environment, read


class Contests:
    """One contest at a time; its rows are written when it is left.

    Within a budget a case begins only while there is time left for twice the longest of its op so far, at most for the
    longest of all; a contest of single visits, which may take minutes each, ends before a visit that, as long as the
    longest so far, would end too late.
    """

    def __init__(self, environment, folder, budget=None):
        self.environment, self.folder, self.rows = environment, folder, []
        self.start, self.budget = time.monotonic(), budget
        self.longest_visit, self.longest = 0.0, {}  # `longest` case of each op
        self.case = self.contest = self.failure = None
        self.left_out = []  # the cases that were not reached, or not finished

    def enter(self, op, case):
        if case != self.case:
            self.leave()
            self.need(self.expected(case), case)
            self.case, self.began = case, time.monotonic()
            try:
                self.contest = getattr(op, "Contest", Contest)(op, case)
            except Exception as error:
                self.keep([failed(case, op.contestants(case)[0], error)])
                self.failure = bare(error)
        if self.failure:
            raise self.failure
        return self.contest

    def visit(self, contest, name, benchmark):
        if self.case.passes == 1:
            self.need(self.longest_visit, self.case)
        start = time.monotonic()
        try:
            return contest.time(name, benchmark)
        finally:
            self.longest_visit = max(self.longest_visit, time.monotonic() - start)

    def expected(self, case):
        longest = max(self.longest.values(), default=0.0)
        return min(longest, 2 * self.longest.get(case.op, longest))

    def need(self, seconds, case):
        if self.budget is not None and time.monotonic() - self.start + seconds > self.budget:
            if case not in self.left_out:
                self.left_out.append(case)
            raise OutOfTime

    def leave(self):
        if self.contest:
            if error := getattr(self.contest, "failure", None):
                ours = next(iter(self.contest.entries.values())).contestant
                self.keep([failed(self.case, ours, error)])
            else:
                self.keep(self.contest.rows(self.environment))
        if self.case:
            took = time.monotonic() - self.began
            self.longest[self.case.op] = max(self.longest.get(self.case.op, 0.0), took)
        self.case = self.contest = self.failure = None

    def keep(self, rows):
        rows = [row | self.environment for row in rows]
        self.rows += rows
        if self.folder:
            append(self.folder / f"{self.case.op}-{self.environment['kind']}.jsonl", rows)


def bare(error):
    """An exception without its frames, which would keep what they hold on the device: models, inputs, results."""
    chain = [error]
    for link in chain:
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and e not in chain]
        link.__traceback__ = None
    return error


CONTESTS = pytest.StashKey[Contests]()
DONE = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--quick", action="store_true", help="small cases, within a minute; writes no rows")
    group.addoption("--rows", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows are appended")
    group.addoption("--commit", help="hash, with -dirty behind it where it is: for a copy without .git")
    group.addoption("--budget", type=float, metavar="SECONDS", help="begin nothing that would end later")
    group.addoption("--again", action="store_true", help="also cases that have rows of this commit and device")


def pytest_configure(config):
    if INTERPRETED:
        raise pytest.UsageError("unset TRITON_INTERPRET: interpreted kernels are not worth timing")
    option = config.option
    option.benchmark_quiet = True  # its table knows neither memory nor errors, and each visit apart
    here = environment("cuda" if torch.cuda.is_available() else "cpu", option.commit)
    here["heap"] = "keeps what is freed" if keep_freed() else "the system's"
    config.stash[CONTESTS] = Contests(here, None if option.quick else option.rows, option.budget)
    config.stash[DONE] = []


def pytest_collection_modifyitems(config, items):
    """What is worth most comes first, over all suites; what has rows of this commit and device is left out."""
    option, contests = config.option, config.stash[CONTESTS]
    again = option.again or option.quick or contests.environment["dirty"] is not False
    known = set() if again else measured(read(folder=option.rows), contests.environment)
    finished = {}
    # pytest makes one item of a suite without cases here, such as the sampler's on a CPU, and skips it
    empty = [item for item in items if not isinstance(item.callspec.params["turn"], tuple)]
    items[:] = [item for item in items if item not in empty]

    def is_done(item):
        op, case, *_ = item.callspec.params["turn"]
        if case not in finished:
            finished[case] = is_finished(case, op.contestants(case), known, contests.environment)
        return finished[case]

    done = [item for item in items if is_done(item)]
    config.hook.pytest_deselected(items=done + empty)
    config.stash[DONE] += [case for case, all_of_it in finished.items() if all_of_it]
    items[:] = sorted(
        (item for item in items if item not in done), key=lambda item: item.callspec.params["turn"][1].order
    )


def measured(rows, here):
    """(case, contestant, configuration) of what was measured, or found to fail, at this commit and on this device."""
    return {
        (case_of(row), row["contestant"], str(row["config"]))
        for row in rows
        if "median_ms" in row and all(row.get(key) == here[key] for key in ("commit", "dirty", "device", "threads"))
    }


def is_finished(case, contestants, known, here):
    """Whether every contestant of a case has a row; a case that failed has one alone."""
    row = {"op": case.op, "variant": case.variant, "device": here["device"], "dtype": case.precision, **case.sizes()}
    return all((case_of(row), c.name, str(c.config)) in known for c in contestants)


@pytest.fixture
def contests(pytestconfig):
    return pytestconfig.stash[CONTESTS]


def pytest_sessionfinish(session):
    session.config.stash[CONTESTS].leave()


def pytest_terminal_summary(config):
    contests, done = config.stash[CONTESTS], config.stash[DONE]
    show(contests.rows)
    if done:
        print(f"{len(done)} cases have rows of this commit and device already; --again measures them anew")
    if contests.left_out:
        names = ", ".join(map(str, contests.left_out))
        print(f"out of time; the same command goes on with these {len(contests.left_out)} cases: {names}")
