"""Checkpoints: whole or absent, told apart from damaged ones, kept as long as they should be."""

import errno
import json
import os
import resource
import shutil
from dataclasses import replace

import pytest
from equal_runs import assert_equal_runs, differing_tensors

import uae_fast.checkpoint
import uae_fast.run
from uae_fast.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    clear_leftovers,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from uae_fast.config import CheckpointConfig, ConfigError
from uae_fast.guards import RunFailed
from uae_fast.models.loading import load_models, load_run
from uae_fast.run import Run
from uae_fast.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    """A run of three steps with a checkpoint of each, and its configuration."""
    from uae_fast.config import load_config

    folder = tmp_path_factory.mktemp("finished")
    config = load_config("tiny", [
        f"run={folder / 'run'}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}",
        "stages=[2]", "stage2.steps=3", "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8",
        "evaluate.images=2", "render.batch=8", "render.steps=4", "stage3.window_end=3", "reporters=[]",
        "checkpoint.every=1", "checkpoint.keep=9",
        "models.encoder=lora", "models.decoder=lora",
    ])  # fmt: skip
    return train(config), config


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run that a test may spoil, and its configuration."""
    run, config = finished
    return shutil.copytree(run, tmp_path / "copy"), replace(config, run=str(tmp_path / "copy"))


def steps(run):
    return [read_state(path)["step"] for path in checkpoints(run / "checkpoints")]


@pytest.mark.parametrize(
    "keep, expected",
    [
        (["keep=1"], [2, 4]),
        (["keep=3"], [1, 2, 3, 4]),
        (["keep=1", "keep_every=3"], [2, 3, 4]),
        (["keep=1", "keep_best=reward"], None),
        (["keep=1", "keep_best=loss"], None),
    ],
)
def test_retention(world, small_config, keep, expected):
    """The last few, every n-th and the best stay, and the ends of stages (2 and 4 here) whatever the rest."""
    options = ["stages=[2,3]", "checkpoint.every=1", "evaluate.images=0", *(f"checkpoint.{part}" for part in keep)]
    run = train(small_config(world, *options))
    if expected is None:
        key = keep[1].split("=")[1]
        values = [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines()]
        best = 1 + values.index(max(values) if key == "reward" else min(values))
        expected = sorted({2, 4, best})
    assert steps(run) == expected


def test_the_best_checkpoint_stays(finished, tmp_path):
    """With scores planted: higher is better for a reward, lower for a loss; the newest may be the worst."""
    for key, best in (("reward", 1), ("loss", 0)):
        folder = shutil.copytree(finished[0] / "checkpoints", tmp_path / key)
        for path, score in zip(checkpoints(folder), (-3.0, 5.0, 1.0, 2.0), strict=True):
            state = read_state(path) | {"score": score, "moment": None}
            (path / "state.json").write_text(json.dumps(state))
        prune_checkpoints(folder, CheckpointConfig(keep=1, keep_best=key))
        assert [read_state(path)["step"] for path in checkpoints(folder)] == [best, 3]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


SPOILED = {
    "cut short": lambda path: os.truncate(path / "optimizer.safetensors", 1000),
    "have changed": lambda path: flip(path / "encoder" / "adapter_model.safetensors"),
    "is missing": lambda path: (path / "mean.safetensors").unlink(),
    "is not in its": lambda path: (path / "encoder" / "adapter_model.bin").write_bytes(b"cos\nsystem\n"),
    "state.json have changed": lambda path: flip(path / "state.json"),
    "cannot be read": lambda path: os.truncate(path / "manifest.json", 50),
}


@pytest.mark.parametrize("words", SPOILED)
def test_damage_is_found_and_the_checkpoint_before_is_used(finished, copied, words, capsys):
    run, config = copied
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])
    spoiled = checkpoints(run / "checkpoints")[-1]
    SPOILED[words](spoiled)
    found = "1000 bytes, not" if words == "cut short" else words
    with pytest.raises(DamagedCheckpoint, match=found):
        verify_checkpoint(spoiled)
    train(config, resume=True)
    output = capsys.readouterr().out
    assert f"{spoiled} is damaged" in output and found in output and "resuming from" in output
    assert f"resuming from {run}/checkpoints/step-000001" in output
    assert (run / "checkpoints" / "step-000002.damaged").is_dir()
    assert_equal_runs(finished[0], run)
    assert steps(run) == [0, 1, 2, 3]


def test_a_damaged_checkpoint_is_not_used_by_other_commands(copied):
    run, _ = copied
    flip(checkpoints(run / "checkpoints")[-1] / "encoder" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"the contents of encoder/adapter_model\.safetensors have changed"):
        load_run(run, "stage2")
    assert steps(run) == [0, 1, 2, 3]  # reading commands rename nothing


def test_half_a_checkpoint_is_none(copied):
    run, _ = copied
    folder = run / "checkpoints"
    half = checkpoints(folder)[-1]
    (half / "manifest.json").unlink()  # written last
    (folder / ".step-000009.part").mkdir()
    os.rename(folder / "step-000001", folder / ".step-000001.pruned")
    os.rename(folder / "step-000002", folder / ".step-000002.old")  # killed between the two renames of a replacement
    shutil.copytree(folder / "step-000000", folder / ".step-000000.old")  # killed just after them
    assert steps(run) == [0]
    clear_leftovers(folder)
    assert steps(run) == [0, 2] and newest_checkpoint(folder).name == "step-000002"
    assert sorted(os.listdir(folder)) == ["step-000000", "step-000002", "step-000003"]


def test_everything_is_on_the_disk_before_it_is_published(finished, tmp_path, monkeypatch):
    """The order in which the disk is told: every file and folder, the rename, the folder it is in."""
    folder, events = tmp_path / "checkpoints", []
    fsync, rename = os.fsync, os.rename

    def told(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"{a} -> {b}"), rename(a, b)))
    models, state = load_models(finished[1]), read_state(checkpoints(finished[0] / "checkpoints")[-1])
    path = save_checkpoint(folder, models, state, {})
    part = folder / ".step-000003.part"
    published = events.index(f"{part} -> {path}")
    written = {str(part / each.relative_to(path)) for each in path.rglob("*")} | {str(part)}
    assert set(events[:published]) == written and events[published + 1 :] == [str(folder)]
    assert {"manifest.json", "state.json", "encoder"} <= {each.name for each in path.iterdir()}


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(copied, monkeypatch):
    run, config = copied
    shutil.rmtree(run / "checkpoints" / "step-000000")  # it has no tensors

    def cut_off(path, **_):
        sorted(path.rglob("*.safetensors"))[0].unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(uae_fast.checkpoint.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(run / "checkpoints", replace(config.checkpoint, keep=1))
    monkeypatch.undo()
    assert steps(run) == [2, 3]
    for path in checkpoints(run / "checkpoints"):
        verify_checkpoint(path)
    clear_leftovers(run / "checkpoints")
    assert not list((run / "checkpoints").glob(".*"))


FAULTS = {
    "fsync": "uae_fast.checkpoint.os.fsync",
    "rename": "uae_fast.checkpoint.os.rename",
    "tensors": "safetensors.torch.serialize_file",
    "text": "pathlib.Path.write_text",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_stops_no_training(finished, tmp_path, monkeypatch, capsys, fault):
    """The save of step 2 of 3 fails; the run ends in the same weights, and step 1 is there meanwhile."""
    save, during = Run.save, []

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_on_a_full_disk(self, **options):
        with monkeypatch.context() as patch:
            if self.position.step == 2:
                patch.setattr(FAULTS[fault], refuse)
            save(self, **options)
        if self.position.step == 2:
            during.extend(sorted(os.listdir(self.folder / "checkpoints")))

    monkeypatch.setattr(Run, "save", save_on_a_full_disk)
    run = train(replace(finished[1], run=str(tmp_path / "full")))
    output = capsys.readouterr().out
    assert "step 2 not saved: [Errno 28] No space left on device; training goes on, the last checkpoint is" in output
    assert during == ["step-000000", "step-000001"]  # and nothing half written
    assert steps(run) == [0, 1, 3]
    assert_equal_runs(finished[0], run)


def test_the_last_checkpoint_must_be_written(finished, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(folder, models, state, tensors):
        return refuse() if state["step"] == 3 else save_checkpoint(folder, models, state, tensors)

    monkeypatch.setattr(uae_fast.run, "save_checkpoint", save)
    with pytest.raises(RunFailed, match=r"step 3 cannot be saved: .*No space left.*the last checkpoint is .*-000002$"):
        train(replace(finished[1], run=str(tmp_path / "full")))


def test_a_real_write_error_leaves_the_old_checkpoint(finished, tmp_path):
    """Files may not pass 20 kB: the library's own writer fails half-way, not a stand-in for it."""
    run, config = finished
    folder = tmp_path / "checkpoints"
    old = shutil.copytree(checkpoints(run / "checkpoints")[-1], folder / "step-000003")
    models, state = load_models(config), read_state(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(folder, models, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(folder) == ["step-000003"]
    verify_checkpoint(old)
    save_checkpoint(folder, models, state, {})  # replaces it
    assert os.listdir(folder) == ["step-000003"]
    verify_checkpoint(old)
    assert differing_tensors(old, checkpoints(run / "checkpoints")[-1])
