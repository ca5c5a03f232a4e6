"""The configuration tree: one YAML file, dotted overrides, and every mistake reported at once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PRESETS = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """One or more mistakes in a configuration, a line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class ModelsConfig:
    """Which models, and what of them trains."""

    path: str = "tiny"
    """"tiny" for the small weights that ship with the package, a folder laid out like them, or nothing ("") where the
    keys below name every part; the projector is a new one then."""
    encoder_from: str = ""
    """Instead of the folder's encoder: another folder, or owner/name@commit of a Hub repository."""
    decoder_from: str = ""
    """Instead of the folder's decoder: another folder, or owner/name@commit of a Hub repository."""
    load: Literal["pretrained", "dummy"] = "pretrained"
    """dummy: random weights of the same shapes, made on the device without a file, to try out speed and memory."""
    start: str = ""
    """A checkpoint (a folder of a run's `checkpoints`) whose adapters or weights everything starts from."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of frozen weights. Adapters, projector, reward, and what trains in full are in float32."""
    encoder_quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the frozen language model under its adapter: 4-bit NormalFloat, or LLM.int8()."""
    decoder_quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the frozen transformer blocks under their adapter."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""
    offload: bool = False
    """Keep in host memory what is not computing: encoder, decoder and reward take turns on the device."""
    cache: str = ""
    """Folder for the pooled condition, which the decoder's text encoders make once. Unless given: beside a decoder that
    is in a folder, else in the run's folder."""
    encoder: Literal["lora", "full"] = "lora"
    """What trains of the encoder's language model; vision tower and LM head never do."""
    decoder: Literal["lora", "full"] = "lora"
    """What trains of the decoder's transformer."""
    lora_rank: int = 32
    lora_alpha: int = 64


@dataclass
class DataConfig:
    """Folders of images, or parquet files: a folder of them, a pattern ("data/train-*.parquet"), or owner/name@commit
    of a dataset on the Hub. Captions, from `captions.jsonl` ({file, caption}) or a column, are for stages 0 and 1 and
    for evaluation alone."""

    train: str = "data/tiny/train"
    heldout: str = "data/tiny/heldout"
    image_column: str = "image"
    """Of parquet files: cells with an encoded image, as Hugging Face datasets keep them."""
    caption_column: str = "caption"
    resolution: int = 32
    """Side of the images the decoder draws, in pixels."""


@dataclass
class CaptionConfig:
    """How captions are written."""

    prompt: str = "describe the image"
    image_tokens: int = 0
    """The most tokens an image takes in the encoder's context; larger images are made smaller. 0: as the encoder's
    image processor says."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """Of evaluation, stage 3 and `uae-fast caption`; stage 2 samples with its own."""


@dataclass
class ConditionConfig:
    """How captions are re-read into conditions."""

    adapter: Literal["frozen", "live"] = "frozen"
    """frozen: by the encoder as it was when the decoder was last trained; live: by the encoder as it is."""
    length: int = 512
    """Positions of a condition, template included; shorter captions are padded, longer ones cut."""


@dataclass
class RenderConfig:
    """How reconstructions are drawn."""

    steps: int = 10
    """Euler steps from noise to image."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in rewards and evaluation; 1 leaves the unconditional pass out."""
    negative_prompt: str = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
    batch: int = 8
    """Images drawn at once; a short batch is padded to it, so that a drawing never depends on its neighbours."""


@dataclass
class RewardConfig:
    """What a reconstruction is compared by."""

    encoders: list[str] = field(default_factory=list)
    """Image encoders (CLIP, SigLIP, DINOv2 or DINOv3): folders, or owner/name@commit of Hub repositories. Empty: the
    one in `models.path`."""
    weights: list[float] = field(default_factory=list)
    """Of each encoder's cosine in the reward; equal if empty."""
    heldout: str = ""
    """One more image encoder that is reported beside the reward and never trained on: it shows a reward that is merely
    being pleased."""
    free_tokens: int = 0
    """Length control of stage 2: tokens a caption may have without a loss of reward."""
    token_penalty: float = 0.0
    """Reward taken off in stage 2 for every token beyond `free_tokens`; 0 turns length control off."""


