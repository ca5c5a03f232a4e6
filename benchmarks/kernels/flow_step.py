"""A step of a flow policy with its log-prob: drawn, and replayed with the gradient of its log-prob.

H counts the elements of a sample. Rivals do what Flow-GRPO's `sde_step_with_logprob` does: guidance in the model's
dtype, everything else in fp32, noise from torch's generator. Each draws noise of its own, so the gate on a drawn step
compares the means, and the one on a replay the log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from uae_kernels import flow_step, reference

from .harness import Case, Contestant, Results, Step, compiled, ours, training_step

SIZES = [(8, 64), (64, 64), (8, 128), (64, 128)]  # samples, side: 512² and 1024² images
CHANNELS, GUIDANCE, NOISE_LEVEL = 16, 4.5, 0.7
SIGMA, SIGMA_NEXT = 0.8, 0.7


def cases(device: str, quick: bool, op: str = "flow_step", variants: tuple = ("draw", "replay")) -> Iterator[Case]:
    sizes = [(4, 16)] if quick else [(8, 32)] if device == "cpu" else SIZES
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for variant in variants:
        for samples, side in sizes:
            yield Case(op, variant, device, dtype, N=samples, H=CHANNELS * side * side, calls=20, quick=quick)


def inputs(case: Case) -> Any:
    """The halves of a guided batch, in the model's dtype, and latents in fp32."""
    assert case.H is not None
    side = math.isqrt(case.H // CHANNELS)
    shape = case.N, CHANNELS, side, side
    make = partial(torch.randn, device=case.device)
    uncond, velocity = (part.contiguous() for part in make(2 * case.N, *shape[1:]).to(case.dtype).chunk(2))
    sigma, sigma_next = (torch.full((case.N,), value, device=case.device) for value in (SIGMA, SIGMA_NEXT))
    given = SimpleNamespace(
        velocity=velocity.requires_grad_(), uncond=uncond, sample=make(shape), sigma=sigma, sigma_next=sigma_next,
        seed=torch.arange(case.N, device=case.device), upstream=make(case.N) * case.H,
    )  # fmt: skip
    with torch.no_grad():
        given.next_sample = reference.flow_step(**policy(given), noise=make(shape)).next_sample
    return given


def policy(given: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments of `flow_step` but for the noise, all in `dtype` if given."""
    tensors = (given.velocity, given.sample, given.sigma, given.sigma_next, given.uncond)
    velocity, sample, sigma, sigma_next, uncond = (x if dtype is None else x.to(dtype) for x in tensors)
    options = dict(noise_level=NOISE_LEVEL, velocity_uncond=uncond, guidance_scale=GUIDANCE)
    return dict(velocity=velocity, sample=sample, sigma=sigma, sigma_next=sigma_next) | options


def truth(case: Case, given: Any) -> Results:
    wide = policy(given, torch.float64)
    if case.variant == "draw":
        return {"mean": reference.flow_step(**wide, noise=given.sample).mean.detach()}
    leaf = wide["velocity"].detach().requires_grad_()
    replay = partial(reference.flow_step, **wide | {"velocity": leaf}, next_sample=given.next_sample)
    return training_step("log_prob", lambda: replay().log_prob, {"velocity": leaf}, given.upstream)()


def eager(
    velocity: Tensor, uncond: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, taken: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Next sample, log-prob and mean."""
    v, x = (uncond + GUIDANCE * (velocity - uncond)).float(), sample.float()
    sigma, sigma_next = sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1)
    dt = sigma_next - sigma
    s = NOISE_LEVEL * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * torch.sqrt(-dt)
    if taken is None:
        taken = mean + std * torch.randn_like(x)
    log_prob = -((taken.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return taken, log_prob.mean((1, 2, 3)), mean


def contestants(case: Case) -> list[Contestant]:
    def own(given: Any, impl: str, function: Any = flow_step) -> Step:
        if case.variant == "draw":
            return no_grad(lambda: function(**policy(given), seed=given.seed, impl=impl).mean)
        replay = partial(function, **policy(given), next_sample=given.next_sample, impl=impl)
        return training_step("log_prob", lambda: replay().log_prob, {"velocity": given.velocity}, given.upstream)

    def rival(given: Any, function: Any) -> Step:
        drawn = case.variant == "draw"
        call = partial(
            function, given.velocity, given.uncond, given.sample, given.sigma, given.sigma_next,
            None if drawn else given.next_sample,
        )  # fmt: skip
        if drawn:
            return no_grad(lambda: call()[2])
        return training_step("log_prob", lambda: call()[1], {"velocity": given.velocity}, given.upstream)

    return [
        *ours(case, own, lambda given: own(given, "auto", compiled(case, flow_step))),
        Contestant("eager, Flow-GRPO's formula", lambda given: rival(given, eager)),
        Contestant("torch.compile of eager", lambda given: rival(given, compiled(case, eager))),
    ]


def no_grad(function: Any) -> Step:
    @torch.no_grad()
    def step() -> Results:
        return {"mean": function()}

    return step
