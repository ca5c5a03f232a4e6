"""The configuration tree: one YAML file, dotted overrides, and every mistake reported at once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

PRESETS = Path(__file__).parent / "configs"
TAG = "tag:yaml.org,2002:"
SCALARS = {TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")}
FOLDERS = ("run", "data.train", "data.heldout")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")


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
    encoder_quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Of the frozen language model under its adapter: 4-bit NormalFloat, LLM.int8(), or fp8 (see the next key)."""
    decoder_quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Of the frozen transformer blocks under their adapter. fp8 keeps weights in e4m3 with a scale a row and multiplies
    in `dtype`, in training as in drawing, on any device; `same_sampler.fp8` multiplies in e4m3, and draws alone."""
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
    max_bad: float = 0.01
    """Share of a folder's images that may be unreadable: they are left out by name. More of them stop the run."""


@dataclass
class CaptionConfig:
    """How captions are written."""

    prompt: str = "describe the image"
    image_tokens: int = 0
    """The most tokens an image takes in the encoder's context; larger images are made smaller. 0: as the encoder's
    image processor says."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """Of evaluation, stage 3 and `uae-fast caption`; stage 2 samples with its own. 0 takes the likeliest tokens."""
    engine: Literal["uae", "generate"] = "uae"
    """What samples: uae computes an image's prompt once for all its captions, and drops finished captions from the
    batch; generate is transformers' own generation, for comparison."""


@dataclass
class ConditionConfig:
    """How captions are re-read into conditions."""

    adapter: Literal["frozen", "live"] = "frozen"
    """frozen: by the encoder as it was when the decoder was last trained; live: by the encoder as it is."""
    length: int = 512
    """Positions of a condition, template included; shorter captions are padded, longer ones cut."""
    buckets: list[int] = field(default_factory=list)
    """Shorter lengths, ascending: the decoder sees a caption padded to the smallest that holds it; none pads each to
    `length`. The decoder attends to padding: it draws best with the buckets it was trained with."""


@dataclass
class RenderConfig:
    """How reconstructions are drawn: part of what a reward means."""

    steps: int = 10
    """Euler steps from noise to image."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in rewards and evaluation; 1 leaves the unconditional pass out."""
    negative_prompt: str = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
    batch: int = 8
    """Images drawn at once; a short batch is padded to it, so that a drawing never depends on its neighbours."""


@dataclass
class SameSamplerConfig:
    """How fast images are drawn: the same images, up to rounding."""

    accelerate: bool = True
    """The decoder computes by the fused ops of `uae_kernels.mmdit`; false, or with `models.offload`: by diffusers' own
    modules."""
    attention: Literal["auto", "sdpa", "segments", "flash-attn", "xformers"] = "auto"
    """What computes the accelerated decoder's attention; auto is torch's `scaled_dot_product_attention`, segments is
    `uae_kernels.segment_attention`, which joins no copies of image and text."""
    graph: bool = False
    """All steps of a batch as one CUDA graph, recorded once for each shape: for small batches, where Python cannot keep
    up. Needs a CUDA device; it has not run on one yet."""
    fp8: bool = False
    """Products of the frozen decoder in 8-bit floating-point numbers (e4m3), in stage 2 and evaluation; not the same
    images up to rounding: within the error that is measured when it is calibrated, at its first drawing. A GPU of
    compute capability 8.9 or newer; a CPU emulates it."""
    decode_batch: int = 0
    """Latents turned into images at once, a short batch padded to it; 0 is render.batch."""


@dataclass
class CheaperSamplerConfig:
    """Other images for less: another reward, named in metrics.jsonl and summary.json.

    All but `vae` are for stage 2's rewards, evaluation and the commands; stages 1 and 3 train on full paths."""

    vae: Literal["full", "tiny"] = "full"
    """tiny: an AutoencoderTiny in decoder/vae_tiny turns latents into images."""
    guided_part: float = 1.0
    """Share of the steps, from the first, on which guidance runs; the others leave the unconditional pass out."""
    steps: int = 0
    """Euler steps instead of `render.steps`; 0: as many."""
    reuse: list[int] = field(default_factory=list)
    """Steps, numbered from 0 and ascending, that take the velocity of the step before once more instead of a forward
    pass; never 0."""


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
    max_skipped: int = 3
    """This many steps in a row with a number that is not finite stop the run; each is skipped."""


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
    shared_prefix: bool = True
    """Compute the prompt of an image once for all its captions in a micro-batch, which is most where `micro_batch` is
    a multiple of `group_size`, and no padding; false: every caption in a row of its own, behind a copy of its prompt.
    """
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
    guidance_scale: float = 1.0
    """Classifier-free guidance of the policy, in rollout and update; 1 leaves the unconditional pass out. The
    unconditional velocity carries no gradient."""
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
    encoders: list[str] = field(default_factory=list)
    """Image encoders of `uae-fast evaluate`, as in reward.encoders; empty: those of the reward, and reward.heldout."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Optimiser rollouts between checkpoints; the end of every stage has one anyway, which is never pruned."""
    keep: int = 2
    """Checkpoints kept besides the ends of stages."""
    keep_every: int = 0
    """Those of every so many steps of the run are kept as well; 0: none."""
    keep_best: Literal["none", "reward", "loss"] = "none"
    """Kept as well: the one with the highest reward, or lowest loss, in the mean since the checkpoint before it."""


