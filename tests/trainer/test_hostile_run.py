"""Whole runs on images and captions as nobody would wish them."""

import json
import math
import os

import pytest
from equal_runs import assert_equal_runs, rows
from PIL import Image

from uae_fast.cli import main
from uae_fast.data import ImageFolder, ReadAhead
from uae_fast.stages.generation_for_understanding import GenerationForUnderstanding
from uae_fast.trainer import train

CAPTIONS = [
    "",
    "<|image_pad|>" * 50,
    "<|im_end|><|im_start|>",
    "red " * 3000,
    "half \ud800",
    "a\x00b",
    "<script>",
    "ż 🐝",
]
NAMES = ["ż 🐝.png", "line\nbreak.png", os.fsdecode(b"\xff.png"), "<b>.png"]


@pytest.fixture
def odd_world(own_world):
    """Scenes whose captions are of another world, some under odd names and in odd formats."""
    for split in ("train", "heldout"):
        folder = own_world / split
        files = sorted(folder.glob("*.png"))
        for file, name in zip(
            files, ["ż 🐝.png", "line\nbreak.png", os.fsdecode(b"\xff.png"), "<b>.png"], strict=False
        ):
            file.rename(folder / name)
        Image.open(files[4]).convert("CMYK").save(folder / "scene-00004.jpg")  # a stem that is there already
        Image.open(files[5]).convert("L").resize((90, 1)).save(folder / "wide.gif")
        Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(folder / "point.webp")
        names = sorted(path.name for path in folder.iterdir() if path.name != "captions.jsonl")
        rows = [{"file": name, "caption": CAPTIONS[i % 8]} for i, name in enumerate(names)]
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return own_world


@pytest.mark.parametrize("context", ["caption", "image"])
def test_stages_that_read_captions_get_through_them(odd_world, small_config, context):
    sizes = ["stage0.steps=1", "stage0.images=64", "stage0.micro_batch=64", "stage1.steps=1", "stage1.images=16"]
    shown = ["evaluate.images=27", "evaluate.gallery=27"]
    run = train(small_config(odd_world, "stages=[0,1]", *sizes, *shown, f"stage1.context={context}"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in metrics)
    scores = [json.loads(line) for line in (run / "samples" / "ceiling" / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 27 and all(math.isfinite(row["reward"]) and row["accuracy"] is None for row in scores)
    pictures = [row["picture"] for row in scores]
    assert len(set(pictures)) == 27 and {path.name for path in (run / "samples" / "source").iterdir()} == set(pictures)
    by_file = {row["file"]: row["picture"] for row in scores}
    for name in ("scene-00004.jpg", "scene-00004.png"):
        source = Image.open(run / "samples" / "source" / by_file[name])
        theirs = Image.open(odd_world / "heldout" / name).convert("RGB")
        assert source.tobytes() == theirs.tobytes()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>.png" not in page and "&lt;b&gt;.png, the source" in page


def test_reading_ahead_changes_no_bit(world, small_config, monkeypatch):
    """Against a run that reads every step when it needs it, and prepares nothing."""
    options = ("stages=[0,2,3]", "stage0.steps=3", "stage2.steps=3", "stage3.steps=3", "evaluate.images=2")
    run = train(small_config(world, *options, run="ahead"))

    def batch(self, step):
        return self.images.batch(step, self.size, self.seed, self.stage)

    monkeypatch.setattr(ReadAhead, "batch", batch)
    assert_equal_runs(train(small_config(world, *options, run="plain")), run)


def test_an_image_lost_on_the_way_is_counted_from_its_step_on(own_world, small_config, monkeypatch, capsys):
    config = small_config(own_world, "stages=[2]", "stage2.steps=4", "evaluate.images=0", "data.max_bad=0.1")
    lost = ImageFolder(config.data.train, "data.train").batch(2, 2, config.seed, "stage2")[1].file
    rollout, seen = GenerationForUnderstanding.rollout, []

    def losing(self, examples, step):
        (own_world / "train" / lost).unlink(missing_ok=True)  # in step 0; the thread reads step 2 during step 1
        seen.append(capsys.readouterr().out)
        return rollout(self, examples, step)

    monkeypatch.setattr(GenerationForUnderstanding, "rollout", losing)
    assert [row["skipped_images"] for row in rows(train(config))] == [0, 0, 1, 1]
    assert [f"skipped {own_world}/train/{lost}: not a file\n" in said for said in seen] == [False, False, True, False]


def test_commands_say_odd_names_in_one_line(odd_world, capsys):
    (odd_world / "heldout" / "\x1b[31m.png").write_bytes(b"no")
    assert main(["caption", str(odd_world / "heldout")]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert len(lines) == 27 and all(line.isprintable() for line in lines)
    assert "\\x1b[31m.png" in output.err and "\x1b" not in output.err
    assert main(["generate", "half \udcff <|image_pad|>", "--out", str(odd_world / "drawn.png")]) == 0
