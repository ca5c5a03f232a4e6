"""TRL 1.16's names over our ops: call them, or let a TRL trainer call them after `install()`.

Results are fp32 (fp64 for fp64 inputs) where TRL's follow the inputs' dtype on some devices, and a token id outside
the vocabulary gives 0 where TRL fails or reads out of bounds.
"""

import functools
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .._common import GRPOLoss, compute_dtype
from ..grpo_loss import grpo_loss as _grpo_loss
from ..linear_logprobs import linear_logprobs
from ..reference.linear_logprobs import check_linear
from ..token_logprobs import token_logprobs
from ._entropy import logprobs_and_entropies

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`trl.trainer.utils.selective_log_softmax`: log p of the tokens `index`, one a position or K.

    Args:
        logits: (..., V).
        index: (...), or (..., K) for K tokens a position, which share one log Σ e^z.
        temperature: positive number, divides the logits.
        row_mask: of `index`'s shape, zero = skipped: log-probability and gradient 0.

    Returns:
        log-probabilities of `index`'s shape.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive.
        TypeError: an `index` that is neither int64 nor int32.
    """
    index = _skip(index, row_mask)
    if index.dim() != logits.dim():
        return _logprobs(logits, index, temperature=temperature)
    scored = (index >= 0) & (index < logits.shape[-1])
    index = torch.where(scored, index, 0)
    chosen = logits.gather(-1, index.long()).to(compute_dtype(logits))
    best, at = chosen.max(-1, keepdim=True)
    anchor = torch.where(scored.any(-1), index.gather(-1, at)[..., 0], -100)
    best = torch.where(best == -torch.inf, 0, best)
    # log p_k = log p_best + (z_k − z_best)/temperature
    logprobs = _logprobs(logits, anchor, temperature=temperature)[..., None] + (chosen - best) / temperature
    return torch.where(scored, logprobs, 0)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`trl.trainer.utils.selective_log_softmax_and_entropy`: log p of the tokens `index` (...), and entropies.

    Args:
        entropy_requires_grad: whether gradients flow through the entropies.

    Returns:
        log-probabilities and entropies (...). See `selective_log_softmax` for the rest.
    """
    return _logprobs(
        logits,
        _skip(index, row_mask),
        temperature=temperature,
        return_entropy=True,
        entropy_grad=entropy_requires_grad,
    )


def _skip(index: Tensor, row_mask: Tensor | None) -> Tensor:
    if row_mask is None:
        return index
    if row_mask.shape != index.shape:
        raise ValueError(f"row_mask must have index's shape {tuple(index.shape)}, got {tuple(row_mask.shape)}")
    return torch.where(row_mask != 0, index, -100)


def _logprobs(logits: Tensor, index: Tensor, **options: Any) -> Any:
    if index.shape != logits.shape[:-1]:
        raise ValueError(f"index {tuple(index.shape)} does not select from logits {tuple(logits.shape)}")
    return token_logprobs(logits, index, **options)


class ChunkedLogProbFunction:
    """`trl.kernels.ChunkedLogProbFunction`: its `apply`, the only part that is called."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Log-probabilities, and entropies if asked for, under a linear head, without the (N, V) logits.

        As in TRL, products are taken in autocast's dtype, else in the dtype of `hidden`; a weight of another dtype
        is copied. A frozen head costs two matrix products for forward and backward together, TRL's three; an entropy
        that is differentiated costs three more.

        Args:
            hidden: (N, H).
            weight: (V, H), a plain dense tensor: a module's adapters are invisible here, see `check_lm_head`.
            bias: (V,) or None.
            targets: (N,).
            temperature: positive number, divides the logits.
            chunk_size: TRL's tile width. It does not change results there either; our tiles have a size of their own.
            final_logit_softcapping: positive number or None.
            logit_scale: number, multiplies the logits before the softcap.
            outputs: what to compute besides log-probabilities; "entropy" is the only choice, so TRL's default raises.

        Returns:
            (log-probabilities (N,), entropies (N,) or None, None, None, None).

        Raises:
            NotImplementedError: other `outputs`, or a trainable weight that DeepSpeed ZeRO-3 has split up, which the
                backward pass would find empty.
            TypeError, ValueError: as `linear_logprobs`.
        """
        unknown = set(outputs) - {"log_probs", "entropy"}
        if unknown:
            raise NotImplementedError(
                f"outputs: {', '.join(sorted(unknown))} cannot be computed here; pass "
                'outputs=("entropy",) or outputs=(), or use trl.kernels.ChunkedLogProbFunction (SFTTrainer, DPOTrainer '
                "and KTOTrainer need it: undo install() for them)"
            )
        if hasattr(weight, "ds_id") and weight.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("weight: a trainable head under DeepSpeed ZeRO-3; freeze it or use ZeRO-2")
        check_linear(hidden, weight, targets, bias, temperature, final_logit_softcapping)
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        weight = weight.to(torch.get_autocast_dtype(device) if autocast else hidden.dtype)
        options: dict[str, Any] = dict(
            bias=bias, temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale
        )
        if "entropy" in outputs:
            return *logprobs_and_entropies(hidden, weight, targets, **options), None, None, None
        logprobs = linear_logprobs(hidden, weight, targets, **options)
        assert isinstance(logprobs, Tensor)
        return logprobs, None, None, None, None


