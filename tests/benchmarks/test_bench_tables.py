"""Numbers in Markdown files are those of the committed rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import tables
from benchmarks.kernels import report
from benchmarks.rows import OURS
from benchmarks.trainer import learning


@pytest.mark.parametrize("file", tables.FILES, ids=tables.PLACES)
def test_files_say_what_the_rows_say(file):
    text = file.read_text()
    for found in tables.MARKED.finditer(text):
        assert found[0] == tables.written(found[0], file.parent), (
            f"{file}: table {found[2]} is not that of the rows: python -m benchmarks.tables"
        )
    assert tables.MARKED.search(text)


def rows(kind="cpu", ours=10.0, rival=20.0, **more):
    base = {
        "op": "square", "variant": "only", "dtype": "float32", "N": 8, "H": None, "V": None, "B": None, "T": None,
        "config": {}, "errors": {}, "reason": None, "rounds": 3, "device": f"a {kind.upper()}", "kind": kind,
        "date": "1", "threads": 2, "versions": {"torch": "2"}, "python": "3", "commit": "abcdef", "dirty": False,
    }  # fmt: skip
    base |= more

    def row(name, ms):
        times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "visits_ms": [ms] * 8}
        return base | {"contestant": name, **times, "peak_bytes": int(1e6 * ms)}

    return [row(OURS, ours), row("slow", 3 * rival), row("quick", rival)]


def performance(monkeypatch, found):
    monkeypatch.setattr(tables, "read", lambda pattern="", **_: [] if learning.OP in pattern else found)
    return tables.table("performance")


def test_readme_names_what_is_faster_and_what_is_not(monkeypatch):
    text = performance(monkeypatch, rows() + rows(ours=30.0, variant="other") + rows(ours=40.0, op="round"))
    best, worst = "2.00× (only, float32, N 8; quick)", "0.67× (other, float32, N 8; quick)"
    assert f"| square | faster in 1, slower in 1 | {best} | {worst} |" in text
    assert "| round | slower in 1 | 0.50× (only, float32, N 8; quick) |  |" in text
    assert "On a CPU the ops are faster in 1, slower in 2 of 3 cases, each beside its fastest rival." in text
    assert "Measured on a CPU: a CPU, 2 threads" in text and "On an H200, predicted and not measured: " in text
    assert text.count(tables.WHY) == 1 and "### Learning\n\nNot measured yet." in text
    equal = performance(monkeypatch, rows() + rows(ours=20.0, N=9))
    assert "faster in 1, equal in 1 of 2 cases" in equal


def test_measured_gpus_take_the_place_of_predictions(monkeypatch):
    text = performance(monkeypatch, rows() + rows("gpu", device="NVIDIA H200"))
    assert "Measured on a GPU: NVIDIA H200" in text and "≈" not in text
    assert text.index("On a GPU the ops are") < text.index("On a CPU the ops are")


def test_a_line_says_who_is_faster_whatever_the_numbers(monkeypatch):
    trainer = {"op": "trainer-stage2", "variant": "stage2-tiny"}
    known = {
        (10.0, 20.0): "10 ms beside 20 ms of quick: faster, 2.00× (2.00–2.00), in 0.50× its peak memory.",
        (20.0, 20.0): "20 ms beside 20 ms of quick: equal, 1.00× (1.00–1.00), in 1.00× its peak memory.",
        (40.0, 20.0): "40 ms beside 20 ms of quick: slower, 0.50× (0.50–0.50), in 2.00× its peak memory.",
    }
    for (ours, rival), said in known.items():
        text = performance(monkeypatch, rows(ours=ours, rival=rival, **trainer))
        assert f"- Stage 2's, preset tiny, on a CPU: {said}" in text and "the ops are" not in text
    found = rows(**trainer)
    for row in found:
        row["visits_ms"] = None
    assert "20 ms of quick: not judged, 2.00×, in" in performance(monkeypatch, found)
    assert performance(monkeypatch, []).startswith("### Learning\n\nNot measured yet.")


def test_verdicts_of_paired_visits_carry_their_interval(monkeypatch):
    found = rows(op="trainer-stage2", variant="stage2-tiny")
    for row, at in zip(found, (10.0, 60.0, 20.0), strict=True):
        row["visits_ms"] = [at * (1 + 0.01 * i) ** (row["contestant"] == "quick") for i in range(8)]
    assert "faster, 2.07× (2.02–2.12)" in performance(monkeypatch, found)


def test_every_case_stands_beside_every_rival(monkeypatch):
    found = rows(errors={"loss": 2e-7}) + rows(ours=30.0, N=9)
    found += [row | {"op": "round", "device": "another", "date": "0"} for row in rows()]  # of another machine, before
    found += [found[0] | {"contestant": "gone", "median_ms": None, "reason": "needs a GPU"}]
    monkeypatch.setattr(tables, "read", lambda pattern: [row for row in found if pattern == f"{row['op']}-cpu.jsonl"])
    text = tables.measured("cpu", ["square", "round"], tables.ROOT)
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| **only, float32, N 8: uae-kernels** | **10** |  | **10.0** | **loss 2e-07** |",
        "| slow | 60 | faster, 6.00× (6.00–6.00) | 60.0 | loss 2e-07 |",
        "| quick | 20 | faster, 2.00× (2.00–2.00) | 20.0 | loss 2e-07 |",
        "| **only, float32, N 9: uae-kernels** | **30** |  | **30.0** |  |",
        "| slow | 60 | faster, 2.00× (2.00–2.00) | 60.0 |  |",
        "| quick | 20 | slower, 0.67× (0.67–0.67) | 20.0 |  |",
    ]
    assert "Not run: gone (needs a GPU) in only." in text and text.endswith("Python 3, commit abcdef, 1.")
    assert tables.measured("gpu", ["square"], tables.ROOT) == "Not measured yet."


def test_predictions_are_marked_and_say_what_of():
    """Of the smallest case; log-probs of the head by two products and four bytes a logit."""
    text = tables.table("predicted")
    ms = 1e3 * 2400 * 151_936 * (2 * 2 * 2048 / 790e12 + 4 / 4.3e12)
    (line,) = (line for line in text.splitlines() if line.startswith("| linear_logprobs, frozen"))
    assert f"| linear_logprobs, frozen, bfloat16, N 2,400, H 2,048, V 151,936 | ≈ {ms:.3g} [2, 4] |" in line
    assert "(1.62×) [3, 12]" in line and "not measured" in text
    assert "≈ 1.62× our time (linear_logprobs, frozen; TRL, ChunkedLogProbFunction)" in tables.in_short()


# ---- learning -------------------------------------------------------------------------------------------------------


def run(contestant, seed, end, **more):
    where = {key: value for key, value in rows()[0].items() if key in ("device", "kind", "threads", "versions")}
    row = {
        "contestant": contestant, "seed": seed, "budget_s": 80.0, "steps": 100 + seed, "commit": "abcdef",
        "dirty": False, "python": "3", "date": "1", "heldout": [(0.0, 0.4), (40.0, 0.7), (80.0, end)],
    }  # fmt: skip
    return where | row | more


def test_learning_says_who_got_where_and_when(monkeypatch):
    found = [run(learning.FAST, seed, 0.9 + 0.1 * seed) for seed in (0, 1)]
    found += [run(learning.NAIVE, seed, 0.75 + 0.1 * seed) for seed in (0, 1)]
    monkeypatch.setattr(tables, "read", lambda *_, **__: found)
    text = tables.table("trainer-learning-cpu")
    # 0.6 lies two thirds of the way to 40 s; 0.9 is reached at 80 s, and by the second seed at 40 + 40 · 2/3
    own = "| **26.7 ± 0.0** | **56.7 ± 4.7** | **73.3 ± 9.4** | **0.950 ± 0.071** |"
    assert f"| **{learning.FAST}** | **100 ± 1** {own}" in text
    assert f"| {learning.NAIVE} | 100 ± 1 | 26.7 ± 0.0 | in 1 of 2 seeds | not reached | 0.800 ± 0.071 |" in text
    assert "2 seeds" in text and "it starts at 0.400" in text and "Measured: a CPU, 2 threads" in text
    fair = [run(learning.BATCHED, seed, 0.9) for seed in (0, 1)]
    monkeypatch.setattr(tables, "read", lambda *_, **__: found + fair)
    lines = [line for line in tables.table("trainer-learning-cpu").splitlines() if line.startswith("| ")]
    assert [name.replace("**", "") for line in lines[2:] if (name := line.split(" | ")[0][2:])] == list(learning.WAYS)
    for fewer in ([], found[:2]):
        monkeypatch.setattr(tables, "read", lambda *_, rows=fewer, **__: rows)
        assert tables.table("trainer-learning-cpu") == "Not measured yet."


def test_learning_compares_the_same_seeds_under_the_same_circumstances():
    both = [run(name, 0, 0.9) for name in (learning.FAST, learning.NAIVE)]
    alone = run(learning.FAST, 1, 0.9)
    assert learning.newest([*both, alone]) == both
    for change in ({"device": "another"}, {"threads": 4}, {"commit": "x"}, {"dirty": True}, {"budget_s": 9.0}):
        assert learning.newest([both[0], both[1] | change]) == []
        assert (learning.FAST, 0) in learning.missing(both, [0], both[0] | change)
    left = [(learning.BATCHED, 0), *((name, 1) for name in learning.WAYS)]
    assert learning.missing(both, [0, 1], both[0]) == left


def test_times_to_a_reward():
    curve = [(0.0, 0.5), (10.0, 0.7), (20.0, 0.6), (30.0, 0.9)]
    assert learning.reached(curve, 0.4) == 0.0 and learning.reached(curve, 0.6) == pytest.approx(5.0)
    assert learning.reached(curve, 0.8) == pytest.approx(20 + 10 * 2 / 3) and learning.reached(curve, 0.95) is None


# ---- plots ----------------------------------------------------------------------------------------------------------


def growing():
    made = []
    for n in (64, 128, 256, 512):
        for row in rows(op=report.SCALING, variant="linear_logprobs against N", ours=n / 9, rival=n / 7, N=n):
            made.append(row | {"contestant": row["contestant"].replace("slow", "Liger, FusedLinearScaledCrossEntropy")})
    return made


@pytest.mark.parametrize(
    "measured, legends", [(growing(), 2), (rows() + rows(N=16), 1), (rows(), 0)], ids=["growth", "curves", "bars"]
)
def test_plots_are_titled_and_legends_cover_nothing(measured, legends, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, *_: figures.append(figure))
    report.plot(measured, tmp_path)
    (figure,) = figures
    figure.draw_without_rendering()
    assert "measured on a CPU, 2 threads, torch 2, 1" in figure.get_suptitle()
    found = [axis.get_legend() for axis in figure.axes if axis.get_legend()] + figure.legends
    boxes = [legend.get_window_extent() for legend in found]
    assert len(boxes) == legends
    whole = figure.bbox
    for box in boxes:
        assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1 and whole.y0 <= box.y0
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_unknown_tables_are_refused():
    with pytest.raises(SystemExit, match="no table is called 'square-cpu'"):
        tables.table("square-cpu")
    assert tables.table("gate-nobody") == "Not measured yet."
