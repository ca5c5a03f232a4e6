"""A small call of every op that has Triton kernels, forward and backward, at sizes that fill no block.

`CASES` has, by name, a function that makes the inputs of so many rows on a device, and one that computes outputs and
gradients from them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from uae_kernels import group_advantages, grpo_loss, linear_logprobs, token_logprobs

Inputs = dict[str, Tensor]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a function in which each element of each output has a weight of its own."""
    weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def rewards(device: str, rows: int) -> Inputs:
    values = torch.randn(rows // 7 * 7 or 7, 3, device=device)
    values[1, 0] = torch.nan
    return {"rewards": values, "weights": torch.tensor([1.0, 0.5, -2.0], device=device)}


def advantages(impl: str, rewards: Tensor, weights: Tensor) -> list[Tensor]:
    found = []
    by_id = {"group_ids": torch.arange(len(rewards), device=rewards.device) % 3}
    for options in ({"group_size": 7, "leave_one_out": True}, by_id, by_id | {"aggregation": "normalize_then_sum"}):
        x = leaf(rewards)
        found += gradients([group_advantages(x, reward_weights=weights, impl=impl, **options)], [x])
    return found


def logits(device: str, rows: int, vocabulary: int) -> Inputs:
    return {
        "logits": 3 * torch.randn(2, rows, vocabulary, device=device),
        "targets": tokens(device, (2, rows), vocabulary),
    }


def tokens(device: str, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """Targets, of which the first is ignored, the second out of range, and two the vocabulary's ends."""
    found = torch.randint(0, vocabulary, shape, device=device)
    found.view(-1)[:4] = torch.tensor([-100, vocabulary, 0, vocabulary - 1], device=device)
    return found


def from_logits(impl: str, logits: Tensor, targets: Tensor) -> list[Tensor]:
    x = leaf(logits)
    outputs = token_logprobs(
        x, targets, temperature=0.7, softcap=20.0, return_entropy=True, entropy_grad=True, impl=impl
    )
    return gradients(list(outputs), [x])


def head(device: str, rows: int) -> Inputs:
    width, vocabulary = 40, 131
    return {
        "hidden": torch.randn(rows, width, device=device),
        "weight": torch.randn(vocabulary, width, device=device) / width**0.5,
        "bias": torch.randn(vocabulary, device=device),
        "targets": tokens(device, (rows,), vocabulary),
    }


def frozen(impl: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
    x = leaf(hidden)
    outputs = linear_logprobs(x, weight, targets, bias=bias, return_entropy=True, entropy_grad=True, impl=impl)
    return gradients(list(outputs), [x])


def trained(impl: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
    leaves = [leaf(x) for x in (hidden, weight, bias)]
    x, w, b = leaves
    return gradients([linear_logprobs(x, w, targets, bias=b, softcap=10.0, impl=impl)], leaves)


def sequences(device: str, rows: int) -> Inputs:
    shape = rows // 3 * 3 or 3, 13
    names = ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs")
    found = {name: -torch.rand(shape, device=device) for name in names} | {
        "entropies": torch.rand(shape, device=device)
    }
    return found | {"rewards": torch.randn(shape[0], device=device), "mask": torch.rand(shape, device=device) < 0.8}


def policy_loss(impl: str, logprobs: Tensor, entropies: Tensor, **given: Tensor) -> list[Tensor]:
    found = []
    for options in (
        {"loss_type": "luspo", "importance_level": "sequence"},
        {"loss_type": "dapo", "entropy_quantile": 0.5},
    ):
        leaves = [leaf(logprobs), leaf(entropies)]
        out = grpo_loss(
            leaves[0], entropies=leaves[1], group_size=3, beta=0.1, delta=1.5, importance_cap=1.3, entropy_coef=0.2,
            off_policy_threshold=0.5, impl=impl, **given, **options,
        )  # fmt: skip
        found += gradients([out.loss, out.per_token], leaves) + list(out.metrics.values())
    return found


CASES: dict[str, tuple[Callable[[str, int], Inputs], Callable[..., list[Tensor]]]] = {
    "advantages": (rewards, advantages),
    "token_logprobs": (lambda device, rows: logits(device, rows, 131), from_logits),
    "token_logprobs in vectors": (lambda device, rows: logits(device, rows, 136), from_logits),
    "linear_logprobs, frozen head": (head, frozen),
    "linear_logprobs, trained head": (head, trained),
    "grpo_loss": (sequences, policy_loss),
}
