"""The sampler of SD3.5 with guidance: a whole loop of Euler steps, of one transformer with random weights.

Everybody takes the same steps with fp32 latents, guided from one batch of 2N, with one pooled condition: the rows are
of the class "same sampler", which differ by numerics only. Fewer steps, or guidance on some, would be another class.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from uae_kernels import flow_step
from uae_kernels.mmdit import ModulationTable, accelerate_sd3

from uae_fast.speed import peak_flops

from ..counts import Counts, counted
from ..kernels import harness
from ..kernels.harness import Absent, Contestant, Entry, Results, Step, Truth, WrongResults, compare, compiled, explain
from ..kernels.resources import TESTS
from ..rows import OURS, Row

OP = "sampler"
EAGER = "diffusers, eager"
STEPS, GUIDANCE = 10, 4.5
CLASS = "same sampler"
MODELS: dict[str, dict[str, Any]] = {
    "medium": {"layers": 24, "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
    "large": {"layers": 38},
}
TINY = "tiny"  # the model of a CPU
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}  # of PyTorch's own attention
PAIRS, MOST = 5, 10  # visits to each contestant, the fewest that an interval takes; loops of a visit at most
SLACK = 2  # our error may be so many times that of diffusers in the same dtype
WRONG = 0.5  # a relative error that no rounding explains


@dataclass(frozen=True)
class Case(harness.Case):
    """N images of `pixels`² from T text tokens."""

    model: str = TINY
    pixels: int = 512

    @property
    def passes(self) -> int:
        return 1  # a contestant comes but once, for all its visits

    @property
    def steps(self) -> int:
        return 2 if self.quick else STEPS


def cases(device: str, quick: bool) -> Iterator[Case]:
    """In the order of their value: a run that is cut short has the first ones."""
    make = partial(Case, op=OP, device=device, quick=quick)
    if device == "cpu":
        if quick:
            yield make(variant="tiny-64-5", dtype=torch.float32, N=2, T=5, model=TINY, pixels=64)
        return
    for order, (tokens, images) in enumerate(product((333, 512), (8, 1, 32))):
        for model, pixels in (("large", 512), ("medium", 512), ("large", 1024), ("medium", 1024)):
            if not quick or (tokens, images, pixels) == (333, 1, 512):
                size = {"N": images, "T": tokens, "model": model, "pixels": pixels, "order": order}
                yield make(variant=f"{model}-{pixels}-{tokens}", dtype=torch.bfloat16, **size)


def transformer(case: Case, **changes: Any) -> Any:
    """On the case's device and in its dtype from the start: the same weights every time."""
    sys.path.insert(0, str(TESTS))
    try:
        import sd3
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            if case.model == TINY:
                model = sd3.transformer("medium", **changes)
            else:
                model = sd3.transformer(case.model, full_width=True, **sd3.PUBLISHED | MODELS[case.model] | changes)
    finally:
        torch.set_default_dtype(before)
    return cast(model, case.dtype).requires_grad_(False)


def cast(model: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(model, dtype)  # diffusers' own warns of modules that SD3 does not have


def inputs(case: Case, config: Any = None) -> SimpleNamespace:
    """What a sampler starts from; `config` of a transformer like the case's."""
    if config is None:
        config = transformer(replace(case, device="meta")).config
    make, side = partial(torch.randn, device=case.device), case.pixels // 8
    pooled = make(config.pooled_projection_dim).to(case.dtype)
    sigmas = torch.linspace(1, 0, case.steps + 1, device=case.device)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)  # SD3's shift
    return SimpleNamespace(
        latents=make(case.N, config.in_channels, side, side),
        context=make(2 * case.N, case.T, config.joint_attention_dim).to(case.dtype),  # N unconditional rows first
        pooled=pooled,
        pooled_rows=pooled.expand(2 * case.N, -1),
        sigmas=sigmas,
        timesteps=1000 * sigmas[:-1],
    )  # fmt: skip


