"""What stands between the products of a diffusion transformer's block: gates, residuals, norms and modulations.

One launch for both streams: a program a token. The row stands in registers from the residual to the last modulation, so
each tensor is read or written once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common import with_none, without_none
from .._triton import e4m3, fp64, jit, launch, narrow, tl, use_triton
from ..reference import mmdit as definitions
from ..reference.mmdit.fp8 import E4M3, Quantized
from ..reference.mmdit.gated_residual import FORMS, Modulated, Stream, check_streams, forms_of
from .fp8 import check_device, no_gradient, row_scale

WARPS = 8


@jit()
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@jit()
def _normal(h, inside, width, eps):
    """(h − mean)/√(var + eps) of one row, and 1/√(var + eps)."""
    centered = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    return centered * rstd, rstd


@jit()
def _store_normal(n, i, at, inside, plain, values, scales):
    """One row of a normal, in its own dtype and in e4m3 with its scale."""
    if plain is not None:
        tl.store(plain + at, narrow(n, plain.dtype.element_ty), mask=inside)
    if values is not None:
        scale = row_scale(n)
        tl.store(scales + i, scale)
        tl.store(values + at, e4m3(n * tl.math.div_rn(1.0, scale)), mask=inside)


@jit("tokens")
def _forward_row(
    i, x, y1, gate1, bias1, y2, gate2, bias2, scale1, shift1, scale2, shift2, out, n1, values1, scales1, n2, values2,
    scales2, tokens, gate_stride, stride, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' = x + Σ gate·(y + bias), n = LN(x')·(1 + scale) + shift."""
    j = tl.arange(0, BLOCK)
    inside, at = j < width, i * width + j
    sample = (i.to(tl.int32) // tokens).to(tl.int64)  # a division of 64-bit numbers is a call
    gates, rows = sample * gate_stride + j, sample * stride + j
    h = _load(x, at, inside)
    if y1 is not None:
        y = _load(y1, at, inside)
        if bias1 is not None:
            y += _load(bias1, j, inside)
        h += _load(gate1, gates, inside) * y
        if y2 is not None:
            y = _load(y2, at, inside)
            if bias2 is not None:
                y += _load(bias2, j, inside)
            h += _load(gate2, gates, inside) * y
        rounded = narrow(h, out.dtype.element_ty)
        tl.store(out + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
    if scale1 is not None:
        normal, _ = _normal(h, inside, width, eps)
        n = normal * (1 + _load(scale1, rows, inside)) + _load(shift1, rows, inside)
        _store_normal(n, i, at, inside, n1, values1, scales1)
        if scale2 is not None:
            n = normal * (1 + _load(scale2, rows, inside)) + _load(shift2, rows, inside)
            _store_normal(n, i, at, inside, n2, values2, scales2)


@jit("tokens_a", "tokens_b", "rows_a")
def _gated_residual_kernel(
    x_a, y1_a, gate1_a, bias1_a, y2_a, gate2_a, bias2_a, scale1_a, shift1_a, scale2_a, shift2_a, out_a, n1_a, values1_a,
    scales1_a, n2_a, values2_a, scales2_a, tokens_a, gate_stride_a, stride_a,
    x_b, y1_b, gate1_b, bias1_b, y2_b, gate2_b, bias2_b, scale1_b, shift1_b, scale2_b, shift2_b, out_b, n1_b, values1_b,
    scales1_b, n2_b, values2_b, scales2_b, tokens_b, gate_stride_b, stride_b,
    rows_a, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    if i < rows_a:
        _forward_row(
            i, x_a, y1_a, gate1_a, bias1_a, y2_a, gate2_a, bias2_a, scale1_a, shift1_a, scale2_a, shift2_a, out_a,
            n1_a, values1_a, scales1_a, n2_a, values2_a, scales2_a, tokens_a, gate_stride_a, stride_a, width, eps,
            BLOCK,
        )  # fmt: skip
    else:
        if x_b is not None:
            _forward_row(
                i - rows_a, x_b, y1_b, gate1_b, bias1_b, y2_b, gate2_b, bias2_b, scale1_b, shift1_b, scale2_b,
                shift2_b, out_b, n1_b, values1_b, scales1_b, n2_b, values2_b, scales2_b, tokens_b, gate_stride_b,
                stride_b, width, eps, BLOCK,
            )  # fmt: skip


@jit("tokens")
def _backward_row(
    i, x, gate1, gate2, scale1, scale2, d_out, d_n1, d_n2, d_x, d_y1, d_y2, tokens, gate_stride, stride, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = d x' + rstd·(u − mean u − n·mean(u·n)) with u = Σ dn·(1 + scale), dy = gate·dx."""
    j = tl.arange(0, BLOCK)
    inside, at = j < width, i * width + j
    sample = (i.to(tl.int32) // tokens).to(tl.int64)  # a division of 64-bit numbers is a call
    gates, rows = sample * gate_stride + j, sample * stride + j
    d = tl.zeros((BLOCK,), tl.float32)
    if d_out is not None:
        d = _load(d_out, at, inside)
    if d_n1 is not None:
        normal, rstd = _normal(_load(x, at, inside), inside, width, eps)
        u = _load(d_n1, at, inside) * (1 + _load(scale1, rows, inside))
        if d_n2 is not None:
            u += _load(d_n2, at, inside) * (1 + _load(scale2, rows, inside))
        d += rstd * (u - tl.sum(u, 0) / width - normal * (tl.sum(u * normal, 0) / width))
    tl.store(d_x + at, narrow(d, d_x.dtype.element_ty), mask=inside)
    if d_y1 is not None:
        tl.store(d_y1 + at, narrow(d * _load(gate1, gates, inside), d_y1.dtype.element_ty), mask=inside)
        if d_y2 is not None:
            tl.store(d_y2 + at, narrow(d * _load(gate2, gates, inside), d_y2.dtype.element_ty), mask=inside)


@jit("tokens_a", "tokens_b", "rows_a")
def _gated_residual_backward_kernel(
    x_a, gate1_a, gate2_a, scale1_a, scale2_a, d_out_a, d_n1_a, d_n2_a, d_x_a, d_y1_a, d_y2_a,
    tokens_a, gate_stride_a, stride_a,
    x_b, gate1_b, gate2_b, scale1_b, scale2_b, d_out_b, d_n1_b, d_n2_b, d_x_b, d_y1_b, d_y2_b,
    tokens_b, gate_stride_b, stride_b,
    rows_a, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    if i < rows_a:
        _backward_row(
            i, x_a, gate1_a, gate2_a, scale1_a, scale2_a, d_out_a, d_n1_a, d_n2_a, d_x_a, d_y1_a, d_y2_a,
            tokens_a, gate_stride_a, stride_a, width, eps, BLOCK,
        )  # fmt: skip
    else:
        if x_b is not None:
            _backward_row(
                i - rows_a, x_b, gate1_b, gate2_b, scale1_b, scale2_b, d_out_b, d_n1_b, d_n2_b, d_x_b, d_y1_b,
                d_y2_b, tokens_b, gate_stride_b, stride_b, width, eps, BLOCK,
            )  # fmt: skip


class _Flat(NamedTuple):
    """A stream as the kernels take it; the custom ops take the tensors of all streams in turn."""

    x: Tensor
    y1: Tensor | None = None
    gate1: Tensor | None = None
    bias1: Tensor | None = None
    y2: Tensor | None = None
    gate2: Tensor | None = None
    bias2: Tensor | None = None
    scale1: Tensor | None = None
    shift1: Tensor | None = None
    scale2: Tensor | None = None
    shift2: Tensor | None = None

    @property
    def outputs(self) -> list[bool]:
        """Whether there is an x', a first normal, a second one."""
        return [part is not None for part in (self.y1, self.scale1, self.scale2)]


def _streams(flat: Sequence[Tensor | None]) -> list[_Flat]:
    size = len(_Flat._fields)
    return [_Flat(*flat[start : start + size]) for start in range(0, len(flat), size)]  # type: ignore[arg-type]


def _stride(*rows: Tensor | None) -> int:
    """The one distance between the rows of a stream's gates, or of its scales and shifts."""
    strides = {row.stride(0) for row in rows if row is not None}
    return strides.pop() if strides else 0


def _run(kernel: Any, streams: list[_Flat], tensors: list[list[Tensor | None]], eps: float, **options: Any) -> None:
    """Launches `kernel` with its `tensors` of one or two streams."""
    arguments: list[Any] = []
    for stream, own in zip(streams, tensors, strict=True):
        strides = _stride(stream.gate1, stream.gate2), _stride(*stream[7:])
        arguments += [*own, stream.x.shape[1], *strides]
    if len(streams) == 1:
        arguments += [None] * len(tensors[0]) + [1, 0, 0]
    rows, width = [stream.x.shape[:2].numel() for stream in streams], streams[0].x.shape[2]
    block = 1 << max(width - 1, 1).bit_length()
    # Twice as many where sm_120 would run out of registers
    wide = block > 2048 and any(stream.y2 is not None for stream in streams)
    launch(kernel, (sum(rows),), *arguments, rows[0], width, eps, BLOCK=block, num_warps=WARPS << wide, **options)


@torch.library.custom_op(
    "uae_kernels::gated_residual",
    mutates_args=(),
    schema="(Tensor[] tensors, bool[] present, SymInt[] forms, float eps) -> Tensor[]",
)
def _forward(tensors: Sequence[Tensor], present: Sequence[bool], forms: Sequence[int], eps: float) -> list[Tensor]:
    """Of each stream in turn: x' if it has a branch, then for each modulation a normal, its e4m3 values, their scales.

    Of these three what its form asks for, an index into FORMS, two of a stream.
    """
    streams = _streams(with_none(tensors, present))
    made = _made(streams, forms)
    # Left to itself, ptxas spills a register or two of the forms in e4m3 to have one block more resident
    options = {"maxnreg": 128} if any(forms) else {}
    _run(_gated_residual_kernel, streams, [[*s, *own] for s, own in zip(streams, made, strict=True)], eps, **options)
    return [x for own in made for x in own if x is not None]


@_forward.register_fake
def _(tensors, present, forms, eps):
    streams = _streams(with_none(tensors, present))
    return [x for own in _made(streams, forms) for x in own if x is not None]


def _made(streams: list[_Flat], forms: Sequence[int]) -> list[list[Tensor | None]]:
    """Empty outputs of each stream, None where one is not wanted."""
    made = list[list[Tensor | None]]()
    for k, stream in enumerate(streams):
        summed, *modulated = stream.outputs
        own = [torch.empty_like(stream.x) if summed else None]
        for wanted, form in zip(modulated, forms[2 * k : 2 * k + 2], strict=True):
            name, x = FORMS[form] if wanted else "", stream.x
            own += [
                torch.empty_like(x) if name in ("plain", "both") else None,
                torch.empty_like(x, dtype=E4M3) if name in ("fp8", "both") else None,
                x.new_empty((*x.shape[:2], 1), dtype=torch.float32) if name in ("fp8", "both") else None,
            ]
        made.append(own)
    return made


@torch.library.custom_op(
    "uae_kernels::gated_residual_backward",
    mutates_args=(),
    schema="(Tensor?[] flat, Tensor?[] grads, float eps) -> Tensor[]",
)
def _backward(flat: Sequence[Tensor | None], grads: Sequence[Tensor | None], eps: float) -> list[Tensor]:
    """dx, then dy of each branch, of each stream in turn.

    `flat` as in forward but x' for x, and for y any tensor of its dtype; `grads` three of a stream.
    """
    streams, tensors, results = _streams(flat), [], []
    for k, s in enumerate(streams):
        d_out, d_n1, d_n2 = grads[3 * k : 3 * k + 3]
        scale1, scale2 = s.scale1, s.scale2
        if d_n1 is None:
            scale1, scale2, d_n1, d_n2 = scale2, None, d_n2, None
        made = [None if like is None else torch.empty_like(s.x, dtype=like.dtype) for like in (s.x, s.y1, s.y2)]
        tensors.append([s.x, s.gate1, s.gate2, scale1, scale2, d_out, d_n1, d_n2, *made])
        results += [x for x in made if x is not None]
    _run(_gated_residual_backward_kernel, streams, tensors, eps)
    return results


@_backward.register_fake
def _(flat, grads, eps):
    return [torch.empty_like(s.x, dtype=y.dtype) for s in _streams(flat) for y in (s.x, s.y1, s.y2) if y is not None]


def _setup_context(ctx, inputs, output):
    tensors, ctx.present, _, ctx.eps = inputs
    results, kept = iter(output), list[Tensor | None]()
    for stream in _streams(with_none(tensors, ctx.present)):
        made = [next(results) if wanted else None for wanted in stream.outputs]
        like = [None if y is None else y.new_empty(0) for y in (stream.y1, stream.y2)]
        kept += stream._replace(x=stream.x if made[0] is None else made[0], y1=like[0], y2=like[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept)


def _autograd(ctx, grads):
    kept = ctx.saved_tensors
    given = iter(grads)
    upstream = [next(given) if wanted else None for stream in _streams(kept) for wanted in stream.outputs]
    results = iter(_backward(kept, [None if g is None else g.contiguous() for g in upstream], ctx.eps))
    found = list[Tensor | None]()
    for stream in _streams(kept):
        d_x, d_y1, d_y2 = (None if x is None else next(results) for x in (stream.x, stream.y1, stream.y2))
        found += [d_x, d_y1, None, None, d_y2, *[None] * 6]
    return [grad for grad, there in zip(found, ctx.present, strict=True) if there], None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_residual(*streams: Stream, eps: float = 1e-6, impl: str = "auto") -> list[Modulated]:
    """Adds gated branches to one or two streams of tokens, normalises them and modulates the normals, in one launch.

    x' = x + Σ_i gate_i·(y_i + bias_i), n_j = LN(x')·(1 + scale_j) + shift_j, LN without weights over the last dimension
    (adaLN-Zero of arXiv 2212.09748, as the blocks of arXiv 2403.03206 use it).

    Args:
        streams: Stream(x, modulations, branches): x (B, N, C) floats, up to two (scale, shift), each (B, C), up to two
            (y (B, N, C), gate (B, C), bias (C,) or None), and the form in which each normal is wanted. A second stream
            has tokens of its own and the same B and C.
        eps: added to the variance.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64, and where a gate, a bias, a scale or a shift
            needs a gradient: Triton gives those of x and y alone. "triton" and "torch" ask for one of them.

    Returns:
        Modulated(x', (n, ...)) for each stream, in its x's dtype; computed in fp32 (fp64 for fp64), rounded once each.
        x' is x itself where there is no branch. A normal of the form "fp8" or "both" is a `Quantized` of what would
        have been rounded, each token with its own scale, max|n|/448; its `plain` is the normal itself or None.

    Raises:
        ValueError: shapes that do not fit, an unknown form.
        RuntimeError: `impl="triton"` where it cannot run; a form in e4m3 where gradients are needed, or on a GPU older
            than sm_89.
    """
    check_streams(streams)
    if any(form != "plain" for stream in streams for form in stream.forms):
        no_gradient("gated_residual", *(x for s in streams for x in (s.x, *(y for y, _, _ in s.branches), *_rows(s))))
        check_device("gated_residual", streams[0].x)
    unsupported = fp64(*(stream.x for stream in streams))
    if torch.is_grad_enabled() and any(row.requires_grad for stream in streams for row in _rows(stream)):
        unsupported = unsupported or "gradients of gates, biases, scales and shifts"
    if not use_triton("gated_residual", impl, streams[0].x, unsupported):
        return definitions.gated_residual(*streams, eps=eps)
    flat: list[Tensor | None] = []
    for x, modulations, branches, _ in streams:
        scales = _aligned([part for pair in modulations for part in pair])
        gates = _aligned([gate for _, gate, _ in branches])
        parts = [part for (y, _, bias), gate in zip(branches, gates, strict=True)
                 for part in (y.contiguous(), gate, None if bias is None else bias.contiguous())]  # fmt: skip
        flat += _Flat(x.contiguous(), *parts, *[None] * (6 - len(parts)), *scales)
    forms = [FORMS.index(form) for stream in streams for form in (*forms_of(stream), "plain", "plain")[:2]]
    results = iter(_forward(*without_none(flat), forms, eps))
    return [
        Modulated(
            next(results) if stream.branches else stream.x,
            tuple(_normal_in(form, results) for form in forms_of(stream)),
        )
        for stream in streams
    ]


def _normal_in(form: str, results: Iterator[Tensor]) -> Any:
    plain = None if form == "fp8" else next(results)
    return plain if form == "plain" else Quantized(next(results), next(results), plain)


def _rows(stream: Stream) -> list[Tensor]:
    parts = [part for pair in stream.modulations for part in pair]
    return parts + [part for _, *pair in stream.branches for part in pair if part is not None]


def _aligned(rows: list[Tensor]) -> list[Tensor]:
    """Rows (B, C) that all lie at one distance, each in one piece."""
    alike = len({row.stride(0) for row in rows}) == 1 and all(row.stride(1) == 1 for row in rows)
    return rows if alike else [row.contiguous() for row in rows]


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """LN(x)·(1 + scale) + shift over the last dimension: `gated_residual` of one stream without a branch.

    Args:
        x: (B, N, C) floats.
        scale, shift: (B, C).
        eps: added to the variance.
        impl: as there.

    Returns:
        (B, N, C) in x's dtype; computed in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError, RuntimeError: as there.
    """
    return gated_residual(Stream(x, ((scale, shift),)), eps=eps, impl=impl)[0].normalized[0]
