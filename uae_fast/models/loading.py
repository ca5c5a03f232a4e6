"""Models from folders and from the Hub, and into folders, in the layouts their own libraries read and write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..bnb import import_bitsandbytes
from ..checkpoint import DamagedCheckpoint, checkpoints, load_checkpoint, read_state, verify_checkpoint
from ..config import Config, ConfigError, accelerated, load_config
from ..seeds import derive_seed
from ..text import printable
from . import Models
from .decoder import Decoder
from .dummy import dummy_tokenizer, empty, fill
from .encoder import Encoder
from .fp8 import NAME as FP8_NAME
from .offload import Offloader
from .projector import Projector
from .quantize import quantize_linears
from .reward import ImageEncoder, Reward
from .sources import Source, find_sources, named, pooled_file

MAX_SHARD = "2MB"
PROJECTOR_WIDTH = 8192  # of a new projector (METHOD §1)
IMAGE_ENCODERS = {  # classes of transformers by "model_type"
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
}
IMAGE_PROCESSORS = {
    "clip": "CLIPImageProcessorPil",
    "siglip": "SiglipImageProcessorPil",
    "dinov2": "BitImageProcessorPil",
    "dinov3_vit": "ViTImageProcessorPil",  # its own, the same resizing, needs torchvision
}


def run_device(config: Config) -> torch.device:
    """The device of a run: the configured one, or for "auto" a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError([f"device: {config.device}, but PyTorch finds no GPU here"])
    return torch.device(config.device)


def load_models(config: Config) -> Models:
    """The networks of a configuration, frozen, on its device, with what trains prepared.

    Each part comes from where `models` and `reward` say (`find_sources`): safetensors alone, and no code but the
    libraries' own. Frozen weights are in `models.dtype` or quantised; adapters, the projector, whatever trains in full
    and the reward's image encoders are in fp32.

    Raises:
        ConfigError: a part is missing, has no safetensors or cannot be read, or `models.start` is damaged.
    """
    sources, settings = find_sources(config), config.models
    import_bitsandbytes()
    device, records = run_device(config), records_graphs(config)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs are recorded, and memory is pinned, for the current one
    if config.same_sampler.fp8:
        check_fp8(device)
    given: dict[str, Any] = {"device": device, "seed": None}
    if settings.load == "dummy":
        given["seed"] = derive_seed(config.seed, "dummy")

    def options(part: str) -> dict[str, Any]:
        dtype = torch.float32 if getattr(settings, part) == "full" else getattr(torch, settings.dtype)
        return {"dtype": dtype, "quantization": getattr(settings, f"{part}_quantization"), **given}

    with named(sources.encoder.key, sources.encoder):
        encoder = load_encoder(
            sources.encoder,
            image_tokens=config.caption.image_tokens,
            caption_prompt=config.caption.prompt,
            condition_length=config.condition.length,
            buckets=config.condition.buckets,
            **options("encoder"),
        )
    with named(sources.decoder.key, sources.decoder):
        file, tiny = pooled_file(config, sources.decoder), config.cheaper_sampler.vae == "tiny"
        decoder = load_decoder(sources.decoder, file, tiny=tiny, **options("decoder"))
    if sources.projector is None:
        projector = new_projector(encoder, decoder, derive_seed(config.seed, "projector"))
    else:
        with named("models.path", sources.projector):
            projector = load_projector(sources.projector)
    rewards = [load_image_encoder(source, **given) for source in sources.rewards]
    models = Models(
        encoder,
        projector,
        decoder,
        Reward(rewards, config.reward.weights),
        heldout=Reward([load_image_encoder(sources.heldout, **given)]) if sources.heldout else None,
        reader="reader" if config.condition.adapter == "frozen" else "policy",
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "lora"))
        encoder.prepare_training(settings.encoder, settings.lora_rank, settings.lora_alpha)
        decoder.prepare_training(settings.decoder, settings.lora_rank, settings.lora_alpha)
    if settings.gradient_checkpointing:
        encoder.checkpoint_gradients()
        decoder.checkpoint_gradients()
    if settings.start:
        try:
            verify_checkpoint(Path(settings.start))
        except DamagedCheckpoint as error:
            raise ConfigError([f"models.start: {error}"]) from None
        with named("models.start", settings.start):
            load_checkpoint(Path(settings.start), models)
    if settings.offload:
        models.offloader = Offloader(models, device)
    else:
        models.to(device)
    if accelerated(config):
        accelerate_decoder(decoder, config)
    decoder.records = records
    return models


