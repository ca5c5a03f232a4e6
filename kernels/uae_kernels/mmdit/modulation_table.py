"""The modulations of a whole sampling schedule, computed once.

With a constant pooled condition the outputs of all adaLN layers depend on the timestep alone: a table of them stands in
for a third of SD3.5's weights.
"""

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("uae_kernels")


def modulation_layers(transformer: Any) -> dict[str, nn.Module]:
    """Each linear layer that turns the timestep's embedding into scales, shifts and gates, in order."""
    layers = {}
    for i, block in enumerate(transformer.transformer_blocks):
        layers[f"transformer_blocks.{i}.norm1.linear"] = block.norm1.linear
        layers[f"transformer_blocks.{i}.norm1_context.linear"] = block.norm1_context.linear
    layers["norm_out.linear"] = transformer.norm_out.linear
    return layers


def pooled_hash(pooled: Tensor) -> str:
    """SHA-256 of a pooled condition (D,): its dtype and its bytes."""
    raw = pooled.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{pooled.dtype} ".encode() + raw).hexdigest()


class ModulationTable:
    """Every modulation of a transformer at each timestep of a schedule, for one pooled condition.

    Attributes:
        timesteps: (S,) as the transformer gets them.
        values: (S, K), row s all modulations at timesteps[s], one layer's after the other's.
        sizes: how many of the K are each layer's.
        hash: `pooled_hash` of the pooled condition.
    """

    def __init__(self, transformer: Any, timesteps: Tensor, pooled: Tensor):
        """Computes the table: S rows through the transformer's own layers.

        Args:
            transformer: an SD3Transformer2DModel.
            timesteps: (S,) floats, such as `scheduler.timesteps`.
            pooled: (D,), the pooled condition of every prompt.

        Raises:
            ValueError: shapes that do not fit, or an adapter on a modulation layer.
        """
        if timesteps.dim() != 1 or not len(timesteps) or pooled.dim() != 1:
            raise ValueError(
                f"ModulationTable: expected timesteps (S,) and pooled (D,), got {tuple(timesteps.shape)} and "
                f"{tuple(pooled.shape)}"
            )
        layers = modulation_layers(transformer)
        if wrapped := [name for name, layer in layers.items() if type(layer) is not nn.Linear]:
            raise ValueError(f"ModulationTable: an adapter or a quantised layer stands at {wrapped[0]}")
        with torch.no_grad():
            embedding = nn.functional.silu(transformer.time_text_embed(timesteps, pooled.expand(len(timesteps), -1)))
            values = [layer(embedding) for layer in layers.values()]
        self.timesteps = timesteps.clone()
        self.values = torch.cat(values, 1)
        self.sizes = [value.shape[1] for value in values]
        self.hash = "" if pooled.is_meta else pooled_hash(pooled)
        # What tells the pooled tensor last found to be the table's, and the tensor, whose memory stays its own thereby
        self._known: tuple | None = None

    def serves(self, pooled: Tensor) -> bool:
        """Whether pooled (B, D) is the table's in every row; a tensor is looked at once as long as it is not changed."""
        key = pooled.data_ptr(), pooled._version, pooled.shape, pooled.stride(), pooled.dtype
        if self._known is not None and self._known[0] == key:
            return True
        one = pooled[:1] if pooled.stride(0) == 0 or (pooled == pooled[:1]).all() else None
        if one is None or pooled_hash(one[0]) != self.hash:
            return False
        self._known = key, pooled
        return True

    def rows(self, timestep: Tensor) -> list[Tensor]:
        """The modulations (B, K_i) of each layer at timestep (B,), without a synchronisation; views if all are equal.

        Raises:
            RuntimeError: a timestep that the table does not have (on a GPU when it synchronises next).
        """
        alike = timestep.stride(0) == 0 or len(timestep) == 1
        wanted = timestep[:1] if alike else timestep
        found = wanted[:, None] == self.timesteps
        if not found.is_meta:
            torch._assert_async(found.any(1).all(), "ModulationTable: a timestep is not in the table")
        rows = self.values.index_select(0, found.int().argmax(1))
        return list(rows.expand(len(timestep), -1).split(self.sizes, 1))


class Dropped:
    """The modulation layers' weights, taken out of a transformer and kept in the host's memory."""

    def __init__(self, transformer: Any):
        self.layers = modulation_layers(transformer)
        self.weights = {}
        for name, layer in self.layers.items():
            for part in ("weight", "bias"):
                tensor = getattr(layer, part)
                self.weights[name, part] = tensor if tensor.is_meta else tensor.data.cpu(), tensor.device
                setattr(layer, part, None)

    def put_back(self) -> None:
        for (name, part), (tensor, device) in self.weights.items():
            setattr(self.layers[name], part, nn.Parameter(tensor.to(device), requires_grad=False))
