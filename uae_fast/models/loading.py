"""Models from folders and into folders, in the layouts their own libraries read and write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint import checkpoints, find_moment, load_checkpoint, read_state
from ..config import Config, ConfigError, load_config
from ..seeds import derive_seed
from . import Models
from .decoder import Decoder
from .encoder import Encoder
from .projector import Projector
from .reward import Reward

TINY = Path(__file__).parent.parent / "tiny" / "weights"
MAX_SHARD = "2MB"
VAE_TINY = "decoder/vae_tiny"


def models_folder(config: Config) -> Path:
    """The folder behind `models.path`.

    Raises:
        ConfigError: there is none, or a part is missing in it.
    """
    folder = TINY if config.models.path == "tiny" else Path(config.models.path)
    for part in (
        "encoder",
        "decoder/transformer",
        "decoder/vae",
        "decoder/scheduler",
        "projector.safetensors",
        "reward",
    ):
        if not (folder / part).exists():
            raise ConfigError([f'models.path: {folder} has no {part}; "tiny" names the weights in the package'])
    if config.cheaper_sampler.vae == "tiny" and not (folder / VAE_TINY).exists():
        raise ConfigError([f"cheaper_sampler.vae: {folder} has no {VAE_TINY}, an AutoencoderTiny; choose full"])
    return folder


def load_models(config: Config) -> Models:
    """The networks of a configuration, frozen, in fp32, with what trains prepared.

    `models.path` is a folder of ``encoder/`` (model, tokenizer, image processor), ``decoder/`` (transformer, vae,
    scheduler, pooled.safetensors), ``projector.safetensors`` and ``reward/`` (a CLIP model).
    """
    folder = models_folder(config)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    models = Models(
        load_encoder(
            folder / "encoder",
            caption_prompt=config.caption.prompt,
            condition_length=config.condition.length,
            buckets=config.condition.buckets,
        ),
        load_projector(folder),
        load_decoder(folder / "decoder", tiny=config.cheaper_sampler.vae == "tiny"),
        load_reward(folder / "reward"),
        reader="reader" if config.condition.adapter == "frozen" else "policy",
    )
    settings = config.models
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "lora"))
        models.encoder.prepare_training(settings.encoder, settings.lora_rank, settings.lora_alpha)
        models.decoder.prepare_training(settings.decoder, settings.lora_rank, settings.lora_alpha)
    models.to(device)
    if config.same_sampler.accelerate:
        accelerate_decoder(models.decoder, config)
    return models


def accelerate_decoder(decoder: Decoder, config: Config) -> None:
    """Puts the fused ops into a decoder that has its place, its adapter and its weights.

    Raises:
        ConfigError: the ops do not know the transformer, or the attention backend is not installed.
    """
    try:
        decoder.accelerate(config.same_sampler.attention, (config.render.steps, config.stage1.sampler_steps))
    except RuntimeError as error:
        raise ConfigError([f"same_sampler.attention: {error}"]) from None
    except (TypeError, ValueError) as error:
        raise ConfigError([f"same_sampler.accelerate: {error}; false leaves it to diffusers"]) from None


def save_encoder(encoder: Encoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes model, tokenizer and image processor into `folder`."""
    encoder.model.to(dtype).save_pretrained(folder, max_shard_size=MAX_SHARD)
    encoder.tokenizer.save_pretrained(folder)
    encoder.image_processor.save_pretrained(folder)


def load_encoder(folder: Path, *, caption_prompt: str, condition_length: int, buckets: Sequence[int] = ()) -> Encoder:
    """An encoder in fp32 from a folder with model, tokenizer and image processor."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Encoder(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        caption_prompt=caption_prompt,
        condition_length=condition_length,
        buckets=buckets,
    )


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


def load_projector(folder: Path) -> Projector:
    """A projector in fp32 from `projector.safetensors`, whose shapes it takes."""
    weights = {name: value.float() for name, value in load_file(folder / "projector.safetensors").items()}
    up, down = weights["up.weight"], weights["down.weight"]
    projector = Projector(up.shape[1], up.shape[0], down.shape[0])
    projector.load_state_dict(weights)
    return projector.requires_grad_(False)


def load_decoder(folder: Path, *, tiny: bool = False) -> Decoder:
    """A decoder in fp32 from a folder with transformer, vae, scheduler and pooled.safetensors.

    Args:
        tiny: vae_tiny turns latents into images.

    Raises:
        ConfigError: vae_tiny has other latents than vae.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    decoder = Decoder(
        SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        load_file(folder / "pooled.safetensors")["pooled"].float(),
        AutoencoderTiny.from_pretrained(folder / "vae_tiny", torch_dtype=torch.float32) if tiny else None,
    )
    if tiny:
        full, small = decoder.vae.config, decoder.vae_tiny.config
        sizes = [(c.latent_channels, len(c.block_out_channels)) for c in (full, small)]
        if sizes[0] != sizes[1] or small.upsampling_scaling_factor != 2:
            problem = f"cheaper_sampler.vae: {folder / 'vae_tiny'} has other latents than {folder / 'vae'}"
            raise ConfigError([f"{problem}: (channels, levels) are {sizes[1]}, not {sizes[0]}"])
    return decoder


def load_reward(folder: Path) -> Reward:
    """A reward in fp32 from a CLIP model's folder."""
    from transformers import CLIPModel

    normalisation = json.loads((folder / "preprocessor_config.json").read_text())
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return Reward(model, normalisation["image_mean"], normalisation["image_std"])


def load_run(run: Path, at: str | None) -> tuple[Config, Models]:
    """Configuration and networks of a run as they were at a moment.

    Args:
        run: the run's folder.
        at: "before", "stage0" … "stage3", or None for the run's last checkpoint.

    Raises:
        ConfigError: no such run, or it has no such moment.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError([f"--run: {run} is not a run's folder: it has no config.yaml"])
    config = load_config(run / "config.yaml")
    saved = checkpoints(run / "checkpoints")
    found = find_moment(run / "checkpoints", at) if at else saved[-1] if saved else None
    if at not in (None, "before") and found is None:
        had = ", ".join(["before", *filter(None, (read_state(path)["moment"] for path in saved))])
        raise ConfigError([f"--at {at}: {run} has no such moment; it has {had}"])
    models = load_models(config)
    if found is not None:
        models.encoder.freeze_reader()
        load_checkpoint(found, models)
    return config, models