@dataclass
class OptimizerConfig:
    """The optimiser of every stage."""

    name: Literal["adamw8bit", "paged_adamw8bit", "adamw"] = "adamw8bit"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its value, in each stage."""


@dataclass
class Stage0Config:
    """Decoder pre-training on (image, caption) pairs."""

    steps: int = 1000
    images: int = 32
    """Images of a step."""
    micro_batch: int = 32
    lr_decoder: float = 1e-5
    lr_projector: float = 1e-4


@dataclass
class Stage1Config:
    """Cold start: encoder, projector and decoder through the differentiable sampler."""

    steps: int = 20
    images: int = 8
    micro_batch: int = 8
    lr_encoder: float = 1e-5
    lr_projector: float = 1e-4
    lr_decoder: float = 1e-5
    context: Literal["caption", "image"] = "caption"
    """caption: conditions are re-read captions, as in every other stage; image: the states of the answer's tokens with
    the image in sight, as in the released code."""
    sampler_steps: int = 10
    guidance_scale: float = 1.0
    backprop_last_steps: int = 2
    """Gradients run through this many last sampler steps."""


@dataclass
class Stage2Config:
    """Generation for Understanding: GRPO on the encoder's captions."""

    steps: int = 60
    images: int = 8
    group_size: int = 8
    """Captions of an image."""
    micro_batch: int = 64
    """Captions of one forward and backward pass."""
    updates: int = 1
    """Optimiser steps on each rollout."""
    lr: float = 1e-5
    temperature: float = 1.0
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "grpo"
    importance_level: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 1e-6
    """Weight of the KL term to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_importance"] = "k3"
    scale_advantages: Literal["group", "batch", "none"] = "group"


@dataclass
class Stage3Config:
    """Understanding for Generation: flow GRPO on the decoder."""

    steps: int = 60
    images: int = 8
    group_size: int = 8
    """Drawings of a caption."""
    micro_batch: int = 64
    """Drawings of one forward and backward pass, at one step of the sampler."""
    updates: int = 1
    lr: float = 3e-4
    kind: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    noise_level: float = 0.7
    window: int = 3
    """Sampler steps that are drawn with noise and trained on; the ones before are one path shared by a group."""
    window_end: int = 5
    """The window lies inside the first `window_end` sampler steps; where, is drawn anew for every batch."""
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    beta: float = 0.0
    """Weight of the KL term to the decoder as it was when the stage began."""
    kl: Literal["gaussian", "flow_grpo", "velocity"] = "gaussian"
    scale_advantages: Literal["group", "batch", "none"] = "group"
    ema_decay: float = 0.9
    """Of the running mean of the weights, which is what evaluation and the next stage get; 0 turns it off."""


@dataclass
class EvaluateConfig:
    """What is measured on held-out images before and after each stage."""

    images: int = 1024
    gallery: int = 8
    """How many of them go into samples/ and the report."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Optimiser rollouts between checkpoints; the end of every stage has one anyway, which is never pruned."""
    keep: int = 2
    """Checkpoints kept besides the ends of stages."""


@dataclass
class Config:
    """A run."""

    run: str = "runs/tiny"
    """The run's folder; nothing is written outside it."""
    seed: int = 0
    stages: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Stages in the order they run; each starts from the end of the one before."""
    device: str = "auto"
    """"auto" takes a GPU where there is one."""
    reporters: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Besides metrics.jsonl: "tensorboard" or nothing."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stage0: Stage0Config = field(default_factory=Stage0Config)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    stage3: Stage3Config = field(default_factory=Stage3Config)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def leaves(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the tree with its type."""
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for item in fields(cls):
        kind = hints[item.name]
        if is_dataclass(kind):
            found |= leaves(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + item.name] = kind
    return found


