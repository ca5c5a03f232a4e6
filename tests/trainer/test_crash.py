"""kill −9, at random instants and inside saves."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_run_killed_anywhere_ends_in_the_same_weights():
    """Four rounds of what `make crash` does thirty times; `crash.py` says what is compared."""
    command = [sys.executable, Path(__file__).with_name("crash.py"), "--rounds", "4", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, failures = map(int, re.search(r"(\d+) kills in 4 rounds, (\d+) failures", done.stdout).groups())
    assert kills >= 2 and failures == 0, done.stdout
    assert done.stdout.count(" at point ") >= 2, done.stdout  # in rounds 2 and 4, however fast the machine
