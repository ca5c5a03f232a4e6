"""Models from folders and into folders, in the layouts their own libraries read and write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint import (
    LOCAL,
    DamagedCheckpoint,
    checkpoints,
    find_moment,
    load_checkpoint,
    read_state,
    verify_checkpoint,
)
from ..config import Config, ConfigError, load_config, printable
from ..seeds import derive_seed
from . import Models
from .decoder import Decoder
from .encoder import Encoder
from .projector import Projector
from .reward import Reward

TINY = Path(__file__).parent.parent / "tiny" / "weights"
PARTS = ("encoder", "decoder", "projector.safetensors", "reward")  # of a folder of models
WEIGHTS = ("encoder", "decoder/transformer", "decoder/vae", "reward")  # what has its weights in a folder of its own
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
MAX_SHARD = "2MB"
VAE_TINY = "decoder/vae_tiny"


def models_folder(config: Config) -> Path:
    """The folder behind `models.path`, which no model hub stands behind: what is not on the disk is not loaded.

    Raises:
        ConfigError: there is none, a part is missing in it, it has weights that cannot be read without running code, or
            its decoder does not draw images of `data.resolution`.
    """
    folder = TINY if config.models.path == "tiny" else Path(config.models.path)
    if not folder.is_dir():
        raise ConfigError(
            [f'models.path: {folder} is no folder on this machine; "tiny" names the weights in the package']
        )
    parts = (*WEIGHTS, "decoder/scheduler", "projector.safetensors")
    missing = [part for part in parts if not (folder / part).exists()]
    problems = [f"models.path: {folder} has no {', '.join(missing)}"] if missing else []
    weights = [part for part in WEIGHTS if part not in missing]
    if config.cheaper_sampler.vae == "tiny":
        if (folder / VAE_TINY).exists():
            weights.append(VAE_TINY)
        else:
            problems.append(f"cheaper_sampler.vae: {folder} has no {VAE_TINY}, an AutoencoderTiny; choose full")
    for part in weights:
        problems += [f"models.path: {folder / part} {fault}" for fault in unsafe_weights(folder / part)]
    if not problems:
        problems = _unfit_resolution(config.data.resolution, folder / "decoder")
    if problems:
        raise ConfigError(problems)
    return folder


def unsafe_weights(folder: Path) -> list[str]:
    """Why the weights of a model's folder are not read, if they are not: nothing here is unpickled."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            return [f"has its weights as pickles ({', '.join(pickles)}), which may run code; convert to safetensors"]
        return ["has no weights (*.safetensors)"]
    outside = []
    for index in folder.glob("*.index.json"):
        with named(str(index)):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside += [f"has a shard outside itself: {printable(name)}" for name in shards if Path(name).name != name]
    return outside


def _unfit_resolution(resolution: int, decoder: Path) -> list[str]:
    with named(str(decoder)):
        vae, transformer = (json.loads((decoder / part / "config.json").read_text()) for part in ("vae", "transformer"))
        unit = 2 ** (len(vae["block_out_channels"]) - 1) * transformer["patch_size"]
        largest = unit * transformer["pos_embed_max_size"]
        if resolution % unit or not resolution <= largest:
            return [f"data.resolution: {resolution} is no multiple of {unit} up to {largest}, as {decoder} draws"]
        return []


@contextmanager
def named(what: str) -> Iterator[None]:
    """Within, whatever a library raises on a file that is not what it should be becomes a line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError([f"models.path: {what} cannot be loaded: {printable(reason)}"]) from error


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
    """The networks of a configuration, frozen, in fp32, with what trains prepared.

    `models.path` is a folder of ``encoder/`` (model, tokenizer, image processor), ``decoder/`` (transformer, vae,
    scheduler, pooled.safetensors), ``projector.safetensors`` and ``reward/`` (a CLIP model).
    """
    folder = models_folder(config)
    device = run_device(config)
    with named(str(folder / "encoder")):
        encoder = load_encoder(
            folder / "encoder",
            caption_prompt=config.caption.prompt,
            condition_length=config.condition.length,
            buckets=config.condition.buckets,
        )
    with named(str(folder / "projector.safetensors")):
        projector = load_projector(folder)
    with named(str(folder / "decoder")):
        decoder = load_decoder(folder / "decoder", tiny=config.cheaper_sampler.vae == "tiny")
    with named(str(folder / "reward")):
        reward = load_reward(folder / "reward")
    reader = "reader" if config.condition.adapter == "frozen" else "policy"
    models = Models(encoder, projector, decoder, reward, reader)
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
    """An encoder in fp32 from a folder with model, tokenizer and image processor.

    Its chat template is rendered by transformers in a sandbox without access to Python. The attention is named here,
    because a name in the folder's config.json could be that of a kernel to be downloaded.
    """
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Encoder(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", **LOCAL
        ),
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True),
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
        SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32, **LOCAL),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **LOCAL),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        load_file(folder / "pooled.safetensors")["pooled"].float(),
        AutoencoderTiny.from_pretrained(folder / "vae_tiny", torch_dtype=torch.float32, **LOCAL) if tiny else None,
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
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **LOCAL)
    return Reward(model, normalisation["image_mean"], normalisation["image_std"])


def load_run(run: Path, at: str | None) -> tuple[Config, Models]:
    """Configuration and networks of a run as they were at a moment.

    Args:
        run: the run's folder.
        at: "before", "stage0" … "stage3", or None for the run's last checkpoint.

    Raises:
        ConfigError: no such run, it has no such moment, or the moment's checkpoint is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError([f"--run: {run} is not a run's folder: it has no config.yaml"])
    config = load_config(run / "config.yaml")
    saved = checkpoints(run / "checkpoints")
    found = find_moment(run / "checkpoints", at) if at else saved[-1] if saved else None
    if at not in (None, "before") and found is None:
        had = ", ".join(["before", *filter(None, (read_state(path)["moment"] for path in saved))])
        raise ConfigError([f"--at {at}: {run} has no such moment; it has {had}"])
    try:
        if found is not None:
            verify_checkpoint(found)
    except DamagedCheckpoint as error:
        raise ConfigError([f"--run: {error}; name another moment with --at"]) from None
    models = load_models(config)
    if found is not None:
        models.encoder.freeze_reader()
        load_checkpoint(found, models)
    return config, models
