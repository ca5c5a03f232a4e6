"""The policy losses of the GRPO family over per-token log-probabilities.

Two launches forward: a program for each sequence, then one program that adds the sequences up. One launch backward, of
the same kernel as the first, so that both directions agree on which tokens count and which ratios are clipped.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._common import UNRECORDED, GRPOLoss, pack, schema
from ._triton import fp64, jit, launch, narrow, tl, use_triton
from .advantages import _moments
from .reference.grpo_loss import (
    MAX_EXPONENT,
    METRICS,
    MIN_LOG_WEIGHT,
    MIN_LOGPROB,
    OVER_TOKENS,
    check_arguments,
    entropy_cut,
    kept_tokens,
)

BLOCK = 1024  # tokens of a sequence at a time
MEMBERS = 64  # rewards of a group at a time
SEQUENCES = 256  # sequences that are added up at a time
WARPS = 8
REGISTERS = 128  # a thread; left to itself, ptxas takes fewer and spills

FAR = tl.constexpr(MAX_EXPONENT)
LOWEST = tl.constexpr(MIN_LOGPROB)
LIGHTEST = tl.constexpr(MIN_LOG_WEIGHT)
INF = tl.constexpr(math.inf)

# The sums of a sequence: the metrics in their order, then what the loss is made of.
SUMS = 10
KL, RATIO, LARGEST, LOW, HIGH, ZERO, LOSS, TOKENS, ENTROPY, CHOSEN = map(tl.constexpr, range(SUMS))

STRIDED = ("logprobs", "entropies", "advantages", "mask", "old", "ref", "sampling", "grad_per_token")
STRIDES = [f"{name}_{axis}" for name in STRIDED for axis in "bt"]
NUMBERS = [
    "lower", "upper", "delta", "beta", "floor", "cap", "threshold", "tau_positive", "tau_other", "k_positive",
    "lam_positive", "k_negative", "lam_negative", "coef",
]  # fmt: skip


@jit()
def _clamp(x, low, high):
    """x within [low, high]; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@jit()
def _load(x, x_b, x_t, i, t, m):
    """x[i, t] in fp32; what a masked position holds never enters."""
    return tl.load(x + i * x_b + t * x_t, mask=m, other=0).to(tl.float32)


@jit()
def _load_logprob(x, x_b, x_t, i, t, m):
    x = tl.load(x + i * x_b + t * x_t, mask=m, other=0).to(tl.float32)
    return tl.where(x < LOWEST, LOWEST, x)


@jit()
def _load_tokens(
    i, t, T, mask, mask_b, mask_t, logprobs, logprobs_b, logprobs_t, old, old_b, old_t, sampling, sampling_b, sampling_t
):  # fmt: skip
    """Which of the tokens t count, log π and whether it has a gradient, log π_old, log π_sampler."""
    m = t < T
    if mask is not None:
        m = m & (tl.load(mask + i * mask_b + t * mask_t, mask=m, other=0) != 0)
    given = _load(logprobs, logprobs_b, logprobs_t, i, t, m)
    logp = tl.where(given < LOWEST, LOWEST, given)
    before = logp
    if old is not None:
        before = _load_logprob(old, old_b, old_t, i, t, m)
    sampler = before
    if sampling is not None:
        sampler = _load_logprob(sampling, sampling_b, sampling_t, i, t, m)
        sampler = tl.where(sampler == sampler, sampler, before)
    return m, logp, given >= LOWEST, before, sampler


@jit()
def _correction(gap, floor, cap, LIMIT: tl.constexpr):
    """ρ = exp(gap) within its limits, and log ρ, which is the gap itself where no limit applies."""
    log_rho = _clamp(gap, -FAR, FAR)
    free = tl.exp(log_rho)
    if LIMIT == "truncate":
        rho = _clamp(free, floor, cap)
    else:
        rho = tl.where((free >= floor) & (free <= cap), free, 0.0)
    log_rho = tl.where(rho == free, log_rho, tl.log(tl.where(rho < 1e-8, 1e-8, rho)))
    return rho, _clamp(log_rho, LIGHTEST, FAR)


