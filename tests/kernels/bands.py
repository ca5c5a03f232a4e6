"""Tensors between bands of bytes that nobody may touch, and whose value must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

BAND = 2**16  # bytes on either side: a whole block of the largest kernels


class Bands:
    """Puts tensors into buffers of their own, which hold one byte wherever the tensor is not.

    Memory that an op allocates without filling holds that byte as well: 0xFF makes it NaN, or −1.
    """

    def __init__(self, byte: int):
        self.byte = byte
        self.buffers: list[tuple[Tensor, int, int]] = []  # with the first byte of the tensor and the first after it

    def inside(self, tensor: Tensor, shift: int = 0, filled: bool = True) -> Tensor:
        """A tensor of the same sizes, strides and, if `filled`, contents, `shift` elements off an aligned address."""
        if tensor.numel() == 0 or tensor.device.type == "meta":
            return tensor
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        length = tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))
        start = BAND + shift * tensor.element_size()
        buffer = torch.full((start + length + BAND,), self.byte, dtype=torch.uint8, device=tensor.device)
        self.buffers.append((buffer, start, start + length))
        place = buffer.untyped_storage(), start // tensor.element_size(), tensor.shape, tensor.stride()
        copy = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(*place)  # no view: it owns its storage
        return copy.copy_(tensor) if filled else copy

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on what is allocated lies between bands."""

        def banded(original: Callable[..., Tensor], filled: bool) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: self.inside(original(*args, **kwargs), filled=filled)

        places: list[tuple[Any, str]] = [(torch, "{}"), (torch, "{}_like"), (torch.Tensor, "new_{}")]
        for holder, form in places:
            for kind in ("empty", "zeros"):
                name = form.format(kind)
                monkeypatch.setattr(holder, name, banded(getattr(holder, name), filled=kind == "zeros"))

    def check(self) -> None:
        """Fails if a band has changed."""
        for buffer, start, stop in self.buffers:
            for side, band in (("before", buffer[:start]), ("after", buffer[stop:])):
                changed = (band != self.byte).nonzero()
                assert len(changed) == 0, f"{len(changed)} bytes {side} a tensor of {stop - start} bytes were written"
