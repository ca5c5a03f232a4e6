"""What a run is made of: with anything else in its place, going on would be another run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence, Set
from glob import glob
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from .config import Config, ConfigError, leaves
from .models.loading import run_device
from .models.sources import Source, find_sources
from .parquet import HUB_FILES
from .team import Team
from .text import nearest

# Keys that change nothing of what is computed. Of folders it is the contents that count, under the same keys.
FREE = {
    "run", "device", "reporters", "models.path", "models.encoder_from", "models.decoder_from", "models.cache",
    "models.start", "reward.encoders", "reward.heldout", "data.train", "data.heldout", "data.max_bad",
    "evaluate.encoders",
}  # fmt: skip


def run_identity(config: Config) -> dict[str, Any]:
    """What a run is made of, by key, as JSON: its configuration, and fingerprints of its models and data.

    "models.path" has the SHA-256 of each part's files, wherever they are (of a Hub repository its commit), "data.train"
    and "data.heldout" that of all files, "precision" how numbers are computed.
    """
    found = {key: attrgetter(key)(config) for key in leaves() if key not in FREE and not key.startswith("checkpoint.")}
    found["models.path"] = _parts(config)
    for key in ("data.train", "data.heldout"):
        found[key] = _images(attrgetter(key)(config))
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
    """Where bits agree: versions and device, and how many processes. Another machine is said aloud, not refused."""
    device, size = run_device(config), Team().size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__} on {name}" + f", {size} processes" * (size > 1)


def _parts(config: Config) -> dict[str, str]:
    """A fingerprint of each of the models, by part."""
    sources = find_sources(config)
    found = {"encoder": _source(sources.encoder), "decoder": _source(sources.decoder)}
    if sources.projector is not None:
        found["projector.safetensors"] = fingerprint(sources.projector)
    for i, source in enumerate(sources.rewards, 1):
        found["reward" if i == 1 else f"reward {i}"] = _source(source)
    if sources.heldout is not None:
        found["heldout"] = _source(sources.heldout)
    if config.models.start:
        found["start"] = fingerprint(Path(config.models.start))
    return found


def _source(source: Source) -> str:
    if source.folder is None:
        return str(source)
    made = {"pooled.safetensors"} if source.has("text_encoder") else set()  # by the text encoders, in the first run
    return fingerprint(source.folder, without=made)


def _images(place: str) -> str:
    if not Path(place).exists() and HUB_FILES.fullmatch(place):
        return place
    files = [Path(place)] if Path(place).exists() else sorted(map(Path, glob(place)))
    return " ".join(map(fingerprint, files))


def fingerprint(path: Path, without: Set[str] = frozenset()) -> str:
    """SHA-256 over names and contents of a file, or of all files below a folder; hidden ones and `without` aside."""
    below = (p for p in path.rglob("*") if p.is_file() and p.name[0] != "." and p.name not in without)
    files = [path] if path.is_file() else sorted(below)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(os.fsencode(file.relative_to(path).as_posix()) + b"\0")  # a name may be any bytes
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _difference(key: str, saved: Any, present: Any) -> str:
    if key == "models.path":
        saved = saved or {}
        changed = [part for part in {**saved, **present} if saved.get(part) != present.get(part)]
        return f"the files of {', '.join(changed)} are not those the run began with"
    if key.startswith("data."):
        return "the folder's files are not those the run began with"
    return f"the run began with {saved!r}, not {present!r}"


def _near(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known)
    return f"; did you mean {near}?" if near else " that going on depends on"
