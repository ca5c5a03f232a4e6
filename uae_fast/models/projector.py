"""The projector between the encoder's states and the decoder's context."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """``Linear · GELU · Linear`` on every re-read token (METHOD §1; 2048 → 8192 → 4096 at full size).

    Args:
        in_features, hidden_features, out_features: encoder width, inner width, decoder context width.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.up = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden_features, out_features)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Context (B, L, D) from states (B, L, H); positions where `mask` (B, L) is False become zero."""
        context = self.down(self.act(self.up(states.to(self.up.weight.dtype))))
        return context * mask.unsqueeze(-1)
