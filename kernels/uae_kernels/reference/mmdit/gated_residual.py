"""Definition of `uae_kernels.mmdit.gated_residual`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._common import check_choice, check_impl, compute_dtype
from .fp8 import in_e4m3

FORMS = "plain", "fp8", "both"


class Stream(NamedTuple):
    """One of a block's streams of tokens (image or text), and what happens to it between two products."""

    x: Tensor  # (B, N, C), the residual stream
    modulations: tuple[tuple[Tensor, Tensor], ...] = ()  # (scale, shift), each (B, C); up to two
    branches: tuple[tuple[Tensor, Tensor, Tensor | None], ...] = ()  # (y (B, N, C), gate (B, C), bias (C,)); up to two
    forms: tuple[str, ...] = ()  # of each normal: "plain", "fp8" (a `Quantized`) or "both"; () is "plain" for all


class Modulated(NamedTuple):
    """What a stream becomes."""

    x: Tensor  # (B, N, C)
    normalized: tuple[Any, ...]  # for each modulation (B, N, C), or a `Quantized` of it


def gated_residual(*streams: Stream, eps: float = 1e-6, impl: str = "auto") -> list[Modulated]:
    """See `uae_kernels.mmdit.gated_residual`; differentiable in everything."""
    check_impl("gated_residual", impl)
    check_streams(streams)
    return [_one(stream, eps) for stream in streams]


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """See `uae_kernels.mmdit.layer_norm_modulate`; differentiable in everything."""
    return gated_residual(Stream(x, ((scale, shift),)), eps=eps, impl=impl)[0].normalized[0]


def _one(stream: Stream, eps: float) -> Modulated:
    dtype = compute_dtype(stream.x)
    x = stream.x
    if stream.branches:
        wide = x.to(dtype)
        for y, gate, bias in stream.branches:
            y = y.to(dtype) if bias is None else y.to(dtype) + bias.to(dtype)
            wide = wide + gate.to(dtype)[:, None] * y
        x = wide.to(x.dtype)
    if not stream.modulations:
        return Modulated(x, ())
    normal = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    made: list[Any] = []
    for (scale, shift), form in zip(stream.modulations, forms_of(stream), strict=True):
        wide = torch.addcmul(shift.to(dtype)[:, None], normal, 1 + scale.to(dtype)[:, None])
        plain = None if form == "fp8" else wide.to(x.dtype)
        made.append(plain if form == "plain" else in_e4m3(wide, plain=plain))
    return Modulated(x, tuple(made))


def forms_of(stream: Stream) -> tuple[str, ...]:
    return stream.forms or ("plain",) * len(stream.modulations)


def check_streams(streams: tuple[Stream, ...]) -> None:
    if not 1 <= len(streams) <= 2:
        raise ValueError(f"gated_residual: expected one or two streams, got {len(streams)}")
    for x, modulations, branches, forms in streams:
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(f"gated_residual: x must be floats of shape (B, N, C), got {tuple(x.shape)}")
        if x.shape[0] != streams[0].x.shape[0] or x.shape[2] != streams[0].x.shape[2]:
            raise ValueError(f"gated_residual: streams differ: {[tuple(stream.x.shape) for stream in streams]}")
        if len(modulations) > 2 or len(branches) > 2 or not (modulations or branches):
            raise ValueError("gated_residual: a stream takes up to two modulations and up to two branches, and one")
        if forms and len(forms) != len(modulations):
            raise ValueError(f"gated_residual: {len(modulations)} modulations, but forms {forms}")
        for form in forms:
            check_choice("gated_residual", "a normal's form", form, FORMS)
        whole, rows = tuple(x.shape), (x.shape[0], x.shape[2])
        given: list[tuple[str, Tensor | None, tuple[int, ...]]] = []
        for i, (scale, shift) in enumerate(modulations):
            given += [(f"modulation {i}'s scale", scale, rows), (f"modulation {i}'s shift", shift, rows)]
        for i, (y, gate, bias) in enumerate(branches):
            given += [(f"branch {i}'s y", y, whole), (f"branch {i}'s gate", gate, rows)]
            given += [(f"branch {i}'s bias", bias, rows[1:])]
        for name, part, shape in given:
            if part is not None and part.shape != shape:
                raise ValueError(f"gated_residual: {name} must be {shape}, got {tuple(part.shape)}")
