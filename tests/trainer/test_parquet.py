"""Parquet files as Hugging Face's `datasets` writes them: what is read, in which order, and what is refused."""

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import write_decoder
from PIL import Image

from uae_fast.config import ConfigError, DataConfig, load_config
from uae_fast.data import ImageFolder
from uae_fast.identity import differences, run_identity
from uae_fast.models.sources import TINY
from uae_fast.parquet import MIXED_GROUPS, ParquetImages, open_images
from uae_fast.trainer import train


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """The training scenes in two files, written by `datasets` itself, in row groups of four: paths, and then bytes."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("parquet")
    rows = [json.loads(line) for line in (world / "train" / "captions.jsonl").read_text().splitlines()]
    features = Features({"image": ImageFeature(), "caption": Value("string"), "extra": Value("int64")})
    for part, some in enumerate((rows[:36], rows[36:])):
        columns = {
            "image": [
                {"path": str(path), "bytes": path.read_bytes() if part else None}
                for path in (world / "train" / row["file"] for row in some)
            ],
            "caption": [row["caption"] for row in some],
            "extra": list(range(len(some))),
        }
        data = Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / "data" / f"train-{part:05d}-of-00002.parquet", batch_size=4)
    return folder


def opened(files, **options):
    return open_images(str(files), "data.train", DataConfig(max_bad=0.5), **options)


def test_rows_are_the_images_of_the_folder(world, files):
    images, folder = opened(files, captions=True), ImageFolder(world / "train", "data.train")
    assert isinstance(images, ParquetImages) and len(images) == len(folder) == 64 and len(images.groups) == 16
    for row in (0, 3, 4, 35, 36, 63):
        ours, theirs = images[row], folder[row]
        assert (ours.id, ours.caption, ours.image.tobytes()) == (theirs.id, theirs.caption, theirs.image.tobytes())
    assert images[36].file == "train-00001-of-00002-000000" and images[35].file == "train-00000-of-00002-000035"


def test_an_epoch_has_every_row_once_and_goes_from_group_to_group(files):
    images = opened(files)
    order = images.order(0, "stage2", 0)
    assert sorted(order) == list(range(64)) and order != sorted(order)
    assert order == opened(files).order(0, "stage2", 0)
    others = [images.order(1, "stage2", 0), images.order(0, "stage3", 0), images.order(0, "stage2", 1)]
    assert all(order != other for other in others)
    first = {row // 4 for row in order[: 4 * MIXED_GROUPS]}
    assert len(first) == MIXED_GROUPS and first != set(range(MIXED_GROUPS))


def test_batches_follow_the_order_whatever_was_read_before(files):
    images, fresh = opened(files), opened(files)
    steps = [[example.id for example in images.batch(step, 10, 0, "stage2")] for step in range(13)]
    expected = images.order(0, "stage2", 0) + images.order(0, "stage2", 1) + images.order(0, "stage2", 2)
    assert [row for step in steps for row in step] == expected[:130]
    assert [example.id for example in fresh.batch(7, 10, 0, "stage2")] == steps[7]
    assert images.table.cache_info().currsize <= MIXED_GROUPS


def test_places(files, world, tmp_path):
    assert len(open_images(str(files / "data" / "train-00001-*.parquet"), "data.train", DataConfig())) == 28
    assert isinstance(open_images(str(world / "train"), "data.train", DataConfig()), ImageFolder)
    for place in (str(tmp_path / "none"), str(tmp_path / "none-*.parquet"), "somebody/something"):
        with pytest.raises(ConfigError, match=r"data\.train"):
            open_images(place, "data.train", DataConfig())


def test_a_run_on_parquet_files(files, world, small_config):
    both = (f"data.train={files}", f"data.heldout={files}")
    run = train(small_config(world, "stages=[1]", *both, "stage1.steps=1", "evaluate.images=3", "render.batch=4"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    scores = [json.loads(line) for line in (run / "samples" / "stage1" / "scores.jsonl").read_text().splitlines()]
    assert [row["file"] for row in scores] == [f"train-00000-of-00002-{i:06d}" for i in range(3)]
    assert len(list((run / "samples" / "stage1").glob("*.png"))) == 2


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def write(folder, images, **columns):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, **columns}), folder / "some.parquet", row_group_size=2)
    return folder


def test_plain_bytes_and_broken_rows(tmp_path):
    folder = write(tmp_path / "plain", [png("red"), b"not a picture", None, png("blue")])
    images = opened(folder)
    assert not images.captioned and images[0].image.getpixel((0, 0)) == (255, 0, 0) and images[3].caption is None
    ids = [example.id for example in images.batch(0, 4, 0, "stage2")]
    assert set(ids) == {0, 3} and len(ids) == 4
    order, good = images.order(0, "stage2", 0), [row for row in images.order(0, "stage2", 0) if row in (0, 3)]
    assert ids[0] == (order[0] if order[0] in good else good[0])
    assert images.skipped.keys() == {"row 1", "row 2"}
    with pytest.raises(ConfigError, match="2 of the 2 images"):
        opened(write(tmp_path / "broken", [b"no", b"neither"])).batch(0, 1, 0, "stage2")


@pytest.mark.parametrize(
    "columns, options, words",
    [
        ({"picture": [b"x"]}, {}, "has no column image .* but .*picture"),
        ({"image": ["a path"]}, {}, "not encoded images"),
        ({"image": [b"x"]}, {"captions": True}, "need a caption in every row, in the column caption"),
        ({"image": [b"x", b"y"], "caption": ["a", None]}, {"captions": True}, "need a caption in every row"),
        ({"image": pa.array([], pa.binary())}, {}, "without a row"),
    ],
)
def test_what_is_of_no_use_is_refused(tmp_path, columns, options, words):
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path, **options)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"data\.train: .*broken\.parquet"):
        opened(tmp_path)


@pytest.mark.parametrize("place", ["somebody/something@main", "somebody/something@main/data/train-*.parquet"])
def test_a_hub_repository_needs_its_commit(place):
    with pytest.raises(ConfigError) as caught:
        open_images(place, "data.train", DataConfig())
    assert f"{place} is neither on this machine nor owner/name@commit" in caught.value.problems[0]


def test_a_hub_repository_out_of_reach_is_named(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no way there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    place = f"somebody/something@{'0123456789' * 4}"
    with pytest.raises(ConfigError, match=f"data.train: {place} cannot be loaded: no way there"):
        open_images(place, "data.train", DataConfig())


def test_too_many_broken_rows_stop_a_run_by_name(tmp_path):
    folder = write(tmp_path / "some", [png("red"), b"not a picture", png("blue")])
    images = open_images(str(folder), "data.train", DataConfig(max_bad=0.3))
    with pytest.raises(ConfigError, match=r"data\.train: 1 of the 3 images .* data\.max_bad = 0\.3 allows 0\nrow 1: "):
        images.batch(0, 3, 0, "stage2")
    allowed = open_images(str(folder), "data.train", DataConfig(max_bad=0.4))
    allowed.batch(0, 3, 0, "stage2")
    assert allowed.notes() == [f"skipped {folder}: row 1: {allowed.skipped['row 1']}"]
    assert allowed.files == ["some-000000", "some-000001", "some-000002"]
    with pytest.raises(ConfigError, match=r"data\.train: .*: row 1 cannot be read"):
        allowed[1]


def test_what_a_run_is_made_of_knows_its_rows(tmp_path, files):
    """A folder, or a pattern, by its files' contents; a Hub repository by its commit."""

    def identity(place):
        return run_identity(load_config("tiny", [f"data.train={place}", f"data.heldout={files}"]))["data.train"]

    folder = write(tmp_path / "some", [png("red"), png("blue")])
    first, pattern = identity(folder), f"{folder}/*.parquet"
    by_pattern = identity(pattern)
    write(folder, [png("red"), png("green")])
    assert identity(folder) != first and identity(pattern) != by_pattern
    hub = f"somebody/something@{'0' * 40}/data/*.parquet"
    assert identity(hub) == hub


def test_what_a_run_is_made_of_knows_its_models(tmp_path, files):
    """By contents: files may move. The pooled condition that the text encoders make does not count."""

    def identity(*places):
        return run_identity(load_config("tiny", [f"data.train={files}", f"data.heldout={files}", *places]))

    tiny, decoder = identity(), write_decoder(tmp_path / "decoder")
    assert list(tiny["models.path"]) == ["encoder", "decoder", "projector.safetensors", "reward"]
    moved = shutil.copytree(TINY / "reward", tmp_path / "reward")
    assert differences(tiny, identity(f"reward.encoders=[{moved}]")) == []
    other = identity(f"models.decoder_from={decoder}")
    (line,) = differences(tiny, other)
    assert line.startswith("models.path: the files of decoder are not those the run began with")
    (decoder / "pooled.safetensors").write_bytes((TINY / "decoder" / "pooled.safetensors").read_bytes())
    assert differences(other, identity(f"models.decoder_from={decoder}")) == []
