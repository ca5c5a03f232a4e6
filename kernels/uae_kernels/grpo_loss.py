"""The policy losses of the GRPO family over per-token log-probabilities.

Two launches forward: a program for each sequence, then one program that adds the sequences up. One launch backward, of
the same kernel as the first, so that both directions agree on which tokens count and which ratios are clipped.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._common import UNRECORDED, GRPOLoss, compute_dtype, direct, pack, unpack
from ._triton import fp64, jit, launch, narrow, tl, use_triton
from .reference.grpo_loss import (
    CLIPPED,
    MAX_EXPONENT,
    METRICS,
    MIN_LOG_WEIGHT,
    MIN_LOGPROB,
    OVER_TOKENS,
    check_arguments,
    check_needs,
    entropy_cut,
    kept_tokens,
    sampler_correction,
    shares,
    vespo_weight,
    zero_std_fraction,
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

STATE = 3  # what backward needs of the whole batch: the divisor, the number of chosen tokens, the cut

STRIDED = ("logprobs", "entropies", "advantages", "mask", "old", "ref", "sampling", "grad_per_token")
STRIDES = [f"{name}_{axis}" for name in STRIDED for axis in "bt"]


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
def _correction(gap, floor, cap, log_floor, log_cap, LIMIT: tl.constexpr):
    """ρ = exp(gap) within its limits, and log ρ, which is the gap itself where no limit applies."""
    log_rho = _clamp(gap, -FAR, FAR)
    rho = tl.exp(log_rho)
    if LIMIT == "truncate":
        log_rho = tl.where(rho < floor, log_floor, log_rho)
        rho = tl.where(rho < floor, floor, rho)
        log_rho = tl.where(rho > cap, log_cap, log_rho)
        rho = tl.where(rho > cap, cap, rho)
    else:
        inside = (rho >= floor) & (rho <= cap)
        log_rho = tl.where(inside, log_rho, LIGHTEST)
        rho = tl.where(inside, rho, 0.0)
    return rho, _clamp(log_rho, LIGHTEST, FAR)


@jit()
def _group_advantage(rewards, stride, i, group, MEMBERS: tl.constexpr):
    """`group_advantages` of sequence i: (r_i − mean)/(std + 1e-4) over the finite rewards of its group, in fp64."""
    first = i // group * group
    counts = tl.zeros((MEMBERS,), tl.float64)
    totals = tl.zeros((MEMBERS,), tl.float64)
    lows = tl.full((MEMBERS,), INF, tl.float64)
    highs = tl.full((MEMBERS,), -INF, tl.float64)
    for start in range(0, group, MEMBERS):
        j = start + tl.arange(0, MEMBERS)
        r = tl.load(rewards + (first + j) * stride, mask=j < group, other=INF).to(tl.float64)
        finite = tl.abs(r) < INF
        counts += tl.where(finite, 1.0, 0.0)
        totals += tl.where(finite, r, 0.0)
        lows = tl.where(finite & (r < lows), r, lows)
        highs = tl.where(finite & (r > highs), r, highs)
    count = tl.sum(counts)
    mean = tl.sum(totals) / tl.where(count > 0, count, 1.0)
    squares = tl.zeros((MEMBERS,), tl.float64)
    for start in range(0, group, MEMBERS):
        j = start + tl.arange(0, MEMBERS)
        r = tl.load(rewards + (first + j) * stride, mask=j < group, other=INF).to(tl.float64)
        squares += tl.where(tl.abs(r) < INF, (r - mean) * (r - mean), 0.0)
    std = tl.sqrt(tl.sum(squares) / tl.where(count > 1, count - 1, 1.0))
    r = tl.load(rewards + i * stride).to(tl.float64)
    informative = (tl.abs(r) < INF) & (tl.min(lows) < tl.max(highs))
    return tl.where(informative, (r - mean) / (std + 1e-4), 0.0).to(tl.float32)


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


@jit(
    *STRIDES, "sequences", "T", "group", "max_length", "lower", "upper", "delta", "beta", "floor", "cap", "log_floor",
    "log_cap", "threshold", "coef", "tau_positive", "tau_other", "k_positive", "lam_positive", "k_negative",
    "lam_negative",
)  # fmt: skip
def _sequence_kernel(
    logprobs, logprobs_b, logprobs_t, entropies, entropies_b, entropies_t, advantages, advantages_b, advantages_t,
    mask, mask_b, mask_t, old, old_b, old_t, ref, ref_b, ref_t, sampling, sampling_b, sampling_t,
    grad_per_token, grad_per_token_b, grad_per_token_t,
    cut, per_token, sums, state, grad, d_logprobs, d_entropies,
    sequences, T, group, max_length, lower, upper, delta, beta, floor, cap, log_floor, log_cap, threshold, coef,
    tau_positive, tau_other, k_positive, lam_positive, k_negative, lam_negative,
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
                _, log_rho = _correction(before - sampler, floor, cap, log_floor, log_cap, LIMIT)
                log_weights += tl.where(m, log_rho, 0.0)
        if GAP == "sequence":
            gaps += before - sampler
        if OFF_POLICY:
            drifts += sampler - logp
    tokens = tl.sum(counts)
    length = tl.where(tokens > 0, tokens, 1.0)
    rho, log_w = zeros + 1, 0.0
    if GAP == "sequence":
        rho, log_w = _correction(zeros + tl.sum(gaps), floor, cap, log_floor, log_cap, LIMIT)
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
                rho, _ = _correction(before - sampler, floor, cap, log_floor, log_cap, LIMIT)
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
    sums, normalizer, cut, loss, metrics, state, sequences, group, count, coef,
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
    if cut is not None:
        tl.store(state + 2, tl.load(cut))

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
    normalizer: Tensor | None
    packed: Tensor  # Numbers
    group_size: int | None
    max_length: int | None
    loss_type: str
    importance_level: str
    kl_estimator: str
    importance_mode: str
    graph: bool  # whether a gradient may be asked for
    triton: bool

    def keep(self) -> Tensor:
        """(B, T), True where a token counts."""
        return kept_tokens(self.logprobs, self.mask)


SCHEMA = """
    Tensor logprobs, Tensor? entropies, Tensor? advantages, Tensor? rewards, Tensor? mask, Tensor? old_logprobs,
    Tensor? ref_logprobs, Tensor? sampling_logprobs, Tensor? normalizer, Tensor packed, SymInt? group_size,
    SymInt? max_length, str loss_type, str importance_level, str kl_estimator, str importance_mode, bool graph,
    bool triton
