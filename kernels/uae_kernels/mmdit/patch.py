"""`accelerate_sd3`: a diffusers SD3 transformer computes by this package's ops, in place and undoably."""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.mmdit.gated_residual import Stream
from ..reference.mmdit.qk_norm import Projections
from .gated_residual import gated_residual
from .joint_attention import check_backend, joint_attention
from .modulation_table import Dropped, ModulationTable, log, modulation_layers
from .qk_norm import qk_norm

Rows = tuple[Tensor, ...]  # (B, C) each


class _State:
    """What an accelerated transformer has beside its modules."""

    def __init__(self, transformer: Any, table: ModulationTable | None, attention: str):
        self.table, self.attention = table, attention
        self.impl = "auto"
        self.dropped = None if table is None else Dropped(transformer)
        self.packed: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
        self.context: tuple[weakref.ref, int, Tensor] | None = None
        # The GELU in the product's epilogue: measured slower than apart on sm_120 (sglang PR 28166)
        self.epilogue = torch.cuda.is_available() and torch.cuda.get_device_capability() < (12, 0)


def accelerate_sd3(
    transformer: Any, *, fp8: bool = False, modulation_table: ModulationTable | None = None, attention: str = "auto"
) -> Any:
    """Makes a diffusers `SD3Transformer2DModel` compute its forward pass by fused ops; `restore_sd3` undoes it.

    The same function of the same inputs up to rounding, with gradients; modules, parameters and their names stay, so
    that peft adapters, quantised layers, `save_pretrained` and `StableDiffusion3Pipeline` work as before. Adapters are
    added as they are, never merged into the weights.

    Args:
        transformer: SD3, SD3.5-medium or SD3.5-large.
        fp8: must be False.
        modulation_table: stands in for the modulation layers where the pooled condition is the table's; their weights
            then wait in the host's memory. Another pooled condition brings them back, with a warning.
        attention: "auto", "sdpa", "flash-attn" or "xformers", see `joint_attention`.

    Returns:
        The transformer itself.

    Raises:
        TypeError: another model.
        ValueError: a transformer accelerated already, a block or an attention processor this does not know, a table
            of another transformer, an unknown backend.
        RuntimeError: an attention backend that is not installed.
    """
    if type(transformer).__name__ != "SD3Transformer2DModel":
        raise TypeError(f"accelerate_sd3: expected a diffusers SD3Transformer2DModel, got {type(transformer).__name__}")
    if fp8:
        raise ValueError("accelerate_sd3: fp8 products are not part of this version; use fp8=False")
    if "_uae" in vars(transformer):
        raise ValueError("accelerate_sd3: this transformer is accelerated already; restore_sd3 it first")
    backend = check_backend(attention)
    _check_blocks(transformer)
    if modulation_table is not None:
        _check_table(transformer, modulation_table)
    transformer._uae = _State(transformer, modulation_table, backend)
    transformer.forward = functools.partial(_forward, transformer)
    return transformer


def restore_sd3(transformer: Any) -> Any:
    """Undoes `accelerate_sd3`; the transformer is again as diffusers made it.

    Raises:
        ValueError: a transformer that is not accelerated.
    """
    if "_uae" not in vars(transformer):
        raise ValueError("restore_sd3: this transformer is not accelerated")
    if transformer._uae.dropped is not None:
        transformer._uae.dropped.put_back()
    del transformer._uae, transformer.forward
    return transformer


