"""The products of an SD3 block in e4m3: which linear layers they are, what scales they take, and their weights."""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.mmdit.fp8 import Quantized
from .fp8 import check_device, fp8_linear, quantize_rows
from .modulation_table import version

MULTIPLE = 16  # of which a product's dimensions are

# By name, the linear layers of a block that are one product: they take one input
LAYERS = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.out": ("attn.to_out.0",),
    "attn.added_out": ("attn.to_add_out",),
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.out": ("attn2.to_out.0",),
    "ff.up": ("ff.net.0.proj",),
    "ff.down": ("ff.net.2",),
    "ff_context.up": ("ff_context.net.0.proj",),
    "ff_context.down": ("ff_context.net.2",),
}
STATIC = ("attn.out", "attn.added_out", "attn2.out", "ff.down", "ff_context.down")  # inputs no norm gives


def products(transformer: Any) -> dict[str, list[nn.Linear]]:
    """The linear layers of each product, without their adapters, by name ("transformer_blocks.3.attn.qkv")."""
    found = {}
    for i, block in enumerate(transformer.transformer_blocks):
        for name, paths in LAYERS.items():
            layers = [at(block, path) for path in paths]
            if layers[0] is not None:
                found[f"transformer_blocks.{i}.{name}"] = [base(layer) for layer in layers]
    return found


def static(names: Iterable[str]) -> list[str]:
    """Those of the products' names whose inputs come from an attention or a GELU."""
    return [name for name in names if name.split(".", 2)[2] in STATIC]


def check_products(transformer: Any) -> None:
    """Raises unless every product can be computed in e4m3."""
    check_device("accelerate_sd3", transformer.pos_embed.proj.weight)
    for name, layers in products(transformer).items():
        for layer in layers:
            if type(layer) is not nn.Linear or layer.bias is None:
                raise ValueError(
                    f"accelerate_sd3: fp8 takes linear layers with a bias as they are; {name} has a "
                    f"{type(layer).__name__}"
                )
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                raise ValueError(
                    f"accelerate_sd3: fp8 takes sizes that are multiples of {MULTIPLE}; {name} has {layer}"
                )


def at(block: Any, path: str) -> Any:
    """A block's part, None where it has none."""
    for name in path.split("."):
        block = None if block is None else getattr(block, name, None) if not name.isdigit() else block[int(name)]
    return block


def base(layer: Any) -> Any:
    """A layer without the adapter around it."""
    return getattr(layer, "base_layer", layer)


