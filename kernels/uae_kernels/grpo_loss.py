"""The policy losses of the GRPO family over per-token log-probabilities."""

import torch
from torch import Tensor

from . import reference
from ._common import GRPOLoss, check_impl, compute_dtype, fake_pull_back, pack, pull_back, unpack
from .reference.grpo_loss import METRICS, check_arguments, check_needs


def _loss(
    logprobs: Tensor,
    entropies: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    normalizer: Tensor | None,
    packed: Tensor,
    group_size: int | None,
    max_length: int | None,
    loss_type: str,
    importance_level: str,
    kl_estimator: str,
    importance_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), per token (B, T) and metrics (6,)."""
    numbers = unpack(packed)
    clip_low, clip_high, delta, beta, floor, cap, threshold, quantile, coef, count = numbers[:10]
    out = reference.grpo_loss(
        logprobs,
        advantages,
        rewards=rewards,
        group_size=group_size,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        entropies=entropies,
        loss_type=loss_type,
        importance_level=importance_level,
        clip_low=clip_low,
        clip_high=clip_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        sapo_temperature=(numbers[10], numbers[11]),
        vespo=(numbers[12], numbers[13], numbers[14], numbers[15]),
        importance_mode=importance_mode,
        importance_floor=floor,
        importance_cap=cap,
        off_policy_threshold=threshold,
        entropy_quantile=quantile,
        entropy_coef=coef,
        normalizer=count if normalizer is None else normalizer,
        max_length=max_length,
    )
    return out.loss, out.per_token, torch.stack(list(out.metrics.values()))


_forward = torch.library.custom_op("uae_kernels::grpo_loss", _loss, mutates_args=())


@_forward.register_fake
def _(logprobs, *options):
    dtype = compute_dtype(logprobs)
    return tuple(logprobs.new_empty(shape, dtype=dtype) for shape in ((), logprobs.shape, len(METRICS)))


@torch.library.custom_op("uae_kernels::grpo_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_per_token: Tensor,
    logprobs: Tensor,
    entropies: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    normalizer: Tensor | None,
    packed: Tensor,
    group_size: int | None,
    max_length: int | None,
    loss_type: str,
    importance_level: str,
    kl_estimator: str,
    importance_mode: str,
    need_logprobs: bool,
    need_entropies: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of logprobs and entropies."""
    constants = (
        advantages, rewards, mask, old_logprobs, ref_logprobs, sampling_logprobs, normalizer, packed,
        group_size, max_length, loss_type, importance_level, kl_estimator, importance_mode,
    )  # fmt: skip
    d_logprobs, d_entropies = pull_back(
        lambda logp, h: _loss(logp, h, *constants)[:2],
        (logprobs, entropies),
        (need_logprobs, need_entropies),
        (grad, grad_per_token),
    )
    return d_logprobs, d_entropies


