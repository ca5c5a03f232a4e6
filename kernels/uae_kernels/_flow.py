"""What `flow_step` and `flow_grpo_loss` share: one pass over the latents forward, one backward.

Their log-probabilities agree bit for bit, however a compiler spreads a block over threads. What is computed element by
element cannot depend on that, without fused multiply-adds, which it would choose kernel by kernel. A sum can: so a
program adds its blocks up element by element, then neighbours in an order that is written out, and what is left goes to
`_log_prob_kernel`, which is one binary for both.

Bytes an element, for bf16 velocities, fp32 samples and no guidance: a drawn step reads 6 and writes 8, a loss reads
10, its gradient reads 10 and writes 2, and no less will do; the partial sums, one for 4·BLOCKS elements, add 0.25 each
way to the first two. Sixteen channels of 128×128 are 64 programs a sample.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import UNRECORDED, schema, unpack
from ._triton import jit, launch, narrow, tl

BLOCK = 1024  # elements of a sample that a program handles at a time
BLOCKS = 4  # times it does
SUMS = 2048  # partial sums added up at a time
WARPS = 4
REGISTERS = {"aligned": 80, "unaligned": 128}  # a thread; left to itself, ptxas takes fewer and spills

LOG_SQRT_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))

ROWS = ("velocity", "uncond", "sample", "taken", "ref", "noise", "grad_mean", "grad_next")
STRIDES = [f"{name}_b" for name in (*ROWS, "seeds", "sigma", "sigma_next", "sigma_max", "grad_rows")]
NUMBERS = ["sigma_number", "sigma_next_number", "sigma_max_number", "level", "cosine", "guidance", "beta"]


@jit()
def _load(x, x_b, i, index, inside, ALIGNED: tl.constexpr):
    """x[i, index] in fp32, 0 outside."""
    if ALIGNED:
        x_b = x_b // 16 * 16  # the same, and known to be a multiple
    return tl.load(x + i * x_b + index, mask=inside, other=0).to(tl.float32)


@jit()
def _sigma(x, x_b, number, i):
    return tl.full((), number, tl.float32) if x is None else tl.load(x + i * x_b).to(tl.float32)


@jit()
def _coefficients(sigma, sigma_next, sigma_max, level, cosine, KIND: tl.constexpr):
    """mean = a·x + b·v, std and diffusion coefficient s of a sample: `reference.flow_step.coefficients`.

    `level` is the noise level; for cps, with θ = noise level·π/2, it is sin θ, and `cosine` is cos θ.
    """
    # To the interpreter a number is a double
    level, cosine = tl.full((), level, tl.float32), tl.full((), cosine, tl.float32)
    if KIND == "cps":
        std = sigma_next * level
        s = std
        a = (1 - sigma_next) + sigma_next * cosine
        b = sigma_next * cosine * (1 - sigma) - (1 - sigma_next) * sigma
    else:
        dt = sigma_next - sigma
        s = level
        if KIND == "flow_sde":
            s = level * tl.sqrt_rn(tl.div_rn(sigma, 1 - tl.where(sigma == 1, sigma_max, sigma)))
        drift = tl.div_rn(s * s, 2 * sigma)
        std = s * tl.sqrt_rn(-dt)
        a = 1 + drift * dt
        b = (1 + drift * (1 - sigma)) * dt
    return a, b, std, s


@jit()
def _velocity_and_mean(
    velocity, velocity_b, uncond, uncond_b, sample, sample_b, i, index, inside, a, b, guidance, ALIGNED: tl.constexpr
):  # fmt: skip
    """v as the model gave it, and a·x + b·(v guided)."""
    v = _load(velocity, velocity_b, i, index, inside, ALIGNED)
    guided = v
    if uncond is not None:
        u = _load(uncond, uncond_b, i, index, inside, ALIGNED)
        guided = u + guidance * (v - u)
    return v, a * _load(sample, sample_b, i, index, inside, ALIGNED) + b * guided


@jit()
def _kl_factor(std, s, KL: tl.constexpr):
    """KL = factor · mean (μ − μ_ref)², 0 where there is no density; the v-space form is 1 · mean (v − v_ref)²."""
    factor = 1.0
    if KL != "velocity":
        width = std if KL == "gaussian" else s
        exact = width == 0
        width = tl.where(exact, 1.0, width)
        factor = tl.where(exact, 0.0, tl.div_rn(0.5, width * width))
    return factor


@jit()
def _randn(seed, index):
    """`tl.randn(seed, index)`, whose cosine would keep a table on the stack for angles far from [0, 2π)."""
    word1, word2, _, _ = tl.randint4x(seed, index)
    u1, u2 = tl.maximum(tl.uint_to_uniform_float(word1), 1e-7), tl.uint_to_uniform_float(word2)
    # cos x, x = r + quarter·π/2 and |r| ≤ π/4; π/2 is a number of ten bits and the rest
    quarter = tl.floor(4 * u2 + 0.5)
    r = 6.283185307179586 * u2 - quarter * 1.5703125 - quarter * 4.838267948966192e-4
    q = r * r
    cosine = 1 - q * (1 / 2 - q * (1 / 24 - q * (1 / 720 - q * (1 / 40320 - q * (1 / 3628800)))))
    sine = r * (1 - q * (1 / 6 - q * (1 / 120 - q * (1 / 5040 - q * (1 / 362880)))))
    turned = tl.where((quarter == 1) | (quarter == 3), sine, cosine)
    return tl.sqrt(-2 * tl.log(u1)) * tl.where((quarter == 1) | (quarter == 2), -turned, turned)


@jit()
def _store_sums(x, out, program, BLOCK: tl.constexpr):
    """Four neighbours at a time are added and stored."""
    left, right = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    left, right = tl.split(tl.reshape(left + right, (BLOCK // 4, 2)))
    tl.store(out + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4), left + right)


@jit(*STRIDES, *NUMBERS, "size", "chunks")
def _forward_kernel(
    velocity, velocity_b, uncond, uncond_b, sample, sample_b, taken, taken_b, ref, ref_b,
    sigma, sigma_b, sigma_next, sigma_next_b, sigma_max, sigma_max_b,
    sigma_number, sigma_next_number, sigma_max_number, level, cosine, guidance, size, chunks,
    noise, noise_b, seeds, seeds_b, drawn, mean, std, errors, distances, kl_factor,
    KIND: tl.constexpr, KL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCK·BLOCKS elements of a sample: the step, and partial sums of (x' − mean)² and of (v − v_ref)²."""
    program = tl.program_id(0).to(tl.int64)
    i, chunk = program // chunks, program % chunks
    if ALIGNED:
        size = size // 16 * 16
    a, b, deviation, s = _coefficients(
        _sigma(sigma, sigma_b, sigma_number, i), _sigma(sigma_next, sigma_next_b, sigma_next_number, i),
        _sigma(sigma_max, sigma_max_b, sigma_max_number, i), level, cosine, KIND,
    )  # fmt: skip
    tl.store(std + i, deviation, mask=chunk == 0)
    if seeds is not None:
        seed = tl.load(seeds + i * seeds_b)
    error = tl.zeros((BLOCK,), tl.float32)
    distance = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        index = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        v, mu = _velocity_and_mean(
            velocity, velocity_b, uncond, uncond_b, sample, sample_b, i, index, inside, a, b, guidance, ALIGNED
        )
        if mean is not None:
            tl.store(mean + i * size + index, mu, mask=inside)
        if errors is not None:
            if taken is not None:
                x = _load(taken, taken_b, i, index, inside, ALIGNED)
            else:
                if noise is not None:
                    z = _load(noise, noise_b, i, index, inside, ALIGNED)
                else:
                    z = _randn(seed, index.to(tl.int32))
                x = mu + deviation * z
                tl.store(drawn + i * size + index, x, mask=inside)
            error += tl.where(inside, (x - mu) * (x - mu), 0.0)
        if distances is not None:
            d = v - _load(ref, ref_b, i, index, inside, ALIGNED)
            distance += tl.where(inside, d * d, 0.0)
    if errors is not None:
        _store_sums(error, errors, program, BLOCK)
    if distances is not None:
        _store_sums(distance, distances, program, BLOCK)
        # Guided, both velocities keep their distance times g; the means keep theirs times b.
        factor = _kl_factor(deviation, s, KL)
        if uncond is not None:
            factor *= tl.full((), guidance, tl.float32) * guidance
        if KL != "velocity":
            factor *= b * b
        tl.store(kl_factor + i, factor, mask=chunk == 0)


