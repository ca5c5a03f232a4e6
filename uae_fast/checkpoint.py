"""Checkpoints: complete or absent, sealed by a manifest, tensors in safetensors, everything else in JSON.

A checkpoint is a folder ``checkpoints/step-000123``. It holds what the run has trained so far: whole models in the
layout of their own library's `from_pretrained`, or LoRA adapters that `PeftModel.from_pretrained` (``encoder/``) and
`StableDiffusion3Pipeline.load_lora_weights` (``decoder/``) read, besides optimiser state and running means.
``manifest.json`` lists every file with its size and SHA-256.

A folder with another name is none: ``.step-000123.part`` is being written, ``.old`` being replaced, ``.pruned`` being
removed, and ``step-000123.damaged`` was found to differ from its manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import CheckpointConfig
from .files import sync
from .models import Models
from .models.decoder import Decoder
from .models.encoder import Encoder

STATE = "state.json"
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"  # peft's own name; where it is absent peft would unpickle adapter_model.bin
LOCAL: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}  # of from_pretrained
NAME = re.compile(r"step-\d{6,}")


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that its manifest lists."""


def save_checkpoint(folder: Path, models: Models, state: dict, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Writes a checkpoint into a temporary folder, forces it to the disk, then renames it.

    There is never half of one under its name, and one that is replaced stays until the new one is whole.

    Args:
        folder: the run's ``checkpoints``.
        models: the networks.
        state: JSON, where the run stands. Its "step" names the folder, its "trained" the parts that are saved.
        tensors: more tensors, by file name: optimiser state, running means.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or fails; what was written of the new checkpoint is gone again.
    """
    final = folder / f"step-{state['step']:06d}"
    temporary, replaced = _hidden(final, "part"), _hidden(final, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
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
        _seal(temporary)
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _seal(folder: Path) -> None:
    """Writes the manifest of everything in a folder, and forces all of it to the disk."""
    entries = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder).items()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1))
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify_checkpoint(path: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, foreign, cut short or altered; the message names it.
    """
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path} is damaged: its {MANIFEST} cannot be read") from None
    files = _files(path)
    for name in sorted(expected.keys() | files.keys()):
        if name not in files:
            raise DamagedCheckpoint(f"{path} is damaged: {name} is missing")
        if name not in expected:
            raise DamagedCheckpoint(f"{path} is damaged: {name} is not in its {MANIFEST}")
        size, digest = expected[name]
        if files[name].stat().st_size != size:
            raise DamagedCheckpoint(f"{path} is damaged: {name} has {files[name].stat().st_size} bytes, not {size}")
        if _sha256(files[name]) != digest:
            raise DamagedCheckpoint(f"{path} is damaged: the contents of {name} have changed")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are put aside, aloud, under another name."""
    for path in reversed(checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except DamagedCheckpoint as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            print(f"{error}\nit is now {aside.name}; the checkpoint before it is used", flush=True)
    return None


def clear_leftovers(folder: Path) -> None:
    """Puts right what a killed process left behind: a replaced checkpoint without its successor comes back, the rest
    of what is half written or half removed goes."""
    for replaced in folder.glob(".step-*.old"):
        final = folder / replaced.stem[1:]
        if not final.exists():
            os.rename(replaced, final)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(path: Path, models: Models) -> dict:
    """Puts a verified checkpoint's networks into `models` (made by the same configuration); returns its state."""
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
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, settings: CheckpointConfig) -> None:
    """Removes checkpoints but for the newest, the ends of stages, and those that `settings` keeps."""
    states = {path: read_state(path) for path in checkpoints(folder)}
    newest = next(reversed(states), None)
    passing = [path for path, state in states.items() if state["moment"] is None and path != newest]
    kept = set(passing[max(0, len(passing) - settings.keep + 1) :])
    if settings.keep_every:
        kept |= {path for path, state in states.items() if state["step"] and state["step"] % settings.keep_every == 0}
    if settings.keep_best != "none":
        sign = -1 if settings.keep_best == "loss" else 1
        scored = [(sign * state["score"], path) for path, state in states.items() if state["score"] is not None]
        kept |= {path for _, path in sorted(scored)[-1:]}
    for path in passing:
        if path not in kept:
            pruned = _hidden(path, "pruned")  # its name goes first: half a checkpoint is none
            os.rename(path, pruned)
            shutil.rmtree(pruned, ignore_errors=True)


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


def last_words(run: Path) -> str:
    """Which checkpoint a run that cannot go on has to go back to."""
    saved = checkpoints(run / "checkpoints")
    return f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint"


def remedy(error: OSError, run: Path) -> str:
    """What helps where the disk has refused to take a run's file."""
    saved = checkpoints(run / "checkpoints")
    again = "go on with --resume" if saved else "start again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = sum(path.stat().st_size for path in _files(saved[-1]).values()) if saved else 0
        disk = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
        takes = f", a checkpoint takes {size / 1e6:.1f}" * bool(saved)
        return (
            f"free space on the disk of {run} ({shutil.disk_usage(disk).free / 1e6:.1f} MB are left{takes}) and {again}"
        )
    if error.errno == errno.EFBIG:
        return f"allow larger files (ulimit -f) and {again}"
    return f"see that {run} can be written to and {again}"


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder but its manifest, by relative name."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    found.pop(MANIFEST, None)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
