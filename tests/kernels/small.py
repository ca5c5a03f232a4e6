"""A small call of every op that has Triton kernels, forward and backward, at sizes that fill no block.

`CASES` has, by name, a function that makes the inputs of so many rows on a device, and one that computes outputs and
gradients from them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from uae_kernels import (
    flow_grpo_loss,
    flow_step,
    group_advantages,
    grpo_loss,
    linear_logprobs,
    segment_attention,
    shared_prefix_attention,
    token_logprobs,
)
from uae_kernels.mmdit import Projections, Stream, gated_residual, qk_norm, quantize_rows

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


def latents(device: str, rows: int) -> Inputs:
    names = ("velocity", "uncond", "sample", "taken", "ref")
    found = {name: torch.randn(3, 2, rows, device=device) for name in names}
    sigmas = {
        "sigma": torch.linspace(1.0, 0.5, 3, device=device),
        "sigma_next": torch.linspace(0.8, 0.0, 3, device=device),
    }
    return found | sigmas | {"seed": torch.arange(3, device=device), "row": torch.randn(3, device=device)}


def policy_step(
    impl: str, velocity: Tensor, uncond: Tensor, sample: Tensor, taken: Tensor, **given: Tensor
) -> list[Tensor]:
    found = []
    for kind, options in (("flow_sde", {"seed": given["seed"]}), ("cps", {"next_sample": taken})):
        leaves = [leaf(velocity), leaf(uncond), leaf(sample)]
        step = flow_step(
            leaves[0], leaves[2], given["sigma"], given["sigma_next"], kind=kind, velocity_uncond=leaves[1],
            guidance_scale=2.0, impl=impl, **options,
        )  # fmt: skip
        outputs = [step.mean, step.log_prob] + ([step.next_sample] if "seed" in options else [])
        found += [*gradients(outputs, leaves), step.std]
    return found


def policy_step_loss(
    impl: str, velocity: Tensor, uncond: Tensor, sample: Tensor, taken: Tensor, **given: Tensor
) -> list[Tensor]:
    found = []
    for kind, kl in (("flow_sde", "gaussian"), ("cps", "velocity")):
        leaves = [leaf(velocity), leaf(uncond), leaf(sample)]
        out = flow_grpo_loss(
            leaves[0], leaves[2], taken, given["row"], given["row"].flip(0), given["sigma"], given["sigma_next"],
            kind=kind, ref_velocity=given["ref"], beta=0.1, kl=kl, clip_range=0.1, velocity_uncond=leaves[1],
            guidance_scale=2.0, impl=impl,
        )  # fmt: skip
        found += gradients([out.loss, out.per_token], leaves) + [out.logprobs, *out.metrics.values()]
    return found


def streams(device: str, rows: int) -> Inputs:
    shapes = {"image": (2, rows, 24), "text": (2, 3, 24), "rows": (2, 144), "bias": (24,)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def residuals(impl: str, image: Tensor, text: Tensor, rows: Tensor, bias: Tensor) -> list[Tensor]:
    parts = rows.chunk(6, 1)
    leaves = [leaf(x) for x in (image, image.flip(1), text, text.flip(1))]
    x, y, c, c_y = leaves
    made = gated_residual(
        Stream(x, (parts[:2], parts[2:4]), ((y, parts[4], bias), (y, parts[5], None))),
        Stream(c, (parts[1:3],), ((c_y, parts[0], None),)),
        impl=impl,
    )
    return gradients([part for stream in made for part in (stream.x, *stream.normalized)], leaves)


@torch.no_grad()
def in_e4m3(impl: str, image: Tensor, text: Tensor, rows: Tensor, bias: Tensor) -> list[Tensor]:
    parts = rows.chunk(6, 1)
    streams = gated_residual(
        Stream(image, (parts[:2], parts[2:4]), ((image.flip(1), parts[4], bias),), ("fp8", "both")),
        Stream(text, (parts[1:3],), ((text.flip(1), parts[0], None),), ("fp8",)),
        impl=impl,
    )
    made = [normal for stream in streams for normal in stream.normalized]
    made += [quantize_rows(image, impl=impl), quantize_rows(text, scale=bias[:2].abs() + 1, gelu=True, impl=impl)]
    return [x for rows in made for x in (rows.values.float(), rows.scales)]


def projections(device: str, rows: int) -> Inputs:
    shapes = {"image": (2, rows, 72), "text": (2, 3, 72), "weights": (4, 8)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def heads(impl: str, image: Tensor, text: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = [leaf(image), leaf(text)]
    parts = [Projections(*x.chunk(3, -1), *weights[2 * i : 2 * i + 2]) for i, x in enumerate(leaves)]
    return gradients(list(qk_norm(*parts, heads=3, impl=impl)), leaves)


def segments(device: str, rows: int) -> Inputs:
    shapes = {"image": (2, rows, 3, 2, 16), "text": (2, 5, 3, 2, 16), "weights": (4, 16)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def joint(impl: str, image: Tensor, text: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = [leaf(image), leaf(text)]
    parts = [part for x in leaves for part in x.unbind(2)]
    names = ("q_weight", "k_weight", "q2_weight", "k2_weight")
    return gradients(list(segment_attention(*parts, **dict(zip(names, weights, strict=True)), impl=impl)), leaves)


def continuations(device: str, rows: int) -> Inputs:
    shapes = {"q": (4, rows, 4, 16), "kv": (2, 4, rows, 2, 16), "prefix": (2, 2, 9, 2, 16)}
    found = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    lengths = torch.tensor([rows, 1, 0, rows - 1], device=device)
    return found | {"lengths": lengths, "prefix_lengths": torch.tensor([9, 4], device=device)}


def behind_a_prefix(impl: str, q: Tensor, kv: Tensor, prefix: Tensor, **lengths: Tensor) -> list[Tensor]:
    leaves = [leaf(q), leaf(kv), leaf(prefix)]
    out = shared_prefix_attention(leaves[0], *leaves[1], *leaves[2], group_size=2, impl=impl, **lengths)
    return gradients([out], leaves)


CASES: dict[str, tuple[Callable[[str, int], Inputs], Callable[..., list[Tensor]]]] = {
    "advantages": (rewards, advantages),
    "token_logprobs": (lambda device, rows: logits(device, rows, 131), from_logits),
    "token_logprobs in vectors": (lambda device, rows: logits(device, rows, 136), from_logits),
    "linear_logprobs, frozen head": (head, frozen),
    "linear_logprobs, trained head": (head, trained),
    "grpo_loss": (sequences, policy_loss),
    "flow_step": (latents, policy_step),
    "flow_grpo_loss": (latents, policy_step_loss),
    "gated_residual": (streams, residuals),
    "fp8 quantize_rows and gated_residual": (streams, in_e4m3),
    "qk_norm": (projections, heads),
    "segment_attention": (segments, joint),
    "shared_prefix_attention": (continuations, behind_a_prefix),
}