@torch.no_grad()
def fingerprint(transformer: Any) -> str:
    """SHA-256 over the names, dtypes and shapes of all weights, adapters' too, and sums of their bits.

    The sums are exact integers, of every row and of every column: the same on every device, and others when numbers
    change or change places.
    """
    digest = hashlib.sha256()
    for name, weight in transformer.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        rows = weight.detach().contiguous().view(whole).view(-1, weight.shape[-1])
        for dim in (0, 1):
            digest.update(rows.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Fp8Calibration:
    """Static scales of the inputs that no norm gives, for each level of a schedule, and what stays in bf16.

    Attributes:
        timesteps: (S,) fp32, the levels as the transformer gets them.
        scales: by product's name (S,) fp32: max|input|/448 at each level, with a margin.
        fallback: names of the products that stay as they are.
        fingerprint: of the weights it was made with, see `fingerprint`.
        errors: by product's name, how far it alone moves the velocity, relative to the velocity's norm.
        error: how far all that are not in `fallback` move it together.
    """

    timesteps: Tensor
    scales: dict[str, Tensor]
    fallback: tuple[str, ...] = ()
    fingerprint: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    error: float | None = None

    def check(self, transformer: Any) -> None:
        """Raises ValueError unless it was made for this transformer with these weights."""
        names = products(transformer)
        if set(self.scales) != set(static(names)) or not set(self.fallback) <= set(names):
            raise ValueError("this Fp8Calibration is of another transformer: its products have other names")
        for name, scales in self.scales.items():
            if scales.shape != self.timesteps.shape or not ((scales > 0) & scales.isfinite()).all():
                raise ValueError(f"this Fp8Calibration has no positive scale at each level for {name}")
        if self.fingerprint != fingerprint(transformer):
            raise ValueError("this Fp8Calibration was made with other weights (or another adapter)")


class InFp8(nn.Linear):
    """A linear layer whose product is computed in e4m3 by another; its weight stays in the host's memory meanwhile."""

    product: "Product"
    result: Tensor | None = None  # what it is to give next

    def _apply(self, fn, recurse=True):
        weight: Any = self._parameters["weight"]
        weight.data = weight.data.to(fn(weight.data.new_empty(0)).dtype)  # it follows in dtype, not in place
        self._parameters["weight"] = None
        super()._apply(fn, recurse)
        self._parameters["weight"] = weight
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Its part of the product, which is known when an adapter around it asks."""
        result, self.result = self.result, None
        if result is None:
            raise RuntimeError("this layer's weight waits in the host's memory: restore_sd3 the transformer first")
        return result


class Product:
    """Linear layers of one input whose product is computed in e4m3."""

    def __init__(self, name: str, layers: list[nn.Linear]):
        self.name, self.layers = name, layers
        made = [quantize_rows(layer.weight.detach(), impl="torch") for layer in layers]
        self.weight = Quantized(torch.cat([w.values for w in made]), torch.cat([w.scales for w in made]))
        for layer in layers:
            layer.__class__ = InFp8
            layer.product = self  # type: ignore[assignment]
            layer.weight.data = layer.weight.data if layer.weight.is_meta else layer.weight.data.cpu()
        self.note_weights()

    def note_weights(self) -> None:
        self.versions = [(layer, layer.weight, version(layer.weight)) for layer in self.layers]

    def changed(self) -> bool:
        """Whether a weight is not the one that was quantised."""
        return any(layer.weight is not weight or version(weight) != v for layer, weight, v in self.versions)

    def __call__(self, x: Quantized, bias: Tensor) -> Tensor:
        if self.weight.values.device != x.values.device:
            self.weight = Quantized(*(part.to(x.values.device) for part in self.weight[:2]))
        return fp8_linear(x, self.weight, bias, dtype=bias.dtype)

    def put_back(self, device: torch.device) -> None:
        """The layers compute again, on `device`, with the weights they had."""
        for layer in self.layers:
            layer.__class__ = nn.Linear
            del layer.product
            layer.__dict__.pop("result", None)
            layer.weight.data = layer.weight.data.to(device)


class Fp8InUse:
    """The products of a transformer that are computed in e4m3, and the scales of their inputs at the present level."""

    def __init__(self, transformer: Any, calibration: Fp8Calibration | None, names: Iterable[str] | None = None):
        """`names` are the products meant; by default all but those that the calibration leaves as they are."""
        layers = products(transformer)
        if names is None:
            names = [name for name in layers if calibration is None or name not in calibration.fallback]
        self.products = [Product(name, layers[name]) for name in names]
        self.timesteps: Tensor | None = None
        self.scales: dict[str, Tensor] = {}  # (B,) or (1,) of each static product, at the present level
        if calibration is not None:
            self.names = [product.name for product in self.products if product.name in calibration.scales]
            self.timesteps = calibration.timesteps
            self.table = torch.stack([calibration.scales[name] for name in self.names], 1) if self.names else None

    def __deepcopy__(self, memo):
        made = memo[id(self)] = copy.copy(self)
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        for product in made.products:
            product.note_weights()  # a copied tensor counts its changes from 0
        return made

    def begin(self, model: Any, timestep: Tensor, *inputs: Tensor) -> None:
        """Before a forward pass: refuses a policy's, and finds the scales of its level, without a synchronisation."""
        if torch.is_grad_enabled():
            _refuse_gradients(model, inputs)
        if changed := [product.name for product in self.products if product.changed()]:
            raise RuntimeError(
                f"accelerate_sd3: the weights of {changed[0]} have changed since they were quantised; restore_sd3 the "
                "transformer and accelerate it again"
            )
        if self.timesteps is None or self.table is None:
            return
        if self.table.device != timestep.device:
            self.timesteps, self.table = self.timesteps.to(timestep.device), self.table.to(timestep.device)
        alike = timestep.stride(0) == 0 or len(timestep) == 1
        found = (timestep[:1] if alike else timestep)[:, None] == self.timesteps
        torch._assert_async(found.any(1).all(), "Fp8Calibration: a timestep is not among its levels")
        columns = self.table.index_select(0, found.int().argmax(1)).unbind(1)
        self.scales = dict(zip(self.names, columns, strict=True))

    def layers(self) -> Iterator[nn.Linear]:
        """The layers whose own forward does not run."""
        return (layer for product in self.products for layer in product.layers)

    def put_back(self, device: torch.device) -> None:
        """All layers compute again, on `device`."""
        for product in self.products:
            product.put_back(device)


def _refuse_gradients(model: Any, inputs: tuple[Tensor, ...]) -> None:
    trained = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    if trained is None and any(x.requires_grad for x in inputs):
        trained = "an input"
    if trained is not None:
        raise RuntimeError(
            f"accelerate_sd3: fp8 products have no gradients, and {trained} requires one: they draw with a frozen "
            "transformer and are never a policy's. restore_sd3 it, and accelerate it without fp8, before it is trained "
            "or its log-probs are taken; or draw under torch.no_grad()"
        )