def grpo_loss(
    per_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    vllm_importance_sampling_correction: bool = True,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    max_completion_length: int = 512,
) -> GRPOLoss:
    """The loss of `trl.GRPOTrainer`, with `trl.GRPOConfig`'s names and defaults, of one process's micro-batch.

    Over `uae_kernels.grpo_loss`, which has the formulas and stays finite where TRL's exponentials overflow. Not
    divided by the gradient accumulation steps. The entropy quantile is this process's, where TRL gathers all
    processes' entropies.

    Args:
        per_token_logps: (B, T), differentiable.
        advantages: (B,) or (B, T).
        mask: (B, T), TRL's completion mask times its tool mask.
        old_per_token_logps: (B, T), None = per_token_logps without gradient.
        ref_per_token_logps: (B, T), needed by `beta`.
        sampling_per_token_logps: (B, T) as vLLM reported them, None = no correction and old_per_token_logps for
            `off_policy_mask_threshold`.
        entropies: (B, T), needed by `top_entropy_quantile` below 1 and by `entropy_coef`.
        num_items_in_batch: what dapo, cispo and vespo divide by; None = this mask's sum. TRL's share of one
            accumulation window is num_items_in_batch/num_processes·gradient_accumulation_steps/steps_per_generation.
        epsilon_high: None = epsilon; for cispo the cap of the ratio itself.
        use_bias_correction_kl: the KL is multiplied by the importance ratio.
        max_completion_length: tokens per sequence dr_grpo divides by.

    Returns:
        GRPOLoss, as `uae_kernels.grpo_loss`. Its clip fractions are of the ratios themselves, TRL's of what `delta`
        has left of them.

    Raises:
        ValueError: as `uae_kernels.grpo_loss`; vespo with a correction per sequence.
    """
    mode = vllm_importance_sampling_mode
    floor, cap = vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max
    if not vllm_importance_sampling_correction:
        mode, floor, cap = "token_truncate", 1.0, 1.0  # the sampler serves the off-policy mask alone
    elif sampling_per_token_logps is not None and loss_type == "vespo" and not mode.startswith("token"):
        raise ValueError(f'vllm_importance_sampling_mode: vespo needs "token_truncate" or "token_mask", got {mode!r}')
    return _grpo_loss(
        per_token_logps,
        advantages,
        mask=mask,
        old_logprobs=old_per_token_logps,
        ref_logprobs=ref_per_token_logps,
        sampling_logprobs=sampling_per_token_logps,
        entropies=entropies,
        loss_type=loss_type,
        importance_level=importance_sampling_level,
        clip_low=epsilon,
        clip_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_estimator="k3_importance" if use_bias_correction_kl else "k3",
        sapo_temperature=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, max(vespo_lambda_pos, 1e-4), vespo_k_neg, max(vespo_lambda_neg, 1e-4)),
        importance_mode=mode,
        importance_floor=floor,
        importance_cap=cap,
        off_policy_threshold=off_policy_mask_threshold,
        entropy_quantile=top_entropy_quantile if top_entropy_quantile < 1.0 else None,
        entropy_coef=entropy_coef,
        normalizer=num_items_in_batch if loss_type in ("dapo", "cispo", "vespo") else None,
        max_length=max_completion_length,
    )


def install() -> ExitStack:
    """Makes TRL's trainers, those that already exist too, take their log-probabilities from `ChunkedLogProbFunction`.

    Two names are patched, for the whole process:

    - `trl.trainer.utils._ChunkedLogProbFunction`, which every fused LM head looks up when it is called: GRPO, RLOO and
      asynchronous GRPO. The SFT, DPO and KTO trainers ask it for outputs that raise NotImplementedError.
    - `add_fused_lm_head`, in `trl.trainer.utils` and wherever it has been imported: heads added from now on raise if
      they are wrapped (`check_lm_head`), where TRL's own function would leave a LoRA adapter on the head out of
      the result without a word. A GRPOTrainer refuses such an adapter itself.

    Returns:
        A context manager; leaving its `with` block, or calling its `close()`, takes both patches back.

    Raises:
        RuntimeError: a TRL without this function (1.16 is the version tested).
    """
    utils: Any = import_module("trl.trainer.utils")
    missing = [name for name in ("_ChunkedLogProbFunction", "add_fused_lm_head") if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(f"install: this TRL has no trl.trainer.utils.{missing[0]}; TRL 1.16 has")
    add_head = utils.add_fused_lm_head

    @functools.wraps(add_head)
    def add_checked_head(model: Any, *args: Any, **kwargs: Any) -> None:
        add_head(model, *args, **kwargs)
        fused_forward = model.forward

        @functools.wraps(type(model).forward)  # `generate` reads the signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("fused_lm_head"):
                check_lm_head(self.get_output_embeddings())
            return fused_forward(*args, **kwargs)

        model.forward = types.MethodType(forward, model)

    undo = ExitStack()
    undo.callback(setattr, utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    undo.callback(_replace, add_checked_head, add_head)
    utils._ChunkedLogProbFunction = ChunkedLogProbFunction
    _replace(add_head, add_checked_head)
    return undo


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Wherever TRL's modules have imported `add_fused_lm_head`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and vars(module).get("add_fused_lm_head") is old:
            module.add_fused_lm_head = new  # type: ignore[attr-defined]


def check_lm_head(head: torch.nn.Module) -> None:
    """Raises unless `head.weight` and `head.bias` are all that the LM head computes.

    A linear layer passes, and so does PEFT's trained copy of one (`modules_to_save`).

    Raises:
        NotImplementedError: a LoRA or other adapter, or any other module around or instead of the linear layer.
    """
    if not (isinstance(head, torch.nn.Linear) or "modules_to_save" in head._modules):
        raise NotImplementedError(
            f"the LM head is a {type(head).__module__}.{type(head).__qualname__}, of which only the weight would be "
            'used: leave the head out of target_modules, train it whole with modules_to_save=["lm_head"], or merge '
            "the adapter (merge_and_unload)"
        )
