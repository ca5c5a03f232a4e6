"""Files that people really have, and files that somebody made to do harm: the right pixels, or a skip by name."""

import io
import json
import os
import struct
import threading
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from uae_fast.config import ConfigError
from uae_fast.data import MAX_ASPECT, ImageFolder, ReadAhead, load_image

pytestmark = pytest.mark.filterwarnings(  # Pillow's, of broken files
    "ignore::UserWarning:PIL.TiffImagePlugin", "ignore::RuntimeWarning:PIL.Image"
)
WHITE = (255, 255, 255)


def pixels(image):
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, color, row=b"", extra=b""):
    """A PNG file as its specification has it, of one row of big-endian samples."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def shorts(*values):
    return struct.pack(f">{len(values)}H", *values)


GREYS = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
HIGH = [(v >> 8,) * 3 for v in GREYS[0].tolist()]
FRAMES = [Image.new("RGB", (2, 1), color) for color in ((255, 0, 0), (0, 0, 255))]
MOVING = {"save_all": True, "append_images": FRAMES[1:]}
PALETTE = Image.new("P", (3, 1))
PALETTE.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
PALETTE.putdata([0, 1, 2])
GREY_ALPHA = Image.new("LA", (2, 1))
GREY_ALPHA.putdata([(10, 255), (10, 0)])
COLOR_ALPHA = Image.new("RGBA", (3, 1))
COLOR_ALPHA.putdata([(1, 2, 3, 255), (1, 2, 3, 0), (0, 100, 200, 51)])
BLENDED = [(1, 2, 3), WHITE, (204, 224, 244)]  # 255 + (c − 255)·51/255
CMYK = Image.new("CMYK", (3, 1))
CMYK.putdata([(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 255, 51)])
INKS = [WHITE, (0, 255, 255), (204, 102, 0)]  # (1 − C)(1 − K) of each
DECODED = {
    "16-bit grey PNG": (encoded(Image.fromarray(GREYS), "PNG"), HIGH),
    "16-bit grey TIFF": (encoded(Image.fromarray(GREYS), "TIFF"), HIGH),
    "16-bit grey TIFF of the other byte order": (encoded(Image.fromarray(GREYS.astype(">u2")), "TIFF"), HIGH),
    "16-bit grey PNG, one grey transparent": (
        png(2, 1, 16, 0, shorts(0x1201, 0x1202), chunk(b"tRNS", shorts(0x1201))), [WHITE, (0x12,) * 3],
    ),
    "16-bit grey and alpha PNG": (png(2, 1, 16, 4, shorts(0x80FF, 65535, 0x80FF, 0)), [(0x80,) * 3, WHITE]),
    "16-bit colour PNG": (png(2, 1, 16, 2, shorts(65535, 32768, 255, 256, 0, 513)), [(255, 128, 0), (1, 0, 2)]),
    "1-bit PNG": (png(4, 1, 1, 0, b"\xa0"), [WHITE, (0, 0, 0), WHITE, (0, 0, 0)]),
    "CMYK TIFF": (encoded(CMYK, "TIFF"), INKS),
    "palette PNG": (encoded(PALETTE, "PNG"), [(10, 20, 30), (200, 100, 50), (1, 2, 3)]),
    "palette PNG, one colour transparent": (
        encoded(PALETTE, "PNG", transparency=1), [(10, 20, 30), WHITE, (1, 2, 3)],
    ),
    "palette PNG with an alpha a colour": (
        encoded(PALETTE, "PNG", transparency=b"\xff\x00\x80"), [(10, 20, 30), WHITE, (128, 128, 129)],
    ),
    "palette GIF, one colour transparent": (
        encoded(PALETTE, "GIF", transparency=1), [(10, 20, 30), WHITE, (1, 2, 3)],
    ),
    "colour PNG, one colour transparent": (
        png(2, 1, 8, 2, bytes([9, 8, 7, 9, 8, 6]), chunk(b"tRNS", shorts(9, 8, 7))), [WHITE, (9, 8, 6)],
    ),
    "grey and alpha": (encoded(GREY_ALPHA, "PNG"), [(10, 10, 10), WHITE]),
    "alpha PNG": (encoded(COLOR_ALPHA, "PNG"), BLENDED),
    "alpha WebP": (encoded(COLOR_ALPHA, "WEBP", lossless=True, exact=True), BLENDED),
    "animated GIF": (encoded(FRAMES[0], "GIF", **MOVING), [(255, 0, 0)] * 2),
    "animated WebP": (encoded(FRAMES[0], "WEBP", lossless=True, **MOVING), [(255, 0, 0)] * 2),
    "animated PNG": (encoded(FRAMES[0], "PNG", **MOVING), [(255, 0, 0)] * 2),
    "TIFF of several pages": (encoded(FRAMES[0], "TIFF", **MOVING), [(255, 0, 0)] * 2),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "BMP"), [(7, 8, 9)]),
}  # fmt: skip


@pytest.mark.parametrize("content, expected", DECODED.values(), ids=list(DECODED))
def test_the_pixels_are_right(tmp_path, content, expected):
    (tmp_path / "image.png").write_bytes(content)  # the name does not decide
    image = load_image(tmp_path / "image.png")
    assert image.mode == "RGB" and image.size == (len(expected), 1)
    assert pixels(image) == expected


def test_a_cmyk_jpeg_is_not_read_as_its_negative(tmp_path):
    for i, (ink, color) in enumerate(zip([(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 255, 51)], INKS, strict=True)):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"{i}.jpg", quality=100)
        assert np.abs(np.asarray(load_image(tmp_path / f"{i}.jpg")).astype(int) - color).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, kind, orientation):
    """Stored as cameras do, an image comes back as it was seen: white in its upper left eighth."""
    upright = Image.new("RGB", (32, 16), (0, 0, 0))
    upright.paste(WHITE, (0, 0, 8, 8))
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    read = load_image(tmp_path / "photo.jpg")
    assert read.size == (32, 16)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(upright)).max() <= (40 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "kind, options",
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}),
     ("BMP", {}), ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
def test_a_file_cut_anywhere_gives_all_its_pixels_or_none(tmp_path, kind, options):
    image = Image.new("RGB", (16, 16))
    image.putdata([(i % 256, i * 7 % 256, i * 13 % 256) for i in range(256)])
    content, path = encoded(image, kind, **options), tmp_path / "cut.png"
    path.write_bytes(content)
    whole, refused = pixels(load_image(path)), 0
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        try:
            assert pixels(load_image(path)) == whole, size
        except (OSError, SyntaxError, ValueError):
            refused += 1
    assert refused > len(content) // 3 * 0.8


HOSTILE = {
    "no bytes": (b"", "no image of the formats"),
    "text": (b"not a picture", "no image of the formats"),
    "a page": (b"<html><script>alert(1)</script></html>", "no image of the formats"),
    "PostScript, which Pillow has Ghostscript run": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", "no image of the formats",
    ),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "no image of the formats"),
    "a bomb of 900 megapixels": (png(30_000, 30_000, 8, 2), "decompression bomb"),
    "a bomb of 90 megapixels": (png(10_000, 9_000, 1, 0), "decompression bomb"),
    "a text bomb": (png(1, 1, 8, 0, b"\0", chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**27))), "too large"),
    "no width": (png(0, 1, 8, 0), "no image of the formats"),
    "a thread": (encoded(Image.new("RGB", (1, MAX_ASPECT + 1)), "PNG"), f"more than {MAX_ASPECT} times as long"),
    "32-bit integers": (encoded(Image.new("I", (2, 2)), "TIFF"), "32-bit"),
    "floats": (encoded(Image.new("F", (2, 2)), "TIFF"), "32-bit"),
    "16-bit colours, one transparent": (
        png(1, 1, 16, 2, shorts(1, 2, 3), chunk(b"tRNS", shorts(1, 2, 3))), "16-bit colours",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Sixteen sound images of colours of their own."""
    path = tmp_path / "images"
    path.mkdir()
    for i in range(16):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path / f"{i:02d}.png")
    return path


