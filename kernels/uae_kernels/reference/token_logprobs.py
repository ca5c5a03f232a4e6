"""Definition of `uae_kernels.token_logprobs`."""

import torch
from torch import Tensor

from .._common import check_impl, compute_dtype


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
    """See `uae_kernels.token_logprobs`; `inplace_backward` changes nothing here."""
    check_impl("token_logprobs", impl)
    check_logits(logits, targets, temperature, softcap)
    z = logits.to(compute_dtype(logits)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature

    scored = is_scored(targets, logits.shape[-1], ignore_index)
    alive = scored & (z.detach().amax(-1) != -torch.inf)  # a row of -inf has log-probability -inf, no gradient
    z = torch.where(alive[..., None], z, 0)
    log_p = torch.log_softmax(z, -1)
    index = torch.where(scored, targets, 0)[..., None].long()
    logprobs = torch.where(alive, log_p.gather(-1, index)[..., 0], -torch.inf)
    logprobs = torch.where(scored, logprobs, 0)
    if not return_entropy:
        return logprobs
    # H = −Σ p log p, with 0·log 0 = 0
    finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
    entropy = torch.where(alive, -(log_p.exp() * finite_log_p).sum(-1), 0)
    return logprobs, entropy if entropy_grad else entropy.detach()


def is_scored(targets: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Where a target counts: an id outside [0, V) is ignored like `ignore_index`, never read."""
    return (targets != ignore_index) & (targets >= 0) & (targets < vocabulary)


def check_logits(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> None:
    if logits.shape[:-1] != targets.shape or not logits.is_floating_point():
        raise ValueError(
            "token_logprobs: expected float logits (..., V) and targets (...), got "
            f"{tuple(logits.shape)} {logits.dtype} and {tuple(targets.shape)}"
        )
    check_head(targets, temperature, softcap)


def check_head(targets: Tensor, temperature: float, softcap: float | None) -> None:
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