"""


class Numbers(NamedTuple):
    clip_low: float
    clip_high: float
    delta: float
    beta: float
    floor: float
    cap: float
    threshold: float | None
    quantile: float | None
    coef: float
    normalizer: float | None
    tau_positive: float
    tau_other: float
    k_positive: float
    lam_positive: float
    k_negative: float
    lam_negative: float


def _cut(x: Inputs, quantile: float | None) -> Tensor | None:
    if x.entropies is None or quantile is None or not x.logprobs.numel():
        return None
    return entropy_cut(x.entropies.to(compute_dtype(x.logprobs)), x.keep(), quantile)


def _launch_sequences(
    x: Inputs,
    n: Numbers,
    cut: Tensor | None,
    *,
    per_token: Tensor | None = None,
    sums: Tensor | None = None,
    state: Tensor | None = None,
    grad: Tensor | None = None,
    grad_per_token: Tensor | None = None,
    d_logprobs: Tensor | None = None,
    d_entropies: Tensor | None = None,
) -> None:
    """Forward it writes `per_token` and `sums`, backward the gradients that are not None."""
    advantages = x.rewards if x.advantages is None else x.advantages
    strided: list[Any] = []
    for y in (
        x.logprobs, x.entropies, advantages, x.mask, x.old_logprobs, x.ref_logprobs, x.sampling_logprobs, grad_per_token
    ):  # fmt: skip
        strided += (None, 0, 0) if y is None else (y, y.stride(0), y.stride(1) if y.dim() == 2 else 0)
    B, T = x.logprobs.shape
    gap, limit = x.importance_mode.split("_")
    launch(
        _sequence_kernel,
        (B,),
        *strided,
        cut=cut,
        per_token=per_token,
        sums=sums,
        state=state,
        grad=grad,
        d_logprobs=d_logprobs,
        d_entropies=d_entropies,
        sequences=B,
        T=T,
        group=x.group_size or 1,
        max_length=float(max(T, 1) if x.max_length is None else x.max_length),
        lower=1 - n.clip_low,
        upper=n.clip_high if x.loss_type == "cispo" else 1 + n.clip_high,
        delta=n.delta,
        beta=n.beta,
        floor=n.floor,
        cap=n.cap,
        log_floor=math.log(n.floor) if n.floor > 0 else -math.inf,
        log_cap=math.log(n.cap) if n.cap > 0 else -math.inf,
        threshold=0.0 if n.threshold is None else n.threshold,
        coef=n.coef,
        tau_positive=n.tau_positive,
        tau_other=n.tau_other,
        k_positive=n.k_positive,
        lam_positive=n.lam_positive,
        k_negative=n.k_negative,
        lam_negative=n.lam_negative,
        LOSS_TYPE=x.loss_type,
        LEVEL=x.importance_level,
        ESTIMATOR=x.kl_estimator,
        ADVANTAGES="rewards" if x.advantages is None else "sequence" if x.advantages.dim() == 1 else "token",
        GAP="none" if x.sampling_logprobs is None else gap,
        LIMIT=limit,
        OFF_POLICY=n.threshold is not None,
        BACKWARD=sums is None,
        MEMBERS=MEMBERS,
        BLOCK=BLOCK,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


def _forward_triton(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = Numbers(*unpack(x.packed))
    B, T = x.logprobs.shape
    empty = partial(x.logprobs.new_empty, dtype=torch.float32)
    loss, per_token, metrics, state, sums = map(empty, ((), (B, T), len(METRICS), STATE, (SUMS, B)))
    cut = _cut(x, n.quantile)
    _launch_sequences(x, n, cut, per_token=per_token, sums=sums)
    launch(
        _reduce_kernel, (1,), sums, x.normalizer, cut, loss, metrics, state, B, x.group_size or 1,
        math.nan if n.normalizer is None else n.normalizer, n.coef,
        BY_TOKENS=x.loss_type in OVER_TOKENS, SUMS=SUMS, SEQUENCES=SEQUENCES, num_warps=WARPS,
    )  # fmt: skip
    return loss, per_token, metrics, state


def _forward_torch(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in fewer passes, and with a graph the slopes of `per_token` in log π that backward scales.

    Slopes are (1, B, T), or for ratios of sequences (2, B, T): in the mean log-ratio, and in the token itself.
    """
    n, dtype = Numbers(*unpack(x.packed)), compute_dtype(x.logprobs)
    shape, m, zero = x.logprobs.shape, x.keep(), x.logprobs.new_zeros((), dtype=dtype)  # a number would be converted
    tokens = m.sum(1, keepdim=True)
    length = tokens.clamp(min=1)

    def floored(y: Tensor) -> Tensor:
        return torch.where(m, y.to(dtype), zero).clamp_(min=MIN_LOGPROB)

    a = x.advantages
    if a is None:
        assert x.rewards is not None
        a = reference.group_advantages(x.rewards, x.group_size)
    a = a.to(dtype)
    zero_std = zero_std_fraction(a, m, x.group_size)
    a = torch.where(tokens > 0, a[:, None], zero) if a.dim() == 1 else torch.where(m, a, zero)

    logp = floored(x.logprobs)
    old = logp if x.old_logprobs is None else floored(x.old_logprobs)
    spent = old is not logp and x.sampling_logprobs is None and n.threshold is None  # new memory costs more than a pass
    level = log_ratio = torch.sub(logp, old, out=old if spent else None)
    if x.importance_level == "sequence":
        level = (log_ratio.sum(1, keepdim=True) / length).expand(shape)
    near = level.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    ratio = near.exp()

    rho, sampler = None, old
    if x.sampling_logprobs is not None:
        sampler = floored(x.sampling_logprobs)
        sampler = torch.where(sampler.isnan(), old, sampler)
        rho = sampler_correction(old - sampler, m, x.importance_mode, n.floor, n.cap)

    # Each token's loss, and its slopes in r and in log π
    d_ratio = d_logp = low = high = None
    if x.loss_type in CLIPPED:
        low, high = ratio < 1 - n.clip_low, ratio > 1 + n.clip_high
        free = (ratio if n.delta == math.inf else ratio.clamp(max=n.delta)) * a
        clipped = ratio.clamp(1 - n.clip_low, 1 + n.clip_high).mul_(a)
        if x.graph:
            # As autograd has it: a tie's gradient goes to both sides by halves, and at a bound the slope is 1.
            if n.delta == math.inf:
                d_ratio = torch.where(free <= clipped, -a, zero)
            else:
                to_free = torch.where(free == clipped, 0.5, (free < clipped).to(dtype))
                d_ratio = torch.where(ratio <= n.delta, to_free, 0) + torch.where(low | high, 0, 1 - to_free)
                d_ratio = d_ratio * -a
        value = torch.minimum(free, clipped, out=clipped).neg_()
    elif x.loss_type == "cispo":
        high = ratio > n.clip_high
        d_logp = ratio.clamp(max=n.clip_high) * -a
        value = d_logp * logp
    elif x.loss_type == "sapo":
        tau = torch.full_like(a, n.tau_other).masked_fill_(a > 0, n.tau_positive)
        gate = torch.sigmoid(tau * (ratio - 1))
        value, d_ratio = gate * (-4 / tau * a), gate * (1 - gate) * (-4 * a)
    else:
        vespo = n.k_positive, n.lam_positive, n.k_negative, n.lam_negative
        d_logp = vespo_weight(log_ratio, torch.ones_like(logp) if rho is None else rho, a, vespo) * -a
        value, rho = d_logp * logp, None

    kept, chosen, cut = None, m, _cut(x, n.quantile)
    if n.threshold is not None:
        kept = (a >= 0) | ((sampler - logp).sum(1, keepdim=True) / length <= n.threshold)
    if x.entropies is not None and cut is not None:
        chosen = m & (x.entropies.to(dtype) >= cut)
        kept = chosen if kept is None else kept & chosen

    def weighed(y: Tensor | None) -> Any:
        if y is None:
            return None
        y = y if kept is None else torch.where(kept, y, 0)
        return y if rho is None else y * rho

    value, d_ratio, d_logp = weighed(value), weighed(d_ratio), weighed(d_logp)
    kl = None
    if x.ref_logprobs is not None:
        y = floored(x.ref_logprobs).sub_(logp)  # the x of the estimators
        if x.kl_estimator == "k1":
            kl, d_kl = -y, torch.ones_like(y)
        elif x.kl_estimator == "k2":
            kl, d_kl = 0.5 * y.square(), -y
        else:
            bounded = y.clamp(max=MAX_EXPONENT)
            d_kl = torch.expm1(bounded)
            far = y != bounded
            kl = torch.sub(d_kl, bounded, out=bounded)
            d_kl.masked_fill_(far, 0).neg_()
            if x.kl_estimator == "k3_importance":
                d_ratio = _plus(d_ratio, n.beta * kl)
                kl, d_kl = kl * ratio, d_kl * ratio
        value.add_(n.beta * kl)
        d_logp = _plus(d_logp, n.beta * d_kl) if x.graph else None

    per_token = torch.where(m, value, zero)
    sums = (value if x.loss_type == "luspo_legacy" else per_token).sum(1, keepdim=True)
    normalizer = n.normalizer if x.normalizer is None else x.normalizer
    loss = (sums * shares(tokens, x.loss_type, normalizer, shape[1], x.max_length, sums)).sum()
    if x.entropies is not None:
        loss = loss - n.coef * (torch.where(chosen, x.entropies.to(dtype), 0).sum() / chosen.sum().clamp(min=1))

    counted = torch.where(m, ratio, zero)
    of_tokens = (
        zero if kl is None else kl.sum(),  # 0 where masked
        counted.sum(),
        zero if low is None else torch.count_nonzero(low & ((a < 0) & m)).to(dtype),
        zero if high is None else torch.count_nonzero(high & ((a > 0) & m)).to(dtype),
    )
    kl_mean, ratio_mean, *fractions = (torch.stack(of_tokens) / tokens.sum().clamp(min=1)).unbind()
    largest = counted.amax() if counted.numel() else zero
    metrics = torch.stack([kl_mean, ratio_mean, largest, *fractions, zero_std])
    if not x.graph:
        return loss, per_token, metrics, loss.new_empty(0)
    return loss, per_token, metrics, _slopes(x, m, d_ratio, d_logp, torch.where(level == near, ratio, zero))


