"""Inputs as a policy has them in training, and the fp64 truth of a language-model head.

Rows of Gaussian logits are scaled so that their entropies are spread evenly over 0.2–6 nats, as far as |logit| ≤ 40
allows; the targets are sampled from them. A head has Gaussian weight rows of norm about 1, so that Gaussian hidden
states give Gaussian logits, and the scale of a row of logits is that of its hidden state.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from .harness import Results, Truth

ENTROPIES = (0.2, 6.0)
LARGEST = 40.0
TILE = 512  # rows whose logits exist at one time


def tiles(rows: int, device: str) -> tuple[Tensor, ...]:
    return torch.arange(rows, device=device).split(TILE)


def sharpen(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Unit Gaussian logits (rows, V) -> the scale of each row (rows, 1), and a target sampled from each."""
    low, high = torch.zeros_like(logits[:, :1]), LARGEST / logits.abs().amax(1, keepdim=True)
    wanted = torch.empty_like(low).uniform_(*ENTROPIES)
    for _ in range(16):
        middle = (low + high) / 2
        log_p = torch.log_softmax(logits * middle, 1)
        too_flat = -(log_p.exp() * log_p).sum(1, keepdim=True) > wanted
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return high, torch.softmax(logits * high, 1).multinomial(1)[:, 0]


def policy_head(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """hidden (rows, width), which requires a gradient, weight (vocabulary, width), targets (rows,)."""
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    hidden, targets = torch.randn(rows, width, device=device), torch.empty(rows, dtype=torch.int64, device=device)
    wide = weight.float()
    for i in tiles(rows, device):
        scale, targets[i] = sharpen(hidden[i] @ wide.T)
        hidden[i] *= scale
    return SimpleNamespace(hidden=hidden.to(dtype).requires_grad_(), weight=weight, targets=targets)


def policy_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """logits (rows, vocabulary), which require a gradient, targets (rows,)."""
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    targets = torch.empty(rows, dtype=torch.int64, device=device)
    for i in tiles(rows, device):
        unit = torch.randn(len(i), vocabulary, device=device)
        scale, targets[i] = sharpen(unit)
        logits[i] = (unit * scale).to(dtype)
    return SimpleNamespace(logits=logits.requires_grad_(), targets=targets)


def policy_batch(logprobs: Tensor, group_size: int = 8) -> SimpleNamespace:
    """What a GRPO loss reads beside log-probs (B, T): advantages, mask, old and reference log-probs.

    Sequences end between T/2 and T. One token in ten has left the clip range; the ratios stay away from its ends, where
    the gradient jumps and no two implementations need agree.
    """
    b, t = logprobs.shape
    rewards = torch.rand(b, device=logprobs.device)
    groups = rewards.view(-1, group_size)
    lengths = torch.randint(t // 2, t + 1, (b, 1), device=logprobs.device)
    log_ratio = torch.empty_like(logprobs).uniform_(-0.15, 0.15)
    far = torch.rand_like(log_ratio)
    log_ratio += torch.where(far < 0.05, 0.5, torch.where(far < 0.1, -0.5, 0.0))
    return SimpleNamespace(
        advantages=((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten(),
        mask=torch.arange(t, device=logprobs.device) < lengths,
        old_logprobs=(logprobs - log_ratio).float(),
        ref_logprobs=(logprobs + 0.1 * torch.randn_like(logprobs)).float(),
    )


def score(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


def entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def logits_values(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of (B, T, V) in fp64, a sequence at a time."""
    return torch.stack([score(x.double(), y) for x, y in zip(logits.detach(), targets, strict=True)])


def d_logits(logits: Tensor, targets: Tensor, upstream: Tensor) -> Truth:
    """The gradient of Σ upstream·logprobs in fp64 at 16 tokens of each sequence of logits (B, T, V)."""
    some = slice(None), slice(None, None, -(-logits.shape[1] // 16))
    chosen = logits.detach()[some].double().requires_grad_()
    (exact,) = torch.autograd.grad(score(chosen, targets[some]), chosen, upstream[some].double())
    return {"d_logits": (some, exact)}


def head_values(hidden: Tensor, weight: Tensor, targets: Tensor) -> Results:
    """Log-probs and entropies of a head in fp64."""
    results = [torch.empty(len(targets), dtype=torch.float64, device=hidden.device) for _ in range(2)]
    wide = weight.detach().double()
    for i in tiles(len(targets), hidden.device.type):
        logits = hidden.detach()[i].double() @ wide.T
        results[0][i], results[1][i] = score(logits, targets[i]), entropy(logits)
    return {"logprobs": results[0], "entropy": results[1]}


def head_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, trainable: bool) -> Results:
    """Gradients of Σ upstream·logprobs in fp64."""
    wide = weight.detach().double().requires_grad_(trainable)
    d_hidden, d_weight = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device), torch.zeros_like(wide)
    for i in tiles(len(targets), hidden.device.type):
        h = hidden.detach()[i].double().requires_grad_()
        logprobs = score(h @ wide.T, targets[i])
        d_hidden[i], *rest = torch.autograd.grad(logprobs, [h, wide] if trainable else [h], upstream[i].double())
        for part in rest:
            d_weight += part
    return {"d_hidden": d_hidden, "d_weight": d_weight} if trainable else {"d_hidden": d_hidden}
