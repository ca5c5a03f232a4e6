"""`uae-fast evaluate`: Unified-Bench's scores are those of each encoder's own library calls on the files."""

import json

import pytest
import torch
from PIL import Image, ImageOps

from tests.layouts import write_image_encoder
from uae_fast.cli import main
from uae_fast.tiny.export import export

COUNT = 3


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return [write_image_encoder(folder / kind, kind) for kind in ("clip", "dinov2", "dinov3")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Images of unequal sides, which each library resizes and crops in its own way."""
    folder = tmp_path_factory.mktemp("sources")
    export(folder / "scenes", "heldout", COUNT, seed=0)
    for i, path in enumerate(sorted((folder / "scenes").glob("*.png"))):
        image = Image.open(path).convert("RGB").resize((48 + 9 * i, 40))
        image.save(path)
    return folder / "scenes"


def evaluate(sources, judges, out, *more):
    encoders = ", ".join(str(folder) for folder in judges)
    places = [
        f"data.heldout={sources}",
        f"evaluate.images={COUNT}",
        f"evaluate.encoders=[{encoders}]",
        "render.batch=4",
    ]
    return main(["evaluate", "tiny", "--out", str(out), *places, *map(str, more)])


def library_cosine(folder, first, second):
    from transformers import AutoImageProcessor, AutoModel, ViTImageProcessorPil

    # DINOv3's own processor needs torchvision, which has no build for a CPU; both only resize to the input's size.
    kind = ViTImageProcessorPil if folder.name == "dinov3" else AutoImageProcessor
    processor = kind.from_pretrained(folder, **({} if folder.name == "dinov3" else {"backend": "pil"}))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    embeddings = []
    for path in (first, second):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if hasattr(model, "get_image_features"):
                embeddings.append(model.get_image_features(pixel_values=pixels).pooler_output[0])
            else:
                embeddings.append(model(pixel_values=pixels).last_hidden_state[0, 0])
    return torch.cosine_similarity(*embeddings, dim=0).item()


def test_scores_are_the_libraries_own_cosines_of_the_files(sources, judges, tmp_path):
    assert evaluate(sources, judges, tmp_path / "out", "--tokens", 4) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(found["encoders"]) == ["clip", "dinov2", "dinov3"]
    for folder in judges:
        entry = found["encoders"][folder.name]
        assert len(entry["scores"]) == COUNT
        for file, value in entry["scores"].items():
            expected = library_cosine(folder, sources / file, tmp_path / "out" / "whole" / file)
            assert value == pytest.approx(expected, abs=1e-5)
        values = list(entry["scores"].values())
        assert (entry["min"], entry["max"]) == (min(values), max(values)) and min(values) < max(values)
        assert entry["average"] == pytest.approx(sum(values) / COUNT)
    averages = [entry["average"] for entry in found["encoders"].values()]
    assert found["overall"] == pytest.approx(sum(averages) / 3)
    assert found["by_tokens"]["4"]["overall"] != found["overall"]
    assert (tmp_path / "out" / "by_tokens.png").stat().st_size > 5000


def test_captions_are_the_runs_own_and_cut_ones_are_their_beginnings(sources, judges, tmp_path):
    from uae_fast.config import load_config
    from uae_fast.evaluate.unified_bench import cut
    from uae_fast.models.loading import load_models

    models = load_models(load_config("tiny"))
    caption = "a red circle top-left and a blue square on white"
    assert cut(models, caption, 3) == "a red circle"
    assert cut(models, caption, 99) == caption


def test_reconstructions_of_others_are_found_by_name(sources, judges, tmp_path):
    """Equal files score 1; `recon_` and another suffix are the same name; one more suffix is one too many."""
    others = tmp_path / "others"
    others.mkdir()
    for i, path in enumerate(sorted(sources.glob("*.png"))):
        name = (path.name, f"recon_{path.name}", f"recon_{path.stem}.bmp")[i]
        Image.open(path).save(others / name)
    assert evaluate(sources, judges, tmp_path / "out", "--reconstructions", others) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["overall"] == pytest.approx(1, abs=1e-6) and "by_tokens" not in found
    mirrored = others / "recon_scene-00001.png"
    ImageOps.mirror(ImageOps.invert(Image.open(mirrored))).save(mirrored)
    assert evaluate(sources, judges, tmp_path / "again", "--reconstructions", others) == 0
    scores = json.loads((tmp_path / "again" / "scores.json").read_text())["encoders"]["clip"]["scores"]
    assert [value > 1 - 1e-6 for value in scores.values()] == [True, False, True]


def test_what_is_missing_or_there_twice_is_named(sources, judges, tmp_path, capsys):
    others = tmp_path / "others"
    others.mkdir()
    for name in ("scene-00000.png", "recon_scene-00000.png", "scene-00002.png"):
        Image.open(sources / "scene-00000.png").save(others / name)
    assert evaluate(sources, judges, tmp_path / "out", "--reconstructions", others) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{others}: each source needs one reconstruction of its name",
        "scene-00000.png has scene-00000.png and recon_scene-00000.png",
        "scene-00001.png has nothing",
    ]


def test_mistakes_are_named_before_any_model_loads(sources, judges, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert evaluate(sources, judges, tmp_path / "out", "--tokens", 0, "--at", "stage2") == 2
    assert capsys.readouterr().err.splitlines() == [
        "--tokens 0: must be at least 1",
        f"--out {tmp_path / 'out'}: exists already; name a new folder",
        "--at stage2: tiny is no run's folder",
    ]
    assert evaluate(sources, [tmp_path / "none"], tmp_path / "new") == 2
    assert "evaluate.encoders:" in capsys.readouterr().err
