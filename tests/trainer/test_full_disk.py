"""A disk that takes no more: the file is named, the last checkpoint stays, and going on ends in the same weights."""

import errno
import os
import resource
import subprocess

import pytest
import test_signals
from equal_runs import assert_equal_runs

import uae_fast.trainer
from uae_fast.checkpoint import checkpoints, newest_checkpoint, read_state
from uae_fast.cli import main
from uae_fast.config import save_config
from uae_fast.evaluate.heldout import Evaluator
from uae_fast.guards import RunFailed, disk_failures
from uae_fast.trainer import train


def configuration(world, folder, *overrides):
    """A checkpoint a step: two of stage 2, one of stage 3."""
    often = ("checkpoint.every=1", "checkpoint.keep=2", "stage3.steps=1", "evaluate.gallery=2")
    whole = ("stage2.micro_batch=8", "stage3.micro_batch=8")
    return test_signals.configuration(world, folder, *often, *whole, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world):
    return train(configuration(world, tmp_path_factory.mktemp("whole")))


class Full:
    """A disk of 64 MB in memory, filled to the last byte."""

    words = "No space left on device; free space on the disk of .* \\(0.0 MB are left"

    def __init__(self, folder):
        self.folder = folder
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
        if mounted.returncode:
            pytest.skip("no right to mount a disk in memory")

    def refuse(self):
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def relent(self):
        (self.folder / "ballast").unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class ReadOnly(Full):
    """A disk that its owner takes the right to write away from."""

    words = "Read-only file system; see that .*run can be written to"

    def refuse(self):
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)

    def relent(self):
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)


class Limited:
    """A limit of 40 bytes a file."""

    words = "File too large; allow larger files \\(ulimit -f\\)"

    def __init__(self, folder):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refuse(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, self.limits[1]))

    def relent(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def close(self):
        self.relent()


@pytest.fixture(params=[Full, ReadOnly, Limited])
def disk(request, tmp_path, capsys):  # capsys: pytest's own record of the output is a file, too
    disk = request.param(tmp_path)
    yield disk
    disk.close()


def refusing(disk, function):
    """A function during which the disk takes nothing."""

    def wrapped(*arguments, **options):
        disk.refuse()
        return function(*arguments, **options)

    return wrapped


def at_moment(disk, moment):
    measure = Evaluator.measure
    return lambda self, name: (refusing(disk, measure) if name == moment else measure)(self, name)


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize(
    "place, file, step",
    [
        ("config", "config.yaml", None),
        ("before", "samples/before", 0),
        ("stage2", "samples/stage2", 2),
        ("stage3", "samples/stage3", 3),
        ("summary", "summary.json", 3),
        ("report", "report.html", 3),
    ],
)
def test_what_cannot_be_written_is_named_and_the_run_goes_on_later(
    whole, world, tmp_path, monkeypatch, disk, place, file, step
):
    config = configuration(world, tmp_path)
    with monkeypatch.context() as patch:
        if place == "config":
            patch.setattr(uae_fast.trainer, "save_config", refusing(disk, save_config))
        elif place == "summary":
            patch.setattr(Evaluator, "summary", refusing(disk, Evaluator.summary))
        elif place == "report":
            patch.setattr(uae_fast.trainer, "write_report", refusing(disk, uae_fast.trainer.write_report))
        else:
            patch.setattr(Evaluator, "measure", at_moment(disk, place))
        with pytest.raises(RunFailed, match=rf"run/{file}.* cannot be written: {disk.words}") as failed:
            train(config)
    disk.relent()
    run = tmp_path / "run"
    assert not list(run.rglob("*.part"))
    if step is None:
        assert str(failed.value).endswith("and start again; there is no checkpoint")
        train(config)
    else:
        assert "go on with --resume; the last checkpoint is" in str(failed.value)
        assert read_state(newest_checkpoint(run / "checkpoints"))["step"] == step
        train(config, resume=True)
    assert_equal_runs(whole, run)
    for moment in ("source", "before", "stage2", "stage3"):
        names = {path.name for path in (whole / "samples" / moment).glob("*.png")}
        assert {path.name for path in (run / "samples" / moment).glob("*.png")} == names
        assert all(
            (run / "samples" / moment / n).read_bytes() == (whole / "samples" / moment / n).read_bytes() for n in names
        )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_disk_that_fills_up_for_good_ends_the_run_at_its_next_measurement(world, tmp_path, monkeypatch, capsys):
    """Steps go on without a checkpoint; what must be written then is what stops the run, with status 1."""
    disk = Full(tmp_path)
    try:
        save_config(configuration(world, tmp_path, "reporters=[tensorboard]"), tmp_path / "config.yaml")
        monkeypatch.setattr(uae_fast.trainer, "take_step", refusing(disk, uae_fast.trainer.take_step))
        capsys.readouterr()
        assert main(["train", str(tmp_path / "config.yaml")]) == 1
        said, error = capsys.readouterr()
        assert "step 1 not saved: [Errno 28] No space left on device" in said
        assert "metrics.jsonl not written: [Errno 28] No space left on device; its rows wait" in said
        assert error.count("\n") == 1 and "step-000000" in error
        assert "samples/stage2" in error and "cannot be written: No space left on device" in error
        assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000"]
    finally:
        disk.close()


def test_other_errors_are_left_alone(tmp_path):
    run, elsewhere = tmp_path / "run", str(tmp_path / "runs")
    for error in (OSError("no such model"), FileNotFoundError(errno.ENOENT, "gone", elsewhere), OSError(5)):
        with pytest.raises(OSError) as caught, disk_failures(run):
            raise error
        assert caught.value is error
    words = os.strerror(errno.EACCES)
    for place in (run / "config.yaml", run, tmp_path):
        with pytest.raises(RunFailed, match=f"^{place} cannot be written: {words}; see that"), disk_failures(run):
            raise PermissionError(errno.EACCES, words, str(place))


def test_a_folder_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFailed, match=r"run.* cannot be written: (Not a directory|File exists); see that .*run can"):
        train(configuration(world, tmp_path))
