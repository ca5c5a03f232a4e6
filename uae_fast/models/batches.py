"""Rows in batches of one shape, so that what is computed for a row does not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_batches(function: Callable[..., Tensor], batch: int, *tensors: Tensor) -> Tensor:
    """`function` over chunks of exactly `batch` rows; a short last chunk is padded with copies of its last row."""
    if len(tensors[0]) == batch:
        return function(*tensors)
    outputs = []
    for chunk in zip(*(tensor.split(batch) for tensor in tensors), strict=True):
        rows = len(chunk[0])
        if rows < batch:
            chunk = tuple(torch.cat([part, part[-1:].expand(batch - rows, *part.shape[1:])]) for part in chunk)
        outputs.append(function(*chunk)[:rows])
    return torch.cat(outputs)


def by_length(
    function: Callable[..., Tensor], batch: int, lengths: Sequence[int] | None, context: Tensor, *tensors: Tensor
) -> Tensor:
    """`function(context, *tensors)` for the rows of each length apart, with so much of their context, `in_batches`.

    Args:
        function: gives as many rows as it gets.
        batch: how many it gets.
        lengths: B numbers on the host; None leaves the context whole.
        context: (B, L, D).
        tensors: (B, ...) each.

    Returns:
        The results in the order of the rows.
    """
    if lengths is None or len(set(lengths)) == 1:
        return in_batches(function, batch, context if lengths is None else context[:, : lengths[0]], *tensors)
    found: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [i for i, own in enumerate(lengths) if own == length]
        parts = [pick(tensor, rows) for tensor in (context[:, :length], *tensors)]
        found |= dict(zip(rows, in_batches(function, batch, *parts).unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(lengths))])


def pick(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, named on the host: nothing is copied to the device to choose them."""
    return torch.stack([tensor[i] for i in rows])
