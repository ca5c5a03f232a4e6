"""The modulations of a whole sampling schedule, computed once.

With a constant pooled condition the outputs of all adaLN layers depend on the timestep alone: a table of them stands in
for a third of SD3.5's weights.
"""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

KNOWN = 8  # pooled tensors remembered


def modulation_layers(transformer: Any) -> dict[str, nn.Module]:
    """Each linear layer that turns the timestep's embedding into scales, shifts and gates, in order."""
    return {f"{name}.linear": norm.linear for name, norm in _modulated_norms(transformer)}


def _modulated_norms(transformer: Any) -> list[tuple[str, Any]]:
    norms = []
    for i, block in enumerate(transformer.transformer_blocks):
        norms += [(f"transformer_blocks.{i}.{name}", getattr(block, name)) for name in ("norm1", "norm1_context")]
    return [*norms, ("norm_out", transformer.norm_out)]


def _places(transformer: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of each linear layer between the timestep and the modulations."""
    places = [(norm, "linear", norm.linear) for _, norm in _modulated_norms(transformer)]
    for parent in transformer.time_text_embed.children():
        places += [
            (parent, name, child) for name, child in parent.named_children() if any(True for _ in child.parameters())
        ]
    return places


def may_wait(layer: nn.Module) -> bool:
    """Whether a layer is linear and all its state is in plain parameters, which may be elsewhere while it is not run.

    So is `nn.Linear`, and a subclass that keeps its weight in another format; not what wraps a layer (an adapter), nor
    what has parameters of a class of their own (bitsandbytes, torchao, DTensor).
    """
    plain = all(type(parameter) in (nn.Parameter, FakeTensor) for parameter in layer.parameters())
    return (
        isinstance(layer, nn.Linear)
        and type(layer) is not _Waiting
        and plain
        and not any(True for _ in layer.buffers())
    )


def version(tensor: Tensor) -> int | None:
    """Changes when the tensor's values are written; None where PyTorch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version


class ModulationTable:
    """Every modulation of a transformer at each timestep of a schedule, for one pooled condition.

    Attributes:
        timesteps: (S,) as the transformer gets them.
        pooled: (D,), the pooled condition.
        values: (S, K), row s all modulations at timesteps[s], one layer's after the other's.
        sizes: how many of the K are each layer's.
    """

    def __init__(self, transformer: Any, timesteps: Tensor, pooled: Tensor):
        """Computes the table, row by row through the transformer's own layers, on their device and in their dtype.

        Args:
            transformer: an SD3Transformer2DModel.
            timesteps: (S,) numbers, such as `scheduler.timesteps`.
            pooled: (D,), the pooled condition of every prompt.

        Raises:
            ValueError: shapes that do not fit, an adapter or a layer that `may_wait` does not know between timestep and
                modulations, or an accelerated transformer whose modulation layers another table stands in for.
        """
        if timesteps.dim() != 1 or not len(timesteps) or pooled.dim() != 1:
            raise ValueError(
                f"ModulationTable: expected timesteps (S,) and pooled (D,), got {tuple(timesteps.shape)} and "
                f"{tuple(pooled.shape)}"
            )
        places = _places(transformer)
        for parent, name, layer in places:
            if type(layer) is _Waiting:
                raise ValueError(
                    "ModulationTable: a table stands in for these layers; restore_sd3 the transformer first"
                )
            if not may_wait(layer):
                raise ValueError(f"ModulationTable: {type(parent).__name__}.{name} is a {type(layer).__name__}")
        weight = transformer.pos_embed.proj.weight
        self.timesteps, self.pooled = timesteps.to(weight.device), pooled.detach().to(weight, copy=True)
        layers, rows = modulation_layers(transformer).values(), []
        with torch.no_grad():
            for timestep in self.timesteps.split(1):  # each alone: its bits do not depend on what else is in the table
                embedding = nn.functional.silu(transformer.time_text_embed(timestep, self.pooled[None]))
                rows.append([layer(embedding) for layer in layers])
        self.values = torch.cat([torch.cat(row, 1) for row in rows])
        self.sizes = [value.shape[1] for value in rows[0]]
        self._made_from = [(weakref.ref(weight), version(weight)) for weight in _weights(places)]
        # Where the rows lie that were found to be the table's, and these, so that nothing else takes their memory
        self._known: dict[tuple, Tensor] = {}
        self._remember(pooled[None])

    def was_made_from(self, transformer: Any) -> bool:
        """Whether these are the transformer's modulations: its own weights, unchanged since."""
        weights = _weights(_places(transformer))
        return len(weights) == len(self._made_from) and all(
            then() is now and count == version(now) for now, (then, count) in zip(weights, self._made_from, strict=True)
        )

    def serves(self, pooled: Tensor) -> bool:
        """Whether pooled (B, D) is the table's in every row.

        Told from where it lies if it was the table's before, as the tensor it was made for is, and has not changed.
        """
        if _place(pooled) in self._known:
            return True
        if not torch.equal(pooled.to(self.pooled), self.pooled.expand_as(pooled)):
            return False
        self._remember(pooled)
        return True

    def _remember(self, pooled: Tensor) -> None:
        if version(pooled) is None:
            return
        if len(self._known) == KNOWN:
            del self._known[next(iter(self._known))]
        self._known[_place(pooled)] = pooled

    def rows(self, timestep: Tensor) -> list[Tensor]:
        """The modulations (B, K_i) of each layer at timestep (B,), without a synchronisation; views if all are equal.

        Raises:
            RuntimeError: a timestep that the table does not have (on a GPU when it synchronises next).
        """
        if self.values.device != timestep.device:
            self.timesteps, self.values = self.timesteps.to(timestep.device), self.values.to(timestep.device)
        alike = timestep.stride(0) == 0 or len(timestep) == 1
        found = (timestep[:1] if alike else timestep)[:, None] == self.timesteps
        torch._assert_async(found.any(1).all(), "ModulationTable: a timestep is not in the table")
        rows = self.values.index_select(0, found.int().argmax(1))
        return list(rows.expand(len(timestep), -1).split(self.sizes, 1))


def _place(pooled: Tensor) -> tuple:
    """Changes with what pooled (B, D) holds, not with how often it repeats one row."""
    alike = pooled.stride(0) == 0 or len(pooled) == 1
    rows = pooled[0] if alike else pooled
    storage = rows.untyped_storage()._cdata
    return storage, rows.storage_offset(), version(rows), rows.shape, rows.stride(), rows.dtype


def _weights(places: list[tuple[nn.Module, str, nn.Module]]) -> list[nn.Parameter]:
    return [weight for _, _, layer in places for weight in layer.parameters(recurse=False)]


class _Waiting(nn.Linear):
    """A linear layer whose weights stay in the host's memory wherever its module moves; they follow it in dtype."""

    def _apply(self, fn, recurse=True):
        for weight in self.parameters(recurse=False):
            weight.data = weight.data.to(fn(weight.data.new_empty(0)).dtype)
        return self


class TableInUse:
    """A table, and the layers it stands in for, whose weights it keeps in the host's memory meanwhile."""

    def __init__(self, transformer: Any, table: ModulationTable):
        self.table = table
        self.places = _places(transformer)
        self.waiting = {layer: type(layer) for layer in modulation_layers(transformer).values()}
        for layer in self.waiting:
            layer.__class__ = _Waiting
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data if weight.is_meta else weight.data.cpu()
        self._note_weights()

    def _note_weights(self) -> None:
        self.weights = [
            (layer, name, weight, version(weight))
            for _, _, layer in self.places
            for name, weight in layer.named_parameters(recurse=False)
        ]

    def __deepcopy__(self, memo):
        made = memo[id(self)] = copy.copy(self)
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        made._note_weights()  # a copied tensor counts its changes from 0
        made.table._known.clear()  # and lies elsewhere
        return made

    def reason_against(self, pooled: Tensor) -> str | None:
        """Why the table may not serve this call; None if it may."""
        if any(getattr(parent, name) is not layer for parent, name, layer in self.places):
            return "an adapter stands at a modulation layer"
        if any(layer._parameters[n] is not weight or version(weight) != v for layer, n, weight, v in self.weights):
            return "a modulation layer's weights have changed"
        if torch.is_grad_enabled() and any(weight.requires_grad for _, _, weight, _ in self.weights):
            return "a modulation layer is trained"
        return None if self.table.serves(pooled) else "the pooled condition is not the table's"

    def put_back(self, device: torch.device) -> None:
        """The layers compute again, on `device`."""
        for layer, kind in self.waiting.items():
            layer.__class__ = kind
        for parent, name, _ in self.places:
            for weight in getattr(parent, name).parameters():
                weight.data = weight.data.to(device)
