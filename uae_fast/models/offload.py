"""Taking turns on the device: parts that a phase does not need wait in host memory (`models.offload`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import Models


class Offloader:
    """Brings a part onto the device just before it computes, and sends the others away.

    At first all wait. Always on the device are the projector, the pooled condition and the optimiser's state. The part
    that trains stays there while gradients are recorded; where several train (stage 1), all of them always do: what a
    backward pass needs must be there.

    Args:
        models: wherever they were loaded; hooks are put on their modules.
        device: where they compute.
        host: where they wait.
    """

    def __init__(self, models: Models, device: torch.device, host: torch.device | str = "cpu"):
        self.device, self.host = device, torch.device(host)
        encoder, decoder = models.encoder.model, models.decoder
        vaes = [vae for vae in (decoder.vae, decoder.vae_tiny) if vae is not None]
        self.parts: dict[str, Any] = {"encoder": encoder, "decoder": nn.ModuleList([decoder.transformer, *vaes])}
        entrances: dict[str, list[nn.Module]] = {
            "encoder": [encoder.model.visual, encoder.model.language_model, encoder.get_input_embeddings()],
            "decoder": [decoder.transformer, *(child for vae in vaes for child in vae.children())],
        }
        judges: list[Any] = []
        for name, reward in (("reward", models.reward), ("heldout", models.heldout)):
            if reward is not None:
                judges += reward.encoders
                towers: list[Any] = [judge.model for judge in reward.encoders]
                self.parts[name] = nn.ModuleList(towers)
                entrances[name] = [child for tower in towers for child in tower.children()]
        self.present: set[str] = set()
        for name in self.parts:
            self.move(name, self.host)
        models.projector.to(device)
        for owner in (models.encoder, decoder, *judges):
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))
        for name, modules in entrances.items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, name=name: self.bring(name))

    def bring(self, name: str) -> None:
        """The part `name` onto the device; the others, as far as they can, off it first."""
        if self.present == {name}:
            return
        train = {part for part, module in self.parts.items() if any(p.requires_grad for p in module.parameters())}
        stay = train if len(train) > 1 or torch.is_grad_enabled() else set()
        for other in sorted(self.present - {name} - stay):
            self.move(other, self.host)
            self.present.remove(other)
        if name not in self.present:
            self.move(name, self.device)
            self.present.add(name)

    def move(self, name: str, place: torch.device) -> None:
        """Moves a part's weights."""
        self.parts[name].to(place)
