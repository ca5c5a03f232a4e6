"""What stands between the products of a diffusion transformer's block: gates, residuals, norms and modulations.

One launch for both streams: a program a token. The row stands in registers from the residual to the last modulation, so
each tensor is read or written once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import mmdit as definitions
from .._triton import fp64, jit, launch, narrow, tl, use_triton
from ..reference.mmdit.gated_residual import Modulated, Stream, check_streams

WARPS = 8
TENSORS = 11  # of a stream: x, (y, gate, bias) twice, (scale, shift) twice


@jit()
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@jit()
def _normal(h, inside, width, eps):
    """(h − mean)/√(var + eps) of one row, and 1/√(var + eps)."""
    centered = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    return centered * rstd, rstd


@jit("tokens", "gate_stride", "stride")
def _forward_row(
    i, x, y1, gate1, bias1, y2, gate2, bias2, scale1, shift1, scale2, shift2, out, n1, n2, tokens, gate_stride, stride,
    width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' = x + Σ gate·(y + bias), n = LN(x')·(1 + scale) + shift."""
    j = tl.arange(0, BLOCK)
    inside, at = j < width, i * width + j
    gates, rows = i // tokens * gate_stride + j, i // tokens * stride + j
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
    if n1 is not None:
        normal, _ = _normal(h, inside, width, eps)
        n = normal * (1 + _load(scale1, rows, inside)) + _load(shift1, rows, inside)
        tl.store(n1 + at, narrow(n, n1.dtype.element_ty), mask=inside)
        if n2 is not None:
            n = normal * (1 + _load(scale2, rows, inside)) + _load(shift2, rows, inside)
            tl.store(n2 + at, narrow(n, n2.dtype.element_ty), mask=inside)


