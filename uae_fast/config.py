"""The configuration tree: one YAML file, dotted overrides, and every mistake reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from .files import write_whole
from .text import nearest, short

PRESETS = Path(__file__).parent / "configs"
MOMENTS = ("before", "stage0", "stage1", "stage2", "stage3")  # when held-out images are measured, and runs looked at


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
    """Inner width of the adapters: on every linear layer of the language model, on those of the decoder's attention."""
    lora_alpha: int = 64
    """An adapter's product is scaled by alpha / rank."""


@dataclass
class DataConfig:
    """Folders of images, or parquet files: a folder of them, a pattern ("data/train-*.parquet"), or owner/name@commit
    of a dataset on the Hub. Captions, from `captions.jsonl` ({file, caption}) or a column, are for stages 0 and 1 and
    for evaluation alone."""

    train: str = "data/tiny/train"
    """What the stages train on."""
    heldout: str = "data/tiny/heldout"
    """What is measured before and after each stage, and never trained on."""
    image_column: str = "image"
    """Of parquet files: cells with an encoded image, as Hugging Face datasets keep them."""
    caption_column: str = "caption"
    """Of parquet files: texts; needed for stages 0 and 1 alone."""
    resolution: int = 32
    """Side of the images the decoder draws, in pixels."""
    max_bad: float = 0.01
    """Share of a folder's images that may be unreadable: they are left out by name. More of them stop the run."""


@dataclass
class CaptionConfig:
    """How captions are written."""

    prompt: str = "describe the image"
    """What the encoder is told beside the image."""
    image_tokens: int = 0
    """The most tokens an image takes in the encoder's context; larger images are made smaller. 0: as the encoder's
    image processor says."""
    max_new_tokens: int = 512
    """The most tokens of a caption; a longer one is cut off."""
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
    """AdamW with moments in 8 bits, by bitsandbytes (paged: they move to host memory where the GPU's is full), or in
    float32, by PyTorch."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the running means of gradients and of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Share of a weight taken off at each step, times the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients of a greater norm, over all that trains, are scaled down to it."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its value, in each stage."""
    max_skipped: int = 3
    """This many steps in a row with a number that is not finite stop the run; each is skipped."""


@dataclass
class StageConfig:
    """What every stage has."""

    steps: int = 60
    """Of the optimiser; of stages 2 and 3, rollouts."""
    images: int = 8
    """Images of a step."""
    micro_batch: int = 64
    """Samples (images, captions or drawings) of one forward and backward pass."""


@dataclass
class PolicyConfig(StageConfig):
    """What stages that learn from groups have."""

    group_size: int = 8
    """Captions of an image, or drawings of a caption."""
    updates: int = 1
    """Optimiser steps on each rollout."""
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation rewards are divided by, once their group's mean is taken off."""


@dataclass
class Stage0Config(StageConfig):
    """Decoder pre-training on (image, caption) pairs."""

    steps: int = 1000
    images: int = 32
    micro_batch: int = 32
    lr_decoder: float = 1e-5
    """Learning rates are peaks, reached after `optimizer.warmup_steps`, in every stage."""
    lr_projector: float = 1e-4


@dataclass
class Stage1Config(StageConfig):
    """Cold start: encoder, projector and decoder through the differentiable sampler."""

    steps: int = 20
    micro_batch: int = 8
    lr_encoder: float = 1e-5
    lr_projector: float = 1e-4
    lr_decoder: float = 1e-5
    context: Literal["caption", "image"] = "caption"
    """caption: conditions are re-read captions, as in every other stage; image: the states of the answer's tokens with
    the image in sight, as in the released code."""
    sampler_steps: int = 10
    """Euler steps from noise to image."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 leaves the unconditional pass out."""
    backprop_last_steps: int = 2
    """Gradients run through this many last sampler steps."""


@dataclass
class Stage2Config(PolicyConfig):
    """Generation for Understanding: GRPO on the encoder's captions."""

    shared_prefix: bool = True
    """Compute the prompt of an image once for all its captions in a micro-batch, which is most where `micro_batch` is
    a multiple of `group_size`, and no padding; false: every caption in a row of its own, behind a copy of its prompt.
    """
    lr: float = 1e-5
    temperature: float = 1.0
    """Of sampling, and of the log-probs in ratios and KL."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "grpo"
    """As `uae_kernels.grpo_loss` names them."""
    importance_level: Literal["token", "sequence"] = "token"
    """A ratio for each token, or one for each caption (GSPO)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Ratios are clipped to [1 - clip_low, 1 + clip_high]."""
    beta: float = 1e-6
    """Weight of the KL term to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_importance"] = "k3"
    """Of the KL term, as `uae_kernels.grpo_loss` names them."""