def records_graphs(config: Config) -> bool:
    """Whether the sampler's loops become CUDA graphs (`same_sampler.graph`).

    Raises:
        ConfigError: they are to, on another device.
    """
    if not config.same_sampler.graph:
        return False
    device = run_device(config).type
    if device != "cuda":
        raise ConfigError([f"same_sampler.graph: records CUDA graphs, but device = {config.device} is {device} here"])
    return True


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError unless products are computed in fp8 on the device, or emulated there."""
    from uae_kernels.mmdit.fp8 import check_device

    try:
        check_device("same_sampler.fp8", torch.empty(0, device=device))
    except RuntimeError as error:
        raise ConfigError([str(error)]) from None


def accelerate_decoder(decoder: Decoder, config: Config) -> None:
    """Puts the fused ops into a decoder that has its place, its adapter and its weights.

    Raises:
        ConfigError: the ops do not know the transformer, or the attention backend is not installed.
    """
    try:
        decoder.accelerate(config.same_sampler.attention, schedules(config), config.same_sampler.fp8)
    except RuntimeError as error:
        raise ConfigError([f"same_sampler.attention: {error}"]) from None
    except (TypeError, ValueError) as error:
        raise ConfigError([f"same_sampler.accelerate: {error}; false leaves it to diffusers"]) from None


def schedules(config: Config) -> list[int]:
    """The numbers of steps that are drawn with, each of whose levels has its row in the modulation table."""
    steps = (config.render.steps, config.cheaper_sampler.steps, config.stage1.sampler_steps)
    return [number for number in dict.fromkeys(steps) if number]


def save_encoder(encoder: Encoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes model, tokenizer and image processor into `folder`."""
    encoder.model.to(dtype).save_pretrained(folder, max_shard_size=MAX_SHARD)
    encoder.tokenizer.save_pretrained(folder)
    encoder.image_processor.save_pretrained(folder)


def load_network(
    library_class: Any,
    source: Source,
    part: str = "",
    *,
    inside: Callable[[Any], Any] = lambda model: (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    quantization: str = "none",
    seed: int | None = None,
) -> Any:
    """A network of transformers or diffusers.

    Args:
        library_class, source: whose, and from where; `part` is its subfolder there.
        inside: gives the submodules whose linear layers are quantised.
        dtype: of the weights.
        device: where quantised or random weights are made; None is the CPU.
        quantization: "none", "nf4", "int8" or "fp8".
        seed: not None: the weights are random, and nothing but the configuration is read.
    """
    device = device or torch.device("cpu")
    if seed is None:
        model = pretrained(library_class, source, part, dtype=dtype)
        if quantization != "none":
            quantize_linears(model, inside(model), quantization, device)
        return model
    shape = source.configuration(part or "model")

    def build() -> Any:
        if hasattr(library_class, "config_class"):
            return library_class(library_class.config_class(**shape))  # of transformers
        return library_class.from_config(shape)

    model = empty(build, buffers=device.type != "meta")
    fill(model, device, dtype, seed, quantization=quantization, inside=inside(model))
    return model


def load_encoder(
    source: Source, *, caption_prompt: str, condition_length: int, buckets: Sequence[int] = (), image_tokens: int = 0,
    seed: int | None = None, **options: Any,
) -> Encoder:  # fmt: skip
    """A Qwen2.5-VL with its tokenizer and image processor.

    Its chat template is rendered by transformers in a sandbox without access to Python.

    Args:
        source: model (``config.json``, safetensors), tokenizer and image processor.
        caption_prompt, condition_length, buckets: as `Encoder` takes them.
        image_tokens: the most tokens of an image; 0 as the image processor says.
        seed, options: as of `load_network`; quantised are the layers of the language model, without its head.
    """
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = load_network(
        Qwen2_5_VLForConditionalGeneration, source, seed=seed,
        inside=lambda model: [model.model.language_model.layers], **options,
    )  # fmt: skip
    if seed is None:
        tokenizer = AutoTokenizer.from_pretrained(**source.pretrained(), trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(**source.pretrained())
    else:
        tokenizer, vision = dummy_tokenizer(model.config), model.config.vision_config
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size=source.configuration("preprocessor").get("size"),
        )
    if image_tokens:
        pixels = image_tokens * (image_processor.patch_size * image_processor.merge_size) ** 2
        smallest = min(image_processor.size["shortest_edge"], pixels)
        image_processor.size = {"shortest_edge": smallest, "longest_edge": pixels}
    return Encoder(
        model, tokenizer, image_processor,
        caption_prompt=caption_prompt, condition_length=condition_length, buckets=buckets,
    )  # fmt: skip


def save_decoder(decoder: Decoder, projector: Projector, folder: Path, dtype: torch.dtype) -> None:
    """Writes transformer, scheduler, pooled condition and projector below `folder`."""
    decoder.transformer.to(dtype).save_pretrained(folder / "decoder" / "transformer", max_shard_size=MAX_SHARD)
    decoder.scheduler.save_pretrained(folder / "decoder" / "scheduler")
    save_file({"pooled": decoder.pooled.to(dtype).contiguous()}, folder / "decoder" / "pooled.safetensors")
    weights = {name: value.to(dtype).contiguous() for name, value in projector.state_dict().items()}
    save_file(weights, folder / "projector.safetensors")


def save_reward(model, folder: Path, mean: list[float], std: list[float], dtype: torch.dtype) -> None:
    """Writes a CLIP model and its normalisation (`preprocessor_config.json`)."""
    model.to(dtype).save_pretrained(folder, max_shard_size=MAX_SHARD)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))


