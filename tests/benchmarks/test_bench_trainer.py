"""The trainer's benchmark: its gate, its rows, and what it says where it cannot run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.kernels.harness import WrongResults
from benchmarks.rows import OURS, environment
from benchmarks.trainer import contests, learning, stage2_update, stage3_update, steps, worlds
from benchmarks.trainer.contests import NEEDS_A_GPU
from benchmarks.trainer.test_speed import OPS

# Runs a round, and reports three times of its own
BENCHMARK = SimpleNamespace(
    pedantic=lambda run, **_: run(), stats=SimpleNamespace(stats=SimpleNamespace(data=[0.5, 1.0, 1.5]))
)
UPDATES = [stage2_update, stage3_update]


def quick(op):
    return list(op.cases("cpu", quick=True))


@pytest.mark.parametrize("op", UPDATES)
def test_ours_and_the_peer_do_the_same_work(op):
    (case,) = quick(op)
    contest = op.Contest(op, case)
    for name, entry in contest.entries.items():
        assert contest.time(name, BENCHMARK) is None
        assert 0 <= entry.errors["d_parameters"] < 1e-5 and entry.flops > 0
    ours, theirs = contest.rows(environment("cpu"))
    assert ours["contestant"] == OURS and theirs["contestant"] != OURS
    assert ours["median_ms"] == 1000 and ours["N"] == case.N


@pytest.mark.parametrize("op", UPDATES)
def test_nothing_is_timed_where_ours_is_wrong(op, monkeypatch):
    (case,) = quick(op)

    def wrong(case):
        ours, peer = op.contestants(case)

        def build(given):
            step = ours.build(given)
            return lambda: {name: result * (1 + 1e-4) for name, result in step().items()}

        return [replace(ours, build=build), peer]

    off = SimpleNamespace(**vars(op) | {"contestants": wrong})
    with pytest.raises(WrongResults, match="d_parameters is off by"):
        op.Contest(off, case)


@pytest.mark.parametrize("op", OPS)
def test_full_size_on_a_cpu_is_a_row_that_says_so(op):
    cases = [case for case in op.cases("cpu", quick=False) if case.preset != "tiny"]
    assert len(cases) >= 1
    for case in cases:
        contest = op.Contest(op, case)
        for contestant in op.contestants(case):
            assert contest.time(str(contestant), BENCHMARK) == NEEDS_A_GPU
        rows = contest.rows(environment("cpu"))
        assert {(row["reason"], row["median_ms"]) for row in rows} == {(NEEDS_A_GPU, None)}


def test_cases_are_all_different_and_tiny_ones_come_first():
    names = [str(case) for op in OPS for case in op.cases("cpu", quick=False)]
    assert len(set(names)) == len(names)
    presets = [case.preset for case in steps.cases("cuda", quick=False)]
    assert presets[:3] == ["tiny"] * 3 and len(presets) == 15


def test_steps_are_measured_phase_by_phase():
    case = next(case for case in quick(steps) if case.stage == 2)
    contest = steps.Contest(steps, case)
    (contestant,) = steps.contestants(case)
    assert contest.time(str(contestant), BENCHMARK) is None
    (row,) = contest.rows(environment("cpu"))
    assert row["seconds"].keys() == {"data", "captions", "conditions", "renders", "rewards", "rollout", "update"}
    assert row["images_per_second"] > 0 and row["tokens_per_second"] > 0 and row["mfu"] is None
    assert row["peak_bytes"] > 1e6 and row["flops"] > 1e8 and row["median_ms"] == 1000 and row["N"] == 8


def test_steps_whose_first_ratio_is_not_1_are_not_reported(monkeypatch):
    case = next(case for case in quick(steps) if case.stage == 2)
    real = worlds.take_step

    def off(*arguments):
        values, bad = real(*arguments)
        return values | {"ratio/max": 1.0001}, bad

    monkeypatch.setattr(worlds, "take_step", off)
    with pytest.raises(WrongResults, match="ratio"):
        steps.Contest(steps, case)


@pytest.mark.parametrize("name", [learning.BATCHED, learning.NAIVE])
def test_other_ways_write_the_same_captions(world, tmp_path, name):
    """Their images start from noises of their own, and their update gives the same gradients of the same rollout."""
    way = learning.WAYS[name]
    fast, other = (
        worlds.prepare(2, worlds.tiny_config(world, f"run={tmp_path}", *steps.QUICK[2], *settings)).stage
        for settings in ((), way.settings)
    )
    examples = worlds.Steps(2, fast.config).examples()
    own = fast.rollout(examples, 0)
    with way.taken():
        theirs = other.rollout(examples, 0)
    assert theirs.captions.texts == own.captions.texts and torch.equal(theirs.captions.mask, own.captions.mask)
    assert torch.allclose(theirs.captions.logprobs, own.captions.logprobs, atol=1e-5)
    assert not torch.allclose(theirs.advantages, own.advantages, atol=0.01)
    again = other.rollout(examples, 0)  # what stood in is gone
    assert torch.allclose(again.advantages, own.advantages, atol=1e-3)
    found = [worlds.gradients(stage, own, stage.groups()[0]["params"])[1] for stage in (fast, other)]
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in found)
    assert 0 < (a - b).norm() < 1e-5 * a.norm()  # other arithmetic, the same update


def test_the_batch_of_plain_practice_is_one_call_of_generate(world, tmp_path, monkeypatch):
    """Of all captions, prompts repeated; and one of the decoder's batches draws them, each from its own noise."""
    way, seen = learning.WAYS[learning.BATCHED], []
    config = worlds.tiny_config(world, f"run={tmp_path}", *steps.QUICK[2], *way.settings)
    taken = worlds.Steps(2, config)
    stage, drawn = taken.stage, []
    generate, velocity = stage.models.encoder.model.generate, stage.models.decoder.velocity
    monkeypatch.setattr(stage.models.encoder.model, "generate", lambda **given: seen.append(given) or generate(**given))
    monkeypatch.setattr(
        stage.models.decoder, "velocity", lambda x, *given: drawn.append(x.clone()) or velocity(x, *given)
    )
    with way.taken():
        taken.take(taken.examples())
    (call,) = seen
    assert len(call["inputs_embeds"]) == config.stage2.images * config.stage2.group_size == 8
    first, *others = drawn
    assert len(others) == config.render.steps - 1 and len({row.sum().item() for row in first}) == 8


