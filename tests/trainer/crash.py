"""Kills a small run again and again, and compares what it ends in with a run that was never killed.

    python tests/trainer/crash.py --rounds 30        (make crash)

One process imports everything and forks a child for every attempt, so that an attempt costs a second or two. By turns,
a child is killed after a random time, or kills itself at a random fault point: before and in the middle of every write,
before and after every fsync, before every rename, removal and new folder, and half-way through every file of tensors;
each of these kinds has the same chance. Production code knows nothing of this: the points are put around the functions
of the standard library and of safetensors that it calls. Each round ends in an attempt that nobody kills.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from equal_runs import difference

from uae_fast.checkpoint import checkpoints, read_state, verify_checkpoint

OPTIONS = [
    "stages=[2,3]", "models.encoder=lora", "models.decoder=lora", "models.lora_rank=2", "reporters=[]",
    "evaluate.images=2", "evaluate.gallery=1", "checkpoint.every=1", "checkpoint.keep=1",
    "render.steps=3", "render.batch=4", "caption.max_new_tokens=8",
    "stage2.steps=3", "stage2.images=2", "stage2.group_size=2", "stage2.micro_batch=4", "stage2.lr=1e-3",
    "stage3.steps=3", "stage3.images=2", "stage3.group_size=2", "stage3.micro_batch=4", "stage3.window=1",
    "stage3.window_end=2",
]  # fmt: skip


class FaultPoints:
    """Counts the moments in which a run touches its folder, and kills the process at one of them.

    Args:
        folder: the run's; what lies outside is not counted.
        fatal: the number of the point to die at, from 1; 0 for none.
    """

    def __init__(self, folder: Path, fatal: int):
        self.folder, self.fatal = str(folder), fatal
        self.passed: list[str] = []  # the points' kinds

    def reached(self, kind: str, path: object) -> None:
        if str(path).startswith(self.folder):
            self.passed.append(kind)
            if len(self.passed) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Puts the points into this process, for good."""
        import safetensors.torch

        serialize, opened = safetensors.torch.serialize_file, io.open
        for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(module, name, self._before(name, getattr(module, name)))
        fsync = os.fsync

        def fsync_between(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.reached("fsync", path)
            fsync(descriptor)
            self.reached("fsync", path)

        def serialize_halfway(tensors, path, *arguments, **options):
            self.reached("tensors", path)
            serialize(tensors, path, *arguments, **options)
            content = Path(path).read_bytes()
            os.truncate(path, len(content) // 2)
            self.reached("tensors", path)
            with opened(path, "r+b") as file:
                file.write(content)
            self.reached("tensors", path)

        def open_and_write_halves(path, mode="r", *arguments, **options):
            if mode.startswith("r"):
                return opened(path, mode, *arguments, **options)
            self.reached("write", path)
            file = opened(path, mode, *arguments, **options)
            return Halves(file, lambda: self.reached("write", path)) if str(path).startswith(self.folder) else file

        os.fsync = fsync_between
        safetensors.torch.serialize_file = serialize_halfway
        builtins.open = io.open = open_and_write_halves  # pathlib calls io's

    def _before(self, kind: str, function: Callable) -> Callable:
        def wrapped(path, *arguments, dir_fd=None, **options):
            if dir_fd is not None:  # as shutil.rmtree gives it
                options["dir_fd"] = dir_fd
                self.reached(kind, f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}")
            else:
                self.reached(kind, path)
            return function(path, *arguments, **options)

        return wrapped


class Halves:
    """A file whose every write happens in two halves, with a fault point in between."""

    def __init__(self, file, between: Callable[[], None]):
        self._file, self._between = file, between

    def write(self, content) -> int:
        middle = len(content) // 2
        written = self._file.write(content[:middle])
        self._file.flush()
        self._between()
        return written + self._file.write(content[middle:])

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> Halves:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def attempt(folder: Path, world: Path, *, fatal: int = 0, seconds: float | None = None) -> tuple[int, list[str]]:
    """One process of a run, resumed where it has a checkpoint; killed at a fault point or after a time.

    Returns:
        Exit status (−9 where it was killed) and the kinds of the fault points it passed, if it came to its end.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            status = run_child(folder, world, fatal, write)
        os._exit(status)
    os.close(write)
    end = time.monotonic() + (3600 if seconds is None else seconds)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    with os.fdopen(read) as pipe:
        return os.waitstatus_to_exitcode(done[1]), pipe.read().split()


def run_child(folder: Path, world: Path, fatal: int, pipe: int) -> int:
    from uae_fast.cli import main

    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    points = FaultPoints(folder, fatal)
    points.install()
    places = [f"run={folder}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}"]
    resume = ["--resume"] if checkpoints(folder / "checkpoints") else []
    status = main(["train", "tiny", *places, *OPTIONS, *resume])
    with os.fdopen(pipe, "w") as file:
        file.write(" ".join(points.passed))
    return status


def survey(folder: Path) -> str:
    """The newest checkpoint of a killed run, verified."""
    saved = checkpoints(folder / "checkpoints")
    for path in saved:
        verify_checkpoint(path)
    return f"step {read_state(saved[-1])['step']}" if saved else "no checkpoint yet"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from uae_fast.cli import quiet_libraries
    from uae_fast.tiny.export import export

    quiet_libraries()
    import diffusers.loaders  # noqa: F401  imported once, before any fork; nothing is computed in this process
    import peft  # noqa: F401
    import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl  # noqa: F401

    import uae_fast.trainer  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="uae-fast-crash-"))
    world = folder / "world"
    export(world / "train", "train", 16, seed=0)
    export(world / "heldout", "heldout", 4, seed=0)
    began = time.monotonic()
    status, points = attempt(folder / "whole", world)
    duration = time.monotonic() - began
    if status:
        print((folder / "whole.log").read_text())
        return 1
    kinds = {kind: [n for n, each in enumerate(points, 1) if each == kind] for kind in sorted(set(points))}
    counts = ", ".join(f"{kind} {len(places)}" for kind, places in kinds.items())
    print(f"a run that nobody kills: {duration:.1f} s, {len(points)} fault points ({counts})", flush=True)

    kills = failures = 0
    for number in range(1, arguments.rounds + 1):
        run, words, dice = folder / f"round{number}", [], random.Random(f"{arguments.seed} {number}")
        for turn in range(dice.randint(1, 3)):
            kind, seconds, fatal = dice.choice(list(kinds)), dice.random() * duration, 0
            how = f"{seconds:.2f} s"
            if (number + turn) % 2 == 0:
                fatal = dice.choice(kinds[kind])
                how = f"{kind} at point {fatal}"
            status, _ = attempt(run, world, fatal=fatal, seconds=None if fatal else seconds)
            if status != -signal.SIGKILL:
                break
            kills += 1
            words.append(f"{how} → {survey(run)}")
        if status == -signal.SIGKILL:
            status, _ = attempt(run, world)
        found = f"exit status {status}" if status else difference(folder / "whole", run)
        left = [path.name for path in run.rglob(".*")]
        found = found or (f"left behind: {left}" if left else "")
        failures += bool(found)
        print(f"round {number}: {'; '.join(words) or 'came to its end before'}: {found or 'equal'}", flush=True)
        if found:
            print(run.with_suffix(".log").read_text()[-3000:])
    print(f"{kills} kills in {arguments.rounds} rounds, {failures} failures")
    if failures:
        print(f"what they left is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
