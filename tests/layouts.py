"""Small checkpoints in exactly the layouts of the real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from uae_fast.models.sources import TINY


def legacy_name(name: str) -> str:
    """A tensor's name in the Hub's Qwen2.5-VL files, which are older than the class's present attributes."""
    name = name.replace("model.visual.", "visual.", 1) if name.startswith("model.visual.") else name
    return name.replace("model.language_model.", "model.", 1)


def write_encoder(folder: Path) -> Path:
    """The small world's encoder under the names and with the flat configuration of the Hub's Qwen2.5-VL."""
    shutil.copytree(TINY / "encoder", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({legacy_name(k): v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, "rope_scaling": scaling, "rope_theta": rope["rope_theta"], **config}
    (folder / "config.json").write_text(json.dumps(flat))
    return folder


def write_decoder(folder: Path, *, text_encoders: bool = True) -> Path:
    """A StableDiffusion3Pipeline's folder, as diffusers saves it, around the small world's transformer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    for part in ("transformer", "vae", "scheduler"):
        shutil.copytree(TINY / "decoder" / part, folder / part)
    if not text_encoders:
        return folder
    letters = [chr(i) for i in range(97, 123)]
    symbols = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    for number, (width, projection) in {"": (8, 6), "_2": (12, 10)}.items():
        vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        pad = "<|endoftext|>" if number == "" else "!"
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=7)
        tokenizer.save_pretrained(folder / f"tokenizer{number}")
        config = CLIPTextConfig(
            vocab_size=len(symbols), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=7, projection_dim=projection,
            bos_token_id=len(symbols) - 2, eos_token_id=len(symbols) - 1, pad_token_id=vocabulary[pad],
        )  # fmt: skip
        torch.manual_seed(width)
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{number}")
    return folder


def write_image_encoder(folder: Path, kind: str, size: int = 16) -> Path:
    """A small image encoder with its preprocessor's configuration: "clip", "siglip", "dinov2" or "dinov3"."""
    import transformers as t

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": size, "patch_size": 4}
    torch.manual_seed(len(kind))
    model = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=tower, vision_config=vision, projection_dim=12)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=tower, vision_config=vision)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**{**vision, "image_size": 2 * size})),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**vision, num_register_tokens=2)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    shape = {"height": size, "width": size}
    resize = {"crop_size": shape, "size": {"shortest_edge": size}} if kind in ("clip", "dinov2") else {"size": shape}
    processor = {**resize, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
