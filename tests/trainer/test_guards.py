"""Numbers that are not finite and memory that runs out: injected, and what then stays as it was."""

import json

import pytest
import torch
from equal_runs import assert_equal_runs, differing_tensors, rows, weights

import uae_fast.trainer
from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.cli import main
from uae_fast.config import save_config
from uae_fast.data import ImageFolder
from uae_fast.guards import RunFailed, fetch, shrink_micro_batch
from uae_fast.models.reward import Reward
from uae_fast.stages.generation_for_understanding import GenerationForUnderstanding
from uae_fast.stages.understanding_for_generation import UnderstandingForGeneration
from uae_fast.trainer import accumulate, train

STAGE = {2: GenerationForUnderstanding, 3: UnderstandingForGeneration}
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def make(world, small_config):
    """``make(stage, "key=value", …)``: three steps of a stage, a checkpoint of each; warm-up takes five."""

    def config(stage, *overrides, run="run"):
        return small_config(
            world, f"stages=[{stage}]", f"stage{stage}.steps=3", f"stage{stage}.micro_batch=4", "checkpoint.every=1",
            "checkpoint.keep=9", "evaluate.images=0", "render.batch=8", "render.steps=4", "stage3.window_end=3",
            *overrides, run=run,
        )  # fmt: skip

    return config


def inject(monkeypatch, cls, steps, where, value):
    """Plants `value` into the loss, a gradient, a reward or a log-prob of some of a stage's steps."""
    rollout, loss, reward = cls.rollout, cls.loss, Reward.forward
    now = {"step": None}

    def planted_rollout(self, examples, step):
        now["step"] = step
        result = rollout(self, examples, step)
        if where == "log-ratio" and step in steps:
            if cls is GenerationForUnderstanding:
                result.old_logprobs = stored = self.logprobs(result, slice(0, len(result)), "policy").detach()
            else:
                stored = result.trajectory.log_probs
            stored.view(-1)[0] = value
        return result

    def planted_loss(self, result, rows):
        total, metrics = loss(self, result, rows)
        if now["step"] in steps and rows.start:
            if where == "loss":
                total = total * value
            if where == "gradient":  # the loss stays finite: √(0·p) is 0, its derivative 0·∞
                parameter = self.groups()[0]["params"][0]
                total = total + (parameter.flatten()[0] * 0).sqrt()
        return total, metrics

    def planted_reward(self, images, source):
        result = reward(self, images, source)
        if where == "reward" and now["step"] in steps:
            result[1] = value
        return result

    monkeypatch.setattr(cls, "rollout", planted_rollout)
    monkeypatch.setattr(cls, "loss", planted_loss)
    monkeypatch.setattr(Reward, "forward", planted_reward)