def test_a_learning_run_ends_with_its_time_and_goes_on_where_it_is_missing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "HELDOUT", 8)
    row = learning.learn(world, learning.FAST, 0, seconds=0.01, every=0.0) | {
        "commit": "c",
        "device": "d",
        "threads": 1,
    }
    assert row["steps"] == len(row["training"]) == 1
    assert [len(point) for point in row["heldout"]] == [2, 2] and row["heldout"][0][0] == 0.0
    assert learning.missing([row], [0, 1], row) == [
        (name, seed) for seed in (0, 1) for name in learning.WAYS if (name, seed) != (learning.FAST, 0)
    ]  # fmt: skip
    assert len(learning.missing([row], [0], row | {"commit": "another"})) == 3
    found = [row | {"contestant": name} for name in learning.WAYS]
    assert learning.newest([*found, row | {"commit": "later"}]) == found
    assert learning.newest([row, found[2], row | {"seed": 1}]) == [row, found[2]]
    learning.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert learning.at([(0.0, 1.0), (2.0, 2.0)], 1.0) == 1.5 and learning.at([(0.0, 1.0), (2.0, 2.0)], 3.0) == 2.0


def test_a_card_holds_what_cuda_leaves_of_it(monkeypatch):
    caps, whole = [], SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: whole)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    for gib in (24, 16, None, 96):
        contests.clear("cuda", gib)
    assert caps == [pytest.approx((24 - 0.8) / 80), pytest.approx((16 - 0.8) / 80), 1.0, 1.0]
    contests.clear("cpu", 24)
    assert len(caps) == 4
