"""Reporters: the real TensorBoard, W&B and Trackio, offline; what they get, and what never reaches them."""

import importlib.util
import json
import os
import struct
import subprocess
import sys

import pytest
from equal_runs import rows

from uae_fast.checkpoint import checkpoints
from uae_fast.config import ConfigError
from uae_fast.logging import RunLog
from uae_fast.reporters import check_reporters
from uae_fast.trainer import train

OPTIONS = ("stages=[2]", "stage2.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "evaluate.images=2")


class Recorder:
    """A reporter that notes what it is told, and fails from a call on."""

    def __init__(self, fails=10**9):
        self.told, self.left = [], fails

    def _tell(self, *what):
        self.told.append(what)
        self.left -= 1
        if self.left <= 0:
            raise ConnectionError("the network\x1b is gone\nTraceback ...")

    def scalars(self, step, values):
        self._tell(step, values)

    def pictures(self, step, found):
        self._tell(step, found)

    def close(self):
        self._tell("closed")


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr("uae_fast.logging.open_reporter", lambda *_: made)
    return made


def test_a_reporter_gets_every_row_and_every_measurement(world, small_config, recorder):
    run = train(small_config(world, *OPTIONS, "reporters=[wandb]"))
    told = recorder.told
    summary = json.loads((run / "summary.json").read_text())
    assert told[-1] == ("closed",)
    steps = [(step, values) for step, values in told[:-1] if any(name.startswith("stage2/") for name in values)]
    for (step, values), row in zip(steps, rows(run), strict=True):
        assert (step, values) == (row["step"], {f"stage2/{name}": row[name] for name in row.keys() - {"step", "stage"}})
    for step, moment, (first, second) in ((0, "before", told[:2]), (3, "stage2", told[-3:-1])):
        assert first[0] == second[0] == step and first[1]["heldout/reward"] == summary[moment]["reward"]
        folder = run / "samples" / moment
        scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        drawn = {f"samples/scene-0000{i}": (folder / row["picture"], row["caption"]) for i, row in enumerate(scores)}
        assert second[1] == drawn


@pytest.mark.parametrize("fails", [1, 2, 4, 8])
def test_a_reporter_that_fails_is_off_and_the_run_goes_on(world, small_config, monkeypatch, capsys, fails):
    """At numbers, pictures, a step, and the end; of eight calls in all."""
    made = Recorder(fails)
    monkeypatch.setattr("uae_fast.logging.open_reporter", lambda *_: made)
    run = train(small_config(world, *OPTIONS, "reporters=[trackio]"))
    said = [line for line in capsys.readouterr().out.splitlines() if "trackio" in line]
    assert said == [f"trackio is off from here on: the network\\x1b is gone; {run}/metrics.jsonl has everything"]
    assert len(made.told) == fails and len(rows(run)) == 3 and (run / "report.html").is_file()


def test_a_reporter_that_cannot_begin_is_off(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("api.wandb.ai: no route")

    monkeypatch.setattr("uae_fast.logging.open_reporter", refuse)
    log = RunLog(tmp_path, ["wandb"])
    log.metrics(1, "stage2", {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("wandb is off from here on: api.wandb.ai: no route") == 1
    assert rows(tmp_path) == [{"step": 1, "stage": "stage2", "loss": 1.0}]


def test_a_missing_package_is_named_with_its_command_before_anything_loads(world, small_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_reporters(["wandb", "trackio", "tensorboard"])
    assert caught.value.problems == [
        f"reporters: {name} is not installed; pip install 'uae-fast[{extra}]'"
        for name, extra in (("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "train"))
    ]
    monkeypatch.setattr("uae_fast.trainer.load_models", lambda _: pytest.fail("loaded models"))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        train(small_config(world, "reporters=[wandb]"))


def test_tensorboard_shows_scalars_captions_and_pictures(world, small_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(small_config(world, *OPTIONS, "reporters=[tensorboard]"))
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    rewards = [(event.step, event.value) for event in found.Scalars("stage2/reward")]
    assert rewards == [(row["step"], pytest.approx(row["reward"])) for row in rows(run)]
    assert [event.step for event in found.Scalars("heldout/reward")] == [0, 3]
    images = found.Images("samples/scene-00000")
    assert [(event.step, event.width, event.height) for event in images] == [(0, 32, 32), (3, 32, 32)]


def trained(folder, world, reporter, *options, **environment):
    """A run in a process of its own, as those packages leave threads and handlers behind."""
    command = [
        sys.executable, "-m", "uae_fast.cli", "train", "tiny", f"run={folder / 'run'}", f"data.train={world / 'train'}",
        f"data.heldout={world / 'heldout'}", *OPTIONS, "stage2.images=2", "stage2.group_size=4", "render.batch=8",
        "evaluate.gallery=2", "stage2.micro_batch=8", f"reporters=[{reporter}]", *options,
    ]  # fmt: skip
    inside = {**os.environ, "HOME": str(folder), "SECRET_TOKEN": "hunter2", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=inside, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout + done.stderr


def log_records(data):
    """The records of a file in LevelDB's log format, behind W&B's 7 bytes: blocks of 32 KiB, in parts with 7 each."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_records(folder):
    """What a file of W&B says: the runs it names, and the history, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    runs, history = set(), {}
    for data in log_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            runs.add((record.run.run_id, record.run.project, record.run.display_name))
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            history.setdefault(row["_step"], {}).update(row)
    return runs, history


def test_wandb_offline_has_the_rows_of_the_run_and_goes_on_as_the_same(world, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "work.txt").write_text("committed")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "work.txt"], [*author, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "work.txt").write_text("not committed")
    run, _ = trained(tmp_path, world, "wandb", WANDB_MODE="offline")
    (first,) = (run / "wandb").glob("offline-run-*")
    ids, history = wandb_records(first)
    number = (run / "run_id").read_text().strip()
    assert ids == {(number, "uae-fast", f"run-{number}")}
    assert sorted(history) == [0, 1, 2, 3]
    for row in rows(run):
        assert {name: history[row["step"]][f"stage2/{name}"] for name in row.keys() - {"step", "stage"}} == {
            name: pytest.approx(row[name]) for name in row.keys() - {"step", "stage"}
        }
    summary = json.loads((run / "summary.json").read_text())
    assert history[3]["heldout/reward"] == pytest.approx(summary["stage2"]["reward"])
    assert history[0]["heldout/reward"] == pytest.approx(summary["before"]["reward"])
    assert {"samples/scene-00000", "samples/scene-00001"} <= {
        name.rpartition("/_type")[0] or name for name in history[3]
    }
    kept = {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    assert not [name for name in kept if name.endswith((".py", ".patch")) or "/code/" in name]
    everything = b"".join(path.read_bytes() for path in first.rglob("*") if path.is_file())
    for words in (b"hunter2", b"generation for understanding", b"committed", b"--resume", b"checkpoint.keep=9"):
        assert words not in everything  # of the environment, the console, git, the command line

    for path in checkpoints(run / "checkpoints")[2:]:
        path.rename(tmp_path / path.name)
    again, _ = trained(tmp_path, world, "wandb", "--resume", WANDB_MODE="offline")
    second = next(path for path in (again / "wandb").glob("offline-run-*") if path != first)
    ids, history = wandb_records(second)
    assert ids == {(number, "uae-fast", f"run-{number}")} and sorted(history) == [2, 3]


def test_trackio_has_the_rows_of_the_run(world, tmp_path):
    pytest.importorskip("trackio")
    run, said = trained(tmp_path, world, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    assert "trackio is off" not in said
    code = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("uae-fast")
print(json.dumps([run, SQLiteStorage.get_logs("uae-fast", run)], default=str))
"""
    inside = {**os.environ, "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inside, timeout=300)
    assert done.returncode == 0, done.stderr
    name, logs = json.loads(done.stdout.splitlines()[-1])
    assert name == f"run-{(run / 'run_id').read_text().strip()}"
    rewards = {log["step"]: log["stage2/reward"] for log in logs if "stage2/reward" in log}
    assert rewards == {row["step"]: pytest.approx(row["reward"]) for row in rows(run)}
    assert {log["step"] for log in logs if "heldout/reward" in log} == {0, 3}
    assert any("samples/scene-00000" in log for log in logs)
