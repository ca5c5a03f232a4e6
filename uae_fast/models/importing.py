"""The weights that UAE's authors released (zhiyuanyan1/UAE), read into a run's folder.

Their folder, as the demo of their code reads it:

* ``llm``: a Qwen2.5-VL with the projector's four tensors (``projector.0``, ``projector.2``) among its own;
* ``llm_lora``: the same model once more, in shards, after peft wrapped its language model: ``model.base_model.model.…``
  with ``base_layer`` and ``lora_A.default``/``lora_B.default``; what is in it wins over ``llm``;
* ``dit``: an SD3 transformer saved by diffusers; ``dit_lora``: an adapter of it saved by peft;
* the encoder's tokenizer and image processor, and Stable Diffusion 3.5 large for VAE, scheduler and text encoders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..bnb import import_bitsandbytes
from ..checkpoint import save_checkpoint
from ..config import ConfigError, load_config, save_config
from ..identity import machine, run_identity
from ..run import Position
from .loading import load_models, pooled_condition, pretrained
from .sources import Source, named

LLM = ("llm", "llm_model")
PROCESSOR = ("llm_processor", "llm_model_preprocessor", *LLM)
SD3 = ("SD3", "SD3_model")
PROJECTOR = {f"projector.{i}.{x}": f"{to}.{x}" for i, to in ((0, "up"), (2, "down")) for x in ("weight", "bias")}
KEPT = (".json", ".safetensors")
WRAPPED = "model.base_model.model."  # what peft puts before the names of the model it wraps, which was `model`
SCALES = ("alpha_pattern", "rank_pattern")  # of peft: other scales for some modules
ENCODER_SCALE = 2.0  # α / r of their encoder's adapter, 64 / 32: the shards do not say it
AS_RELEASED = ["data.resolution=1024", "render.steps=40", "reward.heldout="]  # over the preset `paper`: their demo


def import_uae(
    folder: Path, out: Path, *, sd3: str = "", processor: str = "", reward: str = "", overrides: Sequence[str] = ()
) -> list[str]:
    """Writes the released weights as a run that stands at the end of stage 3: ``uae-fast caption … --run OUT``.

    Args:
        folder: with ``llm``, ``llm_lora``, ``dit`` and ``dit_lora``.
        out: the run's folder: ``config.yaml``, ``models`` (encoder, projector, decoder) and a checkpoint with both
            adapters.
        sd3: Stable Diffusion 3.5 large, a folder or owner/name@commit; ``SD3`` inside `folder` unless given.
        processor: the encoder's tokenizer and image processor, likewise; inside `folder` unless given.
        reward: image encoder of the run, likewise; that of the preset ``paper`` unless given.
        overrides: of the written configuration, "key=value".

    Returns:
        What was found that a reader may want to know, a line each.

    Raises:
        ConfigError: a part is missing, or tensors are missing or unknown: all of them are listed.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError([f"import-uae: {out} exists already"])
    import_bitsandbytes()
    llm, llm_lora, dit, dit_lora = (_place(folder, names) for names in (LLM, ("llm_lora",), ("dit",), ("dit_lora",)))
    drawing = Source.parse(sd3 or str(_place(folder, SD3)), "--sd3")
    reading = Source.parse(processor or str(_place(folder, PROCESSOR, "tokenizer_config.json")), "--processor")
    models = out / "models"
    try:
        encoder_adapter, notes = _write_encoder(llm, llm_lora, reading, models)
        _write_decoder(dit, drawing, models / "decoder")
        decoder_adapter, decoder_scale = _read_adapter(dit_lora)
        both = [*encoder_adapter.items(), *decoder_adapter.items()]
        rank = max(value.shape[0] for name, value in both if name.endswith("lora_A"))
        settings = [
            f"run={out}", f"models.path={models}", "models.encoder_from=", "models.decoder_from=",
            f"models.lora_rank={rank}", f"models.lora_alpha={round(ENCODER_SCALE * rank)}", *AS_RELEASED,
        ]  # fmt: skip
        config = load_config("paper", [*settings, *[f"reward.encoders=[{reward}]"] * bool(reward), *overrides])
        save_config(config, out / "config.yaml")
        loaded = load_models(config)
        notes += _fill_adapter(loaded.encoder.adapters, encoder_adapter, "llm_lora", 1.0)
        notes += _fill_adapter(loaded.decoder.transformer, decoder_adapter, "dit_lora", decoder_scale / ENCODER_SCALE)
        position = Position(place=len(config.stages), moment="stage3", trained=("decoder", "encoder"))
        state = {**asdict(position), "score": None, "identity": run_identity(config), "machine": machine(config)}
        save_checkpoint(out / "checkpoints", loaded, state, {})
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # half of an import is none
        raise
    return notes


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _place(folder: Path, names: tuple[str, ...], file: str = "") -> Path:
    """The first of `names` in the release's folder (that has `file`)."""
    for name in names:
        if (folder / name / file).exists():
            return folder / name
    what = f"{' or '.join(dict.fromkeys(names))}{' with ' + file if file else ''}"
    raise ConfigError([f"import-uae: {folder} has no {what}"])