@pytest.mark.parametrize("content, reason", HOSTILE.values(), ids=list(HOSTILE))
def test_what_cannot_be_read_is_skipped_by_name(folder, content, reason):
    (folder / "05.png").write_bytes(content)
    images = ImageFolder(folder, "data.train", max_bad=0.1)
    assert list(images.skipped) == ["05.png"] and reason in images.skipped["05.png"]
    assert len(images) == 15 and 5 not in images.ids
    (note,) = images.notes()
    assert note.startswith(f"skipped {folder}/05.png: ") and reason in note


def test_what_is_no_file_is_skipped_by_name(folder, tmp_path):
    Image.new("RGB", (4, 4), (99, 0, 0)).save(tmp_path / "elsewhere.png")
    for name in ("01.png", "02.png", "03.png", "04.png"):
        (folder / name).unlink()
    (folder / "01.png").mkdir()
    (folder / "02.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "03.png")  # opening it would wait for ever
    (folder / "04.png").symlink_to(tmp_path / "elsewhere.png")  # a link to an image is one
    images = ImageFolder(folder, "data.train", max_bad=0.3)
    assert images.skipped == dict.fromkeys(["01.png", "02.png", "03.png"], "not a file")
    assert pixels(images[images.ids.index(4)].image)[0] == (99, 0, 0)


def test_more_bad_images_than_allowed_stop_with_their_list(folder):
    for i in range(84):
        Image.new("RGB", (2, 2)).save(folder / f"more-{i}.png")
    (folder / "03.png").write_bytes(b"")
    assert list(ImageFolder(folder, "data.train").skipped) == ["03.png"]  # 1 of 100
    (folder / "07.png").write_bytes(b"no")
    with pytest.raises(ConfigError) as caught:
        ImageFolder(folder, "data.train")
    first, *rest = caught.value.problems
    assert first == (f"data.train: 2 of the 100 images in {folder} cannot be read, and data.max_bad = 0.01 allows 1")
    assert [line.split(":")[0] for line in rest] == ["03.png", "07.png"]
    assert len(ImageFolder(folder, "data.train", max_bad=0.02)) == 98
    for path in folder.glob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(ConfigError) as caught:
        ImageFolder(folder, "data.train", max_bad=0.999)
    assert len(caught.value.problems) == 52 and caught.value.problems[-1] == "and 50 more"


def order(images, steps=8):
    """The ids of the first steps' images; an epoch is four steps long."""
    return [example.id for step in range(steps) for example in images.batch(step, 4, 0, "stage2")]


def test_a_skip_moves_nothing_but_the_skipped(folder):
    """A bad image's place goes to the epoch's next one; every other place, and every id, stays."""
    whole = order(ImageFolder(folder, "data.train"))
    assert sorted(whole[:16]) == sorted(whole[16:]) == list(range(16)) and whole[:16] != whole[16:]
    (folder / "05.png").write_bytes(b"")
    cut = order(ImageFolder(folder, "data.train", max_bad=0.1))
    assert [a for a, b in zip(whole, cut, strict=True) if a != b] == [5, 5] and 5 not in cut
    assert cut == order(ImageFolder(folder, "data.train", max_bad=0.1))


def test_an_image_lost_during_the_run_is_skipped_as_if_it_had_been_bad_before(folder, capsys):
    images = ImageFolder(folder, "data.train", max_bad=0.1)
    first = order(images, 1)
    lost = next(i for i in range(16) if i not in first)
    (folder / f"{lost:02d}.png").unlink()
    later = order(images)
    assert capsys.readouterr().out == f"skipped {folder}/{lost:02d}.png: not a file\n"
    (folder / f"{lost:02d}.png").write_bytes(b"")
    assert later == order(ImageFolder(folder, "data.train", max_bad=0.1))
    with pytest.raises(ConfigError, match=rf"{lost:02d}\.png could be read when the run began and cannot be now"):
        images[lost]
    (folder / f"{first[0]:02d}.png").unlink()
    with pytest.raises(ConfigError, match="2 of the 16 images"):
        order(images)


class Watched:
    """Prepares an image by its red value, and tells when it has done so for a step of four."""

    def __init__(self):
        self.seen, self.done = [], [threading.Event() for _ in range(8)]

    def __call__(self, image):
        self.seen.append(image.getpixel((0, 0))[0])
        if len(self.seen) % 4 == 0:
            self.done[len(self.seen) // 4 - 1].set()
        return self.seen[-1]

    def wait(self, step):
        assert self.done[step].wait(60)


def ahead(images, prepare, steps=8):
    return ReadAhead(images, 4, 0, "stage2", steps, prepare)


def readers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("first", [0, 5])
def test_reading_ahead_gives_the_same_images(folder, first):
    expected = order(ImageFolder(folder, "data.train"))[4 * first :]
    with ahead(ImageFolder(folder, "data.train"), lambda image: image.getpixel((0, 0))[0]) as images:
        found = [example for step in range(first, 8) for example in images.batch(step)]
    assert [example.id for example in found] == [example.prepared for example in found] == expected


def test_the_next_step_is_read_while_this_one_computes_and_no_more(folder):
    images, prepare = ImageFolder(folder, "data.train"), Watched()
    expected = order(ImageFolder(folder, "data.train"))
    with ahead(images, prepare) as reading:
        for step in range(3):
            assert [example.id for example in reading.batch(step)] == expected[4 * step : 4 * step + 4]
            prepare.wait(step + 1)  # without anybody asking for it
            assert prepare.seen == expected[: 4 * step + 8]
    assert prepare.seen == expected[:16] and readers() == []
    with ahead(images, prepare := Watched(), steps=1) as reading:
        reading.batch(0)
    assert prepare.seen == expected[:4]  # the last step has none after it


def test_a_lost_image_is_named_and_counted_at_its_step(folder, capsys):
    images, prepare = ImageFolder(folder, "data.train", max_bad=0.1), Watched()
    ids = order(images)
    (folder / f"{ids[5]:02d}.png").unlink()
    with ahead(images, prepare) as reading:
        reading.batch(0)
        prepare.wait(1)
        assert capsys.readouterr().out == "" and images.skipped == {}
        assert [example.id for example in reading.batch(1)] == [ids[4], ids[6], ids[6], ids[7]]
        assert capsys.readouterr().out == f"skipped {folder}/{ids[5]:02d}.png: not a file\n"
        assert list(images.skipped) == [f"{ids[5]:02d}.png"]
        for step in (2, 3, 4, 5):
            reading.batch(step)
    assert capsys.readouterr().out == ""  # once


def test_an_error_comes_out_at_its_step_and_the_thread_ends(folder, capsys):
    """The one, and after the same notes, that reading without a thread would have ended in."""
    images, alone, prepare = *(ImageFolder(folder, "data.train", max_bad=0.1) for _ in range(2)), Watched()
    for i in order(images)[5:7]:
        (folder / f"{i:02d}.png").unlink()
    with pytest.raises(ConfigError, match="2 of the 16 images") as caught, ahead(images, prepare) as reading:
        assert len(reading.batch(0)) == 4
        reading.batch(1)
    said = capsys.readouterr().out
    with pytest.raises(ConfigError) as expected:
        order(alone)
    assert caught.value.problems == expected.value.problems and said == capsys.readouterr().out

    def refuse(image):
        if image.getpixel((0, 0))[0] == ids[6]:
            raise ValueError("no such shape")

    for i in range(16):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i:02d}.png")
    images = ImageFolder(folder, "data.train")
    ids = order(images)
    with pytest.raises(ValueError, match="no such shape"), ahead(images, refuse) as reading:
        assert len(reading.batch(0)) == 4
        reading.batch(1)
    assert readers() == []


def test_a_stop_waits_for_no_more_than_the_step_being_read(folder):
    """An exception in the loop, while the thread stands in the next step's first image."""
    held, entered = threading.Event(), threading.Event()

    def hold(image):
        if len(seen) == 4:
            entered.set()
            held.wait(60)
        seen.append(image)

    seen = []
    with pytest.raises(KeyboardInterrupt), ahead(ImageFolder(folder, "data.train"), hold) as reading:
        reading.batch(0)
        assert entered.wait(60) and readers() == ["images_0"]
        threading.Timer(0.1, held.set).start()
        raise KeyboardInterrupt
    assert len(seen) == 8 and readers() == []


def captions(folder, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def test_every_mistake_in_the_captions_is_named_by_its_line(folder):
    captions(
        folder,
        {"file": "00.png", "caption": "zero"},
        "{broken",
        "",
        "[1, 2]",
        {"caption": "of no file"},
        {"file": 7, "caption": "x"},
        {"file": "01.png", "caption": 7},
        {"file": "02.png", "caption": "x", "attributes": [1]},
        {"file": "00.png", "caption": "again"},
        "[" * 100_000,
        '{"file": "03.png", "n": ' + "9" * 10_000 + "}",
    )
    with pytest.raises(ConfigError) as caught:
        ImageFolder(folder, "data.train")
    start = f"data.train: {folder}/captions.jsonl:"
    no_row = 'not a JSON object with "file" and "caption"'
    assert [problem.removeprefix(start) for problem in caught.value.problems] == [
        f"2: {no_row}", f"4: {no_row}", f"5: {no_row}", f"6: {no_row}", '7: "caption" is not a text',
        '8: "attributes" is not a list of words', "9: 00.png has a row already, line 1", f"10: {no_row}",
        f"11: {no_row}",
    ]  # fmt: skip
    (folder / "captions.jsonl").write_bytes(b'{"file": "00.png", "caption": "caf\xe9"}')
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 34"):
        ImageFolder(folder, "data.train")


def test_captions_are_read_as_they_are(folder):
    said = ["", "two\nlines", "a\u2028b\x85c", "🐝 ż", '"><script>', "<|image_pad|>", "x" * 100_000]
    lines = [json.dumps({"file": f"{i:02d}.png", "caption": text}, ensure_ascii=False) for i, text in enumerate(said)]
    half = '{"file": "07.png", "caption": "half \\ud800"}'
    captions(folder, "\ufeff" + lines[0], *lines[1:], half, '{"file": "08.png", "caption": null}', "\r")
    images = ImageFolder(folder, "data.train")
    assert [images[i].caption for i in range(10)] == [*said, "half ?", None, None]
    assert not images.captioned
    with pytest.raises(ConfigError, match=r"stages 0 and 1 need captions in .*captions\.jsonl; 08\.png has none"):
        ImageFolder(folder, "data.train", captions=True)


def test_rows_of_other_files_are_named_and_never_opened(folder, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    rows = [{"file": name, "caption": "x"} for name in ("../secret.png", "/etc/passwd", "a\x1b[2J\n.png", "00.png")]
    captions(folder, *rows)
    images = ImageFolder(folder, "data.train")
    assert len(images) == 16 and images[0].caption == "x"
    (note,) = images.notes()
    assert note == (
        f"{folder}/captions.jsonl: no image has the name "
        "../secret.png (line 1), /etc/passwd (line 2), a\\x1b[2J\\n.png (line 3)"
    )


def test_names_of_any_script_and_none(folder):
    names = ["żółw.png", "図.png", "🐝 bee.png", "line\nbreak.png", os.fsdecode(b"\xff\xfe.png"), " .png", "-rf.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (0, i, 1)).save(folder / name, "PNG")
    (folder / unicodedata.normalize("NFD", "é.png")).write_bytes((folder / "00.png").read_bytes())
    captions(folder, *({"file": name, "caption": name.encode("utf-8", "replace").decode()} for name in names[:4]),
             {"file": unicodedata.normalize("NFC", "é.png"), "caption": "e"})  # fmt: skip
    images = ImageFolder(folder, "data.train", max_bad=0.5)
    found = {images[i].file: images[i] for i in range(len(images))}
    assert [pixels(found[name].image)[0] for name in names] == [(0, i, 1) for i in range(len(names))]
    assert [found[name].caption for name in names[:4]] == names[:4]
    assert found[unicodedata.normalize("NFD", "é.png")].caption == "e"  # one letter, spelled in two ways
    for name in names:
        (folder / name).write_bytes(b"")
    notes = ImageFolder(folder, "data.train", max_bad=0.5).notes()
    assert len(notes) == len(names) and all(note.isprintable() for note in notes)
