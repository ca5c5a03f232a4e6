"""Runs compared: everything that a run leaves, but for what a clock measured, must be equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.logging import timeless


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{f.relative_to(checkpoint)}:{k}": v for f in files for k, v in load_file(f).items()}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def differing_tensors(first: Path, second: Path) -> list[str]:
    """Names of the tensors that two checkpoints do not share."""
    ours, theirs = weights(first), weights(second)
    same = {name for name in ours.keys() & theirs.keys() if torch.equal(ours[name], theirs[name])}
    return sorted((ours.keys() | theirs.keys()) - same)


def difference(first: Path, second: Path) -> str:
    """Where two finished runs differ, in words; empty if they are equal."""
    if list(map(timeless, rows(first))) != list(map(timeless, rows(second))):
        return "metrics.jsonl"
    last = [checkpoints(run / "checkpoints")[-1] for run in (first, second)]
    states = [{k: v for k, v in read_state(path).items() if k not in ("seconds", "score")} for path in last]
    if states[0] != states[1]:
        return f"states {states}"
    if not weights(last[0]) or differing_tensors(*last):
        return f"tensors {differing_tensors(*last)}"
    for name in sorted({p.relative_to(r) for r in (first, second) for p in r.glob("samples/*/scores.jsonl")}):
        if (first / name).read_bytes() != (second / name).read_bytes():
            return str(name)
    summaries = [json.loads((run / "summary.json").read_text()) | {"minutes": 0} for run in (first, second)]
    return "" if summaries[0] == summaries[1] else "summary.json"


def assert_equal_runs(first: Path, second: Path) -> None:
    assert difference(first, second) == ""