@dataclass
class Stage3Config(PolicyConfig):
    """Understanding for Generation: flow GRPO on the decoder; a micro-batch is at one step of the sampler."""

    lr: float = 3e-4
    kind: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """How noise enters: the samplers of Flow-GRPO, DanceGRPO and Flow-CPS (`uae_kernels.flow_step`)."""
    noise_level: float = 0.7
    """How much of it; for cps at most 1."""
    window: int = 3
    """Sampler steps that are drawn with noise and trained on; the ones before are one path shared by a group."""
    window_end: int = 5
    """The window lies inside the first `window_end` sampler steps; where, is drawn anew for every batch."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the policy, in rollout and update; 1 leaves the unconditional pass out. The
    unconditional velocity carries no gradient."""
    clip_range: float = 1e-4
    """Ratios are clipped to 1 ± clip_range; they are of log-probs averaged over a latent's elements."""
    advantage_clip: float = 5.0
    """Advantages are clipped to ± this."""
    beta: float = 0.0
    """Weight of the KL term to the decoder as it was when the stage began."""
    kl: Literal["gaussian", "flow_grpo", "velocity"] = "gaussian"
    """How the KL term is computed, as `uae_kernels.flow_grpo_loss` names it."""
    ema_decay: float = 0.9
    """Of the running mean of the weights, which is what evaluation and the next stage get; 0 turns it off."""


@dataclass
class EvaluateConfig:
    """What is measured on held-out images before and after each stage."""

    images: int = 1024
    """Held-out images that are measured: the first so many."""
    gallery: int = 8
    """How many of them go into samples/ and the report."""
    encoders: list[str] = field(default_factory=list)
    """Image encoders of `uae-fast evaluate`, as in reward.encoders; empty: those of the reward, and reward.heldout."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = 50
    """Steps between checkpoints; the end of every stage has one anyway, which is never pruned."""
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
    """Of every random draw."""
    stages: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Stages in the order they run; each starts from the end of the one before."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; or "cpu", "cuda", "cuda:1", "mps"."""
    deterministic: bool = False
    """Whether PyTorch may only use algorithms that repeat bit for bit (`torch.use_deterministic_algorithms`); an
    operation that has none then raises."""
    float32_products: Literal["highest", "high"] = "highest"
    """Of the fp32 that adapters, projector and reward encoders keep whatever `models.dtype` is: in training "high"
    lets a GPU round their factors to TF32 (10 bits, bf16 has 7), which its tensor cores multiply."""
    reporters: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Besides metrics.jsonl: "tensorboard", "wandb", "trackio", or nothing."""
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
    near = nearest(path.stem, preset_names())
    hint = f"did you mean the preset {near}?" if near else f"presets: {', '.join(preset_names())}"
    raise ConfigError([f"{short(name)}: no such file and no preset of that name; {hint}"])


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads, overrides and checks a configuration.

    Args:
        name: a YAML file, or a preset's name.
        overrides: "key=value" with dotted keys. Values are read as YAML; one of a key that holds text, as it stands.

    Raises:
        ConfigError: with every mistake, each naming file and line, the key, and the nearest valid choice.
    """
    from .config_checks import invariants
    from .yaml_values import read_keys, read_value

    known, problems = leaves(), list[str]()
    given = read_keys(find_config(str(name)), overrides, known, problems)
    config = Config()
    for key, (where, node) in given.items():
        if key not in known:
            problems.append(f"{where}: {short(key)}: {_unknown(key, known)}")
            continue
        group, _, leaf = key.rpartition(".")
        try:
            setattr(getattr(config, group) if group else config, leaf, read_value(node, known[key]))
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
    import yaml

    write_whole(path, yaml.safe_dump(asdict(config), sort_keys=False, width=math.inf))


def _unknown(key: str, known: dict[str, Any]) -> str:
    if near := nearest(key[:80], known):
        return f"unknown key; did you mean {near}?"
    group = key.rpartition(".")[0]
    inside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    if inside and group:
        return f"unknown key; {group} has {', '.join(inside)}"
    return f"unknown key; there are {', '.join(dict.fromkeys(name.partition('.')[0] for name in known))}"
