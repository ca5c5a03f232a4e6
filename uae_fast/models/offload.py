"""Taking turns on the device: parts that a phase does not need wait in host memory (`models.offload`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import Models


class Offloader:
    """Brings a part onto the device just before it computes, and sends the others away.

    What stays: the projector, all buffers and adapters' optimiser state; while gradients are recorded, every part that
    has a trainable parameter, so that what a backward pass needs is there.

    Args:
        models: on the device; hooks are put on their modules.
        device: where they compute.
        host: where they wait.
    """

    def __init__(self, models: Models, device: torch.device, host: torch.device | str = "cpu"):
        self.device, self.host = device, torch.device(host)
        encoder, decoder = models.encoder.model, models.decoder
        self.parts: dict[str, Any] = {"encoder": encoder, "decoder": nn.ModuleList([decoder.transformer, decoder.vae])}
        entrances: dict[str, list[nn.Module]] = {
            "encoder": [encoder.model.visual, encoder.model.language_model, encoder.get_input_embeddings()],
            "decoder": [decoder.transformer, *decoder.vae.children()],
        }
        for name, reward in (("reward", models.reward), ("heldout", models.heldout)):
            if reward is not None:
                towers: list[Any] = [image_encoder.model for image_encoder in reward.encoders]
                self.parts[name] = nn.ModuleList(towers)
                entrances[name] = [child for tower in towers for child in tower.children()]
        self.present = set(self.parts)
        for name, modules in entrances.items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, name=name: self.bring(name))

    def bring(self, name: str) -> None:
        """The part `name` onto the device; the others, as far as they can, off it first."""
        if self.present == {name}:
            return
        for other in sorted(self.present - {name}):
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parts[other].parameters())
            if not trains:
                self.move(other, self.host)
                self.present.remove(other)
        if name not in self.present:
            self.move(name, self.device)
            self.present.add(name)

    def move(self, name: str, place: torch.device) -> None:
        """Moves a part's weights."""
        self.parts[name].to(place)
