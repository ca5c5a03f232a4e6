"""Attention of the G continuations of each prompt, forward and backward: `shared_prefix_attention` and copied prefixes.

T counts the tokens of a continuation, G the continuations of a prompt, V its tokens; H is heads × head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from uae_kernels import reference, shared_prefix_attention

from .harness import Case, Contestant, Results, Step, compiled, ours, training_step

HEADS, KV_HEADS, DIM = 16, 2, 128  # of Qwen2.5-VL-3B
GROUPS = (4, 8, 16, 32)
PROMPT, TOKENS = 384, 300  # a prompt with an image of 504², and a caption


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        yield make(device, torch.float32, 2, 64, 16, quick=True)
    elif device == "cpu":
        yield make(device, torch.float32, 8, 256, 64)
    else:
        for i, group in enumerate(GROUPS):
            yield make(device, torch.bfloat16, group, PROMPT, TOKENS, order=i)


def make(device: str, dtype: torch.dtype, group: int, prompt: int, tokens: int, **more: Any) -> Case:
    """Of one prompt."""
    return Case(
        **{"op": "shared_prefix_attention", "variant": "backward"} | more,
        device=device, dtype=dtype, N=group * tokens, H=HEADS * DIM, V=prompt, T=tokens, G=group,
    )  # fmt: skip


def inputs(case: Case) -> Any:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, device=case.device).to(case.dtype)

    own, prompt = (case.G, case.T), (1, case.V)
    leaves = {"q": draw(*own, HEADS)}
    leaves |= {name: draw(*own, KV_HEADS) for name in ("k", "v")}
    leaves |= {name: draw(*prompt, KV_HEADS) for name in ("prefix_k", "prefix_v")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return SimpleNamespace(leaves=leaves, upstream=torch.randn_like(leaves["q"]))


def attend(function: Any, case: Case, leaves: dict[str, Tensor], upstream: Tensor, **options: Any) -> Step:
    return training_step("out", lambda: function(**leaves, group_size=case.G, **options), leaves, upstream)


def truth(case: Case, given: Any) -> Results:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in given.leaves.items()}
    return attend(reference.shared_prefix_attention, case, wide, given.upstream.double())()


def copied(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, group_size: int) -> Tensor:
    """Each continuation with a copy of its prompt's keys and values, as a batch of whole sequences has them."""
    keys, values = (
        torch.cat([prefix.repeat_interleave(group_size, 0), own], 1).transpose(1, 2)
        for prefix, own in ((prefix_k, k), (prefix_v, v))
    )
    tokens, prompt = k.shape[1], prefix_k.shape[1]
    seen = torch.ones(tokens, prompt + tokens, dtype=torch.bool, device=q.device).tril(prompt)
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q.transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def contestants(case: Case) -> list[Contestant]:
    def own(given: Any, impl: str) -> Step:
        return attend(shared_prefix_attention, case, given.leaves, given.upstream, impl=impl)

    return [
        *ours(case, own),
        Contestant("eager, copied prompts", lambda given: attend(copied, case, given.leaves, given.upstream)),
        Contestant(
            "torch.compile of eager",
            lambda given: attend(compiled(case, copied), case, given.leaves, given.upstream),
        ),
    ]
