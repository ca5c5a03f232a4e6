"""Checkpoints: complete or absent, tensors in safetensors, everything else in JSON.

A checkpoint is a folder ``checkpoints/step-000123``. It holds what the run has trained so far: whole models in the
layout of their own library's `from_pretrained`, or LoRA adapters that `PeftModel.from_pretrained` (``encoder/``) and
`StableDiffusion3Pipeline.load_lora_weights` (``decoder/``) read, besides optimiser state and running means.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .models import Models
from .models.decoder import Decoder
from .models.encoder import Encoder

STATE = "state.json"
ADAPTER = "adapter_model.safetensors"  # peft's own name; where it is absent peft would unpickle adapter_model.bin
LOCAL: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}  # of from_pretrained
NAME = re.compile(r"step-\d{6,}")


def save_checkpoint(folder: Path, models: Models, state: dict, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Writes a checkpoint into a temporary folder, then renames it: there is never half of one under its name.

    Args:
        folder: the run's ``checkpoints``.
        models: the networks.
        state: JSON, where the run stands. Its "step" names the folder, its "trained" the parts that are saved.
        tensors: more tensors, by file name: optimiser state, running means.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{state['step']:06d}"
    temporary = folder / f".{final.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if "encoder" in state["trained"]:
        _save_encoder(models.encoder, temporary)
    if "projector" in state["trained"]:
        save_file(_cpu(models.projector.state_dict()), temporary / "projector.safetensors")
    if "decoder" in state["trained"]:
        _save_decoder(models.decoder, temporary / "decoder")
    for name, values in tensors.items():
        save_file(_cpu(values), temporary / f"{name}.safetensors")
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    return final


def load_checkpoint(path: Path, models: Models) -> dict:
    """Puts a checkpoint's networks into `models` (made by the same configuration); returns its state."""
    state = read_state(path)
    if "encoder" in state["trained"]:
        _load_encoder(models.encoder, path)
    if "projector" in state["trained"]:
        models.projector.load_state_dict(load_file(path / "projector.safetensors"))
    if "decoder" in state["trained"]:
        _load_decoder(models.decoder, path / "decoder")
    return state


def read_state(path: Path) -> dict:
    """A checkpoint's state."""
    return json.loads((path / STATE).read_text())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; what an interrupted save left behind is not one."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints and the ends of stages."""
    passing = [path for path in checkpoints(folder)[:-1] if read_state(path)["moment"] is None]
    for path in passing[: max(0, len(passing) - keep + 1)]:
        shutil.rmtree(path)


def find_moment(folder: Path, moment: str) -> Path | None:
    """The last checkpoint of a run that is the end of `moment` ("stage2"), if there is one."""
    found = [path for path in checkpoints(folder) if read_state(path)["moment"] == moment]
    return found[-1] if found else None


def _save_encoder(encoder: Encoder, folder: Path) -> None:
    if encoder.adapters is not None:
        encoder.adapters.save_pretrained(folder / "encoder")  # the adapter "reader" goes into a subfolder
        return
    encoder.model.save_pretrained(folder / "encoder")
    encoder.tokenizer.save_pretrained(folder / "encoder")
    encoder.image_processor.save_pretrained(folder / "encoder")
    if encoder.reader_copy is not None:
        save_file(_cpu(encoder.reader_copy.state_dict()), folder / "reader.safetensors")


def _load_encoder(encoder: Encoder, folder: Path) -> None:
    if encoder.adapters is None:
        saved = type(encoder.model).from_pretrained(folder / "encoder", dtype=encoder.model.dtype, **LOCAL)
        encoder.model.load_state_dict(saved.state_dict())
        if (folder / "reader.safetensors").is_file():
            encoder.freeze_reader()
            encoder.reader_copy.load_state_dict(load_file(folder / "reader.safetensors"))
        return
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(encoder.adapters, load_file(folder / "encoder" / ADAPTER))
    if (folder / "encoder" / "reader").is_dir():
        encoder.freeze_reader()
        weights = load_file(folder / "encoder" / "reader" / ADAPTER)
        set_peft_model_state_dict(encoder.adapters, weights, adapter_name="reader")


def _save_decoder(decoder: Decoder, folder: Path) -> None:
    if not decoder.has_adapter:
        decoder.transformer.save_pretrained(folder)
        return
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict

    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(decoder.transformer),
        transformer_lora_adapter_metadata=decoder.transformer.peft_config["default"].to_dict(),
    )


def _load_decoder(decoder: Decoder, folder: Path) -> None:
    if not decoder.has_adapter:
        saved = type(decoder.transformer).from_pretrained(folder, torch_dtype=decoder.transformer.dtype, **LOCAL)
        decoder.transformer.load_state_dict(saved.state_dict())
        return
    from peft import set_peft_model_state_dict

    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    set_peft_model_state_dict(decoder.transformer, weights)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
