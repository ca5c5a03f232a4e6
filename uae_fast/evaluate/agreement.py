"""How far two samplers' rewards of the same captions agree, image by image: a group of captions is a row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from uae_kernels import group_advantages


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of theirs."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row, in fp64; 0 where a row has no spread."""
    return cosine(centred(a), centred(b))


def centred(values: Tensor) -> Tensor:
    """Each row about its mean, in fp64."""
    return values.double() - values.double().mean(-1, keepdim=True)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, in fp64; 0 where a row is 0."""
    a, b = a.double(), b.double()
    product = (a * b).sum(-1)
    return torch.where(product == 0, 0.0, product / (a.norm(dim=-1) * b.norm(dim=-1)))


def mean_error(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    mean = values.mean().item() if len(values) else None
    return mean, values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def slope(differences: Tensor, lengths: Tensor) -> tuple[float | None, float | None]:
    """Slope of differences (n, G) against lengths (n, G), both about their group's mean, and its standard error.

    The error treats groups as the independent units (a sandwich estimate).
    """
    x, y = centred(lengths), centred(differences)
    covered, spread, groups = (x * y).sum(-1), (x * x).sum(-1), len(x)
    if not spread.sum() > 0:
        return None, None
    found = covered.sum() / spread.sum()
    if groups < 2:
        return found.item(), None
    squares = (covered - found * spread).square().sum() * groups / (groups - 1)
    return found.item(), (squares.sqrt() / spread.sum()).item()


def agreement(reference: Tensor, rewards: Tensor, lengths: Tensor) -> dict[str, Any]:
    """How a sampler's rewards (n, G) agree with the reference's, over groups in which the latter differ.

    A group that the sampler alone finds equal counts with ρ = cosine = 0. "…_stderr" are over groups.
    """
    size = reference.shape[1]
    spread = reference.amax(1) > reference.amin(1)
    kept = [x[spread] for x in (reference, rewards)]
    first, second = (group_advantages(x.flatten(), size).view(-1, size) for x in kept)
    found: dict[str, Any] = {"groups": int(spread.sum()), "zero_variance_groups": int((~spread).sum())}
    measures = {
        "spearman": correlation(ranks(kept[0]), ranks(kept[1])),
        "sign": (first.sign() == second.sign()).double().mean(1),
        "cosine": cosine(first, second),
    }
    for name, values in measures.items():
        found[name], found[f"{name}_stderr"] = mean_error(values)
    found["length_slope"], found["length_slope_stderr"] = slope(kept[1] - kept[0], lengths[spread])
    return found