@jit("count", "size")
def _log_prob_kernel(sums, std, out, count, size, FORM: tl.constexpr, SUMS: tl.constexpr):
    """A sample's log-probability from its `count` partial sums of (x' − mean)²: `reference.flow_step.log_density`."""
    i = tl.program_id(0).to(tl.int64)
    totals = tl.zeros((SUMS,), tl.float32)
    for start in range(0, count, SUMS):
        t = start + tl.arange(0, SUMS)
        totals += tl.load(sums + i * count + t, mask=t < count, other=0)
    error = tl.div_rn(tl.sum(totals), size.to(tl.float32))
    if FORM == "cps":
        tl.store(out + i, -error)
    else:
        deviation = tl.load(std + i)
        exact = deviation == 0
        deviation = tl.where(exact, 1.0, deviation)
        log_prob = -tl.div_rn(error, 2 * deviation * deviation) - tl.log(deviation) - LOG_SQRT_2PI
        tl.store(out + i, tl.where(exact, 0.0, log_prob))


@jit(*STRIDES, *NUMBERS, "size", "chunks")
def _backward_kernel(
    velocity, velocity_b, uncond, uncond_b, sample, sample_b, taken, taken_b, ref, ref_b,
    sigma, sigma_b, sigma_next, sigma_next_b, sigma_max, sigma_max_b,
    sigma_number, sigma_next_number, sigma_max_number, level, cosine, guidance, size, chunks,
    grad_mean, grad_mean_b, grad_next, grad_next_b, grad_rows, grad_rows_b, grad, divisor, slopes,
    d_velocity, d_uncond, d_sample, beta,
    KIND: tl.constexpr, FORM: tl.constexpr, KL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same elements' gradients of mean, of next_sample = mean + std·noise, and of a function of the log-prob.

    That is slopes·log_prob + beta·KL, or the log-prob itself without slopes; what reaches it is
    grad_rows + grad/divisor.
    """
    program = tl.program_id(0).to(tl.int64)
    i, chunk = program // chunks, program % chunks
    if ALIGNED:
        size = size // 16 * 16
    a, b, deviation, s = _coefficients(
        _sigma(sigma, sigma_b, sigma_number, i), _sigma(sigma_next, sigma_next_b, sigma_next_number, i),
        _sigma(sigma_max, sigma_max_b, sigma_max_number, i), level, cosine, KIND,
    )  # fmt: skip
    of_row = 0.0
    if grad_rows is not None:
        of_row += tl.load(grad_rows + i * grad_rows_b).to(tl.float32)
    if grad is not None:
        of_row += tl.div_rn(tl.load(grad).to(tl.float32), tl.load(divisor))
    of_log_prob = of_row
    if slopes is not None:
        of_log_prob = of_row * tl.load(slopes + i)
    n = size.to(tl.float32)
    if FORM == "cps":
        pull = of_log_prob * tl.div_rn(2.0, n)
    else:
        exact = deviation == 0
        variance = tl.where(exact, 1.0, deviation * deviation)
        pull = tl.where(exact, 0.0, tl.div_rn(of_log_prob, variance * n))
    of_kl = tl.div_rn(2 * beta, n) * of_row * _kl_factor(deviation, s, KL)
    for block in range(BLOCKS):
        index = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        d_mean = tl.zeros((BLOCK,), tl.float32)
        d_guided = tl.zeros((BLOCK,), tl.float32)
        if grad_mean is not None:
            d_mean += _load(grad_mean, grad_mean_b, i, index, inside, ALIGNED)
        if grad_next is not None:
            d_mean += _load(grad_next, grad_next_b, i, index, inside, ALIGNED)
        if grad_rows is not None or grad is not None:
            v, mu = _velocity_and_mean(
                velocity, velocity_b, uncond, uncond_b, sample, sample_b, i, index, inside, a, b, guidance, ALIGNED
            )
            d_mean += pull * (_load(taken, taken_b, i, index, inside, ALIGNED) - mu)
            if ref is not None:
                d = of_kl * (v - _load(ref, ref_b, i, index, inside, ALIGNED))
                if uncond is not None:
                    d *= guidance
                if KL == "velocity":
                    d_guided += d
                else:
                    d_mean += b * d
        d_guided += b * d_mean
        if d_velocity is not None:
            d = d_guided if uncond is None else guidance * d_guided
            tl.store(d_velocity + i * size + index, narrow(d, d_velocity.dtype.element_ty), mask=inside)
        if d_uncond is not None:
            d = (1 - guidance) * d_guided
            tl.store(d_uncond + i * size + index, narrow(d, d_uncond.dtype.element_ty), mask=inside)
        if d_sample is not None:
            tl.store(d_sample + i * size + index, narrow(a * d_mean, d_sample.dtype.element_ty), mask=inside)


class Numbers(NamedTuple):
    """What reaches the ops in `packed`; a σ is None where it comes as a tensor."""

    sigma: float | None
    sigma_next: float | None
    sigma_max: float | None
    noise_level: float
    guidance_scale: float
    beta: float = 0.0
    clip_range: float = 0.0
    advantage_clip: float | None = None
    normalizer: float | None = None


class Step(NamedTuple):
    """What both ops take, in this order and first."""

    velocity: Tensor
    velocity_uncond: Tensor | None
    sample: Tensor
    next_sample: Tensor | None
    ref_velocity: Tensor | None
    sigma: Tensor | None
    sigma_next: Tensor | None
    sigma_max: Tensor | None
    packed: Tensor  # Numbers
    kind: str
    log_prob: str
    kl: str

    @property
    def numbers(self) -> Numbers:
        return Numbers(*unpack(self.packed))

    def empty(self, *shape: int) -> Tensor:
        return self.sample.new_empty(shape, dtype=torch.float32)

    def gradients(self, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """Memory for the gradients of velocity, velocity_uncond and sample; without elements where not needed."""
        given = zip(self[:3], needs, strict=True)
        return tuple(x.new_empty(x.shape) if x is not None and need else self.sample.new_empty(0) for x, need in given)


SCHEMA = schema(Step)
TENSORS, INPUTS = 9, len(Step._fields)


def as_arguments(sample: Tensor, *sigmas: float | Tensor) -> tuple[list[Tensor | None], list[float | None]]:
    """σ's as the ops take them: each a tensor, 0-d or (B,), on the device of `sample`, or else a number."""
    tensors = [sigma.to(sample.device) if isinstance(sigma, Tensor) else None for sigma in sigmas]
    return tensors, [None if isinstance(sigma, Tensor) else sigma for sigma in sigmas]


def _rows(x: Tensor) -> Tensor:
    """(B, ...) -> (B, N) with the N elements side by side; a copy only where they are not."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 else x.contiguous()


def _arguments(step: Step, *others: Tensor | None) -> tuple[int, list[Any], list[Any], dict[str, Any]]:
    """What both kernels are launched with: the number of programs, first and later arguments, and options.

    `others` are (B, ...) tensors like the step's own, and end up among the later arguments, each with its stride.
    """
    n, B = step.numbers, len(step.sample)
    rows = [None if x is None else _rows(x) for x in (*step[:5], *others)]
    size = step.sample.shape[1:].numel()
    chunks = -(-size // (BLOCK * BLOCKS))
    strided = [part for x in rows for part in ((None, 0) if x is None else (x, x.stride(0)))]
    sigmas = [part for x in step[5:8] for part in ((None, 0) if x is None else (x, x.stride(0) if x.dim() else 0))]
    angle = n.noise_level * math.pi / 2
    level, cosine = (math.sin(angle), math.cos(angle)) if step.kind == "cps" else (n.noise_level, 0.0)
    numbers = [*(0.0 if x is None else x for x in n[:3]), level, cosine, n.guidance_scale]
    aligned = size % 16 == 0 and all(x is None or (x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0) for x in rows)
    options = {"KIND": step.kind, "KL": step.kl, "ALIGNED": aligned, "BLOCK": BLOCK, "BLOCKS": BLOCKS}
    limit = REGISTERS["aligned" if aligned else "unaligned"]
    options |= {"num_warps": WARPS, "maxnreg": limit, "enable_fp_fusion": False}
    return B * chunks, [*strided[:10], *sigmas, *numbers, size, chunks], strided[10:], options


def launch_forward(
    step: Step,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    drawn: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor,
    log_probs: Tensor | None = None,
    distances: Tensor | None = None,
    kl_factors: Tensor | None = None,
) -> None:
    """Writes what is not None.

    Args:
        noise, seeds: where the step is drawn from; neither for a replay.
        drawn, mean: (B, ...), contiguous.
        std, log_probs: B elements.
        distances: (B,), −mean (v − v_ref)²: KL = −kl_factors·distances.
    """
    B = len(step.sample)
    programs, first, others, options = _arguments(step, noise)
    sums = programs // max(B, 1) * (BLOCK // 4)  # of a sample
    errors, squares = (None if x is None else step.empty(B * sums) for x in (log_probs, distances))
    launch(
        _forward_kernel, (programs,), *first, *others, seeds, 0 if seeds is None else seeds.stride(0),
        drawn, mean, std, errors, squares, kl_factors, **options,
    )  # fmt: skip
    size = step.sample.shape[1:].numel()
    for parts, out, form in ((errors, log_probs, step.log_prob), (squares, distances, "cps")):
        if parts is not None:
            launch(
                _log_prob_kernel, (B,), parts, std, out, sums, size, FORM=form, SUMS=SUMS,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


@torch.library.custom_op(
    "uae_kernels::flow_step_backward",
    mutates_args=(),
    schema="(Tensor? grad_mean, Tensor? grad_next, Tensor? grad_rows, Tensor? grad, Tensor? slopes, Tensor? divisor, "
    f"{SCHEMA}, bool need_velocity, bool need_uncond, bool need_sample) -> (Tensor, Tensor, Tensor)",
    **UNRECORDED,
)
def _backward(*inputs):
    """Gradients of velocity, velocity_uncond and sample; see `_backward_kernel`."""
    grad_mean, grad_next, grad_rows, grad, slopes, divisor = inputs[:6]
    step, needs = Step(*inputs[6:-3]), inputs[-3:]
    grads = step.gradients(needs)
    programs, first, others, options = _arguments(step, grad_mean, grad_next)
    launch(
        _backward_kernel, (programs,), *first, *others,
        grad_rows, 0 if grad_rows is None else grad_rows.stride(0), grad, divisor, slopes,
        *(g if need else None for g, need in zip(grads, needs, strict=True)), step.numbers.beta,
        FORM=step.log_prob, **options,
    )  # fmt: skip
    return grads


@_backward.register_fake
def _(*inputs):
    return Step(*inputs[6:-3]).gradients(inputs[-3:])