def load_projector(file: Path) -> Projector:
    """A projector in fp32 from `projector.safetensors`, whose shapes it takes."""
    weights = {name: value.float() for name, value in load_file(file).items()}
    up, down = weights["up.weight"], weights["down.weight"]
    projector = Projector(up.shape[1], up.shape[0], down.shape[0])
    projector.load_state_dict(weights)
    return projector.requires_grad_(False)


def new_projector(encoder: Encoder, decoder: Decoder, seed: int) -> Projector:
    """An untrained projector between an encoder's states and a decoder's context."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width, context = encoder.model.config.text_config.hidden_size, decoder.transformer.config.joint_attention_dim
        projector = Projector(width, PROJECTOR_WIDTH, context)
    return projector.requires_grad_(False)


def load_decoder(
    source: Source, pooled: Path, *, tiny: bool = False, quantization: str = "none", **options: Any
) -> Decoder:
    """An SD3 decoder, its parts laid out as diffusers saves a `StableDiffusion3Pipeline`.

    Args:
        source: transformer, vae, scheduler, and pooled.safetensors or the text encoders with their tokenizers.
        pooled: file of the pooled condition; made by the text encoders where it is not there yet.
        tiny: vae_tiny turns latents into images.
        quantization, options: as of `load_network`; quantised are the transformer's blocks.

    Raises:
        ConfigError: a part cannot be read, the pooled condition is not as wide as the transformer takes it, or vae_tiny
            has other latents than vae.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    transformer = load_network(
        SD3Transformer2DModel, source, "transformer", quantization=quantization,
        inside=lambda model: [model.transformer_blocks], **options,
    )  # fmt: skip
    vae = load_network(AutoencoderKL, source, "vae", **options)
    vae_tiny = load_network(AutoencoderTiny, source, "vae_tiny", **options) if tiny else None
    if options.get("seed") is None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(**source.pretrained("scheduler"))
        condition = pooled_condition(source, pooled)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(source.configuration("scheduler"))
        condition = torch.zeros(transformer.config.pooled_projection_dim)
    if len(condition) != (width := transformer.config.pooled_projection_dim):
        problem = f"{source}'s transformer takes a pooled condition of {width} channels, {pooled} has {len(condition)}"
        raise ConfigError([f"{source.key}: {problem}"])
    if vae_tiny is not None:
        sizes = [(c.latent_channels, len(c.block_out_channels)) for c in (vae.config, vae_tiny.config)]
        if sizes[0] != sizes[1] or vae_tiny.config.upsampling_scaling_factor != 2:
            problem = f"cheaper_sampler.vae: {source}/vae_tiny has other latents than {source}/vae"
            raise ConfigError([f"{problem}: (channels, levels) are {sizes[1]}, not {sizes[0]}"])
    return Decoder(transformer, vae, scheduler, condition, vae_tiny)


def pooled_condition(source: Source, file: Path) -> Tensor:
    """The pooled embedding (D,), fp32, of the empty prompt: from `file`, or else from the text encoders, into `file`.

    The text encoders are loaded for this once, and let go.
    """
    if not file.is_file():
        pooled = torch.cat([_empty_prompt(source, number) for number in ("", "_2")])
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pooled": pooled.contiguous()}, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    return load_file(file)["pooled"].float()