def _json(file: Path) -> dict[str, Any]:
    with named("import-uae", file):
        return json.loads(file.read_text(encoding="utf-8"))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError([f"import-uae: {folder} has no safetensors file"])
    for file in files:
        with named("import-uae", file):
            tensors = load_file(file)
        yield from tensors.items()


def _write_encoder(llm: Path, llm_lora: Path, reading: Source, models: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Writes encoder and projector; returns the adapter by module and side ("….q_proj.lora_A"), and notes."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    weights = {_plain(name): value for name, value in _tensors(llm)}
    adapter: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    changed = 0
    for name, value in _tensors(llm_lora):
        plain = _plain(name)
        if name.startswith(WRAPPED) and name.endswith((".lora_A.default.weight", ".lora_B.default.weight")):
            adapter["model.language_" + plain.removesuffix(".default.weight")] = value
        elif plain in weights and weights[plain].shape == value.shape:
            changed += not torch.equal(weights[plain], value)
            weights[plain] = value
        else:
            others[name] = value
    head, embeddings = others.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is not None and embeddings is not None and torch.equal(head, embeddings):
        del others["lm_head.weight"]  # tied to the embeddings, and written out all the same
    unknown = [f"llm_lora: unknown tensor {name} {tuple(value.shape)}" for name, value in others.items()]
    missing = [f"llm: no tensor {name}" for name in PROJECTOR if name not in weights]
    _refuse(missing + unknown)

    models.mkdir(parents=True, exist_ok=True)
    projector = {ours: weights.pop(name).contiguous() for name, ours in PROJECTOR.items()}
    save_file(projector, models / "projector.safetensors")
    (folder := models / "encoder").mkdir()
    config = _json(llm / "config.json")
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    pretrained(Qwen2_5_VLForConditionalGeneration, Source(str(folder)), complete=True, dtype=torch.bfloat16)  # checks
    AutoTokenizer.from_pretrained(**reading.pretrained()).save_pretrained(folder)
    Qwen2VLImageProcessorPil.from_pretrained(**reading.pretrained()).save_pretrained(folder)
    return adapter, [f"llm_lora: {changed} tensors differ from those of llm, and replace them"] if changed else []


def _plain(name: str) -> str:
    """A tensor's name without what peft put in: "model.base_model.model.x.base_layer.weight" is "model.x.weight"."""
    if name.startswith(WRAPPED):
        name = "model." + name.removeprefix(WRAPPED)
    return name.replace(".base_layer.", ".")


def _write_decoder(dit: Path, drawing: Source, folder: Path) -> None:
    """Writes the decoder: their transformer, and Stable Diffusion's VAE, scheduler and pooled condition."""
    from diffusers import SD3Transformer2DModel

    pretrained(SD3Transformer2DModel, Source(str(dit)), complete=True, dtype=torch.bfloat16)  # checks
    shutil.copytree(dit, folder / "transformer", ignore=lambda _, names: [n for n in names if not n.endswith(KEPT)])
    for part in ("vae", "scheduler"):
        shutil.copytree(drawing.local("vae", "scheduler") / part, folder / part)
    pooled_condition(drawing, folder / "pooled.safetensors")


def _read_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """An adapter saved by peft, by module and side, and what its product is scaled by, α / r or α / √r."""
    config = _json(folder / "adapter_config.json")
    adapter = {}
    problems = [f"{folder.name}: {key} = {config[key]} is not supported" for key in SCALES if config.get(key)]
    for name, value in _tensors(folder):
        side = name.removeprefix("base_model.model.").removesuffix(".weight")
        if side.endswith((".lora_A", ".lora_B")):
            adapter[side] = value
        else:
            problems.append(f"{folder.name}: unknown tensor {name} {tuple(value.shape)}")
    _refuse(problems)
    return adapter, config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))


@torch.no_grad()
def _fill_adapter(model: Any, adapter: dict[str, Tensor], place: str, factor: float) -> list[str]:
    """Puts an adapter's tensors into the new one of `model`, B times `factor`; returns a note on what it has none for.

    Where theirs has a smaller rank, or none, B keeps its zeros: the sum is theirs all the same.
    """
    ours = {
        name.removesuffix(".default.weight").removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".default.weight")
    }
    problems = []
    for name, value in adapter.items():
        other = f"{name[:-1]}{'B' if name.endswith('A') else 'A'}"
        if name not in ours:
            problems.append(f"{place}: unknown tensor {name} {tuple(value.shape)}")
        elif other not in adapter:
            problems.append(f"{place}: {name} without {other}")
        elif (wide := tuple(ours[name].shape)) and value.shape[name.endswith("A")] != wide[name.endswith("A")]:
            problems.append(f"{place}: {name} is {tuple(value.shape)}, not {wide}")
    _refuse(problems)
    for name, value in adapter.items():
        scaled = value * factor if name.endswith("B") and factor != 1 else value
        ours[name][: value.shape[0], : value.shape[1]] = scaled.to(ours[name].device)
    absent = sorted({name.rpartition(".")[0] for name in ours if name not in adapter})
    return [f"{place}: has nothing for {len(absent)} modules, {absent[0]} the first"] if absent else []