@jit()
def _group_advantage(rewards, stride, i, group, MEMBERS: tl.constexpr):
    """`group_advantages` of sequence i: (r_i − mean)/(std + 1e-4) over the finite rewards of its group, in fp64."""
    anyone = tl.zeros([1], tl.int64)
    mean, std, _, constant = _moments(rewards, None, None, anyone, i // group * group, group, 1, stride, 0, 1, MEMBERS)
    r = tl.load(rewards + i * stride).to(tl.float64)
    a = tl.sum(tl.where(constant, 0.0, (r - mean) / (std + 1e-4)))
    return tl.where(tl.abs(r) < INF, a, 0.0).to(tl.float32)


@jit()
def _policy(
    logp, ratio, a, log_w, zeros, lower, upper, delta, tau_positive, tau_other, k_positive, lam_positive, k_negative,
    lam_negative, LOSS_TYPE: tl.constexpr,
):  # fmt: skip
    """A token's loss L, ∂L/∂r, ∂L/∂log π, and whether r is clipped below and above."""
    d_ratio, d_logp = zeros, zeros
    low, high = zeros > 0, zeros > 0
    if LOSS_TYPE == "cispo":
        d_logp = -tl.where(ratio > upper, upper, ratio) * a
        loss = d_logp * logp
        high = (ratio > upper) & (a > 0)
    elif LOSS_TYPE == "sapo":
        tau = tl.where(a > 0, tau_positive, tau_other)
        gate = tl.div_rn(1.0, 1 + tl.exp(tau * (1 - ratio)))  # a plain quotient may err by 2 ulp on a GPU
        loss = -tl.div_rn(4.0, tau) * gate * a
        d_ratio = -4 * gate * (1 - gate) * a
    elif LOSS_TYPE == "vespo":
        k = tl.where(a >= 0, k_positive, k_negative)
        lam = tl.where(a >= 0, lam_positive, lam_negative)
        phi = tl.exp(lam + k * log_w - lam * tl.exp(log_w))
        d_logp = -tl.where(phi < INF, phi, 0.0) * a
        loss = d_logp * logp
    else:
        free = tl.where(ratio > delta, delta, ratio) * a
        clipped = _clamp(ratio, lower, upper) * a
        loss = -tl.where(free < clipped, free, clipped)
        # As autograd has it: a tie's gradient goes to both sides by halves, and at a bound the slope is 1.
        to_free = tl.where(free == clipped, 0.5, tl.where(free > clipped, 0.0, 1.0))
        d_ratio = -tl.where(ratio <= delta, to_free * a, 0.0)
        d_ratio -= tl.where((ratio >= lower) & (ratio <= upper), (1 - to_free) * a, 0.0)
        low = (ratio < lower) & (a < 0)
        high = (ratio > upper) & (a > 0)
    return loss, d_ratio, d_logp, low, high


@jit()
def _kl(x, ratio, zeros, ESTIMATOR: tl.constexpr):
    """KL, ∂KL/∂r and ∂KL/∂log π from x = log π_ref − log π."""
    d_ratio = zeros
    if ESTIMATOR == "k1":
        kl = -x
        d_logp = zeros + 1
    elif ESTIMATOR == "k2":
        kl = 0.5 * x * x
        d_logp = -x
    else:
        near = tl.where(x > FAR, FAR, x)
        kl = tl.exp(near) - near - 1
        d_logp = tl.where(x <= FAR, 1 - tl.exp(near), 0.0)
        if ESTIMATOR == "k3_importance":
            d_ratio = kl
            kl *= ratio
            d_logp *= ratio
    return kl, d_ratio, d_logp


@jit()
def _share(x, tokens, T, max_length, LOSS_TYPE: tl.constexpr):
    """What a sequence whose tokens' losses sum to x adds to the loss, before the divisor that all have."""
    if LOSS_TYPE == "grpo" or LOSS_TYPE == "sapo":
        x = x / tl.where(tokens > 0, tokens, 1.0)
    elif LOSS_TYPE == "dr_grpo":
        x = x / max_length
    elif LOSS_TYPE == "luspo_legacy":
        x = tl.where(tokens > 0, x / T * tokens, 0.0)
    return x


@jit(*STRIDES, *NUMBERS, "sequences", "T", "group", "max_length")
def _sequence_kernel(
    logprobs, logprobs_b, logprobs_t, entropies, entropies_b, entropies_t, advantages, advantages_b, advantages_t,
    mask, mask_b, mask_t, old, old_b, old_t, ref, ref_b, ref_t, sampling, sampling_b, sampling_t,
    grad_per_token, grad_per_token_b, grad_per_token_t,
    cut, per_token, sums, state, grad, d_logprobs, d_entropies,
    sequences, T, group, max_length, lower, upper, delta, beta, floor, cap, threshold, tau_positive, tau_other,
    k_positive, lam_positive, k_negative, lam_negative, coef,
    LOSS_TYPE: tl.constexpr, LEVEL: tl.constexpr, ESTIMATOR: tl.constexpr, ADVANTAGES: tl.constexpr,
    GAP: tl.constexpr, LIMIT: tl.constexpr, OFF_POLICY: tl.constexpr, BACKWARD: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence. Forward: its tokens' losses and its column of the sums. Backward: its gradients."""
    i = tl.program_id(0).to(tl.int64)
    zeros = tl.zeros((BLOCK,), tl.float32)
    if ADVANTAGES == "rewards":
        advantage = _group_advantage(advantages, advantages_b, i, group, MEMBERS)
    elif ADVANTAGES == "sequence":
        advantage = tl.load(advantages + i * advantages_b).to(tl.float32)

    # The token count K, and what the options ask of the whole sequence
    counts, log_ratios, log_weights, gaps, drifts = zeros, zeros, zeros, zeros, zeros
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK).to(tl.int64)
        m, logp, _, before, sampler = _load_tokens(
            i, t, T, mask, mask_b, mask_t, logprobs, logprobs_b, logprobs_t, old, old_b, old_t,
            sampling, sampling_b, sampling_t,
        )  # fmt: skip
        counts += tl.where(m, 1.0, 0.0)
        if LEVEL == "sequence":
            log_ratios += logp - before
        if LOSS_TYPE == "vespo":
            log_weights += _clamp(logp - before, -FAR, FAR)
            if GAP == "token":
                _, log_rho = _correction(before - sampler, floor, cap, LIMIT)
                log_weights += tl.where(m, log_rho, 0.0)
        if GAP == "sequence":
            gaps += before - sampler
        if OFF_POLICY:
            drifts += sampler - logp
    tokens = tl.sum(counts)
    length = tl.where(tokens > 0, tokens, 1.0)
    rho, log_w = zeros + 1, 0.0
    if GAP == "sequence":
        rho, log_w = _correction(zeros + tl.sum(gaps), floor, cap, LIMIT)
    if LOSS_TYPE == "vespo":
        rho, log_w = zeros + 1, _clamp(tl.sum(log_weights) + log_w, LIGHTEST, FAR)

    losses, kls, ratios, largest, lows, highs, bonus, choices = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    nonzeros, d_levels, upstream = zeros, zeros, 0.0
    if grad is not None:
        upstream = _share(tl.load(grad) / tl.load(state), tokens, T, max_length, LOSS_TYPE)
    # Backward with sequence ratios, a first pass adds up what reaches the level that the tokens share.
    for step in tl.static_range(2 if BACKWARD and LEVEL == "sequence" else 1):
        for start in range(0, T, BLOCK):
            t = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = t < T
            m, logp, has_gradient, before, sampler = _load_tokens(
                i, t, T, mask, mask_b, mask_t, logprobs, logprobs_b, logprobs_t, old, old_b, old_t,
                sampling, sampling_b, sampling_t,
            )  # fmt: skip
            if ADVANTAGES == "token":
                a = _load(advantages, advantages_b, advantages_t, i, t, m)
            else:
                a = zeros + advantage
            level = logp - before
            if LEVEL == "sequence":
                level = zeros + tl.sum(log_ratios) / length
            ratio = tl.exp(_clamp(level, -FAR, FAR))
            if GAP == "token" and LOSS_TYPE != "vespo":
                rho, _ = _correction(before - sampler, floor, cap, LIMIT)
                rho = tl.where(m, rho, 1.0)

            loss, d_ratio, d_logp, low, high = _policy(
                logp, ratio, a, log_w, zeros, lower, upper, delta, tau_positive, tau_other, k_positive, lam_positive,
                k_negative, lam_negative, LOSS_TYPE,
            )  # fmt: skip
            kl, kl_d_ratio, kl_d_logp = zeros, zeros, zeros
            if ref is not None:
                x = _load_logprob(ref, ref_b, ref_t, i, t, m) - logp
                kl, kl_d_ratio, kl_d_logp = _kl(x, ratio, zeros, ESTIMATOR)

            summed = inside if LOSS_TYPE == "luspo_legacy" else m
            kept, chosen, h = inside, m, zeros
            if entropies is not None:
                h = _load(entropies, entropies_b, entropies_t, i, t, m)
            if cut is not None:
                chosen = m & (h >= tl.load(cut))
                kept = chosen
            if OFF_POLICY:
                kept = kept & ~((a < 0) & (zeros + tl.sum(drifts) / length > threshold))

            if BACKWARD:
                g = tl.where(summed, upstream, 0.0)
                if grad_per_token is not None:
                    g += _load(grad_per_token, grad_per_token_b, grad_per_token_t, i, t, m)
                kept_g = tl.where(kept, g * rho, 0.0)
                d_ratio = kept_g * d_ratio + g * beta * kl_d_ratio
                d_level = tl.where((level >= -FAR) & (level <= FAR), d_ratio * ratio, 0.0)
                if LEVEL == "sequence" and step == 0:
                    d_levels += d_level
                else:
                    if LEVEL == "sequence":
                        d_level = tl.sum(d_levels) / length
                    d_logp = d_level + (kept_g * d_logp + g * beta * kl_d_logp)
                    if d_logprobs is not None:
                        d_logp = tl.where(m & has_gradient, d_logp, 0.0)
                        tl.store(d_logprobs + i * T + t, narrow(d_logp, d_logprobs.dtype.element_ty), mask=inside)
                    if d_entropies is not None:
                        d_h = zeros
                        if grad is not None:
                            d_h -= tl.where(chosen, coef * tl.load(grad) / tl.load(state + 1), 0.0)
                        tl.store(d_entropies + i * T + t, narrow(d_h, d_entropies.dtype.element_ty), mask=inside)
            else:
                loss = tl.where(kept, loss, 0.0) * rho + beta * kl
                tl.store(per_token + i * T + t, tl.where(m, loss, 0.0), mask=inside)
                losses += tl.where(summed, loss, 0.0)
                kls += tl.where(m, kl, 0.0)
                ratios += tl.where(m, ratio, 0.0)
                largest = tl.maximum(largest, tl.where(m, ratio, 0.0))
                lows += tl.where(m & low, 1.0, 0.0)
                highs += tl.where(m & high, 1.0, 0.0)
                bonus += tl.where(chosen, h, 0.0)
                choices += tl.where(chosen, 1.0, 0.0)
                nonzeros += tl.where(a != 0, 1.0, 0.0)

    if not BACKWARD:
        zero = tl.sum(nonzeros) == 0 if ADVANTAGES == "token" else advantage == 0
        tl.store(sums + KL * sequences + i, tl.sum(kls))
        tl.store(sums + RATIO * sequences + i, tl.sum(ratios))
        tl.store(sums + LARGEST * sequences + i, tl.max(largest))
        tl.store(sums + LOW * sequences + i, tl.sum(lows))
        tl.store(sums + HIGH * sequences + i, tl.sum(highs))
        tl.store(sums + ZERO * sequences + i, zero.to(tl.float32))
        tl.store(sums + LOSS * sequences + i, _share(tl.sum(losses), tokens, T, max_length, LOSS_TYPE))
        tl.store(sums + TOKENS * sequences + i, tokens)
        tl.store(sums + ENTROPY * sequences + i, tl.sum(bonus))
        tl.store(sums + CHOSEN * sequences + i, tl.sum(choices))


@jit()
def _larger(a, b):
    return tl.maximum(a, b)


@jit()
def _row(totals, ROW: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 16) == ROW, totals, 0.0))


