"""Flow-GRPO's names (github.com/yifan123/flow_grpo, November 2025) over our ops: its step, and its trainers' loss.

Steps and log-probs are fp32 (fp64 for fp64 inputs), read in the model's dtype without a copy. With timesteps on a GPU
nothing waits for it: the schedule is searched there, where Flow-GRPO asks the host for one sample's step at a time. A
timestep that the schedule does not have then gives NaN; one on the CPU raises, as in Flow-GRPO.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import check_choice
from ..flow_grpo_loss import flow_grpo_loss
from ..flow_step import flow_step
from ..reference.flow_step import transition

KINDS = {"sde": "flow_sde", "cps": "cps"}


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
) -> tuple[Tensor, ...]:
    """`flow_grpo.diffusers_patch.sd3_sde_with_logprob.sde_step_with_logprob`: a step, or the log-prob of a given one.

    Args:
        self: the scheduler, with `timesteps`, `sigmas` and `index_for_timestep` as diffusers' flow-matching ones.
        model_output: (B, ...), the guided velocity.
        timestep: (B,), (1,) or one number, entries of the scheduler's `timesteps`.
        sample: (B, ...).
        noise_level: 0 is a deterministic step: no noise is drawn, and log_prob is 0, where Flow-GRPO's is NaN.
        prev_sample: (B, ...), the step taken; needs a noise_level.
        generator: draws the noise: the same numbers as Flow-GRPO's, one for all samples or one each.
        sde_type: "sde" (Flow-GRPO) or "cps" (Flow-CPS), whose log_prob is −mean (prev_sample − mean)².
        return_sqrt_dt: also return √(−dt).

    Returns:
        (prev_sample, log_prob (B,), prev_sample_mean, std_dev_t[, √(−dt)]), the last two of shape (B, 1, ..., 1), or
        (1, 1, ..., 1) for one timestep. For "sde" std_dev_t is s, the noise's standard deviation over √(−dt): the KL
        that Flow-GRPO's trainers divide by 2·std_dev_t² is therefore without dt.

    Raises:
        ValueError: an unknown sde_type; prev_sample with a generator, or with noise_level 0; generators that are
            neither one nor B.
    """
    kind = _kind(sde_type)
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: nothing is drawn when prev_sample is given; pass one of them")
    if prev_sample is not None and noise_level == 0:
        raise ValueError("noise_level: a deterministic step, 0, has no log-probability of a given prev_sample")
    sigmas = _sigmas(self, timestep, sample)
    step = flow_step(
        model_output,
        sample,
        *(_spread(sigma) for sigma in sigmas[:2]),
        sigma_max=sigmas[2],
        kind=kind,
        noise_level=noise_level,
        noise=None if generator is None or noise_level == 0 else _noise(sample, generator),
        next_sample=prev_sample,
        log_prob="cps" if kind == "cps" else "gaussian",
    )
    log_prob = step.mean.new_zeros(len(sample)) if step.log_prob is None else step.log_prob
    zero = torch.zeros(len(sigmas[0]), *[1] * (sample.dim() - 1), dtype=step.mean.dtype, device=sample.device)
    _, _, std_dev_t = transition(zero, zero, *sigmas, kind, noise_level)
    if return_sqrt_dt:
        sqrt_dt = (sigmas[0] - sigmas[1]).sqrt().to(zero.dtype).view_as(zero)
        return step.next_sample, log_prob, step.mean, std_dev_t, sqrt_dt
    return step.next_sample, log_prob, step.mean, std_dev_t


def grpo_loss(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    ref_model_output: Tensor | None = None,
    noise_level: float = 0.7,
    sde_type: str | None = "sde",
    adv_clip_max: float = 5,
    clip_range: float = 1e-4,
    beta: float = 0.0,
    kl: str = "flow_grpo",
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `scripts/train_sd3.py` does from `compute_log_prob` to `loss`, in one pass; its config's names and defaults.

    Args:
        self, model_output, timestep, sample, prev_sample, noise_level, sde_type: as in `sde_step_with_logprob`.
        log_probs: (B,), those of the rollout.
        advantages: (B,), clamped to ±adv_clip_max.
        ref_model_output: (B, ...), the guided velocity with the adapter disabled; needed by `beta`.
        kl: "flow_grpo", without dt as theirs; "gaussian" has it, "velocity" compares the velocities.

    Returns:
        (loss, info): policy_loss, approx_kl, clipfrac, clipfrac_gt_one, clipfrac_lt_one, and kl_loss with
        ref_model_output; 0-d tensors without a graph.

    Raises:
        ValueError: as `uae_kernels.flow_grpo_loss`.
    """
    kind = _kind(sde_type)
    *sigmas, sigma_max = _sigmas(self, timestep, sample)
    out = flow_grpo_loss(
        model_output,
        sample,
        prev_sample,
        log_probs,
        advantages,
        *(_spread(sigma) for sigma in sigmas),
        sigma_max=sigma_max,
        kind=kind,
        noise_level=noise_level,
        ref_velocity=ref_model_output,
        beta=beta,
        kl=kl,
        log_prob="cps" if kind == "cps" else "gaussian",
        clip_range=clip_range,
        advantage_clip=adv_clip_max,
    )
    with torch.no_grad():
        log_ratio = out.logprobs - log_probs
        beyond = log_ratio.exp() - 1
        info = {
            "policy_loss": out.loss.detach() - beta * out.metrics["kl"],
            "approx_kl": 0.5 * log_ratio.square().mean(),
            "clipfrac": (beyond.abs() > clip_range).to(beyond.dtype).mean(),
            "clipfrac_gt_one": (beyond > clip_range).to(beyond.dtype).mean(),
            "clipfrac_lt_one": (-beyond > clip_range).to(beyond.dtype).mean(),
        }
    if ref_model_output is not None:
        info["kl_loss"] = out.metrics["kl"]
    return out.loss, info


def _kind(sde_type: str | None) -> str:
    check_choice("flow_grpo", "sde_type", str(sde_type), list(KINDS))
    return KINDS[str(sde_type)]


def _sigmas(scheduler: Any, timestep: float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ and the next σ of each timestep, (B,) or (1,), and the schedule's second σ."""
    timestep = torch.as_tensor(timestep).reshape(-1)
    sigmas = scheduler.sigmas.to(sample.device)
    if timestep.device.type == "cpu":
        index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep], device=sample.device)
        return sigmas[index], sigmas[index + 1], sigmas[1]
    return (*_search(scheduler.timesteps.to(timestep.device), sigmas, timestep), sigmas[1])


def _search(timesteps: Tensor, sigmas: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Without waiting for the device: NaN for a timestep that is not among `timesteps`."""
    equal = timesteps == timestep[:, None]
    index, known = equal.int().argmax(1), equal.any(1)
    return torch.where(known, sigmas[index], torch.nan), torch.where(known, sigmas[index + 1], torch.nan)


def _spread(sigma: Tensor) -> Tensor:
    """(1,) or (B,) as `flow_step` takes it."""
    return sigma[0] if len(sigma) == 1 else sigma


def _noise(sample: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers as `diffusers.utils.torch_utils.randn_tensor` draws them."""
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) not in (1, len(sample)):
        raise ValueError(f"generator: one, or one for each of {len(sample)} samples, got {len(generators)}")
    shape = sample.shape if len(generators) == 1 else (1, *sample.shape[1:])
    return torch.cat([torch.randn(shape, generator=g, device=g.device).to(sample.device) for g in generators])