@dataclass
class Config:
    """A run."""

    run: str = "runs/tiny"
    """The run's folder; nothing is written outside it."""
    seed: int = 0
    stages: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Stages in the order they run; each starts from the end of the one before."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; or "cpu", "cuda", "cuda:1", "mps"."""
    deterministic: bool = False
    """Whether PyTorch may only use algorithms that repeat bit for bit (`torch.use_deterministic_algorithms`); an
    operation that has none then raises."""
    reporters: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Besides metrics.jsonl: "tensorboard" or nothing."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    same_sampler: SameSamplerConfig = field(default_factory=SameSamplerConfig)
    cheaper_sampler: CheaperSamplerConfig = field(default_factory=CheaperSamplerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stage0: Stage0Config = field(default_factory=Stage0Config)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    stage3: Stage3Config = field(default_factory=Stage3Config)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def accelerated(config: Config) -> bool:
    """Whether the decoder computes by fused ops; one that takes turns on the device (`models.offload`) does not."""
    return config.same_sampler.accelerate and not config.models.offload


def cheaper(config: Config, *, drawn: bool = True) -> dict[str, str]:
    """The settings that make the sampler a cheaper one, key and value (of a list "1_3"); none where it is the full one.

    Args:
        drawn: of what `rollout.renders.draw` draws; else of the paths of stages 1 and 3, whose only one is the VAE.
    """
    default, found = CheaperSamplerConfig(), {}
    for item in fields(default):
        value = getattr(config.cheaper_sampler, item.name)
        if value != getattr(default, item.name) and (drawn or item.name == "vae"):
            found[item.name] = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


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
    preset = PRESETS / f"{name}.yaml"
    try:
        if path.is_file():
            return path
        if path.name == name and preset.is_file():
            return preset
    except OSError:  # a name too long for the file system
        pass
    near = difflib.get_close_matches(path.stem, preset_names(), 1)
    hint = f"; did you mean the preset {near[0]}?" if near else f"; presets: {', '.join(preset_names())}"
    raise ConfigError([f"{_short(name)}: no such file and no preset of that name{hint}"])


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads, overrides and checks a configuration.

    Args:
        name: a YAML file, or a preset's name.
        overrides: "key=value" with dotted keys. Values are read as YAML; one of a key that holds text, as it stands.

    Raises:
        ConfigError: with every mistake, each naming file and line, the key, and the nearest valid choice.
    """
    path = find_config(str(name))
    known = leaves()
    problems: list[str] = []
    given: dict[str, tuple[str, yaml.Node]] = {}  # key -> (where, value)
    try:
        root = _compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([_not_yaml(str(path), error)]) from None
    if root is not None:
        _collect(root, "", str(path), given, problems)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"command line: {_short(override)!r} is not key=value")
            continue
        try:
            is_text = known.get(key) is str or get_origin(known.get(key)) is Literal
            node = yaml.ScalarNode(TAG + "str", text) if is_text else _compose(text)
            given[key] = ("command line", node or yaml.ScalarNode(TAG + "null", ""))
        except yaml.YAMLError as error:
            problems.append(_not_yaml(f"command line: {_short(key)}", error))

    config = Config()
    for key, (where, node) in given.items():
        if key not in known:
            problems.append(f"{where}: {_short(key)}: {_unknown(key, known)}")
            continue
        group, _, leaf = key.rpartition(".")
        try:
            setattr(getattr(config, group) if group else config, leaf, _value(node, known[key]))
        except ValueError as error:
            problems.append(f"{where}: {key}: {error}")
    for key, message in invariants(config):
        where = given[key][0] if key in given else "default"
        problems.append(f"{where}: {key}: {message}")
    if problems:
        raise ConfigError(problems)
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False, width=math.inf), encoding="utf-8")
    temporary.replace(path)


def _compose(text: str) -> yaml.Node | None:
    """YAML as nodes: nothing is constructed, an alias is not expanded."""
    try:
        return yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _not_yaml(where: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, OSError):
        return f"{where}: {error.strerror}"
    place = f"{where}:{mark.line + 1}" if mark and where != "command line" else where
    return f"{place}: not valid YAML: {_short(getattr(error, 'problem', None) or str(error).splitlines()[0])}"


def _collect(node: yaml.Node, prefix: str, file: str, given: dict, problems: list[str]) -> None:
    if node.tag == TAG + "null":  # all its lines are commented out
        return
    where = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{where}: {prefix.rstrip('.') or 'the file'}: expected keys and values")
        return
    groups = {key.rpartition(".")[0] for key in leaves() if "." in key}
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be a word, not {_shown(key_node)}")
            continue
        key = prefix + key_node.value
        if key in seen or key in given:
            problems.append(f"{where}: {_short(key)}: given twice, first at {seen.get(key) or given[key][0]}")
        seen[key] = where
        if key in groups:
            _collect(value_node, f"{key}.", file, given, problems)
        else:
            given[key] = (where, value_node)


def _value(node: yaml.Node, kind: Any) -> Any:
    """A node as text, a number, a truth value, one of a Literal's choices, or a list of such.

    Raises:
        ValueError: it is none; the message says what is expected.
    """
    if node.tag not in SCALARS | {TAG + "seq", TAG + "map"}:
        raise ValueError(f"could not determine a constructor for the tag {_short(node.tag)!r}: plain values only")
    if get_origin(kind) is list:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(f"{_shown(node)} is not a list; write [a, b]")
        return [_value(item, get_args(kind)[0]) for item in node.value]
    text = node.value if isinstance(node, yaml.ScalarNode) and node.tag != TAG + "null" else None
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            near = difflib.get_close_matches(text or "", get_args(kind), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{_shown(node)} is none of {', '.join(get_args(kind))}{hint}")
    elif kind is str:
        if text is None:
            raise ValueError(f"{_shown(node)} is not a text")
        if "\0" in text or text != unicode_text(text):
            raise ValueError(f"{_shown(node)} has a character that is no Unicode text")
    elif kind is bool:
        if text is None or text.lower() not in yaml.SafeLoader.bool_values:
            raise ValueError(f"{_shown(node)} is neither true nor false")
        return yaml.SafeLoader.bool_values[text.lower()]
    elif kind is int:
        if text is None or not re.fullmatch(r"[-+]?[0-9][0-9_]{0,17}", text):
            raise ValueError(f"{_shown(node)} is not a whole number of at most 18 digits")
        return int(text)
    else:
        try:
            number = float(text if text is not None else "nothing")
        except ValueError:
            raise ValueError(f"{_shown(node)} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{_shown(node)} is not a finite number")
        return number
    return text


def _shown(node: yaml.Node) -> str:
    """A value as a message shows it."""
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if node.tag == TAG + "null" else repr(_short(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of keys"


def _short(text: str) -> str:
    """Text from outside, in one line of at most 80 characters."""
    line = printable(text[:81])
    return line if len(line) <= 80 else f"{line[:77]}..."


def printable(text: str) -> str:
    """Text that moves no cursor, breaks no line and can be encoded: whatever else there is, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unicode_text(text: str) -> str:
    """Text without halves of surrogate pairs, which no encoding takes: "?" in their place."""
    return text.encode("utf-8", "replace").decode()


def _unknown(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key[:80], known, 1, 0.6)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    group = key.rpartition(".")[0]
    inside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    if inside and group:
        return f"unknown key; {group} has {', '.join(inside)}"
    return f"unknown key; there are {', '.join(dict.fromkeys(name.partition('.')[0] for name in known))}"


def invariants(config: Config) -> list[tuple[str, str]]:
    """Contradictions between keys, as (key, message); all of them, before any model loads."""
    c, found = config, []

    def need(holds: bool, key: str, message: str) -> None:
        if not holds:
            found.append((key, message))

    for key, value in _numbers(config):
        need(value >= 0 or key == "seed", key, f"{value} is negative")
    for key in FOLDERS:
        group, _, leaf = key.rpartition(".")
        need(bool(getattr(getattr(c, group) if group else c, leaf).strip()), key, "names no folder")
    need(bool(c.models.path.strip()) or not c.models.path, "models.path", "names no folder")
    need(
        bool(DEVICE.fullmatch(c.device)),
        "device",
        f"no device {_short(c.device)!r}; choose auto, cpu, cuda, cuda:N or mps",
    )
    need(c.data.resolution >= 1, "data.resolution", "at least 1")
    need(c.data.max_bad < 1, "data.max_bad", "is a share: below 1")
    need(bool(c.stages), "stages", "no stage to run; choose from 0, 1, 2, 3")
    for stage in dict.fromkeys(c.stages):
        need(stage in (0, 1, 2, 3), "stages", f"there is no stage {stage}; choose from 0, 1, 2, 3")
        need(c.stages.count(stage) == 1, "stages", f"stage {stage} is listed twice")
    for reporter in c.reporters:
        need(reporter == "tensorboard", "reporters", f"no reporter {_short(reporter)!r}; choose from tensorboard")
    betas_fit = len(c.optimizer.betas) == 2 and all(0 <= beta < 1 for beta in c.optimizer.betas)
    need(betas_fit, "optimizer.betas", "two numbers of at least 0 and below 1 are needed")
    need(c.optimizer.eps > 0, "optimizer.eps", "must be above 0")
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
    buckets = c.condition.buckets
    need(
        buckets == sorted(set(buckets)) and all(1 <= length < c.condition.length for length in buckets),
        "condition.buckets",
        f"must ascend and lie below condition.length = {c.condition.length}",
    )
    need(
        accelerated(c) or c.same_sampler.attention == "auto",
        "same_sampler.attention",
        "chooses for the accelerated decoder alone; "
        + ("models.offload is true" if c.models.offload else "same_sampler.accelerate is false"),
    )
    graph, kept = c.same_sampler.graph, c.models.decoder_quantization
    need(
        not graph or c.device == "auto" or c.device.startswith("cuda"),
        "same_sampler.graph",
        f"records CUDA graphs, but device = {_short(c.device)}: choose a CUDA device, or false",
    )
    need(
        not graph or not c.models.offload,
        "same_sampler.graph",
        "a graph reads weights where they were recorded, but models.offload moves them: choose false",
    )
    need(
        not graph or kept == "none",
        "same_sampler.graph",
        f"quantised layers are not recorded: models.decoder_quantization is {kept}, choose none, or false here",
    )
    cheap, steps = c.cheaper_sampler, c.cheaper_sampler.steps or c.render.steps
    need(
        cheap.steps < c.render.steps,
        "cheaper_sampler.steps",
        f"{cheap.steps} are no fewer than render.steps = {c.render.steps}; 0 takes as many",
    )
    need(0 < cheap.guided_part <= 1, "cheaper_sampler.guided_part", "is a share: above 0, and at most 1")
    need(
        cheap.guided_part == 1 or c.render.guidance_scale != 1,
        "cheaper_sampler.guided_part",
        "chooses guided steps, but there are none: render.guidance_scale is 1",
    )
    need(
        cheap.reuse == sorted(set(cheap.reuse)) and all(1 <= step < steps for step in cheap.reuse),
        "cheaper_sampler.reuse",
        f"must ascend and lie between 1 and {steps - 1}, the last step: "
        f"{'cheaper_sampler' if cheap.steps else 'render'}.steps = {steps}",
    )
    if c.same_sampler.fp8:
        need(
            accelerated(c),
            "same_sampler.fp8",
            "is of the accelerated decoder alone; "
            + ("models.offload is true" if c.models.offload else "same_sampler.accelerate is false"),
        )
        need(
            c.models.decoder_quantization == "none",
            "same_sampler.fp8",
            f"takes weights as they are; models.decoder_quantization is {kept}"
            + (", which keeps them in e4m3 and multiplies in models.dtype: choose one of the two" * (kept == "fp8")),
        )
        need(
            c.device.partition(":")[0] in ("auto", "cuda", "cpu"),
            "same_sampler.fp8",
            f"runs on a GPU by CUDA, or emulated on a CPU; device is {c.device}",
        )
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
    need(
        c.stage3.kind != "cps" or c.stage3.noise_level <= 1,
        "stage3.noise_level",
        "of stage3.kind = cps is a fraction of a quarter turn: at most 1",
    )
    need(c.stage3.ema_decay < 1, "stage3.ema_decay", "must be below 1")
    need(c.stage2.temperature > 0, "stage2.temperature", "must be above 0")
    need(c.caption.max_new_tokens >= 1, "caption.max_new_tokens", "at least 1")
    need(c.condition.length >= 1, "condition.length", "at least 1")
    need(c.models.lora_rank >= 1, "models.lora_rank", "at least 1")
    need(c.models.lora_alpha >= 1, "models.lora_alpha", "at least 1: at 0 an adapter adds nothing")
    need(c.optimizer.max_skipped >= 1, "optimizer.max_skipped", "at least 1")
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
            "int8 weights cannot be moved by models.offload: choose nf4 or fp8",
        )
        need(
            quantization != "fp8" or c.device != "mps",
            key,
            "keeps e4m3 numbers, which mps does not have: choose none, or another device",
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
