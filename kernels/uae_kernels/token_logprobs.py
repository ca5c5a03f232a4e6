"""Log-probabilities of given tokens from logits, a row tile at a time."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ._common import check_impl, compute_dtype, pack_head, unpack_head
from .reference.token_logprobs import check_logits, is_scored

ROWS = 128
CPU_ELEMENTS = 2**19  # a CPU's tiles also stay in its cache


def _tiles(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices of (at most ROWS, V) pieces of logits (..., T, V), of any strides without a copy."""
    rows = ROWS
    if logits.device.type == "cpu":
        rows = max(1, min(ROWS, CPU_ELEMENTS // max(logits.shape[-1], 1)))
    for leading in product(*map(range, logits.shape[:-2])):
        for start in range(0, logits.shape[-2], rows):
            yield *leading, slice(start, start + rows)


def _log_softmax(logits: Tensor, packed: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """log p (rows, V) in fp32, the slope 1 − tanh² where there is a softcap, and which rows are all −inf."""
    temperature, softcap, logit_scale = unpack_head(packed)
    z, slope = logits.to(compute_dtype(logits)), None
    if softcap is not None:
        z = z.mul(logit_scale / softcap).tanh_()
        slope = z.square().neg_().add_(1)
        z.mul_(softcap / temperature)
    elif logit_scale != temperature:
        z = z * (logit_scale / temperature)
    return torch.log_softmax(z, 1), slope, z.amax(1, keepdim=True) == -torch.inf


@torch.library.custom_op("uae_kernels::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor, targets: Tensor, packed: Tensor, ignore_index: int, entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """(..., T, V), (..., T) -> log p and entropy (..., T)."""
    scored = is_scored(targets, logits.shape[-1], ignore_index)
    index = torch.where(scored, targets, 0).long()
    logprobs = logits.new_zeros(targets.shape, dtype=compute_dtype(logits))
    entropies = torch.zeros_like(logprobs)
    for i in _tiles(logits):
        log_p, _, dead = _log_softmax(logits[i], packed)
        value = log_p.gather(1, index[i][:, None]).masked_fill_(dead, -torch.inf)[:, 0]
        logprobs[i] = torch.where(scored[i], value, 0)
        if entropy:
            value = _row_entropy(log_p)
            entropies[i] = torch.where(scored[i] & ~dead[:, 0], value, 0)
    return logprobs, entropies


@_forward.register_fake
def _(logits, targets, packed, ignore_index, entropy, inplace):
    return tuple(logits.new_empty(targets.shape, dtype=compute_dtype(logits)) for _ in range(2))


def _row_entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p, 0·log 0 = 0. One row alone would be summed in parts, one for each thread: two are not."""
    terms = log_p.exp().mul_(log_p.clamp(min=torch.finfo(log_p.dtype).min))
    return -terms.expand(max(len(terms), 2), -1).sum(1)[: len(terms)]


def _write_gradient(
    out: Tensor,
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    packed: Tensor,
    ignore_index: int,
    entropy: bool,
) -> None:
    """dL/dlogits into `out`, which may be `logits` itself: each tile is read before it is written."""
    temperature, _, logit_scale = unpack_head(packed)
    scored = is_scored(targets, logits.shape[-1], ignore_index)
    index = torch.where(scored, targets, 0).long()
    for i in _tiles(logits):
        log_p, slope, dead = _log_softmax(logits[i], packed)
        keep = scored[i][:, None] & ~dead
        g = torch.where(keep, grad[i][:, None], 0) * (logit_scale / temperature)
        # dL/dz_v = g·([v = y] − p_v) − g_H·p_v·(log p_v + H)
        if entropy:
            g_entropy = torch.where(keep, grad_entropy[i][:, None], 0) * (logit_scale / temperature)
            p = log_p.exp()
            finite = log_p.clamp_(min=torch.finfo(log_p.dtype).min)
            dz = finite.add_(_row_entropy(log_p)[:, None]).mul_(g_entropy).add_(g).mul_(p).neg_()
        else:
            dz = log_p.exp_().mul_(-g)
        dz.scatter_add_(1, index[i][:, None], g)
        if slope is not None:
            dz.mul_(slope)
        out[i] = dz.masked_fill_(~keep, 0)


@torch.library.custom_op("uae_kernels::token_logprobs_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    packed: Tensor,
    ignore_index: int,
    entropy: bool,
) -> Tensor:
    out = torch.empty_like(logits)
    _write_gradient(out, grad, grad_entropy, logits, targets, packed, ignore_index, entropy)
    return out


@_backward.register_fake
def _(grad, grad_entropy, logits, targets, packed, ignore_index, entropy):
    return torch.empty_like(logits)


@torch.library.custom_op("uae_kernels::token_logprobs_backward_", mutates_args=("logits",))
def _backward_(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    packed: Tensor,
    ignore_index: int,
    entropy: bool,
) -> None:
    _write_gradient(logits, grad, grad_entropy, logits, targets, packed, ignore_index, entropy)


@_backward_.register_fake
def _(grad, grad_entropy, logits, targets, packed, ignore_index, entropy):
    return None


def _setup_context(ctx, inputs, output):
    logits, targets, packed, ignore_index, entropy, inplace = inputs
    ctx.save_for_backward(logits, targets, packed)
    ctx.options = ignore_index, entropy, inplace
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_entropy):
    logits, targets, packed = ctx.saved_tensors
    ignore_index, entropy, inplace = ctx.options
    none = (None,) * 5
    if grad is None and grad_entropy is None:
        return None, *none
    given = grad if grad is not None else grad_entropy
    grads = [torch.zeros_like(given) if g is None else g for g in (grad, grad_entropy)]
    if inplace:
        logits = logits.detach()
        _backward_(*grads, logits, targets, packed, ignore_index, entropy)
        return logits, *none
    return _backward(*grads, logits, targets, packed, ignore_index, entropy), *none


_forward.register_autograd(_autograd, setup_context=_setup_context)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, from logits.

    z = softcap·tanh(logit_scale·logits/softcap)/temperature, log p = z[target] − log Σ_v e^{z_v}.

    Works on 128 rows at a time in fp32: beside the logits it allocates nothing of their size but their
    gradient.

    Args:
        logits: (..., V) floats of any strides; a slice such as logits[:, :-1] is not copied.
        targets: (...) int64 or int32 token ids. `ignore_index` and ids outside [0, V) are ignored:
            log-probability, entropy and gradients are 0, whatever their logits hold.
        temperature: positive number, divides the logits.
        softcap: positive number or None.
        logit_scale: number, multiplies the logits before the softcap.
        return_entropy: also return −Σ p log p, in nats.
        entropy_grad: whether gradients flow through the entropy.
        inplace_backward: the backward pass overwrites `logits` with their gradient, which saves a tensor of
            their size; nothing else may read them afterwards. Has no effect under torch.compile, which plans
            memory itself.
        impl: "auto" and "torch" run PyTorch; "triton" raises.

    Returns:
        fp32 (fp64 for fp64 logits) (...) log-probabilities, or (log-probabilities, entropies). −inf logits
        are tokens of probability 0; a row of nothing else gives −inf, entropy 0 and no gradient.

    Raises:
        ValueError: shapes that do not fit, temperature or softcap not positive, `inplace_backward` on logits
            that overlap themselves in memory (expanded).
        TypeError: targets of another dtype.
        RuntimeError: `impl="triton"`.
    """
    check_impl("token_logprobs", impl)
    check_logits(logits, targets, temperature, softcap)
    if inplace_backward and any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError("token_logprobs: inplace_backward cannot write to expanded logits")
    rows = logits.dim() == 1  # a single distribution
    logprobs, entropy = _forward(
        logits[None] if rows else logits,
        targets[None] if rows else targets,
        pack_head(temperature, softcap, logit_scale),
        ignore_index,
        return_entropy,
        inplace_backward and not torch.compiler.is_compiling(),
    )
    if rows:
        logprobs, entropy = logprobs[0], entropy[0]
    if not return_entropy:
        return logprobs
    return logprobs, entropy if entropy_grad else entropy.detach()
