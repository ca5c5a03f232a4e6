"""The sampler's benchmark: its counts by hand, its gate, and what becomes of contestants that fail."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import conftest, tables
from benchmarks.kernels.harness import Absent, Contestant, WrongResults
from benchmarks.rows import OURS, append, environment, ratio, read, verdict
from benchmarks.sampler import counted, denoise

BENCHMARK = SimpleNamespace(pedantic=lambda run, rounds: [run() for _ in range(rounds)])


def tiny():
    (case,) = denoise.cases("cpu", quick=True)
    return case


def op(*contestants):
    made = {"inputs": denoise.inputs, "truth": denoise.truth, "Contest": denoise.Contest}
    return SimpleNamespace(**made, contestants=lambda case: list(contestants))


def contest(*contestants):
    return denoise.Contest(op(*contestants), tiny())


def right(given):
    return denoise.loop(denoise.transformer(tiny()), given)


def off(by):
    """Right but for a relative error of the first image's latents."""
    return lambda given: lambda: {"latents": right(given)()["latents"] * (1 + by)}


def products(case, layers, width, context, pooled, channels, patch=2):
    """FLOPs of one guided step of the small medium model, of which block 0 has a second attention."""
    batch, images, text = 2 * case.N, (case.pixels // 8 // patch) ** 2, case.T
    square = 2 * batch * width * width
    flops = 2 * batch * images * channels * patch**2 * width * 2  # into patches and out of them
    flops += 2 * batch * text * context * width
    flops += 2 * batch * (256 + pooled) * width + 2 * square  # timestep and pooled condition, two layers each
    for layer in range(layers):
        last = layer == layers - 1
        flops += square * (12 * images + (3 if last else 12) * text)  # attention 4, feed-forward 8
        flops += square * ((9 if layer == 0 else 6) + (2 if last else 6))  # modulations
        flops += 4 * batch * (images + text) ** 2 * width
        flops += (square * 4 * images + 4 * batch * images**2 * width) if layer == 0 else 0
    return flops + 2 * square  # norm_out


def test_flops_and_weights_of_a_small_model_by_hand():
    case = tiny()
    model = denoise.transformer(case)
    config = model.config
    counts, resident = denoise.counts_and_bytes(case, denoise.EAGER)
    by_hand = products(
        case, config.num_layers, model.inner_dim, config.joint_attention_dim, config.pooled_projection_dim,
        config.in_channels,
    )  # fmt: skip
    assert counts.flops == by_hand
    assert resident == sum(p.nbytes for p in model.parameters())

    ours, kept = denoise.counts_and_bytes(case, OURS)
    # The table's modulations and the context, embedded once for all steps, are missing; in their place stands the table
    width = model.inner_dim
    rows = [9 * width, 6 * width] + [6 * width, 2 * width] + [2 * width]
    square = 2 * 2 * case.N * width
    embedding = square * (256 + config.pooled_projection_dim + 2 * width) + square * sum(rows)
    assert counts.flops - ours.flops == embedding + square * case.T * config.joint_attention_dim
    gone = sum(4 * size * (width + 1) for size in rows)
    assert resident - kept == gone - 4 * denoise.STEPS * sum(rows)
    assert ours.launches < counts.launches / 3


def test_a_predicted_time_is_of_the_slower_of_arithmetic_and_bytes():
    kernels = [("mm", 0, 655e12), ("attention", 3.65e9, 306e12), ("add", 3.65e12, 0), ("mm", 3.65e12, 1.0)]
    counts = SimpleNamespace(kernels=[SimpleNamespace(name=n, bytes=b, flops=f) for n, b, f in kernels])
    assert counted.predicted_ms(counts, 512) == pytest.approx(4000)


def test_ours_must_be_as_near_to_the_truth_as_diffusers(tmp_path):
    found = contest(Contestant(OURS, right))
    assert 0 < found.error < 1e-5  # fp32
    assert found.time(OURS, BENCHMARK) is None
    (row,) = found.rows({"date": "now"})
    assert row["class"] == "same sampler" and row["reason"] is None
    case = found.case
    assert row["image_step_ms"][0] == pytest.approx(row["median_ms"] / case.N / case.steps)
    assert row["images_per_s"] == pytest.approx(1e3 * case.N / row["median_ms"])

    broken = [Contestant(OURS, right), Contestant(OURS, off(4 * found.error), {"attention": "x"}),
              Contestant("late", right)]  # fmt: skip
    contests = conftest.Contests({"kind": "cpu"}, tmp_path)
    visited = contests.enter(op(*broken), case)
    assert visited.time(OURS, BENCHMARK) is None
    for contestant in broken[1:]:
        with pytest.raises(WrongResults, match="latents is off by"):
            visited.time(str(contestant), BENCHMARK)
    contests.leave()
    (row,) = read(folder=tmp_path)  # nor is a rival's speed reported
    assert (row["contestant"], row["median_ms"]) == (OURS, None) and "latents is off by" in row["reason"]


def test_visits_are_paired_with_ours_on_a_machine_that_drifts(monkeypatch):
    """Loops take ever longer, a rival's twice and another's half as long as ours: ratios are what is true."""
    clock, speeds, done = SimpleNamespace(now=0.0, loops=0), {OURS: 1.0, "slow": 2.0, "quick": 0.5}, []

    def taking(name):
        def build(given):
            run = right(given)

            def step():
                clock.loops += 1
                clock.now += speeds[name] * 1.01**clock.loops
                done.append(name)
                return run()

            return step

        return build

    monkeypatch.setattr(denoise.harness.time, "perf_counter", lambda: clock.now)
    rivals = [Contestant(name, taking(name)) for name in speeds]
    found = denoise.Contest(op(*rivals), replace(tiny(), quick=False))
    for name in found.entries:
        assert found.time(name, BENCHMARK) is None
    ours, *others = found.rows({"date": "now"})
    assert done[-10:] == [*["quick", OURS, OURS, "quick"] * 2, "quick", OURS]
    assert [len(row[key]) for row in (ours, *others) for key in ("visits_ms", "beside_ms")] == [denoise.PAIRS] * 6
    assert ours["rounds"] == 3 * denoise.PAIRS and others[0]["rounds"] == denoise.PAIRS
    assert others[1]["median_ms"] / others[0]["median_ms"] > 1.1 * 0.25  # so far it drifts meanwhile
    for row, true, says in zip(others, (2.0, 0.5), ("faster", "slower"), strict=True):
        paired = ratio(ours, row)
        assert paired.median == pytest.approx(true, rel=0.011) and paired.high / paired.low < 1.021
        assert verdict(ours, row) == says
        assert ratio(*(part | {"visits_ms": part["visits_ms"][:4], "beside_ms": part["beside_ms"][:4]}
                       for part in (ours, row))) is None  # fmt: skip
    assert ratio(others[0], others[1]).median == pytest.approx(0.25, rel=0.025)  # neither of them ours, far apart


def test_what_fails_becomes_a_row_with_its_reason():
    def absent(given):
        raise Absent("needs a GPU")

    def missing(given):
        import no_such_package  # noqa: F401

    def fails(given):
        return lambda: 1 / 0

    rivals = {"absent": absent, "missing": missing, "fails": fails, "wrong": off(0.6), "rough": off(0.1)}
    found = contest(Contestant(OURS, right), *(Contestant(name, build) for name, build in rivals.items()))
    reasons = {name: found.time(name, BENCHMARK) for name in found.entries}
    assert reasons[OURS] is reasons["rough"] is None and "latents is off by 6.0e-01" in reasons["wrong"]
    assert reasons["missing"] == "no_such_package is not installed"
    assert {row["contestant"]: row["reason"] for row in found.rows({})} == reasons
    assert [name for name, entry in found.entries.items() if entry.step] == [OURS]  # room for the next
    without = contest(Contestant(OURS, fails), Contestant("rival", right))
    assert without.time(OURS, BENCHMARK) == "ZeroDivisionError: division by zero"
    assert without.time("rival", BENCHMARK).startswith("ours, to stand beside, has no speed: ZeroDivision")


def test_a_table_of_the_rows(tmp_path, monkeypatch):
    found = contest(Contestant(OURS, right), Contestant("slow", right), Contestant("rival", lambda given: 1 / 0))
    for name in found.entries:
        found.time(name, BENCHMARK)
    append(tmp_path / "sampler-gpu.jsonl", found.rows(environment("cpu") | {"device": "a GPU"}))
    monkeypatch.setattr(tables, "read", lambda pattern: read(pattern, tmp_path))
    written = tables.table("sampler-gpu")
    (ours, rival), cells = found.rows({})[:2], "{:.3g} ({:.3g}–{:.3g})"
    assert f"| **tiny-64-5, float32, N 2, T 5: uae-kernels** | **{cells.format(*ours['image_step_ms'])}** |" in written
    assert f"| slow | {cells.format(*rival['image_step_ms'])} | not judged, " in written  # of two visits
    assert "Not run: rival (ZeroDivisionError: division by zero) in tiny-64-5." in written


def test_without_a_truth_nobody_is_timed():
    def too_large(case, given):
        raise torch.OutOfMemoryError("31 GiB")

    found = denoise.Contest(SimpleNamespace(**vars(op(Contestant(OURS, right))) | {"truth": too_large}), tiny())
    assert found.time(OURS, BENCHMARK) == "no truth to compare with: out of memory"


def test_the_attention_asked_for_is_the_one_that_is_compiled(monkeypatch):
    """On a CPU PyTorch has flash attention and the formula, and none of cuDNN's."""
    monkeypatch.setitem(denoise.KERNELS, "math", SDPBackend.MATH)
    given, model = denoise.inputs(tiny()), denoise.transformer(tiny())
    for name, layers in (("flash", 3), ("math", 0)):  # two joint ones, and the dual one of the first block
        seen: list[str] = []

        def keep(module, _, seen=seen):
            seen += [str(node.target) for node in module.graph.nodes if "flash_attention" in str(node.target)]
            return module.forward

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep, inference_compiler=keep)
        denoise.within(name, denoise.loop(torch.compile(model, backend=backend, fullgraph=True), given))()
        assert len(seen) == layers, name
    with pytest.raises(RuntimeError, match="No viable backend"):
        denoise.within("cudnn", denoise.loop(model, given))()


def test_full_size_cases_come_in_the_order_of_their_value():
    cases = list(denoise.cases("cuda", quick=False))
    assert len({str(case) for case in cases}) == len(cases) == 2 * 2 * 3 * 2
    assert [(case.model, case.pixels, case.N, case.T) for case in cases[:4]] == [
        ("large", 512, 8, 333), ("medium", 512, 8, 333), ("large", 1024, 8, 333), ("medium", 1024, 8, 333),
    ]  # fmt: skip
    (quick,) = (case for case in denoise.cases("cuda", quick=True) if case.model == "large")
    assert (quick.pixels, quick.N, quick.T) == (512, 1, 333)