def first_image(given: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """The inputs of the first image alone: an image does not depend on the others."""
    context = given.context[:: len(given.latents)].to(dtype)
    pooled = given.pooled.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    parts = {"latents": given.latents[:1].to(wide), "sigmas": given.sigmas.to(wide)}
    parts |= {"context": context, "pooled": pooled, "pooled_rows": pooled.expand(2, -1)}
    return SimpleNamespace(**parts, timesteps=1000 * parts["sigmas"][:-1])


def eager(velocity: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Guidance and Euler step as diffusers' pipeline and scheduler take them, but that the latents stay in fp32."""
    uncond, cond = velocity.chunk(2)
    return sample + (sigma_next - sigma) * (uncond + GUIDANCE * (cond - uncond))


def fused(velocity: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    uncond, cond = velocity.chunk(2)
    return flow_step(
        cond, sample, sigma, sigma_next, kind="ode", velocity_uncond=uncond, guidance_scale=GUIDANCE
    ).next_sample


def loop(model: Any, given: SimpleNamespace, combine: Callable = eager) -> Step:
    """A sampler: from the noise to the latents of the images."""

    @torch.no_grad()
    def step() -> Results:
        x = given.latents
        for timestep, (sigma, sigma_next) in zip(given.timesteps, pairwise(given.sigmas), strict=True):
            velocity = model(
                hidden_states=torch.cat([x, x]).to(given.context.dtype),
                encoder_hidden_states=given.context,
                pooled_projections=given.pooled_rows,
                timestep=timestep.expand(2 * len(x)),
                return_dict=False,
            )[0]
            x = combine(velocity, x, sigma, sigma_next)
        return {"latents": x}

    return step


def truth(case: Case, given: SimpleNamespace) -> Truth:
    """The first image in fp32 (of an fp32 case in fp64), of the same weights."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    model = cast(transformer(case), wide)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return {"latents": (slice(0, 1), loop(model, first_image(given, wide))()["latents"].double())}


def accelerated(model: Any, given: SimpleNamespace, attention: str = "auto") -> Step:
    table = ModulationTable(model, given.timesteps, given.pooled)
    return loop(accelerate_sd3(model, modulation_table=table, attention=attention), given, fused)


def attention(name: str | None) -> AbstractContextManager:
    """All attention within is computed by this kernel, or fails; None leaves the choice to PyTorch.

    `set_attention_backend` does nothing on SD3, whose processor calls `scaled_dot_product_attention` itself.
    """
    if name is None:
        return nullcontext()
    if name in KERNELS:
        return sdpa_kernel(KERNELS[name])
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend)


def within(name: str | None, step: Step) -> Step:
    def run() -> Results:
        with attention(name):
            return step()

    return run


def contestants(case: Case) -> list[Contestant]:
    """Ours first: what breaks its promise ends the contest before anything else is timed."""

    def own(given: SimpleNamespace, name: str | None) -> Step:
        if name in ("flash-attn", "segments"):
            return accelerated(transformer(case), given, name)
        return within(name, accelerated(transformer(case), given))

    def optimised(given: SimpleNamespace, name: str | None, quantise: Callable = lambda model: model) -> Step:
        model = compiled(case, quantise(transformer(case)), mode="max-autotune", fullgraph=True)
        return within(name, loop(model, given))

    def on_a_gpu(build: Callable) -> Callable[[Any], Step]:
        def checked(given: SimpleNamespace) -> Step:
            if case.device != "cuda":
                raise Absent("needs a GPU")
            return build(given)

        return checked

    names = [*KERNELS, "flash-attn"]
    found = [Contestant(OURS, lambda given: own(given, None))]
    for name in ("segments", *names):
        found.append(Contestant(OURS, on_a_gpu(partial(own, name=name)), {"attention": name}))
    found.append(Contestant(EAGER, lambda given: loop(transformer(case), given)))
    found.append(Contestant("torch.compile of it", on_a_gpu(partial(optimised, name=None))))
    for name in names:
        found.append(
            Contestant("torch.compile, attention set", on_a_gpu(partial(optimised, name=name)), {"attention": name})
        )
    fp8 = on_a_gpu(partial(optimised, name="cudnn", quantise=to_fp8))
    return [*found, Contestant("torch.compile, attention set, torchao fp8", fp8, {"attention": "cudnn"})]


def to_fp8(model: Any) -> Any:
    """The blocks' products in fp8, a scale for each row; not those of a few rows, which the timestep needs."""
    if torch.cuda.get_device_capability() < (8, 9):
        raise Absent("needs a GPU with fp8 products (compute capability 8.9)")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def wanted(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks") and ".norm" not in name

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=wanted)
    return model


class Contest(harness.Contest):
    """Of contestants that do not fit the device's memory together: the first, ours, stays; the others come in turn.

    Each is built, judged, visited by turns with ours and dropped: its visits are paired with those of ours beside it.
    """

    alone = False

    def __init__(self, op: ModuleType, case: Case):
        torch.manual_seed(0)
        self.case: Case = case
        self.inputs, self.failure, self.launches = op.inputs(case), None, {}
        self.entries = {str(c): Entry(c) for c in op.contestants(case)}
        self.own = next(iter(self.entries))
        try:
            self.truth = op.truth(case, self.inputs)
            self._drop()
            theirs = loop(transformer(case), first_image(self.inputs, case.dtype))()
            self.error = compare(theirs, self.truth, (WRONG, WRONG))[0]["latents"]  # of diffusers, in this dtype
        except Exception as error:  # such as too little memory
            for entry in self.entries.values():
                entry.reason = f"no truth to compare with: {explain(error)}"
        self._drop()
        self.flops = counts_and_bytes(case, EAGER)[0].flops

    def bounds(self, ours: bool) -> tuple[float, float]:
        return (SLACK * self.error, 0.0) if ours else (WRONG, 0.0)

    def time(self, key: str, benchmark: Any) -> str | None:
        """All visits to a contestant, each beside one to ours."""
        if self.failure:
            raise self.failure
        entry, own, gpu = self.entries[key], self.entries[self.own], self.case.device == "cuda"
        if key != self.own and own.reason and not entry.reason:
            entry.reason = f"ours, to stand beside, has no speed: {own.reason}"
        before = torch.cuda.memory_reserved() if gpu else 0
        try:
            if entry.reason:
                return entry.reason
            entry = self.entries[key] = self._admit(entry.contestant, self.truth)
            if entry.step and gpu:
                entry.peak_bytes = peak_reserved(entry.step) - before
                self.launches[key] = launches(entry.step) // self.case.steps
            if entry.step:
                benchmark.pedantic(lambda: self._visit(entry), rounds=2 if self.case.quick else PAIRS)
        except WrongResults as error:
            self.failure = error
            raise
        except Exception as error:
            entry.reason = explain(error)
            for found in (entry.times, entry.visits, entry.beside):
                found.clear()
        finally:
            if key != self.own:
                entry.step = None
                self._drop()
        return entry.reason

    def _visit(self, entry: Entry) -> None:
        """One to a contestant and one to ours, who is first by turns; where that is the same, one."""
        own = self.entries[self.own]
        for each in [own] if entry is own else [own, entry] if len(entry.visits) % 2 else [entry, own]:
            rounds = min(MOST, max(1, int(harness.SECONDS[self.case.device] / max(each.seconds, 1e-6))))
            times = [harness.seconds(self.timed(each)) for _ in range(rounds)]
            each.times += times
            each.visits.append(statistics.median(times))
        entry.beside.append(own.visits[-1])

    def _drop(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.case.device == "cuda":
            torch.cuda.empty_cache()

    def _row(self, entry: Entry) -> Row:
        case, row = self.case, super()._row(entry)
        loop_ms, peak = row["median_ms"], peak_flops(case.device)
        flops = self.flops * case.steps
        return row | {
            "visits_ms": row["visits_ms"][: len(entry.beside)],  # ours is visited beside all others, too
            "beside_ms": [1e3 * t for t in entry.beside],
            "class": CLASS,
            "model": case.model,
            "pixels": case.pixels,
            "steps": case.steps,
            "flops": flops,
            "launches": self.launches.get(str(entry.contestant)),
            "image_step_ms": [row[key] and row[key] / case.N / case.steps for key in ("median_ms", "p20_ms", "p80_ms")],
            "images_per_s": loop_ms and 1e3 * case.N / loop_ms,
            "mfu": loop_ms and peak and flops / (1e-3 * loop_ms * peak),
        }


def peak_reserved(step: Step) -> int:
    """Memory taken from the GPU, weights included, and that of graphs, which the peak of allocations leaves out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_reserved()


def launches(step: Step) -> int:
    """Kernels that run on the GPU in one loop, those of a replayed graph too."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return sum(
        event.device_type() == DeviceType.CUDA and not event.name().startswith(("Mem", "##")) for event in events
    )


def counts_and_bytes(case: Case, contestant: str, **changes: Any) -> tuple[Counts, int]:
    """What one step of the loop launches on a GPU, counted without one, and the bytes of the weights that stay there.

    Args:
        changes: options of the transformer.
    """
    case = replace(case, device="meta", quick=False)
    model = transformer(case, **changes)
    given = inputs(case, model.config)
    once = SimpleNamespace(**vars(given) | {"sigmas": given.sigmas[:2], "timesteps": given.timesteps[:1]})
    table = 0
    # Nobody can compare a meta tensor's values: the table serves whatever comes
    with mock.patch.object(ModulationTable, "serves", lambda *_: True):
        if contestant == OURS:
            accelerated(model, given)
            table = model._uae.table.table.values.nbytes
        step = loop(model, once, fused if contestant == OURS else eager)
        counted(step)  # what happens the first time alone is not counted
        counts = counted(step)
    waiting = {id(p) for layer in model._uae.table.waiting for p in layer.parameters()} if table else set()
    return counts, table + sum(p.nbytes for p in model.parameters() if id(p) not in waiting)
