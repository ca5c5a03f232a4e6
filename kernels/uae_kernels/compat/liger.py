"""Liger 0.8.5's GRPO names over our ops.

Results are fp32 (fp64 for fp64 inputs); tensors may have any strides; token ids outside the vocabulary give
log-probability 0, where Liger reads out of bounds. "luspo" is the definition Liger has, older than TRL 1.16's: the
mean over all B·T positions of K_i·L, K_i the sequence's tokens (`luspo_legacy` in `uae_kernels.grpo_loss`). A masked
position counts there as a token of ratio 1 and no KL, without a gradient. Liger's own two disagree:
`LigerFusedLinearGRPOLoss` counts and trains whatever the padding gives; `triton_grpo_loss` counts 0, with gradients of
something else. Its kernel also loses the gradient of ratios between `delta` and 1 + `eps_high` where A < 0, if
`delta` is the smaller; here they have it.
"""

from typing import Any

import torch
from torch import Tensor

from .._common import GRPOLoss
from ..grpo_loss import grpo_loss
from ..linear_logprobs import linear_logprobs
from ..token_logprobs import token_logprobs

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """`liger_kernel.ops.grpo_loss.fused_selective_log_softmax`: log-probabilities of the last T ids, no gradient.

    Mind Liger's default temperature of 0.9.

    Args:
        logits: (B, T + 1, V); the last position is not used.
        input_ids: (B, T) or longer.
        mask: (B, T) or longer, zero = skipped: log-probability 0.

    Returns:
        (B, T).
    """
    length = logits.shape[1] - 1
    mask = None if mask is None else mask[:, -length:]
    with torch.no_grad():
        return _shifted_logprobs(logits, input_ids[:, -length:], mask, temperature, inplace=False)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss`: the loss of the GRPO family from logits.

    Mind Liger's defaults: temperature 0.9, beta 0.04, eps_high 0.4, reduce False, and the backward pass overwrites
    the logits.

    Args:
        logits: (B, T + 1, V); the last position is not used.
        old_logp, ref_logp: (B, T) or None; ref_logp is needed by `beta`.
        completion_ids: (B, T).
        advantages: (B,).
        completion_mask: (B, T), None = every token.
        vllm_is_ratio: (B,), (B, 1) or (B, T), multiplies the loss of each token before the KL; vespo takes it into
            its sequence weight.
        num_items_in_batch: what dapo, cispo and vespo divide by, over the number of processes; None = all processes'
            unmasked tokens.
        max_completion_length: what dr_grpo divides by, None = T.

    Returns:
        With `reduce`, (loss, [kl if beta is not 0, clip fraction]); else (loss, kl or None, is_clipped), each (B, T)
        and only the first with a gradient.

    Raises:
        ValueError: shapes that do not fit, unknown choices, an option that the loss type does not have.
    """
    logprobs = _shifted_logprobs(logits, completion_ids, completion_mask, temperature, inplace)
    out, metrics, kl, clipped = _loss(
        logprobs,
        old_logp,
        ref_logp,
        completion_mask,
        advantages,
        beta=beta,
        clip_low=eps_low,
        clip_high=eps_high,
        loss_type=loss_type,
        importance_level=importance_sampling_level,
        sapo_temperature=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        delta=delta,
        use_bias_correction_kl=use_bias_correction_kl,
        vllm_is_ratio=vllm_is_ratio,
        num_items_in_batch=num_items_in_batch,
        max_length=max_completion_length,
    )
    return (out.loss, metrics) if reduce else (out.per_token, kl, clipped)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`: LM head and loss of the GRPO family in one.

    Args:
        compiled, chunk_size: how Liger runs; they change no result there and nothing here.
        use_ref_model: whether the KL has a reference; without one it is 0, whatever reference is passed.
        max_completion_length: what dr_grpo divides by; required by it.
        epsilon_high: for cispo the cap of the ratio itself.

    Raises:
        ValueError: unknown choices, values out of range, an option that the loss type does not have.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        sapo_temperature = sapo_temperature_pos, sapo_temperature_neg
        _check_options(loss_type, importance_sampling_level, sapo_temperature, delta)
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length: dr_grpo needs it")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (kl if beta is not 0, clip fraction)).

        Args:
            _input: (B, T, H).
            lin_weight: (V, H), a plain dense tensor; products are taken in its dtype. No gradient is computed for a
                frozen one.
            selected_token_ids, attention_mask: (B, T).
            advantages: (B,).
            ref_per_token_logps: (B, T). Without them ref_input (B, T, H), ref_weight and ref_bias give them.
            old_per_token_logps: (B, T), None = on-policy.
            vllm_is_ratio, num_items_in_batch: as in `triton_grpo_loss`.
        """
        targets = torch.where(attention_mask != 0, selected_token_ids, -100)
        logprobs = linear_logprobs(_input, lin_weight, targets, bias=bias, temperature=self.temperature)
        assert isinstance(logprobs, Tensor)
        ref: Any = ref_per_token_logps
        if not self.use_ref_model:
            ref = logprobs.detach()
        elif ref is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps: use_ref_model=True needs them, or ref_input and ref_weight; without a "
                    "reference pass LigerFusedLinearGRPOLoss(use_ref_model=False)"
                )
            with torch.no_grad():
                ref = linear_logprobs(ref_input, ref_weight, targets, bias=ref_bias, temperature=self.temperature)
        out, metrics, _, _ = _loss(
            logprobs,
            old_per_token_logps,
            ref,
            attention_mask,
            advantages,
            beta=self.beta,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            loss_type=self.loss_type,
            importance_level=self.importance_sampling_level,
            sapo_temperature=(self.sapo_temperature_pos, self.sapo_temperature_neg),
            vespo=(self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
            delta=self.delta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            max_length=self.max_completion_length,
        )
        return out.loss, tuple(metrics)


def _shifted_logprobs(logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, inplace: bool) -> Tensor:
    """(B, T + 1, V), (B, T) -> (B, T). The whole logits go in, the last position ignored, so that their gradient has
    their shape and can take their place."""
    if ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise ValueError(f"logits (B, T + 1, V) and ids (B, T), got {tuple(logits.shape)} and {tuple(ids.shape)}")
    targets = ids if mask is None else torch.where(mask != 0, ids, -100)
    targets = torch.nn.functional.pad(targets, (0, 1), value=-100)
    logprobs = token_logprobs(logits, targets, temperature=temperature, inplace_backward=inplace)
    assert isinstance(logprobs, Tensor)
    return logprobs[:, :-1]


def _loss(
    logprobs: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor | None,
    advantages: Tensor,
    *,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    importance_level: str,
    sapo_temperature: tuple[float, float],
    vespo: tuple[float, float, float, float],
    delta: float | None,
    use_bias_correction_kl: bool,
    vllm_is_ratio: Tensor | None,
    num_items_in_batch: float | Tensor | None,
    max_length: int | None,
) -> tuple[GRPOLoss, list[Tensor], Tensor | None, Tensor]:
    """The loss, Liger's metrics, and the KL (None without `beta`) and clipping of each token (B, T)."""
    _check_options(loss_type, importance_level, sapo_temperature, delta)
    batch, length = logprobs.shape
    if advantages.shape != (batch,):
        raise ValueError(f"advantages must be ({batch},), got {tuple(advantages.shape)}")
    m = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    common: dict[str, Any] = dict(
        mask=m,
        old_logprobs=old,
        ref_logprobs=ref,
        importance_level=importance_level,
        kl_estimator="k3_importance" if use_bias_correction_kl else "k3",
    )
    weighted, sampling, mode = advantages, None, "token_truncate"
    if vllm_is_ratio is not None:
        rho = vllm_is_ratio[:, None] if vllm_is_ratio.dim() == 1 else vllm_is_ratio
        if rho.shape not in ((batch, 1), (batch, length)):
            raise ValueError(f"vllm_is_ratio must be (B,), (B, 1) or (B, T), got {tuple(vllm_is_ratio.shape)}")
        per_token = rho.shape[1] == length
        if loss_type == "vespo":
            # ρ reaches φ through the sampler: log π_old − log π_sampler = log ρ, a sequence's shared out over tokens.
            gap = rho.log()
            if not per_token:
                gap, mode = gap / m.sum(1, keepdim=True).clamp(min=1), "sequence_truncate"
            sampling = (logprobs.detach() if old is None else old) - gap
        elif loss_type == "luspo" and per_token:
            raise NotImplementedError("vllm_is_ratio: luspo takes one ratio per sequence, (B,) or (B, 1)")
        else:  # the loss is linear in the advantage, of which ρ ≥ 0 keeps the sign
            weighted = advantages[:, None] * rho if per_token else advantages * rho[:, 0]
    out = grpo_loss(
        logprobs,
        weighted,
        sampling_logprobs=sampling,
        importance_mode=mode,
        loss_type="luspo_legacy" if loss_type == "luspo" else loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        delta=delta,
        beta=beta,
        sapo_temperature=sapo_temperature,
        vespo=(vespo[0], max(vespo[1], 1e-4), vespo[2], max(vespo[3], 1e-4)),
        normalizer=_token_count(m, num_items_in_batch) if loss_type in ("dapo", "cispo", "vespo") else None,
        max_length=max_length,
        **common,
    )
    with torch.no_grad():
        # The loss of a token with advantage 0 is beta·KL.
        kl = grpo_loss(logprobs, torch.zeros_like(advantages), beta=1.0, **common).per_token if beta else None
        clipped = torch.zeros_like(logprobs)
        if loss_type not in ("sapo", "vespo"):
            log_ratio = torch.where(m, logprobs - (logprobs if old is None else old), 0)
            if importance_level == "sequence":
                log_ratio = log_ratio.sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
            lowest, highest = (0.0, clip_high) if loss_type == "cispo" else (1 - clip_low, 1 + clip_high)
            ratio, a = log_ratio.exp(), advantages[:, None]
            clipped += m & (((ratio < lowest) & (a < 0)) | ((ratio > highest) & (a > 0)))
        metrics = [out.metrics["kl"]] if beta else []
        metrics.append(clipped.sum() / m.sum().clamp(min=1))
    return out, metrics, kl, clipped


def _check_options(
    loss_type: str, importance_level: str, sapo_temperature: tuple[float, float], delta: float | None
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
    if importance_level not in ("token", "sequence"):
        raise ValueError(f'importance_sampling_level must be "token" or "sequence", got {importance_level!r}')
    if loss_type in ("cispo", "sapo", "vespo"):
        if importance_level == "sequence":
            raise ValueError(f'importance_sampling_level: {loss_type} takes "token" alone')
        if delta is not None:
            raise ValueError(f"delta is not an option of {loss_type}: pass None")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta must be positive or None, got {delta}")
    for name, value in zip(("sapo_temperature_pos", "sapo_temperature_neg"), sapo_temperature, strict=True):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _token_count(m: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor:
    """What dapo, cispo and vespo divide by: the unmasked tokens of all processes, per process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = m.sum().float() if num_items_in_batch is None else num_items_in_batch
    if distributed and num_items_in_batch is None:
        torch.distributed.all_reduce(count)
    return count / torch.distributed.get_world_size() if distributed else count