def preset_names() -> list[str]:
    """The configurations that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file behind a path or a preset's name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    preset = PRESETS / f"{name}.yaml"
    if path.name == name and preset.is_file():
        return preset
    near = difflib.get_close_matches(path.stem, preset_names(), 1)
    hint = f"; did you mean the preset {near[0]}?" if near else f"; presets: {', '.join(preset_names())}"
    raise ConfigError([f"{name}: no such file and no preset of that name{hint}"])


def load_config(name: str | Path, overrides: list[str] = ()) -> Config:  # type: ignore[assignment]
    """Reads, overrides and checks a configuration.

    Args:
        name: a YAML file, or a preset's name.
        overrides: "key=value" with dotted keys; values are read as YAML.

    Raises:
        ConfigError: with every mistake, each naming file and line, the key, and the nearest valid choice.
    """
    path = find_config(str(name))
    problems: list[str] = []
    given: dict[str, tuple[str, Any]] = {}  # key -> (where, value)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([f"{where}: not valid YAML: {getattr(error, 'problem', error)}"]) from None
    if root is not None:
        _collect(root, "", str(path), given, problems)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"command line: {override!r} is not key=value")
            continue
        try:
            given[key] = ("command line", yaml.safe_load(text))
        except yaml.YAMLError:
            problems.append(f"command line: {key}: {text!r} is not valid YAML")

    known = leaves()
    tree = OmegaConf.structured(Config)
    for key, (where, value) in given.items():
        if key not in known:
            problems.append(f"{where}: {key}: {_unknown(key, known)}")
            continue
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException as error:
            problems.append(f"{where}: {key}: {str(error).splitlines()[0]}")
    config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    for key, message in invariants(config):
        where = given[key][0] if key in given else "default"
        problems.append(f"{where}: {key}: {message}")
    if problems:
        raise ConfigError(problems)
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _collect(node: yaml.Node, prefix: str, file: str, given: dict, problems: list[str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        problems.append(
            f"{file}:{node.start_mark.line + 1}: {prefix.rstrip('.') or 'the file'}: expected keys and values"
        )
        return
    groups = {key.rsplit(".", 1)[0] for key in leaves() if "." in key}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, where = prefix + str(key_node.value), f"{file}:{key_node.start_mark.line + 1}"
        if key in seen:
            problems.append(f"{where}: {key}: given twice")
        seen.add(key)
        if key in groups:
            _collect(value_node, f"{key}.", file, given, problems)
        else:
            try:
                given[key] = (where, yaml.SafeLoader("").construct_object(value_node, deep=True))
            except yaml.YAMLError as error:
                problems.append(f"{where}: {key}: {getattr(error, 'problem', error)}")


def _unknown(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if not near and "." in key:
        group = key.rsplit(".", 1)[0]
        inside = [name.rsplit(".", 1)[1] for name in known if name.startswith(f"{group}.")]
        if inside:
            return f"unknown key; {group} has {', '.join(inside)}"
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key"


def invariants(config: Config) -> list[tuple[str, str]]:
    """Contradictions between keys, as (key, message); all of them, before any model loads."""
    c, found = config, []

    def need(holds: bool, key: str, message: str) -> None:
        if not holds:
            found.append((key, message))

    for key, value in _numbers(config):
        need(value >= 0 or key == "seed", key, f"{value} is negative")
    need(bool(c.stages), "stages", "no stage to run; choose from 0, 1, 2, 3")
    for stage in c.stages:
        need(stage in (0, 1, 2, 3), "stages", f"there is no stage {stage}; choose from 0, 1, 2, 3")
    for reporter in c.reporters:
        need(reporter == "tensorboard", "reporters", f"no reporter {reporter!r}; choose from tensorboard")
    need(len(c.optimizer.betas) == 2, "optimizer.betas", "two numbers are needed")
    need(c.optimizer.max_grad_norm > 0, "optimizer.max_grad_norm", "must be above 0")
    for name in ("stage0", "stage1", "stage2", "stage3"):
        stage = getattr(c, name)
        rows = stage.images * getattr(stage, "group_size", 1)
        need(stage.images >= 1, f"{name}.images", "at least 1 image a step")
        need(stage.micro_batch >= 1, f"{name}.micro_batch", "at least 1")
        if stage.micro_batch >= 1 and rows % stage.micro_batch:
            found.append(
                (
                    f"{name}.micro_batch",
                    f"{rows} samples a step do not divide into micro-batches of {stage.micro_batch}",
                )
            )
        if hasattr(stage, "group_size"):
            need(stage.group_size >= 2, f"{name}.group_size", "a group of 1 has no advantage: at least 2")
            need(stage.updates >= 1, f"{name}.updates", "at least 1")
    need(c.render.steps >= 2, "render.steps", "at least 2")
    need(c.render.batch >= 1, "render.batch", "at least 1")
    need(c.stage1.sampler_steps >= 1, "stage1.sampler_steps", "at least 1")
    need(
        1 <= c.stage1.backprop_last_steps <= c.stage1.sampler_steps,
        "stage1.backprop_last_steps",
        f"must lie between 1 and stage1.sampler_steps = {c.stage1.sampler_steps}",
    )
    need(c.stage3.window >= 1, "stage3.window", "at least 1")
    need(
        c.stage3.window <= c.stage3.window_end,
        "stage3.window",
        f"{c.stage3.window} steps do not fit into the first {c.stage3.window_end} (stage3.window_end)",
    )
    need(
        c.stage3.window_end < c.render.steps,
        "stage3.window_end",
        f"must be below render.steps = {c.render.steps}: the last step is never trained on",
    )
    need(c.stage3.noise_level > 0, "stage3.noise_level", "must be above 0: a path without noise has no log-prob")
    need(c.stage3.ema_decay < 1, "stage3.ema_decay", "must be below 1")
    need(c.stage2.temperature > 0, "stage2.temperature", "must be above 0")
    need(c.caption.temperature > 0, "caption.temperature", "must be above 0")
    need(c.caption.max_new_tokens >= 1, "caption.max_new_tokens", "at least 1")
    need(c.models.lora_rank >= 1, "models.lora_rank", "at least 1")
    for part in ("encoder", "decoder"):
        quantization = getattr(c.models, f"{part}_quantization")
        key = f"models.{part}_quantization"
        need(
            quantization == "none" or getattr(c.models, part) == "lora",
            key,
            f"quantised weights do not train in full: set models.{part} to lora",
        )
        need(
            quantization != "int8" or not c.models.offload,
            key,
            "int8 weights cannot be moved by models.offload: choose nf4",
        )
        need(
            getattr(c.models, part) == "lora" or not c.models.offload,
            f"models.{part}",
            "what trains in full keeps copies that models.offload cannot move: choose lora",
        )
    encoders, weights = c.reward.encoders or [""], c.reward.weights
    need(
        len(weights) in (0, len(encoders)),
        "reward.weights",
        f"{len(weights)} weights for {len(encoders)} encoders (reward.encoders)",
    )
    need(
        all(weight >= 0 for weight in weights) and (not weights or sum(weights) > 0),
        "reward.weights",
        "must not be negative, nor all 0",
    )
    need(c.checkpoint.every >= 1, "checkpoint.every", "at least 1")
    need(c.checkpoint.keep >= 1, "checkpoint.keep", "at least 1")
    return found


def _numbers(config: Any, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            found += _numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float):
            found.append((prefix + item.name, value))
    return found
