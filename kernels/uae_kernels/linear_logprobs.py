"""Log-probabilities of a language-model head without its (N, V) logits."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _linear_fused, _linear_tiles, _triton
from ._common import UNRECORDED, compute_dtype, direct, pack_head, unpack_head
from ._triton import fp64, use_triton
from .reference.linear_logprobs import check_linear
from .reference.token_logprobs import is_scored

INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor packed"


@torch.library.custom_op(
    "uae_kernels::linear_logprobs",
    mutates_args=(),
    **UNRECORDED,
    schema=f"({INPUTS}, int ignore_index, Tensor? active, bool entropy, int order, bool fused) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden, weight, targets, bias, packed, ignore_index, active, entropy, order, fused):
    """(N, H), (V, H), (N,) -> log p, entropy, log Σ e^z (N,), d log p/dh, d entropy/dh (N, H).

    `order` says how many of the two Jacobians are wanted, the others have no rows; `active` (N,) of which rows.
    """
    scored = is_scored(targets, len(weight), ignore_index)
    path = _linear_fused if fused else _linear_tiles
    return path.forward(hidden, weight, targets, bias, packed, scored, active, entropy, order)


@_forward.register_fake
def _(hidden, weight, targets, bias, packed, ignore_index, active, entropy, order, fused):
    (rows, width), dtype = hidden.shape, compute_dtype(weight)
    shapes = *[(rows,)] * 3, *[(rows if k < order else 0, width) for k in range(2)]
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op(
    "uae_kernels::linear_logprobs_backward",
    mutates_args=(),
    **UNRECORDED,
    schema=f"(Tensor grad, Tensor? grad_entropy, {INPUTS}, Tensor logprobs, Tensor entropies, Tensor lse, "
    "int ignore_index, bool[] need, bool fused) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad, grad_entropy, hidden, weight, targets, bias, packed, logprobs, entropies, lse, ignore_index, need, fused
):  # fmt: skip
    """The gradients of hidden, weight and bias, from logits computed again; what is not needed has no elements."""
    scored = is_scored(targets, len(weight), ignore_index) & (lse != -torch.inf)
    temperature, _, logit_scale = unpack_head(packed)
    grad = grad * (logit_scale / temperature)
    # dL/dz_v = g·([v = y] − p_v) − g_H·p_v·(log p_v + H) at v = y, where 1 − p loses no digits as −expm1(log p)
    own = -grad * torch.expm1(logprobs)
    if grad_entropy is not None:
        grad_entropy = grad_entropy * (logit_scale / temperature)
        own -= grad_entropy * logprobs.exp() * (logprobs.clamp(min=_linear_tiles.LOWEST) + entropies)
    # A row that does not count, or that only fills up a tile: with a log Σ e^z of +inf its p is 0, and with a hidden
    # state of 0 it adds 0 to dW whatever it held.
    pairs = (targets, -1), (own, 0), (grad, 0), (grad_entropy, 0), (entropies, 0), (lse, torch.inf)
    columns = [(None if x is None else torch.where(scored, x, fill), fill) for x, fill in pairs]
    hidden = torch.where(scored[:, None], hidden, 0)
    path = _linear_fused if fused else _linear_tiles
    return path.backward(hidden, weight, bias, packed, scored, columns, need)


@_backward.register_fake
def _(grad, grad_entropy, hidden, weight, targets, bias, packed, logprobs, entropies, lse, ignore_index, need, fused):
    return (
        hidden.new_empty(hidden.shape if need[0] else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if need[1] else (0, weight.shape[1])),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need[2] else 0),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.ignore_index, _, _, ctx.order, ctx.fused = inputs
    hidden, weight, targets, *_ = tensors
    *values, jacobian, entropy_jacobian = output
    ctx.mark_non_differentiable(values[2], jacobian, entropy_jacobian)
    ctx.set_materialize_grads(False)
    ctx.vocabulary, ctx.dtype = len(weight), hidden.dtype
    ctx.save_for_backward(*((targets, jacobian, entropy_jacobian) if ctx.order else (*tensors, *values)))


@once_differentiable
def _autograd(ctx, grad, grad_entropy, *_):
    if grad is None and grad_entropy is None:
        return (None,) * 10
    if ctx.order:
        return _row_scaling(ctx, grad, grad_entropy), *[None] * 9
    tensors, need = ctx.saved_tensors, [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if grad is None:
        grad = torch.zeros_like(grad_entropy)
    made = (_backward if ctx.fused else _direct_backward)(
        grad, grad_entropy, *tensors, ctx.ignore_index, need, ctx.fused
    )
    d_hidden, d_weight, d_bias = (x if needed else None for x, needed in zip(made, need, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 6


def _row_scaling(ctx, *grads):
    """The gradient of hidden states from the rows' Jacobians; None without one."""
    targets, *jacobians = ctx.saved_tensors
    scored = is_scored(targets, ctx.vocabulary, ctx.ignore_index)
    pairs = [
        (rows, torch.where(scored, g, 0)[:, None])
        for rows, g in zip(jacobians[: ctx.order], grads, strict=False)
        if g is not None
    ]
    if not pairs:
        return None
    d_hidden = torch.empty_like(jacobians[0], dtype=ctx.dtype)
    if len(pairs) == 1:
        return torch.mul(*pairs[0], out=d_hidden)  # rounded once, no copy in fp32
    return torch.addcmul(pairs[0][0] * pairs[0][1], *pairs[1], out=d_hidden)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_direct, _direct_backward = direct(_forward, _setup_context, _autograd), direct(_backward)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under a linear head, without ever holding the (N, V) logits.

    z = softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap)/temperature,
    log p = z[target] − log Σ_v e^{z_v}.

    Frozen head (neither `weight` nor `bias` requires a gradient): the forward pass also forms each row's
    Jacobian d log p/d hidden, and the backward pass of any loss is one row scaling. Forward and backward cost
    two matrix products of 2·N·H·V FLOPs in all and save N·H fp32 numbers; `entropy_grad` adds as much again
    for the entropy's own Jacobian (three products, 2·N·H numbers). Keep such a head outside
    gradient-checkpointed regions, which would pay twice.
    Trainable head: the backward pass computes the logits again, tile by tile, four products in all; nothing
    is allocated for a gradient that is not required.

    Args:
        hidden: (..., H) floats. Any strides.
        weight: (V, H) floats, a plain tensor. Its dtype may differ: products are taken in it, summed in fp32
            (fp64 if it is fp64).
        targets: (...) int64 or int32 token ids. `ignore_index` and ids outside [0, V) are ignored:
            log-probability, entropy and gradients are 0.
        bias: (V,) or None. An entry of −inf removes its token; a row without tokens gives −inf and no
            gradient.
        temperature: positive number, divides the logits.
        softcap: positive number or None.
        logit_scale: number, multiplies the logits before the softcap.
        return_entropy: also return −Σ p log p, in nats.
        entropy_grad: whether gradients flow through the entropy.
        impl: "torch" runs library matrix products on tiles of constant size, "triton" fused kernels (sm_80 and newer,
            no fp64); "auto" is Triton for 16-bit weights on a GPU, library products elsewhere.

    Returns:
        fp32 (...) log-probabilities, or (log-probabilities, entropies). A row's result depends neither on the
        rows beside it nor on its position, bit for bit.

    Raises:
        TypeError: a weight that is not a plain dense tensor (module, DTensor, quantised), or targets of
            another dtype.
        ValueError: shapes that do not fit, temperature or softcap not positive.
        RuntimeError: `impl="triton"` where it cannot run.
    """
    return active_logprobs(
        hidden, weight, targets, None, bias, temperature, softcap, logit_scale, ignore_index, return_entropy,
        entropy_grad, impl,
    )  # fmt: skip


def active_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    active: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
    entropy_grad: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprobs` without the Jacobian of the rows that are not `active` (...): their gradient may be wrong.

    For callers who know that the gradient that arrives there is 0.
    """
    check_linear(hidden, weight, targets, bias, temperature, softcap)
    unsupported = fp64(hidden, weight)
    if weight.is_cuda and _triton.capability(weight) < 80:
        unsupported = unsupported or "GPUs without bf16 matrix units (before sm_80)"
    fused = use_triton("linear_logprobs", impl, weight, unsupported)
    if impl == "auto" and weight.dtype == torch.float32:
        fused = False  # fp32 products without TF32 are the library's strength
    graph = torch.is_grad_enabled()
    trainable = graph and (weight.requires_grad or (bias is not None and bias.requires_grad))
    order = 1 + (return_entropy and entropy_grad) if graph and hidden.requires_grad and not trainable else 0
    logprobs, entropy, *_ = (_forward if fused else _direct)(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        pack_head(temperature, softcap, logit_scale),
        ignore_index,
        None if active is None else active.reshape(-1),
        return_entropy,
        order,
        fused,
    )
    logprobs = logprobs.view(targets.shape)
    if not return_entropy:
        return logprobs
    entropy = entropy.view(targets.shape)
    return logprobs, entropy if entropy_grad else entropy.detach()
