"""How time and memory grow with one size while the others stand still, on a CPU; the report fits the exponents.

On a GPU the ops' own cases have four sizes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from . import group_advantages, linear_logprobs, shared_prefix_attention, token_logprobs
from .harness import Case, Contestant

OP = "scaling"
OF = " against "  # a variant is called "op against size"
MODULES = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (group_advantages, linear_logprobs, shared_prefix_attention, token_logprobs)
}
VARIANTS = {"linear_logprobs": "frozen", "token_logprobs": "backward", "group_advantages": "forward"}
LEFT_OUT = ("torch.compile of eager", "PyTorch, linear_cross_entropy")  # a shape to compile each; much like eager
CHUNK = 4096


def cases(device: str, quick: bool) -> Iterator[Case]:
    if device != "cpu" or quick:
        return
    made = {"op": OP, "device": device, "dtype": torch.float32, "order": 1}
    for n in (64, 128, 256, 512):
        yield Case(**made, variant=f"linear_logprobs{OF}N", N=n, H=256, V=16_384)
    for v in (4096, 8192, 16_384, 32_768):
        yield Case(**made, variant=f"linear_logprobs{OF}V", N=256, H=256, V=v)
    for n in (64, 128, 256, 512):
        yield Case(**made, variant=f"token_logprobs{OF}N", N=n, V=8192, B=8, T=n // 8)
    for group in (4, 16, 64, 256):
        yield Case(**made, variant=f"group_advantages{OF}G", N=65_536, G=group, calls=4)
    for group in (2, 4, 8, 16):
        size = {"variant": f"shared_prefix_attention{OF}G", "op": OP, "order": 1}
        yield shared_prefix_attention.make(device, torch.float32, group, 512, 32, **size)


def growing(case: Case | str) -> str:
    """The size that changes: "N", "V" or "G"."""
    return (case if isinstance(case, str) else case.variant).rpartition(OF)[2]


def _own(case: Case) -> tuple[ModuleType, Case]:
    """The op, and the case as one of its own."""
    name = case.variant.partition(OF)[0]
    return MODULES[name], replace(case, op=name, variant=VARIANTS.get(name, "backward"))


def inputs(case: Case) -> Any:
    module, own = _own(case)
    return module.inputs(own)


def truth(case: Case, given: Any) -> Any:
    module, own = _own(case)
    return module.truth(own, given)


def contestants(case: Case) -> list[Contestant]:
    """Of a rival with a chunk size the one that divides all sizes."""
    module, own = _own(case)
    return [
        contestant
        for contestant in module.contestants(own)
        if contestant.name not in LEFT_OUT
        and contestant.config.get("chunk_size", CHUNK) == CHUNK
        and "impl" not in contestant.config
    ]
