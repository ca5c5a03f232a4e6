"""The commands, run as a person runs them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from uae_fast.cli import main
from uae_fast.config import save_config
from uae_fast.tiny.scenes import split_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """A finished run of a few steps."""
    from uae_fast.config import load_config
    from uae_fast.tiny.export import export
    from uae_fast.trainer import train

    folder = tmp_path_factory.mktemp("commands")
    export(folder / "train", "train", 32, seed=0)
    export(folder / "heldout", "heldout", 8, seed=0)
    small = ["stages=[2]", "stage2.steps=1", "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8"]
    places = [f"run={folder / 'run'}", f"data.train={folder / 'train'}", f"data.heldout={folder / 'heldout'}"]
    return train(load_config("tiny", [*small, *places, "render.batch=8"]))


def shell(*arguments, **options):
    command = [sys.executable, "-m", "uae_fast.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_help_answers_at_once_and_lists_every_command():
    start = time.monotonic()
    done = shell("--help")
    assert done.returncode == 0 and time.monotonic() - start < 10  # a hung import, not a benchmark
    known = ("train", "check", "configs", "caption", "reconstruct", "generate", "evaluate", "bench", "report")
    for command in known:
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_wrong_key_ends_with_status_2_and_the_nearest_one(command):
    done = shell(command, "tiny", "stage2.group_sise=4")
    assert done.returncode == 2
    assert done.stderr == "command line: stage2.group_sise: unknown key; did you mean stage2.group_size?\n"


def test_a_wrong_key_in_a_file_names_file_and_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("run: x\nstage2:\n  lr: 1e-4\n  bata: 0.1\n")
    done = shell("train", tmp_path / "mine.yaml")
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/mine.yaml:4: stage2.bata: unknown key; did you mean stage2.beta?\n"


def test_missing_folders_are_named_before_any_model_loads(tmp_path, monkeypatch, capsys):
    assert main(["train", "tiny", f"run={tmp_path / 'r'}", f"data.train={tmp_path / 'none'}"]) == 2
    assert f"data.train: {tmp_path / 'none'} is not a folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny"]) == 2
    said, _, told = capsys.readouterr().err.rpartition("; this makes it: uae-fast ")
    assert said.endswith("data.train: data/tiny/train is not a folder")
    assert main([*told.split(), "--count", "4"]) == 0 and (tmp_path / "data/tiny/train").is_dir()
    assert main(["check", "tiny", f"models.path={tmp_path}"]) == 2
    assert "has no encoder" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_check_prints_the_arithmetic(capsys):
    assert main(["check", "tiny", "stage2.micro_batch=16"]) == 0
    output = capsys.readouterr().out
    assert "16 (4)" in output and "the configuration is sound" in output


def test_configs_lists_and_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0 and "tiny" in capsys.readouterr().out
    assert main(["configs", "copy", "tiny"]) == 0
    assert main(["check", "tiny.yaml"]) == 0
    assert main(["configs", "copy", "tiny"]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["configs", "copy", "tinny"]) == 2 and "did you mean the preset tiny" in capsys.readouterr().err


def test_env_names_the_versions(capsys):
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    for name in ("python", "torch 2.", "uae-kernels 0.", "bitsandbytes", "GPU", "deterministic: as PyTorch chooses"):
        assert name in output


def test_tiny_export_writes_pictures_and_captions(tmp_path, capsys):
    assert main(["tiny", "export", str(tmp_path / "out"), "--split", "heldout", "--count", "5", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    heldout = {scene.caption() for scene in split_scenes("heldout")}
    assert len(rows) == 5
    for row in rows:
        assert Image.open(tmp_path / "out" / row["file"]).size == (32, 32)
        assert row["caption"] in heldout
        assert [word for word in row["caption"].split() if word in row["attributes"]] == row["attributes"]
    assert main(["tiny", "export", str(tmp_path / "out"), "--count", "5"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["tiny", "export", str(tmp_path / "more"), "--split", "heldout", "--count", "99999"]) == 2
    assert "1512" in capsys.readouterr().err


def test_caption_of_a_folder_as_json_lines(run, capsys):
    heldout = run.parent / "heldout"
    assert main(["caption", str(heldout), "--jsonl", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == sorted(path.name for path in heldout.glob("*.png"))
    truth = {row["file"]: row for row in map(json.loads, (heldout / "captions.jsonl").read_text().splitlines())}
    words = sum(word in truth[row["file"]]["attributes"] for row in rows for word in row["caption"].split())
    assert words >= 8 * 3  # it sees the pictures
    assert main(["caption", str(heldout / rows[0]["file"]), "--run", str(run), "--at", "stage2"]) == 0
    assert rows[0]["file"] in capsys.readouterr().out
    assert main(["caption", str(heldout), "--run", str(run), "--at", "stage3"]) == 2
    assert "it has before, stage2" in capsys.readouterr().err


def test_generate_draws_what_the_text_says(tmp_path):
    from uae_fast.tiny.export import export

    export(tmp_path / "one", "heldout", 1, seed=1)
    caption = json.loads((tmp_path / "one" / "captions.jsonl").read_text())["caption"]
    assert main(["generate", caption, "--out", str(tmp_path / "drawn.png")]) == 0
    paths = (tmp_path / "drawn.png", tmp_path / "one" / "scene-00000.png")
    drawn, truth = (Image.open(path).convert("RGB") for path in paths)
    pairs = zip(drawn.tobytes(), truth.tobytes(), strict=True)
    assert sum(abs(a - b) for a, b in pairs) / len(truth.tobytes()) < 16


def test_reconstruct_shows_both_sides(run, tmp_path, capsys):
    images = sorted((run.parent / "heldout").glob("*.png"))[:2]
    assert main(["reconstruct", *map(str, images), "--out", str(tmp_path / "pair.png")]) == 0
    assert "reward" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "pair.png")
    source = Image.open(images[0]).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
    assert sheet.crop((16, 16, 272, 272)).tobytes() == source.tobytes()


def test_unreadable_images_are_named(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no")
    assert main(["caption", str(tmp_path)]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_report_is_rewritten(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 2000
    assert main(["report", str(run.parent)]) == 2


def test_a_pipe_that_is_no_terminal_gets_plain_lines(run, tmp_path):
    from uae_fast.config import load_config

    config = load_config(run / "config.yaml", [f"run={tmp_path / 'again'}"])
    save_config(config, tmp_path / "again.yaml")
    done = shell("train", tmp_path / "again.yaml", env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "generation for understanding" in done.stdout
    assert f"open {Path(config.run) / 'report.html'}" in done.stdout
    assert done.stderr == ""