@jit("sequences", "group", "count", "coef")
def _reduce_kernel(
    sums, normalizer, loss, metrics, state, sequences, group, count, coef,
    BY_TOKENS: tl.constexpr, SUMS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(SUMS, sequences) -> loss, metrics and state, summed in fp64 and in a fixed order."""
    rows = tl.arange(0, 16).to(tl.int64)
    parts = tl.zeros((16, SEQUENCES), tl.float64)
    largest = tl.zeros((SEQUENCES,), tl.float32)
    zero_groups = tl.zeros((SEQUENCES,), tl.float64)
    nonzero = -1  # the last sequence so far with an advantage that is not 0
    for start in range(0, sequences, SEQUENCES):
        i = start + tl.arange(0, SEQUENCES)
        parts += tl.load(sums + rows[:, None] * sequences + i, mask=(rows < SUMS)[:, None] & (i < sequences), other=0)
        largest = tl.maximum(largest, tl.load(sums + LARGEST * sequences + i, mask=i < sequences, other=0))
        zero = tl.load(sums + ZERO * sequences + i, mask=i < sequences, other=0) != 0
        last = tl.maximum(tl.associative_scan(tl.where(zero, -1, i), 0, _larger), nonzero)
        zero_groups += tl.where((i % group == group - 1) & (last <= i - group), 1.0, 0.0)
        nonzero = tl.max(last)
    totals = tl.sum(parts, 1)
    tokens = tl.maximum(_row(totals, TOKENS), 1.0)

    if normalizer is not None:
        divisor = tl.load(normalizer).to(tl.float64)
    else:
        own = _row(totals, TOKENS) if BY_TOKENS else sequences.to(tl.float64)
        divisor = tl.where(count == count, count, own)
    divisor = tl.where(divisor < 1, 1.0, divisor)
    chosen = tl.maximum(_row(totals, CHOSEN), 1.0)
    tl.store(loss, _row(totals, LOSS) / divisor - coef * (_row(totals, ENTROPY) / chosen))
    tl.store(state, divisor)
    tl.store(state + 1, chosen)

    values = totals / tokens
    ratio_sum = _row(totals, RATIO)  # has the NaN that a maximum drops
    values = tl.where(rows == LARGEST, tl.where(ratio_sum == ratio_sum, tl.max(largest), ratio_sum), values)
    values = tl.where(rows == ZERO, tl.sum(zero_groups) / tl.maximum(sequences // group, 1), values)
    tl.store(metrics + rows, values, mask=rows < LOSS)


class Inputs(NamedTuple):
    """What the op takes, forward and backward."""

    logprobs: Tensor
    entropies: Tensor | None
    advantages: Tensor | None
    rewards: Tensor | None
    mask: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    cut: Tensor | None  # the entropy that counted tokens reach
    normalizer: Tensor | None
    packed: Tensor  # NUMBERS, and the normalizer; NaN for None
    group_size: int | None
    max_length: int | None
    loss_type: str
    importance_level: str
    kl_estimator: str
    importance_mode: str

    def launch(self, grad_per_token: Tensor | None, *tensors: Tensor | None) -> None:
        """The kernel over sequences; `tensors` from `per_token` to `d_entropies`."""
        (B, T), numbers = self.logprobs.shape, dict(zip(NUMBERS, self.packed.tolist(), strict=False))
        rows = self.rewards if self.advantages is None else self.advantages
        strided = list[Any]()
        for x in (*self[:2], rows, *self[4:8], grad_per_token):
            strided += (None, 0, 0) if x is None else (x, x.stride(0), x.stride(1) if x.dim() == 2 else 0)
        of, limit = self.importance_mode.split("_")
        launch(
            _sequence_kernel, (B,), *strided, self.cut, *tensors, B, T, self.group_size or 1,
            float(max(T, 1) if self.max_length is None else self.max_length), **numbers,
            LOSS_TYPE=self.loss_type, LEVEL=self.importance_level, ESTIMATOR=self.kl_estimator,
            ADVANTAGES="rewards" if self.advantages is None else ("sequence", "token")[self.advantages.dim() - 1],
            GAP="none" if self.sampling_logprobs is None else of, LIMIT=limit,
            OFF_POLICY=not math.isnan(numbers["threshold"]), BACKWARD=tensors[0] is None,
            MEMBERS=MEMBERS, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip


SCHEMA = schema(Inputs)


def _outputs(x: Inputs) -> tuple[Tensor, ...]:
    """Memory for the loss (), each token's (B, T), the metrics (6,), and the divisors of loss and entropy (2,)."""
    shapes = (), x.logprobs.shape, len(METRICS), 2
    return tuple(x.logprobs.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op(
    "uae_kernels::grpo_loss", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)", **UNRECORDED
)
def _forward(*inputs):
    x, B = Inputs(*inputs), len(inputs[0])
    *_, coef, count = x.packed.tolist()
    loss, per_token, metrics, state = outputs = _outputs(x)
    sums = loss.new_empty(SUMS, B)
    x.launch(None, per_token, sums, None, None, None, None)
    launch(
        _reduce_kernel, (1,), sums, x.normalizer, loss, metrics, state, B, x.group_size or 1, count, coef,
        BY_TOKENS=x.loss_type in OVER_TOKENS, SUMS=SUMS, SEQUENCES=SEQUENCES, num_warps=WARPS,
    )  # fmt: skip
    return outputs


@_forward.register_fake
def _(*inputs):
    return _outputs(Inputs(*inputs))


def _gradients(x: Inputs, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Memory for the gradients of logprobs and entropies, without elements where they are not needed."""
    given = zip((x.logprobs, x.entropies), needs, strict=True)
    return tuple(y.new_empty(y.shape) if y is not None and need else x.logprobs.new_empty(0) for y, need in given)


@torch.library.custom_op(
    "uae_kernels::grpo_loss_backward",
    mutates_args=(),
    schema=f"(Tensor? grad, Tensor? grad_per_token, Tensor state, {SCHEMA}, bool need_logprobs, bool need_entropies) "
    "-> (Tensor, Tensor)",
    **UNRECORDED,
)
def _backward(grad, grad_per_token, state, *rest):
    x, needs = Inputs(*rest[:-2]), rest[-2:]
    grads = _gradients(x, needs)
    wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
    x.launch(grad_per_token, None, None, state, grad, *wanted)
    return grads


@_backward.register_fake
def _(grad, grad_per_token, state, *rest):
    return _gradients(Inputs(*rest[:-2]), rest[-2:])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *inputs[:11])
    ctx.options = inputs[11:]


def _autograd(ctx, grad, grad_per_token, *_):
    state, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = _backward(grad, grad_per_token, state, *tensors, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 15


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

    With the ratio r = exp(log π − log π_old), advantage A and the mask's token counts K_i, per token (TRL 1.16):

    - grpo, bnpo, dr_grpo, dapo, luspo: −min(min(r, delta)·A, clip(r, 1 − clip_low, 1 + clip_high)·A)
    - cispo (arXiv 2506.13585): −sg(min(r, clip_high))·A·log π; clip_high is the cap itself, not 1 + clip_high
    - sapo (arXiv 2511.20347): −(4/τ)·σ(τ(r − 1))·A, τ by the sign of A
    - vespo: −φ·A·log π, φ = exp(λ + k·log w − λ·w) without gradient, w the whole sequence's ratio

    then, in this order, × off-policy mask, × entropy mask, × sampler correction (not vespo, which has it in w),
    + beta·KL. The sum over unmasked tokens is divided as follows; `normalizer` replaces the quantity in brackets
    (clamped at 1), so that micro-batches of one large batch can share its count:

    - grpo, sapo: Σ_i (Σ_t L/K_i) / [B]
    - bnpo, dapo, cispo, vespo: Σ L / [Σ mask]
    - dr_grpo: Σ L / ([B]·max_length)
    - luspo: Σ_i (Σ_t L) / [B]; luspo_legacy (older TRL, Liger): Σ_i K_i·mean_t(L over all T) / [B], masked tokens
      counting as tokens of log-ratio 0

    Finally entropy_coef × the mean entropy of the tokens kept is subtracted.

    Defined everywhere: nothing a masked position holds, NaN included, reaches the loss or a gradient; an empty mask
    gives loss 0 and gradients 0; log-probabilities below −1e4 (−inf: a sampled token of probability 0) count as −1e4
    without gradient, so −inf on both sides is ratio 1; log-ratios are cut at ±20. With old_logprobs None, or equal to
    logprobs, every ratio is exactly 1 and both clip fractions exactly 0 (cispo counts it where its cap is below 1).

    Args:
        logprobs: (B, T) floats, differentiable.
        advantages: (B,) or (B, T), taken as constants. Either this or `rewards`.
        rewards: (B,); the advantages are then `group_advantages(rewards, group_size)`.
        group_size: G consecutive sequences form a group. With `advantages` only zero_std_fraction uses it.
        mask: (B, T), nonzero = counts. None = every token.
        old_logprobs: (B, T) under the policy that made the batch, None = logprobs without gradient.
        ref_logprobs: (B, T) under the reference policy, needed by `beta`.
        sampling_logprobs: (B, T) as the sampler (an inference engine) reported them; NaN = no correction there.
        entropies: (B, T) in nats, differentiable through `entropy_coef`.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "luspo_legacy", "cispo", "sapo" or "vespo".
        importance_level: "token", or "sequence": r = exp(mean_t(log π − log π_old)) (GSPO, arXiv 2507.18071).
        clip_low, clip_high: the clip range, clip_high None = clip_low.
        delta: upper bound of the unclipped ratio (two-sided clipping), None = none.
        beta: weight of the KL to the reference.
        kl_estimator: of x = log π_ref − log π: "k1" −x, "k2" x²/2, "k3" e^x − x − 1, "k3_importance" k3·r.
        sapo_temperature: τ for A > 0 and for the rest.
        vespo: (k, λ) for A ≥ 0, then (k, λ) for A < 0.
        importance_mode: how ρ = exp(log π_old − log π_sampler) is limited: "token_…" per token or "sequence_…" on the
            sequence's sum; "…_truncate" clamps it, "…_mask" drops what lies outside.
        importance_floor, importance_cap: the limits, None = 0 and infinity.
        off_policy_threshold: drops sequences of negative advantage whose mean log π_sampler − log π exceeds it.
        entropy_quantile: keeps this fraction of the tokens, those with the highest entropy (arXiv 2506.01939).
        entropy_coef: weight of the entropy bonus.
        normalizer: number or 0-d tensor, see above.
        max_length: tokens per sequence dr_grpo divides by, None = T.
        impl: "auto" runs Triton on a GPU and PyTorch elsewhere and for fp64 log-probs; "triton" and "torch" insist.

    Returns:
        GRPOLoss: `loss` fp32 (fp64 for fp64 log-probs); `metrics` over unmasked tokens: kl (as it enters the loss),
        ratio_mean, ratio_max, clip_fraction_low (r < 1 − clip_low, A < 0), clip_fraction_high (r beyond the upper
        bound, A > 0), all 0 for an empty mask, and zero_std_fraction, the fraction of groups (of sequences without
        group_size) whose advantages are all exactly 0; `per_token` (B, T) before the reduction, 0 where masked;
        `logprobs` detached.

    Raises:
        ValueError: shapes that do not fit, unknown choices, an option whose input is missing.
        RuntimeError: `impl="triton"` where Triton cannot run, or for fp64 log-probs.
    """
    if not use_triton("grpo_loss", impl, logprobs, fp64(logprobs)):
        return reference.grpo_loss(
            logprobs, advantages, rewards=rewards, group_size=group_size, mask=mask, old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs, sampling_logprobs=sampling_logprobs, entropies=entropies, loss_type=loss_type,
            importance_level=importance_level, clip_low=clip_low, clip_high=clip_high, delta=delta, beta=beta,
            kl_estimator=kl_estimator, sapo_temperature=sapo_temperature, vespo=vespo, importance_mode=importance_mode,
            importance_floor=importance_floor, importance_cap=importance_cap,
            off_policy_threshold=off_policy_threshold, entropy_quantile=entropy_quantile, entropy_coef=entropy_coef,
            normalizer=normalizer, max_length=max_length,
        )  # fmt: skip
    check_arguments(
        logprobs, advantages, rewards, group_size, (mask, old_logprobs, ref_logprobs, sampling_logprobs, entropies),
        loss_type, importance_level, kl_estimator, importance_mode, beta, entropy_quantile, entropy_coef,
    )  # fmt: skip
    divisor, count = (normalizer.to(logprobs.device), None) if isinstance(normalizer, Tensor) else (None, normalizer)
    clip_high = clip_low if clip_high is None else clip_high
    packed = pack(
        1 - clip_low, clip_high if loss_type == "cispo" else 1 + clip_high, math.inf if delta is None else delta, beta,
        0.0 if importance_floor is None else importance_floor, math.inf if importance_cap is None else importance_cap,
        off_policy_threshold, *sapo_temperature, *vespo, entropy_coef, count,
    )  # fmt: skip
    cut = None
    if entropies is not None and entropy_quantile is not None and entropies.numel():
        cut = entropy_cut(entropies.detach().float(), kept_tokens(logprobs, mask), entropy_quantile)
    loss, per_token, metrics, _ = _forward(
        logprobs, entropies, advantages, rewards, mask, old_logprobs, ref_logprobs, sampling_logprobs, cut, divisor,
        packed, group_size, max_length, loss_type, importance_level, kl_estimator, importance_mode,
    )  # fmt: skip
    return GRPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), per_token, logprobs.detach())
