"""How much memory a run needs on its device, told from shapes alone: every number here is *predicted*.

The stages' own code runs on tensors without memory (PyTorch's fake tensors), its ops as on a GPU unless the device is a
CPU, and what is alive is added up: weights, adapters, gradients and activations are those of the code, not of formulas.
Of a decoder whose modulations a table holds, the layers that make them are not on the device. Formulas are the weights
that bitsandbytes keeps, the optimiser's state, the cache of `caption.engine: generate`, what a CPU casts for
elementwise operators, the head's Jacobian in stage 2, and a sum for CUDA itself.
Not counted: the vision tower's activations (no gradients, one image after another), what an op or a library holds only
while it computes (`linear_logprobs`: about 0.16 GiB on a GPU, 2 MiB on a CPU; cuDNN's and cuBLAS's workspaces; the
weight that NF4 widens), the allocator's rounding to 512 B and its fragmentation, the copies of activations that
LLM.int8() makes, the 256 MiB at most of gradients that several processes send together when the activations are gone,
what `same_sampler.fp8` saves and `same_sampler.graph` takes, and the moment of loading, when the
layers that make modulations are there as well.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from uae_kernels.mmdit.modulation_table import modulation_layers

from ..config import Config, ConfigError, accelerated
from ..environment import launched
from . import Models
from .decoder import Decoder
from .encoder import READER, Prompt
from .loading import load_models, schedules
from .sources import find_sources, image_tokens

GIB = 2**30
CUDA_BYTES = int(0.8 * GIB)  # context, libraries and workspaces: assumed
PARTS = ("encoder", "projector", "decoder", "reward", "heldout")
DRAWN = ("reading captions", "drawing")  # the phases in batches of `render.batch`
WORD = "w20"  # of the random model's tokenizer


@dataclass(frozen=True)
class Phase:
    """A phase of a stage's step.

    Attributes:
        name: for a reader.
        resident: bytes of weights, adapters and optimiser state on the device meanwhile.
        passing: the most bytes of everything else that is alive at once: activations, gradients, caches, data.
    """

    name: str
    resident: int
    passing: int

    @property
    def total(self) -> int:
        return self.resident + self.passing + CUDA_BYTES


class Memoryless(FakeTensorMode):
    """PyTorch's fake tensors, standing for those of a GPU of compute capability `capability` (0: of a CPU)."""

    def __init__(self, capability: int):
        super().__init__(allow_non_fake_inputs=True)
        self.capability = capability


