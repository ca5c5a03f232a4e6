"""What others made stays data: weights, templates, configurations, captions and names run nothing and lead nowhere."""

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uae_fast.checkpoint import ADAPTER
from uae_fast.cli import main
from uae_fast.config import ConfigError, load_config
from uae_fast.models.loading import load_models, load_run
from uae_fast.models.sources import TINY, Source, find_sources
from uae_fast.report import write_report

ROOT = Path(__file__).parents[1]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that nothing may come to stand at."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def foreign(tmp_path):
    """A folder of models as somebody might hand it over."""
    return Path(shutil.copytree(TINY, tmp_path / "models"))


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        load_models(load_config("tiny", [f"models.path={folder}"]))
    assert all(problem.startswith("models.path: ") and problem.isprintable() for problem in caught.value.problems)
    return caught.value.problems


def test_the_payload_would_run(tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "part, name",
    [("encoder", "pytorch_model.bin"), ("decoder/transformer", "diffusion_pytorch_model.bin"),
     ("decoder/vae", "diffusion_pytorch_model.pt"), ("reward", "model.pkl")],
)  # fmt: skip
def test_models_in_pickles_are_refused_unread(foreign, marker, part, name):
    for path in (foreign / part).glob("*.safetensors*"):
        path.unlink()
    torch.save({"weight": Payload(marker)}, foreign / part / name)
    (problem,) = refused(foreign)
    assert f"{foreign / part} has its weights as pickles ({name}), which may run code" in problem
    with pytest.raises(ConfigError, match="pickles"):
        find_sources(load_config("tiny", [f"models.path={foreign}"]))  # before anything loads


def test_a_pickle_beside_safetensors_is_not_read(foreign, marker):
    for name in (
        "encoder/pytorch_model.bin",
        "decoder/transformer/diffusion_pytorch_model.bin",
        "reward/training_args.bin",
    ):
        torch.save({"weight": Payload(marker)}, foreign / name)
    load_models(load_config("tiny", [f"models.path={foreign}"]))


@pytest.mark.parametrize(
    "name", ["encoder/model.safetensors", "reward/model.safetensors", "projector.safetensors",
             "decoder/pooled.safetensors", "decoder/vae/diffusion_pytorch_model.safetensors"],
)  # fmt: skip
def test_a_pickle_under_another_name_is_named(foreign, marker, name):
    torch.save({"weight": Payload(marker)}, foreign / name)
    (problem,) = refused(foreign)
    assert str(foreign / name.split("/")[0]) in problem and "cannot be loaded" in problem


def test_a_shard_may_not_lie_outside(foreign, tmp_path):
    (index,) = (foreign / "decoder" / "transformer").glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../../outside.safetensors")
    index.write_text(json.dumps(content))
    assert "has a shard outside itself: ../../../outside.safetensors" in refused(foreign)[0]


def test_no_code_of_a_model_folder_is_imported(foreign, marker):
    """Classes that a folder's JSON names ("auto_map") are not looked for, and nobody is asked about them."""
    module = f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n"
    for part, config in (("encoder", "config.json"), ("encoder", "tokenizer_config.json"), ("reward", "config.json")):
        (foreign / part / "own.py").write_text(module)
        content = json.loads((foreign / part / config).read_text())
        classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForImageTextToText")
        content |= {"tokenizer_class": "Own"} if "tokenizer" in config else {}
        content["auto_map"] = dict.fromkeys(classes, "own.Own") | {"AutoTokenizer": ["own.Own", "own.Own"]}
        (foreign / part / config).write_text(json.dumps(content))
    load_models(load_config("tiny", [f"models.path={foreign}"]))


def test_no_kernel_that_a_model_folder_names_is_downloaded(foreign):
    for part in ("encoder", "reward"):
        content = json.loads((foreign / part / "config.json").read_text())
        content["attn_implementation"] = content["_attn_implementation"] = "kernels-community/anything"
        content["vision_config"]["attn_implementation"] = "kernels-community/anything"
        (foreign / part / "config.json").write_text(json.dumps(content))
    models = load_models(load_config("tiny", [f"models.path={foreign}"]))
    for model in (models.encoder.model, models.reward.encoders[0].model):
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
            "sdpa"
        }


