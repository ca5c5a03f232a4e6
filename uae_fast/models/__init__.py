"""The four networks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..phases import phase
from .decoder import Decoder
from .encoder import Encoder
from .projector import Projector
from .reward import Reward


@dataclass
class Models:
    """Encoder, projector, decoder and reward of a run."""

    encoder: Encoder
    projector: Projector
    decoder: Decoder
    reward: Reward
    heldout: Reward | None = None
    """The image encoder that is reported beside the reward and never trained on (`reward.heldout`)."""
    reader: str = "reader"
    """Who re-reads captions: "reader" (`condition.adapter: frozen`) or "policy" (`live`)."""
    offloader: Any = None
    """Who brings parts onto the device and sends them away (`models.offload`)."""

    @phase("conditions")
    def condition(self, captions: Sequence[str], role: str | None = None) -> Tensor:
        """The decoder's context (B, L, D) for captions, re-read by `role` (by `self.reader` unless given)."""
        return self.projector(*self.encoder.read(captions, role or self.reader))

    def lengths(self, captions: Sequence[str]) -> list[int] | None:
        """How much of its context the decoder sees of each caption: its bucket; None is all of it."""
        return self.encoder.buckets_of(captions) if self.encoder.buckets else None

    def negative(self, prompt: str, role: str | None = None) -> Tensor:
        """The context (1, L, D) of a negative prompt, as long as its bucket."""
        context, lengths = self.condition([prompt], role), self.lengths([prompt])
        return context if lengths is None else context[:, : lengths[0]]

    def bring(self, parts: Sequence[str]) -> None:
        """Has the named parts, made trainable, on the device, so that an optimiser's state comes to lie there too."""
        if self.offloader is not None:
            for part in self.offloader.parts.keys() & parts:
                self.offloader.bring(part)

    def freeze(self) -> None:
        """Nothing trains."""
        self.encoder.freeze()
        self.decoder.freeze()
        self.projector.requires_grad_(False)

    def to(self, device: torch.device) -> Models:
        """Moves every network."""
        for part in (self.encoder, self.projector, self.decoder, self.reward, self.heldout):
            if part is not None:
                part.to(device)
        return self
