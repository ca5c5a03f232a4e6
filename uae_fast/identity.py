"""What a run is made of: with anything else in its place, going on would be another run."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Config, ConfigError, leaves
from .models.loading import PARTS, models_folder, run_device

# Keys that change nothing of what is computed. Of folders it is the contents that count, under the same keys.
FREE = {"run", "device", "reporters", "models.path", "data.train", "data.heldout"}


def run_identity(config: Config) -> dict[str, Any]:
    """What a run is made of, by key, as JSON: its configuration, and fingerprints of its models and data.

    "models.path" has the SHA-256 of each part's files, "data.train" and "data.heldout" that of all files, "precision"
    how numbers are computed.
    """
    found = {key: _value(config, key) for key in leaves() if key not in FREE and not key.startswith("checkpoint.")}
    folder = models_folder(config)
    found["models.path"] = {part: fingerprint(folder / part) for part in PARTS}
    for key in ("data.train", "data.heldout"):
        found[key] = fingerprint(Path(_value(config, key)))
    found["precision"] = f"{torch.get_float32_matmul_precision()} float32 products on {run_device(config).type}"
    return found


def differences(saved: dict[str, Any], present: dict[str, Any], forced: Sequence[str] = ()) -> list[str]:
    """A line for each key in which two identities differ, those in `forced` left out.

    Raises:
        ConfigError: something in `forced` is no such key.
    """
    unknown = [key for key in forced if key not in present]
    if unknown:
        raise ConfigError([f"--force-resume {key}: no such key{_near(key, present)}" for key in unknown])
    keys = [key for key in present if key not in forced and saved.get(key) != present[key]]
    return [
        f"{key}: {_difference(key, saved.get(key), present[key])}; to go on all the same: --force-resume {key}"
        for key in keys
    ]


def machine(config: Config) -> str:
    """Where bits agree: the versions and the device of a process. Another machine is said aloud, not refused."""
    device = run_device(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__} on {name}"


def fingerprint(path: Path) -> str:
    """SHA-256 over names and contents of a file, or of all files below a folder; hidden ones aside."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(os.fsencode(file.relative_to(path).as_posix()) + b"\0")  # a name may be any bytes
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _difference(key: str, saved: Any, present: Any) -> str:
    if key == "models.path":
        changed = [part for part in present if (saved or {}).get(part) != present[part]]
        return f"the files of {', '.join(changed)} are not those the run began with"
    if key.startswith("data."):
        return "the folder's files are not those the run began with"
    return f"the run began with {saved!r}, not {present!r}"


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else " that going on depends on"
