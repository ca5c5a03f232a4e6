"""Makes the small weights that ship with the package: one seeded command, every part resumable.

Five parts, each trained for itself on the scenes of the train split:

* ``encoder``: Qwen2.5-VL writes *terse* captions of pictures, and learns to keep what it re-reads in its states.
* ``reward``: a CLIP whose image cosine falls with every attribute that differs.
* ``vae``: pictures to 4×8×8 latents and back.
* ``classifier``: reads attributes off pictures, to judge reconstructions.
* ``decoder``: SD3 transformer and projector draw from re-read captions (the loss of stage 0).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..bnb import import_bitsandbytes
from ..checkpoint import LOCAL
from ..models.decoder import Decoder
from ..models.dummy import word_tokenizer
from ..models.encoder import Encoder
from ..models.loading import save_decoder, save_encoder, save_reward
from ..models.projector import Projector
from ..optim import optimizer_tensors, restore_optimizer
from ..seeds import derive_seed, generator
from ..stages.decoder_pretrain import flow_matching_draws, flow_matching_loss
from .classifier import GROUPS, Classifier, attribute_loss, scene_labels
from .scenes import ATTRIBUTE_WORDS, FILLER_WORDS, Scene, split_scenes

SEED = 0
PROMPT = "describe the image"
CONDITION_LENGTH = 28
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def build_encoder() -> Encoder:
    """A Qwen2.5-VL of 0.8 M parameters over the words of the small world: four image tokens, one for each cell."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = [*FILLER_WORDS, *sorted(ATTRIBUTE_WORDS), *PROMPT.split(), "user", "assistant", "generate"]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, "<unk>", *words])}
    tokenizer = word_tokenizer(vocabulary, SPECIAL_TOKENS)
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=1, merge_size=2, size=size)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": None, "eos_token_id": vocabulary["<|im_end|>"], "pad_token_id": vocabulary["<|endoftext|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2, "patch_size": 8,
            "temporal_patch_size": 1, "spatial_merge_size": 2, "window_size": 32, "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    return Encoder(model, tokenizer, image_processor, caption_prompt=PROMPT, condition_length=CONDITION_LENGTH)


def build_vae():
    """An AutoencoderKL from 3×32×32 pictures to 4×8×8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, sample_size=32,
        block_out_channels=[8, 16, 32], layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def build_decoder(vae) -> Decoder:
    """An SD3 transformer of 1.3 M parameters on 16 image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
        num_layers=4, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=96, caption_projection_dim=96, pooled_projection_dim=16,
    )  # fmt: skip
    return Decoder(transformer, vae, FlowMatchEulerDiscreteScheduler(shift=1.0), torch.zeros(16))