class Alive(TorchDispatchMode):
    """Within, counts the bytes of the storages that operators make and nobody has let go; `most` is their peak.

    Args:
        given: modules whose tensors do not count.
        on_a_cpu: whether operators are a CPU's, see `casts`.
    """

    def __init__(self, *given: nn.Module, on_a_cpu: bool = False):
        super().__init__()
        self.now = self.most = 0
        self.on_a_cpu = on_a_cpu
        tensors = [t for module in given for t in (*module.parameters(), *module.buffers())]
        self.sizes = {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        if self.on_a_cpu:
            self.most = max(self.most, self.now + casts(function, (*args, result)))
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._part, key)

    def _part(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def casts(function: Any, tensors: tuple[Any, ...]) -> int:
    """Bytes of the copies that a CPU makes of an elementwise operator's tensors, to have them in one dtype meanwhile.

    A GPU's kernels cast number by number.
    """
    operands = [x for x in tensors if isinstance(x, Tensor) and x.dim() and x.dtype != torch.bool]
    if torch.Tag.pointwise not in function.tags or not operands:
        return 0
    common = reduce(torch.promote_types, (x.dtype for x in operands))
    return sum(x.numel() * common.itemsize for x in operands if x.dtype != common)


def predict(config: Config, stages: Sequence[int] = ()) -> dict[int, list[Phase]]:
    """The phases of each configured stage (or of `stages`) with their memory.

    Raises:
        ConfigError: as `find_sources`.
    """
    predictor = Predictor(config)
    return {stage: predictor.phases(stage) for stage in stages or config.stages}


def worst(phases: Sequence[Phase]) -> Phase:
    """The phase that needs the most."""
    return max(phases, key=lambda phase: phase.total)


def advise(config: Config, stage: int, phases: Sequence[Phase], limit: int) -> tuple[Config, list[str], Phase]:
    """What to change until a stage fits into `limit` bytes, one thing after another, each predicted anew.

    Returns:
        the changed configuration, the changes ("key=value"), and the phase that needs the most with all of them; it may
        still be above the limit, when nothing is left to change.
    """
    config, changes, needs = copy.deepcopy(config), dict[str, str](), worst(phases)
    while needs.total > limit and (lever := next(levers(config, stage, needs), None)) is not None:
        key, value = lever
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
        changes[key] = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        needs = worst(predict(config, [stage])[stage])
    return config, list(changes.values()), needs


def levers(config: Config, stage: int, needs: Phase) -> Iterator[tuple[str, Any]]:
    """What would make a stage need less, the mildest first, as (key, new value)."""
    models, settings = config.models, getattr(config, f"stage{stage}")
    quantization = {part: getattr(models, f"{part}_quantization") for part in ("encoder", "decoder")}
    adapted = [part for part in quantization if getattr(models, part) == "lora"]
    fewer = {"drawing": "render.batch", "updating": f"stage{stage}.micro_batch"}.get(needs.name, f"stage{stage}.images")
    if needs.name == "encoding images":
        fewer = f"stage{stage}.micro_batch"
    group, name = fewer.split(".")
    count = getattr(getattr(config, group), name)
    samples = settings.images // 2 * getattr(settings, "group_size", 1)
    halves = count % 2 == 0 and (name != "images" or samples % settings.micro_batch == 0)

    if models.dtype == "float32" and adapted:
        yield "models.dtype", "bfloat16"
    if needs.name == "updating" and not models.gradient_checkpointing:
        yield "models.gradient_checkpointing", True
    if halves and needs.passing > needs.resident // 8:
        yield fewer, count // 2
    if len(adapted) == 2 and not models.offload and "int8" not in quantization.values():
        yield "models.offload", True
    for part in adapted:
        if quantization[part] == "none":
            yield f"models.{part}_quantization", "nf4"
    if halves:
        yield fewer, count // 2


def fill(config: Config, limit: int) -> list[str]:
    """The largest batches with which every stage is predicted to fit into `limit` bytes, as changes "key=value".

    They are `render.batch` and each stage's `micro_batch`: what is computed at once. What is trained on stays as it is,
    and gradients agree up to rounding.

    Raises:
        ConfigError: a stage does not fit with the smallest of them, with what would make it.
    """
    config, changes = copy.deepcopy(config), []
    drawn = [n for n in config.stages if n in (2, 3)]
    keys = [("render", "batch", [1 << i for i in range(7)], drawn)] if drawn else []
    for number in config.stages:
        settings = getattr(config, f"stage{number}")
        settings.images = max(1, settings.images // launched())
        samples = settings.images * getattr(settings, "group_size", 1)
        sizes = [n for n in range(1, samples + 1) if samples % n == 0]
        keys.append((f"stage{number}", "micro_batch", sizes, [number]))
    for group, name, sizes, stages in keys:
        section = getattr(config, group)

        def fits(size: int, section=section, name=name, stages=stages) -> bool:
            setattr(section, name, size)
            found = [phase for phases in predict(config, stages).values() for phase in phases]
            # A stage's update has a batch of its own, which comes later
            return all(p.total <= limit for p in found if name == "micro_batch" or p.name in DRAWN)

        size = sizes[max(0, bisect_left(sizes, True, key=lambda n: not fits(n)) - 1)]
        if not fits(size):
            number = stages[0]
            _, needed, needs = advise(config, number, predict(config, [number])[number], limit)
            hint = f"with {' '.join(needed)} it would need {needs.total / GIB:.2f}" if needed else "nothing to change"
            raise ConfigError([f"stage {number} does not fit {limit / GIB:g} GiB, {group}.{name}={size}: {hint}"])
        changes.append(f"{group}.{name}={size}")
    return changes


class Predictor:
    """Runs a configuration's phases on models without memory."""

    def __init__(self, config: Config):
        self.given = config
        self.config = copy.deepcopy(config)
        self.config.device, self.config.models.load, self.config.models.start = "meta", "dummy", ""
        for key in ("encoder_quantization", "decoder_quantization"):
            if getattr(config.models, key) != "fp8":  # bitsandbytes has no layers without memory
                setattr(self.config.models, key, "none")
        sampler = self.config.same_sampler
        self.config.models.offload = sampler.accelerate = sampler.graph = sampler.fp8 = False
        sampler.attention = "auto"
        # Sampler steps with gradients are computed again one by one: all but one keep no more than their latents.
        self.config.stage1.backprop_last_steps = 1
        self.prompt_length = image_tokens(config, find_sources(config).encoder)
        self.models = load_models(self.config)
        encoder = self.models.encoder
        if encoder.adapters is not None:
            encoder.adapters.add_adapter(READER, encoder.adapters.peft_config["default"])
            encoder.to("meta")
        encoder.freeze_reader()
        self.prompt_length += len(encoder.tokenizer(encoder._prompt_text)["input_ids"]) - 1  # one was the image's
        self.parts = {name: part for name in PARTS if (part := getattr(self.models, name)) is not None}
        self.mode = Memoryless(0 if config.device == "cpu" else 90)
        for name in ("encoder", "decoder"):
            adapt_as_quantized(self.parts[name], getattr(config.models, f"{name}_quantization"))
        with self.mode:
            feign(self.parts.values())
            if accelerated(config):  # bitsandbytes' layers have no table
                tabulated = config.models.decoder_quantization in ("none", "fp8")
                self.models.decoder.accelerate("auto", schedules(config) if tabulated else ())

    # ---- what stays -------------------------------------------------------------------------------------------------

    def weight_bytes(self, name: str) -> int:
        """Bytes of a part's weights, adapters and buffers as the configuration keeps them."""
        part = self.parts[name]
        kind = getattr(self.given.models, f"{name}_quantization", "none")
        tensors = {t: t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers())}
        if name == "decoder":
            tensors |= {t: t.nbytes for t in table_tensors(part)}
            tensors |= {weight: 0 for layer in waiting_layers(part) for weight in layer.parameters()}
        if kind in ("nf4", "int8"):
            for layer in quantisable(self.models, name):
                tensors[layer.weight] = quantized_bytes(layer, kind)
        return sum(tensors.values())

    def resident(self, names: tuple[str, ...], state: int) -> int:
        """Bytes that stay while the parts `names` compute: of all parts, or with `models.offload` of these."""
        here = {*names, "projector"} & self.parts.keys() if self.given.models.offload else self.parts.keys()
        return sum(map(self.weight_bytes, here)) + state

    def state_bytes(self, stage: Any, parameters: list[nn.Parameter]) -> int:
        """Bytes of the optimiser's moments and of the running mean."""

        def moments(p: nn.Parameter) -> int:
            small = p.numel() < 4096 or self.given.optimizer.name == "adamw"
            return p.numel() * 8 if small else p.numel() * 2 + -(-p.numel() // 256) * 8

        mean = 4 if getattr(stage.settings, "ema_decay", 0) else 0
        return sum(moments(p) + mean * p.numel() for p in parameters)

    # ---- what passes ------------------------------------------------------------------------------------------------

    def phases(self, number: int) -> list[Phase]:
        """The phases of a stage."""
        from ..trainer import STAGES

        stage = STAGES[number](self.config, self.models)
        parameters = [p for group in stage.groups() for p in group["params"]]
        state = self.state_bytes(stage, parameters)
        settings, batch = stage.settings, self.config.render.batch
        images = settings.images
        rows = images * getattr(settings, "group_size", 1)
        read = {0: settings.micro_batch, 2: batch}.get(number, images)
        with self.mode:
            steps: list[tuple[str, tuple[str, ...], Callable[[], Any]]] = []
            if number in (2, 3):
                steps.append(
                    (
                        "writing captions",
                        ("encoder",),
                        lambda: self.write(images, rows if number == 2 else images, alive),
                    )
                )
            if number != 1:
                steps.append(("reading captions", ("encoder",), lambda: self.read(read, rows if number == 2 else read)))
            if number in (2, 3):
                steps.append(("drawing", ("decoder",), lambda: self.draw(rows, batch)))
                steps.append(("rewarding", ("reward", "heldout"), lambda: self.reward(rows)))
            if number == 0:
                steps.append(("encoding images", ("decoder",), lambda: self.encode(settings.micro_batch)))
            trains = {0: ("decoder",), 1: ("encoder", "decoder", "reward"), 2: ("encoder",), 3: ("decoder",)}[number]
            steps.append(("updating", trains, lambda: getattr(self, f"update{number}")(stage)))
            passing = []
            for _, _, step in steps:
                with Alive(*self.parts.values(), on_a_cpu=self.given.device == "cpu") as alive:
                    more = step()
                passing.append(alive.most + (more or 0))
                for parameter in parameters:
                    parameter.grad = None
        # After all of them: a stage that computes modulations has their layers on the device in every phase
        found = [Phase(step[0], self.resident(step[1], state), most) for step, most in zip(steps, passing, strict=True)]
        self.models.freeze()
        return found

    def prompt(self, rows: int) -> Prompt:
        """A prompt of `rows` images, each of as many tokens as an image may have."""
        ids = torch.zeros(rows, self.prompt_length, dtype=torch.long)
        features = torch.zeros(1, self.models.encoder.head.weight.shape[1])
        return Prompt(ids, ids == 0, ids.expand(3, -1, -1), (features,) * rows, (self.prompt_length,) * rows)

    @torch.no_grad()
    def write(self, images: int, rows: int, alive: Alive) -> int:
        """The prompts, and a token of each caption.

        Of transformers' own generation: the prompts alone; returns the bytes by which caches and logits of whole
        captions exceed their peak.
        """
        from transformers import DynamicCache

        from ..rollout.decoding import Writing

        encoder = self.models.encoder
        if self.config.caption.engine == "uae":
            draws = torch.zeros(rows, self.config.caption.max_new_tokens, dtype=torch.float64)
            with encoder.acting_as("policy") as language_model:
                Writing(encoder, language_model, self.prompt(images), draws, 1.0).step()
            return 0
        prompt = self.prompt(rows)
        text = encoder.model.config.text_config
        cache = DynamicCache(config=text)
        encoder.model.model.language_model(
            inputs_embeds=encoder.embed(prompt), attention_mask=prompt.mask.long(), position_ids=prompt.positions,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        length = self.prompt_length + self.config.caption.max_new_tokens
        width = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
        layer = rows * length * width * encoder.model.dtype.itemsize
        # A layer's cache is copied as it grows; logits, softmax and sums of the vocabulary are in fp32 and fp64.
        return max(0, layer * (text.num_hidden_layers + 1) + rows * text.vocab_size * (3 * 4 + 8) - alive.most)

    @torch.no_grad()
    def read(self, batch: int, rows: int) -> int:
        """One batch of captions; returns the bytes of the other rows' contexts."""
        context = self.models.condition([WORD] * batch)
        return max(0, rows - batch) * context[0].numel() * context.element_size()

    @torch.no_grad()
    def draw(self, rows: int, batch: int) -> int:
        """One batch of drawings; returns the bytes of the other rows' contexts and images."""
        from ..rollout.renders import Guidance, ode_path

        decoder, render, side = self.models.decoder, self.config.render, self.config.data.resolution
        context = self.context(batch)
        guidance = Guidance(render.guidance_scale, context[:1])
        latents = ode_path(decoder, self.latents(batch), context, decoder.sigmas(render.steps)[:3], batch, guidance)
        decoder.decode(latents)
        return max(0, rows - batch) * (context[0].numel() + 3 * side**2) * 4

    @torch.no_grad()
    def reward(self, rows: int) -> None:
        images = torch.zeros(rows, 3, self.config.data.resolution, self.config.data.resolution)
        for reward in (self.models.reward, self.models.heldout):
            if reward is not None:
                reward.embed(images)

    @torch.no_grad()
    def encode(self, images: int) -> None:
        self.models.decoder.encode(torch.zeros(images, 3, self.config.data.resolution, self.config.data.resolution))

    def latents(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self.models.decoder.latent_shape(self.config.data.resolution))

    def context(self, rows: int) -> Tensor:
        width = self.models.decoder.transformer.config.joint_attention_dim
        return torch.zeros(rows, self.config.condition.length, width)

    def update0(self, stage: Any) -> None:
        from ..stages.decoder_pretrain import Pairs

        rows, length = stage.settings.images, self.config.condition.length
        encoder = self.models.encoder
        states = torch.zeros(rows, length, encoder.head.weight.shape[1], dtype=encoder.model.dtype)
        mask = torch.ones(rows, length, dtype=torch.bool)
        pairs = Pairs(self.latents(rows), states, mask, torch.full((rows,), 0.5), self.latents(rows), None)
        stage.loss(pairs, slice(0, stage.settings.micro_batch))[0].backward()

    def update1(self, stage: Any) -> int:
        from ..stages.cold_start import Answers

        rows = stage.settings.images
        prompt = self.prompt(rows) if stage.settings.context == "image" else None
        caption = " ".join([WORD] * self.config.condition.length)
        source = self.models.reward.embed(torch.zeros(1, 3, 8, 8)).detach().expand(rows, -1)
        answers = Answers([caption] * rows, source, self.latents(rows), prompt)
        stage.loss(answers, slice(0, stage.settings.micro_batch))[0].backward()
        latents = self.latents(stage.settings.micro_batch)
        return (self.given.stage1.backprop_last_steps - 1) * latents.numel() * 4

    def update2(self, stage: Any) -> None:
        from ..rollout.captions import Captions
        from ..stages.generation_for_understanding import CaptionRollout

        rows, length = stage.settings.micro_batch, self.config.caption.max_new_tokens
        ids, zeros = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length)
        captions = Captions(ids, ids == 0, [""] * rows, zeros)
        prompt = self.prompt(-(-rows // stage.settings.group_size))
        rollout = CaptionRollout(prompt, captions, [length] * rows, torch.zeros(rows), zeros, {}, zeros)
        FrozenHead.apply(stage.states(rollout, slice(0, rows), "policy")).sum().backward()

    def update3(self, stage: Any) -> None:
        from ..rollout.renders import Guidance, Trajectory
        from ..stages.understanding_for_generation import DrawingRollout

        settings = stage.settings
        drawings = settings.images * settings.group_size
        samples = settings.window * drawings
        levels = self.models.decoder.sigmas(self.config.render.steps)[: settings.window + 1]
        side = self.config.data.resolution
        path = Trajectory(
            self.latents(samples), self.latents(samples), torch.zeros(samples), levels, torch.tensor(0.9),
            self.context(drawings), None, torch.zeros(drawings, 3, side, side),
        )  # fmt: skip
        reference = self.latents(samples) if settings.beta else None
        guidance = Guidance(settings.guidance_scale, path.context[:1])
        rollout = DrawingRollout(path, torch.zeros(drawings), reference, {}, guidance)
        stage.loss(rollout, slice(0, settings.micro_batch))[0].backward()


class FrozenHead(torch.autograd.Function):
    """What `linear_grpo_loss` keeps of a frozen head: the Jacobian of each row's log-prob, (B, T, H) in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden, dtype=torch.float32))
        return hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (jacobian,) = ctx.saved_tensors
        return torch.empty_like(jacobian, dtype=torch.float32) * gradient.unsqueeze(-1)


def waiting_layers(decoder: Decoder) -> list[nn.Module]:
    """The modulation layers whose weights are in the host's memory, for the table is in use."""
    return [] if decoder.table is None else list(modulation_layers(decoder.transformer).values())


def table_tensors(decoder: Decoder) -> list[Tensor]:
    """What a table that is kept, in use or not, has on the device."""
    made = decoder._table
    return [] if made is None else [made.timesteps, made.values]


def quantisable(models: Models, name: str) -> Iterator[nn.Linear]:
    """The linear layers of a part that quantisation replaces."""
    inside = {
        "encoder": models.encoder.model.model.language_model.layers,
        "decoder": models.decoder.transformer.transformer_blocks,
    }
    for path, module in inside[name].named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in path:
            yield module


def quantized_bytes(layer: nn.Linear, kind: str) -> int:
    """Bytes of a layer's quantised weight with its scales and tables."""
    count = layer.weight.numel()
    if kind == "int8":
        return count + 4 * layer.out_features
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def adapt_as_quantized(part: nn.Module, kind: str) -> None:
    """Has adapters compute as peft's do over layers of bitsandbytes, of which they take the result's dtype."""
    from peft.tuners import lora

    if kind in ("nf4", "int8"):
        for module in part.modules():
            if type(module) is lora.Linear:
                module.__class__ = lora.Linear4bit if kind == "nf4" else lora.Linear8bitLt


def feign(parts: Iterable[nn.Module]) -> None:
    """Within a fake mode: makes the modules' tensors, on the "meta" device so far, fake ones of a CPU."""
    made: dict[Tensor, Tensor] = {}
    for module in (module for part in parts for module in part.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
                tensors[name] = made[tensor]  # type: ignore[assignment]
