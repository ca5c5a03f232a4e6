"""A pytest plugin for a GPU: a test that hangs, or that breaks the device's context, ends its process and no other."""

import faulthandler
import os
import sys

import pytest

LIMIT = 150.0  # seconds of one test, compilation included


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    import torch

    # In C, whatever the interpreter waits for; behind the lock that tests of much memory wait for
    faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG", LIMIT)), exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:  # whatever follows in this process would fail as well
                print(f"{item.nodeid} broke the device's context: {error}", file=sys.stderr, flush=True)
                os._exit(1)