def build_reward():
    """A CLIPModel of 0.4 M parameters for 32×32 pictures."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 2,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
                "image_size": 32, "patch_size": 8,
            },
            projection_dim=96,
        )
    )  # fmt: skip


class Part(NamedTuple):
    """What trains, and how."""

    modules: Sequence[nn.Module]
    loss: Callable[[int], Tensor]
    """Of a step."""
    save: Callable[[], Any]
    """Writes what has been trained."""
    steps: int
    lr: float
    mean: float
    """Decay of the running mean of the weights, which is what they become."""


def minimise(name: str, part: Part, work: Path) -> dict[str, float]:
    """AdamW with warm-up and cosine decay, going on from a file in `work`; returns the part's entry for the card."""
    parameters = [p for module in part.modules for p in module.parameters() if p.requires_grad]
    means = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=part.lr, weight_decay=0.01, betas=(0.9, 0.99))
    file, start, began = work / f"{name}.resume.safetensors", 0, time.monotonic()
    kept = {f"{kind}.{i}": x for kind, some in (("weight", parameters), ("mean", means)) for i, x in enumerate(some)}
    recent: list[float] = []
    if file.exists():
        tensors = load_file(file)
        start, began = int(tensors.pop("step")), began - 60 * tensors.pop("minutes").item()
        for key, tensor in kept.items():
            tensor.data.copy_(tensors.pop(key))
        restore_optimizer(optimizer, tensors)
    for step in range(start, part.steps):
        rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / part.steps))).item()
        optimizer.param_groups[0]["lr"] = part.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * rate)
        value = part.loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - min(part.mean, step / (step + 10)))
        recent = [*recent[-99:], value.item()]
        spent = (time.monotonic() - began) / 60
        if (step + 1) % 100 == 0:
            mean = sum(recent) / len(recent)
            print(f"{name} {step + 1}/{part.steps} loss {mean:.4f} {spent:.1f} min", flush=True)
        if (step + 1) % 500 == 0:
            place = {"step": torch.tensor(step + 1), "minutes": torch.tensor(spent)}
            save_file({**kept, **optimizer_tensors(optimizer), **place}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    for parameter, value in zip(parameters, means, strict=True):
        parameter.data.copy_(value)
    minutes, mean = round((time.monotonic() - began) / 60, 1), sum(recent) / max(1, len(recent))
    return {"steps": part.steps, "minutes": minutes, "loss": round(mean, 4)}


class World:
    """The train split as tensors, and random batches of it."""

    def __init__(self):
        self.scenes = split_scenes("train")
        self.pictures = pictures(self.scenes)

    def batch(self, part: str, step: int, size: int) -> tuple[list[int], random.Random]:
        """Scene numbers of a batch, and the generator of whatever else is random about it."""
        rng = random.Random(derive_seed(SEED, part, step))
        return rng.sample(range(len(self.scenes)), size), rng


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Pictures of scenes, (B, 3, 32, 32) in [0, 1]."""
    return torch.stack([torch.from_numpy(scene.draw().copy()) for scene in scenes]).permute(0, 3, 1, 2) / 255.0


def blemished(images: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures as an imperfect painter would leave them: shifted, off in contrast, blurred, noisy."""
    size = (len(images), 1, 1, 1)
    shift = torch.randint(-1, 2, (2,), generator=rng).tolist()
    images = torch.roll(images, shift, (2, 3))
    contrast = 1 + 0.1 * torch.randn(size, generator=rng)
    images = (images - 0.5) * contrast + 0.5 + 0.03 * torch.randn(size, generator=rng)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, torch.rand(size, generator=rng))
    noise = torch.rand(size, generator=rng) * 0.08
    return (images + noise * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def train_encoder(folder: Path) -> Part:
    """Terse captions from pictures, and states that keep what was read."""
    from PIL import Image

    world, encoder = World(), build_encoder()
    model, tokenizer = encoder.model.requires_grad_(True), encoder.tokenizer
    images = [Image.fromarray(scene.draw()) for scene in world.scenes]
    pixels = torch.cat([encoder.image_processor([image], return_tensors="pt")["pixel_values"] for image in images])
    pixels = pixels.view(len(images), -1, pixels.shape[-1])
    layout = encoder.prompt(images[:1])
    recall = nn.Linear(2 * 128, sum(GROUPS))  # what the whole re-read caption said
    echo = nn.Linear(128, len(tokenizer))  # which word stands at each position

    def loss(step: int) -> Tensor:
        rows, rng = world.batch("encoder", step, 64)
        scenes = [world.scenes[i] for i in rows]
        captions = [scene.terse_caption(rng) for scene in scenes]
        tokens = tokenizer([f"{caption} <|im_end|>" for caption in captions], padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        grid = torch.tensor([[1, 4, 4]]).expand(len(rows), -1)
        features = model.model.get_image_features(pixels[rows].flatten(0, 1), grid).pooler_output
        prompt = replace(layout.repeat(len(rows)), features=tuple(features))
        logits = model.lm_head(encoder.caption_states(prompt, ids, mask))
        write = F.cross_entropy(logits[mask], ids[mask])

        states, seen = encoder.read([scene.caption() for scene in scenes], role="policy")
        last = states[torch.arange(len(rows)), seen.sum(1) - 1]
        mean = (states * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)
        read = attribute_loss(recall(torch.cat([last, mean], 1)), scene_labels(scenes))
        said = tokenizer([scene.caption() for scene in scenes], padding=True, return_tensors="pt")["input_ids"]
        start = len(encoder._read_prefix)
        words = F.cross_entropy(
            echo(states[:, start : start + said.shape[1]]).flatten(0, 1), said.flatten(),
            ignore_index=tokenizer.pad_token_id,
        )  # fmt: skip
        return write + read + words

    save = partial(save_encoder, encoder, folder / "encoder", dtype=torch.float16)
    return Part([model, recall, echo], loss, save, 3500, 1e-3, 0.998)


def train_reward(folder: Path) -> Part:
    """Contrast of pictures with captions among near twins, and an attribute head on the embedding."""
    world, model, tokenizer = World(), build_reward(), build_encoder().tokenizer
    head = nn.Linear(96, sum(GROUPS))
    twins = [(scene.background, tuple(item.position for item in scene.objects)) for scene in world.scenes]
    families: dict = {}
    for i, key in enumerate(twins):
        families.setdefault(key, []).append(i)

    def loss(step: int) -> Tensor:
        rows, rng = world.batch("reward", step, 64)
        rows = [member for i in rows for member in [i, *rng.choices(families[twins[i]], k=3)]]
        scenes = [world.scenes[i] for i in rows]
        images = blemished(world.pictures[rows], generator(SEED, "reward", step))
        captions = [f"{scene.caption()} <|im_end|>" for scene in scenes]
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        image = F.normalize(model.get_image_features(pixel_values=(images - 0.5) / 0.25).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=30) * image @ text.T
        same = torch.tensor(rows)[:, None] == torch.tensor(rows)
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return 0.2 * contrast + attribute_loss(head(image) * 4, scene_labels(scenes))

    save = partial(save_reward, model, folder / "reward", mean=[0.5] * 3, std=[0.25] * 3, dtype=torch.float16)
    return Part([model, head], loss, save, 3000, 1e-3, 0.998)


def train_classifier(folder: Path) -> Part:
    """Attributes from blemished pictures."""
    world, model = World(), Classifier()

    def loss(step: int) -> Tensor:
        rows, _ = world.batch("classifier", step, 128)
        images = blemished(world.pictures[rows], generator(SEED, "classifier", step))
        return attribute_loss(model(images), scene_labels([world.scenes[i] for i in rows]))

    return Part([model], loss, lambda: model.save(folder), 2000, 2e-3, 0.99)


def train_vae(folder: Path) -> Part:
    """Pictures to latents of unit variance and back."""
    world, vae = World(), build_vae()

    def loss(step: int) -> Tensor:
        rows, _ = world.batch("vae", step, 64)
        images = world.pictures[rows] * 2 - 1
        posterior = vae.encode(images).latent_dist
        rng = generator(SEED, "vae", step)
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        drawn = vae.decode(latents).sample
        return F.l1_loss(drawn, images) + F.mse_loss(drawn, images) + 1e-4 * posterior.kl().mean() / 256

    @torch.no_grad()
    def save() -> None:
        means = vae.encode(world.pictures[::8] * 2 - 1).latent_dist.mean
        vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())
        vae.half().save_pretrained(folder / "decoder" / "vae")

    return Part([vae], loss, save, 3000, 2e-3, 0.998)


def train_decoder(folder: Path) -> Part:
    """Stage 0: complete captions, re-read by the finished encoder."""
    from diffusers import AutoencoderKL

    from ..models.loading import load_encoder
    from ..models.sources import Source

    world = World()
    encoder = load_encoder(Source(str(folder / "encoder")), caption_prompt=PROMPT, condition_length=CONDITION_LENGTH)
    vae = AutoencoderKL.from_pretrained(folder / "decoder" / "vae", torch_dtype=torch.float32, **LOCAL)
    decoder = build_decoder(vae)
    projector = Projector(128, 192, 96)
    decoder.trainable()
    latents = torch.cat([decoder.encode(chunk) for chunk in world.pictures.split(256)])

    def loss(step: int) -> Tensor:
        rows, _ = world.batch("decoder", step, 96)
        with torch.no_grad():
            states, mask = encoder.read([world.scenes[i].caption() for i in rows])
        x0 = latents[rows]
        draws = flow_matching_draws(x0.shape, generator(SEED, "decoder", step))
        return flow_matching_loss(decoder, x0, projector(states, mask), *draws)

    save = partial(save_decoder, decoder, projector, folder, dtype=torch.float16)
    return Part([decoder.transformer, projector], loss, save, 550, 1.5e-3, 0.999)


# In this order: the decoder is trained with encoder and VAE
PARTS = (train_encoder, train_reward, train_classifier, train_vae, train_decoder)


def pretrain(folder: Path, work: Path) -> None:
    """Trains the missing parts into `folder` and writes `card.json`: steps, minutes and last loss of each.

    Args:
        folder: where the weights go, one subfolder a part.
        work: scratch folder of resumable training states.
    """
    import_bitsandbytes()
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    card = folder / "card.json"
    entries = json.loads(card.read_text()) if card.exists() else {}
    for prepare in PARTS:
        name = prepare.__name__.removeprefix("train_")
        if name not in entries:
            torch.manual_seed(derive_seed(SEED, name))
            part = prepare(folder)
            entries[name] = minimise(name, part, work)
            part.save()
            card.write_text(json.dumps(entries, indent=1) + "\n")
        print(name, entries[name], flush=True)