@jit(
    "tokens_a", "gate_stride_a", "stride_a", "tokens_b", "gate_stride_b", "stride_b", "rows_a",
)  # fmt: skip
def _forward_kernel(
    x_a, y1_a, gate1_a, bias1_a, y2_a, gate2_a, bias2_a, scale1_a, shift1_a, scale2_a, shift2_a, out_a, n1_a, n2_a,
    tokens_a, gate_stride_a, stride_a,
    x_b, y1_b, gate1_b, bias1_b, y2_b, gate2_b, bias2_b, scale1_b, shift1_b, scale2_b, shift2_b, out_b, n1_b, n2_b,
    tokens_b, gate_stride_b, stride_b,
    rows_a, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    if i < rows_a:
        _forward_row(
            i, x_a, y1_a, gate1_a, bias1_a, y2_a, gate2_a, bias2_a, scale1_a, shift1_a, scale2_a, shift2_a, out_a,
            n1_a, n2_a, tokens_a, gate_stride_a, stride_a, width, eps, BLOCK,
        )  # fmt: skip
    else:
        if x_b is not None:
            _forward_row(
                i - rows_a, x_b, y1_b, gate1_b, bias1_b, y2_b, gate2_b, bias2_b, scale1_b, shift1_b, scale2_b,
                shift2_b, out_b, n1_b, n2_b, tokens_b, gate_stride_b, stride_b, width, eps, BLOCK,
            )  # fmt: skip


@jit("tokens", "gate_stride", "stride")
def _backward_row(
    i, x, gate1, gate2, scale1, scale2, d_out, d_n1, d_n2, d_x, d_y1, d_y2, tokens, gate_stride, stride, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = d x' + rstd·(u − mean u − n·mean(u·n)) with u = Σ dn·(1 + scale), dy = gate·dx."""
    j = tl.arange(0, BLOCK)
    inside, at = j < width, i * width + j
    gates, rows = i // tokens * gate_stride + j, i // tokens * stride + j
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


@jit("tokens_a", "gate_stride_a", "stride_a", "tokens_b", "gate_stride_b", "stride_b", "rows_a")
def _backward_kernel(
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


def _block(width: int) -> int:
    return 1 << max(width - 1, 1).bit_length()


def _streams(inputs: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    return [list(inputs[start : start + TENSORS]) for start in range(0, len(inputs), TENSORS)]


def _row_stride(*rows: Tensor | None) -> int:
    """The one distance between the rows of a stream's gates, or of its scales and shifts."""
    strides = {row.stride(0) for row in rows if row is not None}
    return strides.pop() if strides else 0


def _per_stream(inputs: Sequence[Tensor | None]) -> list[tuple[int, int, int]]:
    """Tokens of a sample, the gates' and the modulations' strides, of each stream."""
    result = []
    for x, _, gate1, _, _, gate2, _, *modulations in _streams(inputs):
        assert x is not None
        result.append((x.shape[1], _row_stride(gate1, gate2), _row_stride(*modulations)))
    return result


def _run(kernel, inputs: Sequence[Tensor | None], streams: list[list[Tensor | None]], eps: float) -> None:
    """Launches `kernel` with the tensors of one or two streams."""
    arguments: list = []
    for tensors, numbers in zip(streams, _per_stream(inputs), strict=True):
        arguments += [*tensors, *numbers]
    if len(streams) == 1:
        arguments += [None] * len(streams[0]) + [1, 0, 0]
    sizes = [x.shape[:2].numel() for x in inputs[::TENSORS] if x is not None]
    width = inputs[0].shape[2]  # type: ignore[union-attr]
    launch(kernel, (sum(sizes),), *arguments, sizes[0], width, eps, BLOCK=_block(width), num_warps=WARPS)


@torch.library.custom_op("uae_kernels::gated_residual", mutates_args=())
def _forward(inputs: Sequence[Tensor | None], eps: float) -> list[Tensor]:
    """Of each stream in turn: x' if it has a branch, then a normal for each modulation."""
    streams, results = [], []
    for tensors in _streams(inputs):
        wanted = tensors[1], tensors[7], tensors[9]  # y1, scale1, scale2
        made = [None if part is None else torch.empty_like(tensors[0]) for part in wanted]
        streams.append([*tensors, *made])
        results += [x for x in made if x is not None]
    _run(_forward_kernel, inputs, streams, eps)
    return results


@_forward.register_fake
def _(inputs, eps):
    return [
        torch.empty_like(tensors[0]) for tensors in _streams(inputs) for k in (1, 7, 9) if tensors[k] is not None
    ]


@torch.library.custom_op("uae_kernels::gated_residual_backward", mutates_args=())
def _backward(inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], eps: float) -> list[Tensor]:
    """`inputs` as forward's, but x' for x; `grads` three of a stream. Gives dx, then dy of each branch."""
    streams, results = [], []
    for k, tensors in enumerate(_streams(inputs)):
        x, y1, gate1, _, y2, gate2, _, scale1, _, scale2, _ = tensors
        d_out, d_n1, d_n2 = grads[3 * k : 3 * k + 3]
        if d_n1 is None and d_n2 is not None:
            scale1, scale2, d_n1, d_n2 = scale2, None, d_n2, None
        made = [None if part is None else torch.empty_like(x) for part in (x, y1, y2)]
        streams.append([x, gate1, gate2, scale1, scale2, d_out, d_n1, d_n2, *made])
        results += [x for x in made if x is not None]
    _run(_backward_kernel, inputs, streams, eps)
    return results


@_backward.register_fake
def _(inputs, grads, eps):
    return [torch.empty_like(tensors[0]) for tensors in _streams(inputs) for k in (0, 1, 4) if tensors[k] is not None]


def _setup_context(ctx, inputs, output):
    tensors, ctx.eps = inputs
    results = iter(output)
    kept = []
    for stream in _streams(tensors):
        made = [None if stream[k] is None else next(results) for k in (1, 7, 9)]
        # Of y only its presence matters: x' stands in for it.
        x = stream[0] if made[0] is None else made[0]
        kept += [x, *(None if stream[k] is None else x for k in (1,)), *stream[2:4]]
        kept += [None if stream[4] is None else x, *stream[5:]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept)


def _autograd(ctx, grads):
    kept = ctx.saved_tensors
    given = iter(grads)
    upstream = []
    for stream in _streams(kept):
        for k in (1, 7, 9):
            grad = None if stream[k] is None else next(given)
            upstream.append(None if grad is None else grad.contiguous())
    results = iter(_backward(kept, upstream, ctx.eps))
    found = []
    for stream in _streams(kept):
        d_x = next(results)
        d_y = [None if stream[k] is None else next(results) for k in (1, 4)]
        found += [d_x, d_y[0], None, None, d_y[1], *[None] * 6]
    return found, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_residual(*streams: Stream, eps: float = 1e-6, impl: str = "auto") -> list[Modulated]:
    """Adds gated branches to one or two streams of tokens, normalises them and modulates the normals, in one launch.

    x' = x + Σ_i gate_i·(y_i + bias_i), n_j = LN(x')·(1 + scale_j) + shift_j, LN without weights over the last dimension
    (adaLN-Zero of arXiv 2212.09748, as the blocks of arXiv 2403.03206 use it).

    Args:
        streams: Stream(x, modulations, branches): x (B, N, C) floats, up to two (scale, shift), each (B, C), up to two
            (y (B, N, C), gate (B, C), bias (C,) or None). A second stream has tokens of its own and the same B and C.
        eps: added to the variance.
        impl: "auto" is Triton on a GPU and PyTorch elsewhere, for fp64, and where a gate, a bias, a scale or a shift
            needs a gradient: Triton gives those of x and y alone. "triton" and "torch" ask for one of them.

    Returns:
        Modulated(x', (n, ...)) for each stream, in its dtype; computed in fp32 (fp64 for fp64), rounded once each.
        x' is x itself where there is no branch.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    check_streams(streams)
    unsupported = fp64(*(stream.x for stream in streams))
    rows = [part for s in streams for part in (*sum(s.modulations, ()), *sum((b[1:] for b in s.branches), ()))]
    if torch.is_grad_enabled() and any(row is not None and row.requires_grad for row in rows):
        unsupported = unsupported or "gradients of gates, biases, scales and shifts"
    if not use_triton("gated_residual", impl, streams[0].x, unsupported):
        return definitions.gated_residual(*streams, eps=eps)
    flat: list[Tensor | None] = []
    for stream in streams:
        gates = _aligned([gate for _, gate, _ in stream.branches])
        scales = _aligned([part for pair in stream.modulations for part in pair])
        branches = [part for (y, _, bias), gate in zip(stream.branches, gates, strict=True)
                    for part in (y.contiguous(), gate, None if bias is None else bias.contiguous())]  # fmt: skip
        flat += [stream.x.contiguous(), *branches, *[None] * (6 - len(branches))]
        flat += [*scales, *[None] * (4 - len(scales))]
    results = iter(_forward(flat, eps))
    return [
        Modulated(next(results) if s.branches else s.x, tuple(next(results) for _ in s.modulations)) for s in streams
    ]


def _aligned(rows: list[Tensor]) -> list[Tensor]:
    """Rows (B, C) that all lie at one distance, each in one piece."""
    alike = len({row.stride(0) for row in rows}) == 1 and all(row.stride(1) == 1 for row in rows)
    return rows if alike else [row.contiguous() for row in rows]


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """LN(x)·(1 + scale) + shift of x (B, N, C) with scale and shift (B, C): `gated_residual` without a branch.

    Args, Returns, Raises: as there.
    """
    return gated_residual(Stream(x, ((scale, shift),)), eps=eps, impl=impl)[0].normalized[0]