def _check_blocks(transformer: Any) -> None:
    for i, block in enumerate(transformer.transformer_blocks):
        where = f"accelerate_sd3: transformer_blocks.{i}"
        if type(block).__name__ != "JointTransformerBlock":
            raise ValueError(f"{where} is a {type(block).__name__}, not a JointTransformerBlock")
        for name in ("attn", "attn2"):
            attention = getattr(block, name)
            if attention is None:
                continue
            if type(attention.processor).__name__ != "JointAttnProcessor2_0":
                raise ValueError(f"{where}.{name} has a {type(attention.processor).__name__}; reset it first")
            norms = [getattr(attention, norm, None) for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
            if unknown := [type(norm).__name__ for norm in norms if norm is not None and not _is_rms_norm(norm)]:
                raise ValueError(f"{where}.{name} normalises queries and keys by {unknown[0]}")
        if type(block.ff.net[0]).__name__ != "GELU" or block.ff.net[0].approximate != "tanh":
            raise ValueError(f"{where}.ff is not a feed-forward network with tanh GELU")


def _is_rms_norm(norm: nn.Module) -> bool:
    return type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None


def _check_table(transformer: Any, table: ModulationTable) -> None:
    layers = modulation_layers(transformer)
    sizes = [getattr(layer, "out_features", None) for layer in layers.values()]
    if sizes != table.sizes:
        raise ValueError("accelerate_sd3: modulation_table was made for another transformer")
    if wrapped := [name for name, layer in layers.items() if type(layer) is not nn.Linear]:
        raise ValueError(f"accelerate_sd3: an adapter or a quantised layer stands at {wrapped[0]}; use no table")
    if trained := [name for name, layer in layers.items() if layer.weight.requires_grad]:
        raise ValueError(f"accelerate_sd3: {trained[0]} is trained; use no table")


def _forward(
    model: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    block_controlnet_hidden_states: list | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    skip_layers: list[int] | None = None,
) -> Any:
    """SD3Transformer2DModel.forward: (B, C, H, W) latents to (B, C, H, W) velocities."""
    for name, given in (
        ("block_controlnet_hidden_states", block_controlnet_hidden_states),
        ("joint_attention_kwargs", joint_attention_kwargs),
        ("skip_layers", skip_layers),
    ):
        if given:
            raise ValueError(f"accelerate_sd3: {name} is not supported; restore_sd3 the transformer to use it")
    if model.gradient_checkpointing and torch.is_grad_enabled():
        raise ValueError("accelerate_sd3: gradient checkpointing is not supported; disable it or restore_sd3")
    state, blocks = model._uae, model.transformer_blocks
    height, width = (size // model.config.patch_size for size in hidden_states.shape[-2:])
    rows = _modulations(model, timestep, pooled_projections)
    x, c = model.pos_embed(hidden_states), _context(model, encoder_hidden_states)
    eps = blocks[0].norm2.eps
    join = functools.partial(gated_residual, eps=eps, impl=state.impl)

    image, text = join(Stream(x, _attention_pairs(blocks[0], rows[0])), Stream(c, _context_pairs(blocks[0], rows[1])))
    for i, block in enumerate(blocks):
        img, txt = rows[2 * i], rows[2 * i + 1]
        y, y2, c_y = _attend(state, i, block, image.normalized, text.normalized[0])
        branches = [(y[0], img[2], y[1])] + ([] if y2 is None else [(y2[0], img[8], y2[1])])
        streams = [Stream(image.x, ((img[4], img[3]),), tuple(branches))]
        if c_y is not None:
            streams.append(Stream(text.x, ((txt[4], txt[3]),), ((c_y[0], txt[2], c_y[1]),)))
        image, *rest = join(*streams)
        branch = (_feed_forward(state, block.ff, image.normalized[0]), img[5], None)
        last = i + 1 == len(blocks)
        pairs = ((rows[-1][0], rows[-1][1]),) if last else _attention_pairs(blocks[i + 1], rows[2 * i + 2])
        streams = [Stream(image.x, pairs, (branch,))]
        if rest:
            c_branch = (_feed_forward(state, block.ff_context, rest[0].normalized[0]), txt[5], None)
            streams.append(Stream(rest[0].x, _context_pairs(blocks[i + 1], rows[2 * i + 3]), (c_branch,)))
        image, *rest = join(*streams)
        text = rest[0] if rest else text

    out = model.proj_out(image.normalized[0]).unflatten(-1, (model.config.patch_size,) * 2 + (model.out_channels,))
    out = out.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    if not return_dict:
        return (out,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out)


# Of norm1: shift, scale and gate of the attention, then of the feed-forward network, then of the second attention.
# Of norm1_context in the last block, and of norm_out: scale, shift.


def _attention_pairs(block: Any, rows: Rows) -> tuple[tuple[Tensor, Tensor], ...]:
    first = (rows[1], rows[0])
    return (first, (rows[7], rows[6])) if block.use_dual_attention else (first,)


def _context_pairs(block: Any, rows: Rows) -> tuple[tuple[Tensor, Tensor], ...]:
    return ((rows[0], rows[1]),) if block.context_pre_only else ((rows[1], rows[0]),)


def _modulations(model: Any, timestep: Tensor, pooled: Tensor) -> list[Rows]:
    """Of each modulation layer in order its shifts, scales and gates (B, C)."""
    state, width = model._uae, model.inner_dim
    if state.dropped is not None and not state.table.serves(pooled):
        log.warning("accelerate_sd3: the pooled condition is not the table's; the modulation layers are back")
        state.dropped.put_back()
        state.dropped = state.table = None
    if state.table is not None:
        values = state.table.rows(timestep)
    else:
        embedding = nn.functional.silu(model.time_text_embed(timestep, pooled))
        values = [layer(embedding) for layer in modulation_layers(model).values()]
    return [value.split(width, 1) for value in values]


def _context(model: Any, given: Tensor) -> Tensor:
    """The embedded context; without gradients, once for as long as the same tensor comes."""
    known = model._uae.context
    plain = not torch.is_grad_enabled() and type(model.context_embedder) is nn.Linear
    weight = model.context_embedder.weight if plain else None
    key = (given._version, weight.data_ptr(), weight._version) if plain else None
    if plain and known is not None and known[0]() is given and known[1] == key:
        return known[2]
    embedded = model.context_embedder(given)
    model._uae.context = (weakref.ref(given), key, embedded) if plain else None
    return embedded


def _attend(state: _State, i: int, block: Any, image: tuple[Tensor, ...], text: Tensor):
    """(y, bias) of the joint attention's image tokens, of the second attention's, and of the text's; None where absent."""
    attn = block.attn
    streams = (
        Projections(*_project(state, (i, "attn"), attn, ("to_q", "to_k", "to_v"), image[0]),
                    *_weights(attn.norm_q, attn.norm_k)),
        Projections(*_project(state, (i, "add"), attn, ("add_q_proj", "add_k_proj", "add_v_proj"), text),
                    *_weights(attn.norm_added_q, attn.norm_added_k)),
    )  # fmt: skip
    eps = 1e-6 if attn.norm_q is None else attn.norm_q.eps
    q, k, v = qk_norm(*streams, heads=attn.heads, eps=eps, impl=state.impl)
    out, tokens = joint_attention(q, k, v, backend=state.attention), image[0].shape[1]
    y = _project_out(attn.to_out[0], out[:, :tokens])
    c_y = None if block.context_pre_only else _project_out(attn.to_add_out, out[:, tokens:])
    if not block.use_dual_attention:
        return y, None, c_y
    attn = block.attn2
    parts = _project(state, (i, "attn2"), attn, ("to_q", "to_k", "to_v"), image[1])
    q, k, v = qk_norm(Projections(*parts, *_weights(attn.norm_q, attn.norm_k)), heads=attn.heads, eps=eps,
                      impl=state.impl)  # fmt: skip
    return y, _project_out(attn.to_out[0], joint_attention(q, k, v, backend=state.attention)), c_y


def _weights(*norms: nn.Module | None) -> list[Any]:
    return [None if norm is None else norm.weight for norm in norms]


def _is_frozen(*layers: nn.Module) -> bool:
    """Whether these are plain linear layers that are not trained: no adapter, no quantisation."""
    return all(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in layers)


def _project(state: _State, key: tuple[int, str], attn: Any, names: tuple[str, ...], x: Tensor) -> Rows:
    """The three projections of x (B, N, C): one product with the packed weight, or one for each layer."""
    layers = [getattr(attn, name) for name in names]
    if not _is_frozen(*layers):
        return tuple(layer(x) for layer in layers)
    weight, bias = _packed(state, key, layers)
    return nn.functional.linear(x, weight, bias).chunk(3, -1)


def _packed(state: _State, key: tuple[int, str], layers: list[Any]) -> tuple[Tensor, Tensor | None]:
    """The layers' weights and biases as one of each, of which theirs are made views: no memory is taken twice."""
    known = state.packed.get(key)
    if known is not None:
        starts = [part.data_ptr() for part in known[0].chunk(len(layers))]
        if starts == [layer.weight.data_ptr() for layer in layers] and known[0].dtype == layers[0].weight.dtype:
            return known
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    for i, layer in enumerate(layers):
        layer.weight.data = weight.chunk(len(layers))[i]
        if bias is not None:
            layer.bias.data = bias.chunk(len(layers))[i]
    state.packed[key] = weight, bias
    return weight, bias


def _project_out(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(y, bias) with y + bias = layer(x): rows (B, N, C) that lie apart are multiplied where they are."""
    if x.is_contiguous() or not _is_frozen(layer):
        return layer(x), None
    return torch.bmm(x, layer.weight.t().expand(len(x), -1, -1)), layer.bias


def _feed_forward(state: _State, ff: Any, x: Tensor) -> Tensor:
    up, down = ff.net[0].proj, ff.net[2]
    if state.epilogue and _is_frozen(up) and up.bias is not None and not (torch.is_grad_enabled() and x.requires_grad):
        h = torch.ops.aten._addmm_activation(up.bias, x.flatten(0, 1), up.weight.t(), use_gelu=True)
        return down(h.unflatten(0, x.shape[:2]))
    return down(nn.functional.gelu(up(x), approximate="tanh"))
