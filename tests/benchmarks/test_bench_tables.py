"""Numbers in Markdown files are those of the committed rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import tables
from benchmarks.rows import OURS


@pytest.mark.parametrize("file", tables.FILES, ids=tables.PLACES)
def test_files_say_what_the_rows_say(file):
    text = file.read_text()
    for found in tables.MARKED.finditer(text):
        assert found[0] == f"{found[1]}\n{tables.table(found[2])}\n\n{found[3]}", (
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
        return base | {"contestant": name, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "peak_bytes": int(1e6 * ms)}

    return [row(OURS, ours), row("slow", 3 * rival), row("quick", rival)]


def performance(monkeypatch, found):
    monkeypatch.setattr(tables, "read", lambda *_, **__: found)
    return tables.table("performance")


def test_readme_names_what_is_faster_and_what_is_not(monkeypatch):
    text = performance(monkeypatch, rows() + rows(ours=30.0, variant="other"))
    assert "| **square, only, float32, N 8** | **10** | **20 (quick)** | **faster, 2.00×** | **10.0 / 20.0** |" in text
    assert "| square, other, float32, N 8 | 30 | 20 (quick) | slower, 0.67× | 30.0 / 20.0 |" in text
    assert "Not faster on a CPU: square in 1 of 2 cases (quick takes as little as 0.67× our time)." in text
    assert "Measured on a CPU: a CPU, 2 threads" in text and "≈ Predicted for an H200, not measured" in text


def test_measured_gpus_take_the_place_of_predictions(monkeypatch):
    text = performance(monkeypatch, rows() + rows("gpu", device="NVIDIA H200"))
    assert "Measured on a GPU: NVIDIA H200" in text and "≈" not in text


def test_unknown_tables_are_refused():
    with pytest.raises(SystemExit, match="no table is called 'square-cpu'"):
        tables.table("square-cpu")
    assert tables.table("gate-nobody") == "Not measured yet."