@pytest.mark.parametrize(
    "call",
    [
        "from uae_fast.bnb import import_bitsandbytes; import_bitsandbytes()",
        "from uae_fast.tiny import pretrain as p; from pathlib import Path; p.PARTS = (); p.pretrain(Path(), Path())",
        "from uae_fast.cli import main; assert main(['import-uae', 'nowhere', 'out']) == 2",
    ],
    ids=["itself", "pretrain", "import-uae"],
)
def test_bitsandbytes_fetches_no_kernel(tmp_path, call):
    """Where a package of that name is installed, which would: this one says so."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('fetched')\n    raise ImportError\n")
    code = f"import kernels\n{call}\n"
    code += "import kernels as again\nassert again is kernels\nfrom bitsandbytes.nn import Linear4bit"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "") and "pip install" not in done.stderr, done.stderr
    bare = [sys.executable, "-c", "import bitsandbytes"]
    done = subprocess.run(bare, env=env, cwd=tmp_path, capture_output=True, text=True)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert done.stdout == ("fetched\n" if "avx512_bf16" in flags else "")  # the guard is needed


ESCAPES = [
    "cycler.__init__.__globals__.os.mkdir({marker!r})",
    "''.__class__.__mro__[1].__subclasses__()",
    "lipsum.__globals__['os'].mkdir({marker!r})",
    "self._TemplateReference__context.environment.from_string('x')",
    "messages.append(messages)",
    "range(10 ** 9)",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(foreign, marker, escape):
    template = (foreign / "encoder" / "chat_template.jinja").read_text()
    call = escape.format(marker=str(marker)) if "{marker" in escape else escape
    (foreign / "encoder" / "chat_template.jinja").write_text(template + "{{ " + call + " }}")
    assert f"{foreign / 'encoder'} cannot be loaded: " in refused(foreign)[0]


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "no role", "{% for", "<|image_pad|>" * 2])
def test_a_chat_template_that_does_not_fit_is_named(foreign, template):
    (foreign / "encoder" / "chat_template.jinja").write_text(template)
    refused(foreign)


def test_models_come_from_folders_or_at_a_commit(tmp_path, monkeypatch):
    """Of a folder nothing is looked for elsewhere; the name of a repository on a hub alone names nothing."""
    monkeypatch.chdir(tmp_path)
    assert "is no folder on this machine" in refused("Qwen/Qwen2.5-VL-3B-Instruct")[0]
    sources = [path.read_text() for path in (ROOT / "uae_fast").rglob("*.py")]
    calls = [call for source in sources for call in re.findall(r"from_pretrained\((?:[^()]|\([^()]*\))*\)", source)]
    assert len(calls) >= 8
    bound = ("**LOCAL", "local_files_only=True", "**source.pretrained(", "**reading.pretrained(")
    assert [call for call in calls if not any(words in call for words in bound)] == []
    assert Source("folder").pretrained("vae")["local_files_only"] is True
    for name in ("somebody/something", "somebody/something@main", f"somebody/something@{'0' * 39}"):
        with pytest.raises(ConfigError, match=r"the 40 digits of a commit|neither a folder"):
            Source.parse(name, "models.encoder_from")
    unsafe = (
        r"torch\.load\(|pickle\.load|yaml\.(?:unsafe_|full_)?load\(|trust_remote_code=True|(?<![\w.])(?:eval|exec)\("
    )
    assert [found for source in sources for found in re.findall(unsafe, source)] == []


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A run's folder with one checkpoint of an encoder's adapter."""
    from uae_fast.checkpoint import save_checkpoint
    from uae_fast.config import save_config

    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = load_config("tiny", [f"run={folder}", "models.encoder=lora"])
    save_config(config, folder / "config.yaml")
    state = {"place": 1, "stage_step": 0, "step": 1, "moment": "stage2", "trained": ["encoder"], "seconds": 0.0}
    save_checkpoint(folder / "checkpoints", load_models(config), state, {})
    return folder


def test_a_pickle_in_a_checkpoint_is_refused_unread(lora_run, tmp_path, marker):
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    load_run(run, "stage2")
    encoder = run / "checkpoints" / "step-000001" / "encoder"
    torch.save({"weight": Payload(marker)}, encoder / "adapter_model.bin")
    (encoder / ADAPTER).unlink()
    with pytest.raises(Exception, match=rf"{ADAPTER}|damaged"):
        load_run(run, "stage2")