def _plus(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


def _moves(x: Inputs, m: Tensor) -> Tensor:
    """Where the loss sees log π itself, not the floor below it."""
    return m & (x.logprobs >= MIN_LOGPROB)


def _slopes(x: Inputs, m: Tensor, d_ratio: Tensor | None, d_logp: Tensor | None, d_level: Tensor) -> Tensor:
    """What `_forward_torch` saves, 0 where no gradient may come from; `d_level` is the slope of r in the log-ratio."""
    sequences = x.importance_level == "sequence"
    through = None if d_ratio is None else d_level.mul_(d_ratio)
    if sequences:
        slopes = d_level.new_zeros(2, *m.shape)
        if through is not None:
            slopes[0] = through if x.loss_type == "luspo_legacy" else torch.where(m, through, 0)
        if d_logp is not None:
            slopes[1] = torch.where(_moves(x, m), d_logp, 0)
        return slopes
    both = [y for y in (through, d_logp) if y is not None]
    return torch.where(_moves(x, m), both[0] + both[1] if len(both) == 2 else both[0], 0)[None]


def _backward_torch(
    x: Inputs, needs: tuple[bool, ...], slopes: Tensor, grad: Tensor | None, grad_per_token: Tensor | None
) -> tuple[Tensor, ...]:
    n, dtype = Numbers(*unpack(x.packed)), compute_dtype(x.logprobs)
    m = x.keep()
    tokens = m.sum(1, keepdim=True)
    # What reaches each token's loss
    g = torch.zeros_like(tokens, dtype=dtype)
    if grad is not None:
        normalizer = n.normalizer if x.normalizer is None else x.normalizer
        g = grad * shares(tokens, x.loss_type, normalizer, m.shape[1], x.max_length, g)
    if grad_per_token is not None:
        g = g + torch.where(m, grad_per_token.to(dtype), 0)
    grads = [x.logprobs.new_empty(0) for _ in needs]
    if needs[0]:
        d = slopes[-1] * g
        if x.importance_level == "sequence":
            d_level = (slopes[0] * g).sum(1, keepdim=True) / tokens.clamp(min=1)
            d = d + torch.where(_moves(x, m), d_level, 0)
        grads[0] = d.to(x.logprobs.dtype)
    if needs[1] and x.entropies is not None:
        cut = _cut(x, n.quantile)
        chosen = m if cut is None else m & (x.entropies.to(dtype) >= cut)
        each = m.new_zeros((), dtype=dtype) if grad is None else -n.coef * grad / chosen.sum().clamp(min=1)
        grads[1] = torch.where(chosen, each, 0).to(x.entropies.dtype)
    return tuple(grads)


@torch.library.custom_op(
    "uae_kernels::grpo_loss", mutates_args=(), **UNRECORDED, schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(*inputs):
    """Loss (), per token (B, T), metrics (6,), and the state of the kernel's backward pass."""
    x = Inputs(*inputs)
    return _forward_triton(x) if x.triton else _forward_torch(x)


@_forward.register_fake
def _(*inputs):
    x = Inputs(*inputs)
    state: Any = STATE if x.triton else 0
    if x.graph and not x.triton:
        state = 1 + (x.importance_level == "sequence"), *x.logprobs.shape
    shapes = (), x.logprobs.shape, len(METRICS), state
    return tuple(x.logprobs.new_empty(shape, dtype=compute_dtype(x.logprobs)) for shape in shapes)


def _gradients(x: Inputs, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    given = zip((x.logprobs, x.entropies), needs, strict=True)
    return tuple(y.new_empty(y.shape) if y is not None and need else x.logprobs.new_empty(0) for y, need in given)


@torch.library.custom_op(
    "uae_kernels::grpo_loss_backward",
    mutates_args=(),
    **UNRECORDED,
    schema=f"(Tensor? grad, Tensor? grad_per_token, Tensor state, {SCHEMA}, bool need_logprobs, bool need_entropies) "
    "-> (Tensor, Tensor)",
)
def _backward(grad, grad_per_token, state, *rest):
    """Gradients of logprobs and entropies, without elements where they are not needed."""
    x, needs = Inputs(*rest[:-2]), rest[-2:]
    if not x.triton:
        return _backward_torch(x, needs, state, grad, grad_per_token)
    n, grads = Numbers(*unpack(x.packed)), _gradients(x, needs)
    cut = None if x.entropies is None or n.quantile is None else state[2]
    d_logprobs, d_entropies = (g if need else None for g, need in zip(grads, needs, strict=True))
    _launch_sequences(
        x, n, cut, state=state, grad=grad, grad_per_token=grad_per_token, d_logprobs=d_logprobs,
        d_entropies=d_entropies,
    )  # fmt: skip
    return grads


@_backward.register_fake
def _(grad, grad_per_token, state, *rest):
    return _gradients(Inputs(*rest[:-2]), rest[-2:])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *inputs[:10])
    ctx.options = inputs[10:]


def _autograd(ctx, grad, grad_per_token, *_):
    state, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads: tuple[Tensor | None, ...] = (None, None)
    if grad is not None or grad_per_token is not None:
        backward = _backward if ctx.options[-1] else _direct_backward  # by Triton
        grads = backward(grad, grad_per_token, state, *tensors, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 16


_forward.register_autograd(_autograd, setup_context=_setup_context)
_direct, _direct_backward = direct(_forward, _setup_context, _autograd), direct(_backward)


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
        impl: "auto" runs Triton on a GPU and PyTorch elsewhere and for fp64 log-probs; "triton" and "torch" insist.

    Returns:
        GRPOLoss: `loss` fp32 (fp64 for fp64 log-probs); `metrics` over unmasked tokens: kl (as it enters the
        loss), ratio_mean, ratio_max, clip_fraction_low (r < 1 − clip_low, A < 0), clip_fraction_high (r
        beyond the upper bound, A > 0), all 0 for an empty mask, and zero_std_fraction, the fraction of groups
        (of sequences without group_size) whose advantages are all exactly 0; `per_token` (B, T) before the
        reduction, 0 where masked; `logprobs` detached.

    Raises:
        ValueError: shapes that do not fit, unknown choices, an option whose input is missing.
        RuntimeError: `impl="triton"` where Triton cannot run, or for fp64 log-probs.
    """
    triton = use_triton("grpo_loss", impl, logprobs, fp64(logprobs))
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
    divisor, count = (normalizer.to(logprobs.device), None) if isinstance(normalizer, Tensor) else (None, normalizer)
    loss, per_token, metrics, _ = (_forward if triton else _direct)(
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
            clip_low, clip_low if clip_high is None else clip_high, math.inf if delta is None else delta, beta,
            0.0 if importance_floor is None else importance_floor,
            math.inf if importance_cap is None else importance_cap, off_policy_threshold,
            entropy_quantile, entropy_coef, count, *sapo_temperature, *vespo,
        ),
        group_size,
        max_length,
        loss_type,
        importance_level,
        kl_estimator,
        importance_mode,
        torch.is_grad_enabled() and (logprobs.requires_grad or (entropies is not None and entropies.requires_grad)),
        triton,
    )  # fmt: skip
    return GRPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), per_token, logprobs.detach())