@_backward.register_fake
def _(grad, grad_per_token, logprobs, entropies, *options):
    return fake_pull_back((logprobs, entropies), options[-2:], grad)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _autograd(ctx, grad, grad_per_token, _):
    needs = ctx.needs_input_grad[:2]
    grads = _backward(grad, grad_per_token, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 14


_forward.register_autograd(_autograd, setup_context=_setup_context)


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    loss_type: str = "grpo",
    importance_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    sapo_temperature: tuple[float, float] = (1.0, 1.05),
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
    importance_mode: str = "token_truncate",
    importance_floor: float | None = None,
    importance_cap: float | None = None,
    off_policy_threshold: float | None = None,
    entropy_quantile: float | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    impl: str = "auto",
) -> GRPOLoss:
    """Clipped policy loss of B sequences of T tokens, its metrics, and the loss of each token.

    With the ratio r = exp(log π − log π_old), advantage A and the mask's token counts K_i, per token (TRL
    1.16):

    - grpo, bnpo, dr_grpo, dapo, luspo: −min(min(r, delta)·A, clip(r, 1 − clip_low, 1 + clip_high)·A)
    - cispo (arXiv 2506.13585): −sg(min(r, clip_high))·A·log π; clip_high is the cap itself, not 1 + clip_high
    - sapo (arXiv 2511.20347): −(4/τ)·σ(τ(r − 1))·A, τ by the sign of A
    - vespo: −φ·A·log π, φ = exp(λ + k·log w − λ·w) without gradient, w the whole sequence's ratio

    then, in this order, × off-policy mask, × entropy mask, × sampler correction (not vespo, which has it in
    w), + beta·KL. The sum over unmasked tokens is divided as follows; `normalizer` replaces the quantity in
    brackets (clamped at 1), so that micro-batches of one large batch can share its count:

    - grpo, sapo: Σ_i (Σ_t L/K_i) / [B]
    - bnpo, dapo, cispo, vespo: Σ L / [Σ mask]
    - dr_grpo: Σ L / ([B]·max_length)
    - luspo: Σ_i (Σ_t L) / [B]; luspo_legacy (older TRL, Liger): Σ_i K_i·mean_t(L over all T) / [B], masked
      tokens counting as tokens of log-ratio 0

    Finally entropy_coef × the mean entropy of the tokens kept is subtracted.

    Defined everywhere: nothing a masked position holds, NaN included, reaches the loss or a gradient; an
    empty mask gives loss 0 and gradients 0; log-probabilities below −1e4 (−inf: a sampled token of
    probability 0) count as −1e4 without gradient, so −inf on both sides is ratio 1; log-ratios are cut
    at ±20. With old_logprobs None, or equal to logprobs, every ratio is exactly 1 and both clip fractions
    exactly 0 (cispo counts it where its cap is below 1).

    Args:
        logprobs: (B, T) floats, differentiable.
        advantages: (B,) or (B, T), taken as constants. Either this or `rewards`.
        rewards: (B,); the advantages are then `group_advantages(rewards, group_size)`.
        group_size: G consecutive sequences form a group. With `advantages` only zero_std_fraction uses it.
        mask: (B, T), nonzero = counts. None = every token.
        old_logprobs: (B, T) under the policy that made the batch, None = logprobs without gradient.
        ref_logprobs: (B, T) under the reference policy, needed by `beta`.
        sampling_logprobs: (B, T) as the sampler (an inference engine) reported them; NaN = no correction
            there.
        entropies: (B, T) in nats, differentiable through `entropy_coef`.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "luspo_legacy", "cispo", "sapo" or "vespo".
        importance_level: "token", or "sequence": r = exp(mean_t(log π − log π_old)) (GSPO, arXiv 2507.18071).
        clip_low, clip_high: the clip range, clip_high None = clip_low.
        delta: upper bound of the unclipped ratio (two-sided clipping), None = none.
        beta: weight of the KL to the reference.
        kl_estimator: of x = log π_ref − log π: "k1" −x, "k2" x²/2, "k3" e^x − x − 1, "k3_importance" k3·r.
        sapo_temperature: τ for A > 0 and for the rest.
        vespo: (k, λ) for A ≥ 0, then (k, λ) for A < 0.
        importance_mode: how ρ = exp(log π_old − log π_sampler) is limited: "token_…" per token or
            "sequence_…" on the sequence's sum; "…_truncate" clamps it, "…_mask" drops what lies outside.
        importance_floor, importance_cap: the limits, None = 0 and infinity.
        off_policy_threshold: drops sequences of negative advantage whose mean log π_sampler − log π exceeds
            it.
        entropy_quantile: keeps this fraction of the tokens, those with the highest entropy (arXiv
            2506.01939).
        entropy_coef: weight of the entropy bonus.
        normalizer: number or 0-d tensor, see above.
        max_length: tokens per sequence dr_grpo divides by, None = T.
        impl: "auto" and "torch" run PyTorch; "triton" raises.

    Returns:
        GRPOLoss: `loss` fp32 (fp64 for fp64 log-probs); `metrics` over unmasked tokens: kl (as it enters the
        loss), ratio_mean, ratio_max, clip_fraction_low (r < 1 − clip_low, A < 0), clip_fraction_high (r
        beyond the upper bound, A > 0), all 0 for an empty mask, and zero_std_fraction, the fraction of groups
        (of sequences without group_size) whose advantages are all exactly 0; `per_token` (B, T) before the
        reduction, 0 where masked; `logprobs` detached.

    Raises:
        ValueError: shapes that do not fit, unknown choices, an option whose input is missing.
        RuntimeError: `impl="triton"`.
    """
    check_impl("grpo_loss", impl)
    check_arguments(
        logprobs,
        advantages,
        rewards,
        group_size,
        (mask, old_logprobs, ref_logprobs, sampling_logprobs, entropies),
        loss_type,
        importance_level,
        kl_estimator,
        importance_mode,
    )
    check_needs(beta, ref_logprobs, entropy_quantile, entropy_coef, entropies)
    divisor, count = (normalizer, None) if isinstance(normalizer, Tensor) else (None, normalizer)
    loss, per_token, metrics = _forward(
        logprobs,
        entropies,
        advantages,
        rewards,
        mask,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        divisor,
        pack(
            clip_low, clip_high, delta, beta, importance_floor, importance_cap, off_policy_threshold,
            entropy_quantile, entropy_coef, count, *sapo_temperature, *vespo,
        ),
        group_size,
        max_length,
        loss_type,
        importance_level,
        kl_estimator,
        importance_mode,
    )  # fmt: skip
    return GRPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), per_token, logprobs.detach())