def test_names_of_tensors_and_stray_files_lead_nowhere(lora_run, tmp_path, marker):
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    encoder = run / "checkpoints" / "step-000001" / "encoder"
    weights = load_file(encoder / ADAPTER)
    save_file({**weights, f"../../{marker.name}": torch.zeros(1), str(marker): torch.zeros(1)}, encoder / ADAPTER)
    before = sorted(tmp_path.rglob("*"))
    try:
        load_run(run, "stage2")
    except ConfigError as error:
        assert "damaged" in str(error)  # where a checkpoint is sealed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../victim", "/etc/hostname", "tiny.yaml", ".", ""])
def test_only_presets_are_copied_and_only_here(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "victim").write_text("seed: 1")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["configs", "copy", name]) == 2
    assert "presets: " in capsys.readouterr().err or name == "tiny.yaml"
    assert list((tmp_path / "here").iterdir()) == [] and sorted(os.listdir(tmp_path)) == ["here", "victim"]


def test_an_export_stays_in_its_folder(tmp_path):
    assert main(["tiny", "export", str(tmp_path / "a" / ".." / "out"), "--count", "3"]) == 0
    assert {path.parent for path in tmp_path.rglob("*.*")} == {tmp_path / "out"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs" / "scene-00000.png").write_text("theirs")
    assert main(["tiny", "export", str(tmp_path / "link"), "--count", "3"]) == 2
    assert (tmp_path / "theirs" / "scene-00000.png").read_text() == "theirs"


# ---- the report ----------------------------------------------------------------------------------------------------


SCRIPT = "\"><script>alert(1)</script><img src=x onerror=alert(1)>' onload=alert(1) x='</pre></style><b>&amp;"


class Page(HTMLParser):
    """The tags of a page with their attributes' names, its text, and its attributes' values."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.values = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, sorted(name for name, _ in attrs)))
        self.values += [value for _, value in attrs]

    def handle_data(self, data):
        self.text += data


def a_run(folder, text, file="scene.png"):
    """A run whose every word is `text`, but for what is a number or a fixed name."""
    for moment in ("ceiling", "source", "before", "stage2"):
        (folder / "samples" / moment).mkdir(parents=True)
        if moment != "ceiling":
            Image.new("RGB", (8, 8), "red").save(folder / "samples" / moment / "scene.png")
        row = {"file": file, "caption": f"a {text} b" if moment != "before" else "a b", "reward": 0.5,
               "picture": "../../samples/source/scene.png"}  # fmt: skip
        (folder / "samples" / moment / "scores.jsonl").write_text(json.dumps(row) + "\n")
    config = f"seed: {text}\ncaption:\n  prompt: {text}\n{text}: {text}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8", errors="replace")
    rows = [{"step": i, "stage": text, "reward": i / 10, text: i} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"seed": text, "minutes": text, "ceiling": {"reward": text, "accuracy": text}, "stage2": {"reward": text}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_nothing_that_a_report_shows_becomes_part_of_the_page(tmp_path):
    plain = a_run(tmp_path / "plain", "word", "word.png")
    name = SCRIPT.replace("/", "∕")  # a folder's name has no slash
    page = a_run(tmp_path / name, SCRIPT, f"{SCRIPT}.png")
    assert [tag for tag in page.tags if tag[0] != "mark"] == [tag for tag in plain.tags if tag[0] != "mark"]
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    for shown in (f"{name} · training report", f"seed {SCRIPT.split()[0]}", f"prompt: {SCRIPT}"):
        assert shown in page.text, shown
    assert page.text.count(f"a {SCRIPT} b") >= 2  # the caption, and the complete one
    assert f"{SCRIPT}.png, the source" in page.values


def test_a_row_cannot_bring_another_file_into_the_report(tmp_path):
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "scene.png")
    run = tmp_path / "run"
    page = a_run(run, "word", "../../../scene.png")
    shown = [value.partition("base64,")[2] for value in page.values if value.startswith("data:image")]
    red = base64.b64encode((run / "samples" / "source" / "scene.png").read_bytes()).decode()
    assert shown == [red] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "scene.png"]


def test_halves_of_characters_do_not_stop_a_report(tmp_path):
    page = a_run(tmp_path / "run", "half \udcff", "half \udcff.png")
    assert "a half ? b" in page.text and "half ?.png, the source" in page.values