@torch.no_grad()
def _empty_prompt(source: Source, number: str) -> Tensor:
    """The projected pooled embedding (D,) that text encoder `number` ("" or "_2") has of the empty prompt."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(**source.pretrained(f"tokenizer{number}"))
    model = pretrained(CLIPTextModelWithProjection, source, f"text_encoder{number}", dtype=torch.float32)
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return model(tokens["input_ids"]).text_embeds[0]


def load_image_encoder(source: Source, device: torch.device | None = None, seed: int | None = None) -> ImageEncoder:
    """An image encoder in fp32: the image tower of a CLIP or SigLIP, or a DINOv2 or DINOv3.

    Args:
        source: model and `preprocessor_config.json`.
        device, seed: as of `load_network`.
    """
    import transformers

    with named(source.key, source):
        processor, kind = source.configuration("preprocessor"), source.configuration("model").get("model_type")
        if kind not in IMAGE_ENCODERS:
            kinds = f"{printable(str(kind))}, none of {', '.join(IMAGE_ENCODERS)}"
            raise ConfigError([f"{source.key}: {source} has the model type {kinds}"])
        model = load_network(getattr(transformers, IMAGE_ENCODERS[kind]), source, device=device, seed=seed)
        for part in ("text_model", "text_projection"):
            if hasattr(model, part):
                delattr(model, part)
        shape = processor.get("crop_size") or processor.get("size") or {}
        size = shape.get("height") if isinstance(shape, dict) else shape
        return ImageEncoder(model, processor["image_mean"], processor["image_std"], size)


def load_image_processor(source: Source, size: int) -> Any:
    """What an image encoder's authors do to an image before it (resizing, cropping), up to pixels in [0, 1].

    Args:
        source: `preprocessor_config.json`; where that names no size, the shorter side is made `size`, the middle taken.
        size: of the encoder's input.
    """
    import transformers

    options: dict[str, Any] = {"do_normalize": False, "do_rescale": True}
    if "size" not in source.configuration("preprocessor"):
        options |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    library_class = getattr(transformers, IMAGE_PROCESSORS[source.configuration("model")["model_type"]])
    with named(source.key, source):
        return library_class.from_pretrained(**source.pretrained(), **options)


def pretrained(
    library_class: Any, source: Source, subfolder: str = "", *, dtype: torch.dtype, complete: bool = False
) -> Any:
    """A library class's `from_pretrained`: safetensors alone, and every tensor of the model must be there.

    Args:
        library_class: of transformers or diffusers.
        source, subfolder: where.
        dtype: of the weights.
        complete: whether every tensor of the files must be the model's, too.

    Raises:
        ConfigError: what is wrong, in a line.
    """
    place = "/".join(filter(None, (str(source), subfolder)))
    options: dict[str, Any] = {"torch_dtype": dtype}
    if hasattr(library_class, "config_class"):  # of transformers. A folder could name a kernel, to be downloaded
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
    with named(source.key, place):
        model, report = library_class.from_pretrained(
            **source.pretrained(subfolder), use_safetensors=True, output_loading_info=True, **options
        )
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"]) if complete else []
    problems = [f"{source.key}: {place}: no tensor {printable(name)}" for name in missing]
    problems += [f"{source.key}: {place}: unknown tensor {printable(name)}" for name in unknown]
    if problems:
        raise ConfigError(problems)
    return model


def load_run(run: Path, at: str | None, overrides: Sequence[str] = ()) -> tuple[Config, Models]:
    """Configuration and networks of a run as they were at a moment.

    Args:
        run: the run's folder.
        at: "before", "stage0" … "stage3", or None for the run's last checkpoint.
        overrides: "key=value", of its configuration.

    Raises:
        ConfigError: no such run, it has no such moment, or the moment's checkpoint is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError([f"--run: {run} is not a run's folder: it has no config.yaml"])
    config = load_config(run / "config.yaml", overrides)
    saved = checkpoints(run / "checkpoints")
    moments = [read_state(path)["moment"] for path in saved]
    found = saved[-1:] if at is None else [path for path, moment in zip(saved, moments, strict=True) if moment == at]
    if at not in (None, "before") and not found:
        had = ", ".join(["before", *filter(None, moments)])
        raise ConfigError([f"--at {at}: {run} has no such moment; it has {had}"])
    try:
        if found:
            verify_checkpoint(found[-1])
    except DamagedCheckpoint as error:
        raise ConfigError([f"--run: {error}; name another moment with --at"]) from None
    models = load_models(config)
    if found:
        models.encoder.freeze_reader()
        load_checkpoint(found[-1], models)
    models.decoder.fp8_file, models.decoder.fp8_calibrates = run / FP8_NAME, False
    return config, models
