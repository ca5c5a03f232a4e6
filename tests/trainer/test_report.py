"""The report's promises: right numbers, all in one file, text that stays text, gaps that do no harm."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from uae_fast.report import read_rows, tick_labels, ticks, write_report

REWARDS = {"ceiling": 0.9, "before": 0.5, "stage1": 0.6, "stage2": 0.8}
CAPTIONS = {"before": "a thing", "stage1": "a thing", "stage2": "a red thing <script>alert(1)</script>"}
COLORS = {"source": (255, 0, 0), "before": (0, 255, 0), "stage1": (0, 0, 255), "stage2": (255, 255, 0)}


def row(moment, i):
    return {
        "file": f"scene-{i}.png", "caption": CAPTIONS.get(moment, "a red circle"),
        "reward": REWARDS[moment] + 0.1 * i, "tokens": 7, "recall": 0.25, "precision": 1.0, "accuracy": None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """An unfinished run: three scored images, two of them with pictures, and ten steps of two stages."""
    folder = tmp_path / "my <run>"
    for moment in ("ceiling", *COLORS):
        (folder / "samples" / moment).mkdir(parents=True)
    for moment in REWARDS:
        rows = "".join(json.dumps(row(moment, i)) + "\n" for i in range(3))
        (folder / "samples" / moment / "scores.jsonl").write_text(rows)
    for moment, color in COLORS.items():
        for i in range(2):
            Image.new("RGB", (8, 8), color).save(folder / "samples" / moment / f"scene-{i}.png")
    (folder / "config.yaml").write_text("seed: 7\ncaption:\n  prompt: <b>describe</b>\n")
    steps = [{"step": i, "stage": "stage1" if i <= 4 else "stage2", "reward": i / 10} for i in range(1, 11)]
    for step in steps[4:]:
        step |= {"kl": step["step"] / 1e6, "clip_ratio/low": 0, "clip_ratio/high": 0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def finish(run):
    nothing = dict.fromkeys(("reward_stderr", "reward_gain_stderr", "attribute_precision", "accuracy"))
    summary = {"seed": 11, "minutes": 12.34, "ceiling": {"reward": 0.95, "accuracy": None}}
    for moment, reward in (("before", 0.75), ("stage1", 0.7), ("stage2", 0.85)):
        summary[moment] = nothing | {"reward": reward, "attribute_recall": 0.5, "caption_tokens": 12.0}
    (run / "summary.json").write_text(json.dumps(summary))


def written(run):
    return write_report(run).read_text(encoding="utf-8")


def text(html):
    """What a reader sees of some HTML, in one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def line(page, moment):
    return text(re.search(rf'<tr class="{moment}">.*?</tr>', page)[0])


def pictures(page):
    found = re.findall(r'<img[^>]* src="data:image/(\w+);base64,([^"]+)"', page)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in found]


def test_the_summary_is_what_is_shown(run):
    finish(run)
    page = written(run)
    seen = text(page)
    assert "seed 11 · 12.3 minutes · 10 steps · 3 held-out images" in seen
    assert "Reward 0.750 → 0.850" in seen
    assert "Gap closed 50% of the way up to the ceiling, 0.950" in seen
    assert line(page, "stage1") == "After stage 1 cold start 0.700 −0.050 50.0% – 12.0 –"


def test_without_a_summary_the_scores_are_what_is_shown(run):
    page = written(run)
    seen = text(page)
    assert "seed 7 · unfinished" in seen
    assert "Reward 0.600 → 0.900" in seen  # means of 0.5, 0.6, 0.7 and of 0.8, 0.9, 1.0
    assert "Gap closed 75% of the way up to the ceiling, 1.000" in seen
    spread = "± 0.058"  # std 0.1 over the root of 3; the gains are the same for every image
    assert "+0.100 ± 0.000" in line(page, "stage1")
    assert line(page, "stage2") == (
        f"After stage 2 generation for understanding 0.900 {spread} +0.200 ± 0.000 25.0% 100.0% 7.0 –"
    )


@pytest.mark.parametrize("ceiling", [None, 0.7, 0.75, 0.7501])
def test_no_share_of_a_gap_that_is_not_there(run, ceiling):
    finish(run)
    summary = json.loads((run / "summary.json").read_text())
    summary["ceiling"] = {"reward": ceiling, "accuracy": None}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Gap closed – of the way" in text(written(run))


def test_every_picture_is_inside(run):
    page = written(run)
    colors = [image.convert("RGB").getpixel((4, 4)) for _, image in pictures(page)]
    assert colors == [*COLORS.values()] * 2
    assert page.count('class="pixels"') == 8
    assert "://" not in page
    assert not re.search(r"<script|<link|@import|url\(", page)


def test_large_pictures_become_thumbnails(run):
    Image.effect_noise((600, 300), 90).convert("RGB").save(run / "samples" / "stage2" / "scene-0.png")
    kind, image = pictures(written(run))[3]
    assert (kind, image.format, image.size) == ("jpeg", "JPEG", (256, 128))


def test_text_from_data_stays_text(run):
    page = written(run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<h1>my &lt;run&gt;</h1>" in page
    assert "prompt: &lt;b&gt;describe&lt;/b&gt;" in page
    assert "<script" not in page and "<b>describe" not in page


def test_new_words_are_marked_and_only_they(run):
    first = re.search(r'<div class="row">.*?</div>', written(run))[0]
    marked = re.findall(r"<mark>(.*?)</mark>", first)
    assert marked == ["red", "&lt;script&gt;alert(1)&lt;/script&gt;"]
    assert '<p class="same">a thing</p>' in first  # stage 1 changed no word


def test_charts_are_of_what_was_logged(run):
    charts = re.findall(r'aria-label="([^"]* by step[^"]*)"', written(run))
    assert charts == [
        "Reward in cosine similarity by step, between 0.1 and 0.4",
        "Reward in cosine similarity by step, between 0.5 and 1",
        "KL to the reference in nats by step, between 5e−06 and 1e−05",
    ]


def test_a_missing_picture_leaves_a_gap(run):
    (run / "samples" / "stage1" / "scene-1.png").unlink()
    page = written(run)
    assert page.count("no picture") == 1 and len(pictures(page)) == 7


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    page = written(tmp_path)
    assert "seed 3" in page
    assert "<table" not in page and "<svg" not in page and "<img" not in page


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"not the folder of a run: it has no config\.yaml"):
        write_report(tmp_path)


def test_a_half_written_last_row_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert read_rows(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a line of JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.41, 0.87, ["0.4", "0.6", "0.8", "1.0"]),
        (0, 8e-7, ["0", "2e−7", "4e−7", "6e−7", "8e−7"]),
        (-0.3, 0.3, ["−0.4", "−0.2", "0", "0.2", "0.4"]),
        (12, 30, ["10", "15", "20", "25", "30"]),
        (1.010e-4, 1.016e-4, ["1.010e−4", "1.012e−4", "1.014e−4", "1.016e−4"]),
    ],
)
def test_ticks_are_round_and_told_apart(low, high, labels):
    assert tick_labels(ticks(low, high)) == labels