@pytest.mark.parametrize(
    "number, optimizer, where, value, named",
    [
        (2, "adamw8bit", "loss", NAN, "loss"),
        (2, "adamw", "gradient", NAN, "grad_norm"),
        (2, "adamw8bit", "gradient", NAN, "grad_norm"),
        (2, "adamw8bit", "reward", NAN, "reward"),
        (2, "adamw", "reward", INF, "reward"),
        (2, "adamw8bit", "log-ratio", NAN, "ratio/mean"),
        (3, "adamw8bit", "loss", INF, "loss"),
        (3, "adamw", "gradient", NAN, "grad_norm"),
        (3, "adamw8bit", "reward", -INF, "reward"),
        (3, "adamw8bit", "log-ratio", NAN, "ratio/mean"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(make, monkeypatch, number, optimizer, where, value, named):
    """Of three steps the second is bad: weights, moments, running mean and warm-up are those of before it."""
    config = make(number, f"optimizer.name={optimizer}", f"stage{number}.lr=1e-3")
    inject(monkeypatch, STAGE[number], {1}, where, value)
    run = train(config)
    first, second, third = checkpoints(run / "checkpoints")[1:4]
    assert differing_tensors(first, second) == []
    assert differing_tensors(second, third)
    table = rows(run)
    assert [row["skipped_steps"] for row in table] == [0, 1, 1]
    assert [row["lr"] for row in table] == pytest.approx([1e-3 / 6, 2e-3 / 6, 2e-3 / 6])
    assert table[1][named] is None and "NaN" not in (run / "metrics.jsonl").read_text()
    assert all(value is not None for row in (table[0], table[2]) for value in row.values())

    bad = json.loads((run / "bad_step_2.json").read_text())
    assert named in bad["not_finite"]
    batch = ImageFolder(config.data.train, "data.train").batch(1, 2, config.seed, f"stage{number}")
    assert bad["images"] == [{"id": example.id, "file": example.file} for example in batch]
    assert (bad["step"], bad["stage"], bad["stage_step"], bad["seed"]) == (2, f"stage{number}", 1, config.seed)
    assert sorted(path.name for path in run.glob("bad_step_*")) == ["bad_step_2.json"]


def test_a_skipped_step_is_skipped_again_after_a_resume(make, monkeypatch, tmp_path):
    inject(monkeypatch, GenerationForUnderstanding, {1}, "loss", NAN)
    whole = train(make(2, run="whole"))
    parts = train(make(2, run="parts"))
    for path in checkpoints(parts / "checkpoints")[3:]:
        path.rename(tmp_path / path.name)
    train(make(2, run="parts"), resume=True)
    assert_equal_runs(whole, parts)


def test_after_a_bad_second_update_the_first_stays_and_the_rest_is_left_out(make, monkeypatch):
    losses = []
    original = GenerationForUnderstanding.loss

    def loss(self, rollout, rows):
        losses.append(rows)
        total, metrics = original(self, rollout, rows)
        return (total * NAN if len(losses) == 3 else total), metrics  # two micro-batches an update

    monkeypatch.setattr(GenerationForUnderstanding, "loss", loss)
    run = train(make(2, "stage2.updates=3", "stage2.steps=1"))
    assert len(losses) == 4 and rows(run)[0]["skipped_steps"] == 1
    once = weights(checkpoints(run / "checkpoints")[-1])
    monkeypatch.undo()
    single = weights(checkpoints(train(make(2, "stage2.steps=1", run="single")) / "checkpoints")[-1])
    assert once.keys() == single.keys() and all(torch.equal(once[name], single[name]) for name in once)


def test_bad_steps_in_a_row_stop_the_run(make, monkeypatch, tmp_path, capsys):
    """Two good steps between the bad ones start the count anew; the limit itself ends in status 1."""
    inject(monkeypatch, GenerationForUnderstanding, {0, 1, 3, 4}, "loss", NAN)
    config = make(2, "stage2.steps=6", "optimizer.max_skipped=3")
    assert rows(train(config))[-1]["skipped_steps"] == 4
    save_config(make(2, "stage2.steps=6", "optimizer.max_skipped=2", run="stops"), tmp_path / "config.yaml")
    capsys.readouterr()
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("2 steps in a row were not finite (optimizer.max_skipped); the last checkpoint is ")
    assert [row["step"] for row in rows(tmp_path / "stops")] == [1, 2]
    assert read_state(checkpoints(tmp_path / "stops/checkpoints")[-1])["step"] == 1


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_poisoned_weights_are_never_published(make, monkeypatch, mode):
    """A weight that turns NaN makes every later step bad; one that no loss sees is found when it would be saved."""
    update, calls = uae_fast.trainer.RunningMean.update, []

    def poison(self):
        update(self)
        calls.append(0)
        if len(calls) == 2:
            with torch.no_grad():
                self.parameters[-1].view(-1)[0] = NAN

    monkeypatch.setattr(uae_fast.trainer.RunningMean, "update", poison)
    options = (f"models.encoder={mode}", "stage2.lr=1e-3", "stage2.steps=8")
    with pytest.raises(RunFailed, match=r"step 2: encoder\..* is not finite, nothing is saved; .*step-000001$"):
        train(make(2, *options, run="at-once"))
    calls.clear()
    with pytest.raises(RunFailed, match=r"3 steps in a row were not finite .*step-000000$"):
        train(make(2, *options, "checkpoint.every=9", run="later"))


def test_poisoned_moments_are_never_published(make, monkeypatch):
    original = uae_fast.trainer.optimizer_tensors

    def poisoned(optimizer):
        found = original(optimizer)
        name = next(name for name, value in found.items() if value.is_floating_point() and value.numel() > 1)
        return {**found, name: torch.full_like(found[name], INF)}

    monkeypatch.setattr(uae_fast.trainer, "optimizer_tensors", poisoned)
    with pytest.raises(RunFailed, match=r"step 1: optimizer\.\d+\.\w+ is not finite"):
        train(make(2))


def test_an_update_fetches_its_numbers_at_once(make, monkeypatch):
    """One transfer an update; nothing else is read between the first loss and the optimiser's step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.found += function is torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    config = make(3)
    seen = []

    def counted(stage, rollout, parameters, max_grad_norm):
        with Reads() as reads:
            metrics = accumulate(stage, rollout, parameters, max_grad_norm)
            values = fetch({**rollout.metrics, **metrics})
        seen.append(reads.found)
        assert values["loss"] == metrics["loss"].item() and len(values) > 8
        return metrics

    monkeypatch.setattr(uae_fast.trainer, "accumulate", counted)
    train(config)
    assert seen == [0] * 3


# ---- memory that runs out -------------------------------------------------------------------------------------------


def lack(kind="PyTorch"):
    """Raises what comes of too little memory: PyTorch's, a library's, or the end of a recording that failed for it."""
    if kind == "library":
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    if kind == "kernel":
        raise RuntimeError("Triton Error [CUDA]: out of memory")
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    finally:
        if kind == "recording":
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def run_out(monkeypatch, cls, method, largest, first_call=1, kind="PyTorch"):
    """From a call on, a method has memory for micro-batches of at most `largest`."""
    original, calls = getattr(cls, method), []

    def limited(self, *arguments):
        calls.append(self.settings.micro_batch)
        if self.settings.micro_batch > largest and len(calls) >= first_call:
            lack(kind)
        return original(self, *arguments)

    monkeypatch.setattr(cls, method, limited)
    return calls


@pytest.mark.parametrize(
    "number, method, first_call", [(2, "rollout", 1), (2, "loss", 2), (3, "loss", 2), (2, "loss", 6), (3, "loss", 6)]
)
def test_out_of_memory_halves_the_micro_batch(make, monkeypatch, capsys, number, method, first_call):
    """The step is done again, bit for bit the step of a run configured so; a resumed run keeps to it.

    Memory runs out before the first step's gradients, half-way through them, and half-way through a later step's.
    """
    option, steps = f"stage{number}.micro_batch", f"stage{number}.steps=4"
    expected = train(make(number, steps, f"{option}=1", run="small"))
    with monkeypatch.context() as patch:
        run_out(patch, STAGE[number], method, 1, first_call)
        run = train(make(number, steps, run="large"))
    output = capsys.readouterr().out
    assert f"out of memory: stage{number}.micro_batch goes from 4 to 2\n" in output
    assert f"out of memory: stage{number}.micro_batch goes from 2 to 1\n" in output
    table = rows(run)
    first = next(i for i, row in enumerate(table) if row["micro_batch"] == 1)
    assert [row["micro_batch"] for row in table] == [4] * first + [1] * (4 - first)
    assert (first > 0) == (first_call == 6)
    assert {row["ratio/max"] for row in table} == {1.0}
    ours, theirs = (checkpoints(each / "checkpoints")[-1] for each in (run, expected))
    assert first or differing_tensors(ours, theirs) == []
    assert [row["reward"] for row in table] == pytest.approx([row["reward"] for row in rows(expected)], abs=1e-4)
    assert read_state(checkpoints(run / "checkpoints")[3])["micro_batch"] == 1
    ours.rename(run / "ending")
    train(make(number, steps, run="large"), resume=True)  # with memory enough again
    assert differing_tensors(run / "ending", ours) == []


@pytest.mark.parametrize("kind", ["library", "kernel", "recording"])
def test_memory_runs_out_under_other_names(make, monkeypatch, capsys, kind):
    run_out(monkeypatch, STAGE[3], "rollout", 2, kind=kind)
    train(make(3, "stage3.steps=1", run="large"))
    assert "out of memory: stage3.micro_batch goes from 4 to 2\n" in capsys.readouterr().out
    monkeypatch.setattr(STAGE[3], "rollout", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train(make(3, "stage3.steps=1", run="wrong"))


def test_running_out_in_a_later_update_repeats_that_update_alone(make, monkeypatch):
    config = make(2, "stage2.updates=2", "stage2.steps=1", "stage2.micro_batch=8", "optimizer.warmup_steps=0")
    plain = train(config)
    with monkeypatch.context() as patch:
        calls = run_out(patch, GenerationForUnderstanding, "loss", 4, 2)
        run = train(make(2, "stage2.updates=2", "stage2.steps=1", "stage2.micro_batch=8", "optimizer.warmup_steps=0",
                         run="later"))  # fmt: skip
    assert calls == [8, 8, 4, 4]
    ours, theirs = (weights(checkpoints(each / "checkpoints")[-1]) for each in (run, plain))
    start = weights(checkpoints(run / "checkpoints")[0])
    assert not start
    moved = [name for name in ours if "encoder" in name]
    assert moved
    for name in moved:
        assert (ours[name].float() - theirs[name].float()).abs().max() < 2e-6, name


def test_a_micro_batch_of_one_is_the_end(make, monkeypatch):
    run_out(monkeypatch, GenerationForUnderstanding, "loss", 0)
    with pytest.raises(RunFailed, match=r"out of memory in stage2 with a micro-batch of 1; lower render\.batch"):
        train(make(2))


@pytest.mark.parametrize("images, group, sizes", [(5, 3, [15, 5, 1]), (2, 6, [12, 6, 3, 1]), (4, 4, [16, 8, 4, 2, 1])])
def test_micro_batches_stay_divisors_of_the_samples(make, images, group, sizes):
    config = make(2, f"stage2.images={images}", f"stage2.group_size={group}", f"stage2.micro_batch={images * group}")

    class Stage:
        name, settings = "stage2", config.stage2

    assert [images * group, *(shrink_micro_batch(Stage) for _ in sizes[1:])] == sizes
    assert (config.stage2.group_size, config.stage2.images) == (group, images)
