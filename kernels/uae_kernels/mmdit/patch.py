"""`accelerate_sd3`: a diffusers SD3 transformer computes by this package's ops, in place and undoably."""

import functools
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _triton
from ..reference.mmdit.fp8 import Quantized
from ..reference.mmdit.gated_residual import Modulated, Stream
from ..reference.mmdit.qk_norm import Projections
from ..segment_attention import segment_attention
from .fp8 import quantize_rows
from .gated_residual import gated_residual
from .joint_attention import check_backend, joint_attention
from .modulation_table import ModulationTable, TableInUse, may_wait, modulation_layers, version
from .products import Fp8Calibration, Fp8InUse, Product, base, check_products
from .qk_norm import qk_norm

log = logging.getLogger("uae_kernels")

Rows = tuple[Tensor, ...]  # shifts, scales and gates (B, C) in the order a modulation layer gives them
Pairs = tuple[tuple[Tensor, Tensor], ...]  # (scale, shift) of each normal that is wanted of a stream
Normals = tuple[Pairs, tuple[str, ...]]  # these, and the form in which each is wanted
Branch = tuple[Tensor, Tensor | None]  # (y, bias): y + bias is what a layer gives

# Where a sublayer's shift, scale and gate stand among the rows of norm1 and norm1_context
ATTENTION, FEED_FORWARD, SECOND_ATTENTION = 0, 3, 6
NORMS = "norm_q", "norm_k", "norm_added_q", "norm_added_k"


class _State:
    """What an accelerated transformer has beside its modules."""

    def __init__(
        self, transformer: Any, table: ModulationTable | None, attention: str, fp8: bool | Fp8Calibration = False
    ):
        self.impl = "auto"  # of the ops
        self.attention = attention
        self.table = None if table is None else TableInUse(transformer, table)
        self.fp8 = Fp8InUse(transformer, None if fp8 is True else fp8) if fp8 else None
        self.eps = transformer.norm_out.norm.eps
        # Of the last two contexts (with guidance a prompt's and the negative one's): the tensor, its key, it embedded
        self.contexts: list[tuple[weakref.ref, tuple, Tensor]] = []
        self.processors = [(attn, attn.processor) for b in transformer.transformer_blocks for attn in _attentions(b)]
        self.passed_by = list(_passed_by(transformer))


def accelerate_sd3(
    transformer: Any,
    *,
    fp8: bool | Fp8Calibration = False,
    modulation_table: ModulationTable | None = None,
    attention: str = "auto",
) -> Any:
    """Makes a diffusers `SD3Transformer2DModel` compute its forward pass by fused ops; `restore_sd3` undoes it.

    The same function of the same inputs up to rounding, with gradients; modules, parameters and their names stay, so
    that peft adapters, quantised layers, gradient checkpointing, `save_pretrained`, `copy.deepcopy` and
    `StableDiffusion3Pipeline` work as before. Adapters are added as they are, never merged into the weights.

    Frozen query, key and value projections come to lie one under another in memory and are views of that. Without
    gradients the embedded context is kept for as long as the same `encoder_hidden_states` comes again unchanged.

    Args:
        transformer: SD3, SD3.5-medium or SD3.5-large.
        fp8: the blocks' products are computed in e4m3 numbers, of weights quantised once, a scale a row, while the
            weights themselves wait in the host's memory until `restore_sd3`; adapters stay apart and unquantised. Not
            the same function: for drawing with a frozen transformer, on sm_89 and newer GPUs; a CPU emulates it. True
            gives each token a scale of its own everywhere; an `Fp8Calibration` (see `calibrate`) gives inputs that no
            norm makes one for each level, and leaves products that suffer as they are.
        modulation_table: stands in for the modulation layers, whose weights wait in the host's memory meanwhile. A
            pooled condition that is not the table's, an adapter on one of these layers or a change of their weights
            brings them back for good, with a warning.
        attention: "auto" (which is "sdpa"), "sdpa", "flash-attn" or "xformers", see `joint_attention`; or "segments",
            `segment_attention` on the projections where they lie: no queries and keys are joined, normalised copies of
            keys alone are written, and each stream's result is its own tensor. Logged once, at level INFO.

    Returns:
        The transformer itself.

    Raises:
        TypeError: another model.
        ValueError: a transformer accelerated already; a block, a norm, an attention processor, a dropout or a hook that
            this does not know; a table or a calibration that is not of this transformer as it is; an unknown backend;
            with fp8 a quantised layer or one whose sizes are no multiples of 16.
        RuntimeError: an attention backend that is not installed; fp8 on a GPU older than sm_89. With fp8, of a forward
            pass: gradients are enabled and a parameter, an adapter's or an input requires one; the weights have changed
            since they were quantised.
    """
    if type(transformer).__name__ != "SD3Transformer2DModel":
        raise TypeError(f"accelerate_sd3: expected a diffusers SD3Transformer2DModel, got {type(transformer).__name__}")
    if not isinstance(fp8, bool | Fp8Calibration):
        raise TypeError(f"accelerate_sd3: fp8 must be False, True or an Fp8Calibration, got {type(fp8).__name__}")
    if "_uae" in vars(transformer):
        raise ValueError("accelerate_sd3: this transformer is accelerated already; restore_sd3 it first")
    if "forward" in vars(transformer):
        raise ValueError(
            "accelerate_sd3: a hook replaces this transformer's forward; accelerate it before it is offloaded"
        )
    backend = check_backend(attention)
    _check_blocks(transformer)
    if modulation_table is not None:
        _check_table(transformer, modulation_table)
    if fp8:
        check_products(transformer)
    if isinstance(fp8, Fp8Calibration):
        fp8.check(transformer)
    transformer._uae = _State(transformer, modulation_table, backend, fp8)
    transformer.forward = functools.partial(_forward, transformer)
    _announce(backend)
    return transformer


@functools.cache
def _announce(backend: str) -> None:
    log.info("joint attention of SD3 transformers: %s", backend)


def restore_sd3(transformer: Any) -> Any:
    """Undoes `accelerate_sd3`; the transformer is again as diffusers made it.

    Raises:
        ValueError: a transformer that is not accelerated, or that a hook was put on since.
    """
    if "_uae" not in vars(transformer):
        raise ValueError("restore_sd3: this transformer is not accelerated")
    if getattr(vars(transformer).get("forward"), "func", None) is not _forward:
        raise ValueError("restore_sd3: a hook replaces this transformer's forward; remove it first")
    for waiting in (transformer._uae.table, transformer._uae.fp8):
        if waiting is not None:
            waiting.put_back(_device(transformer))
    del transformer._uae, transformer.forward
    return transformer


def _device(transformer: Any) -> torch.device:
    return transformer.pos_embed.proj.weight.device


def _attentions(block: Any) -> list[Any]:
    return [attn for attn in (block.attn, block.attn2) if attn is not None]


def _passed_by(transformer: Any) -> Iterator[nn.Module]:
    """The modules whose own forward does not run."""
    for block in transformer.transformer_blocks:
        norms = [getattr(attn, name, None) for attn in _attentions(block) for name in NORMS]
        parts = block, *_attentions(block), *norms, block.norm1, block.norm1_context, block.ff, block.ff_context
        yield from (part for part in parts if part is not None)
    yield transformer.norm_out


def _check_blocks(transformer: Any) -> None:
    for i, block in enumerate(transformer.transformer_blocks):
        where = f"accelerate_sd3: transformer_blocks.{i}"
        if type(block).__name__ != "JointTransformerBlock":
            raise ValueError(f"{where} is a {type(block).__name__}, not a JointTransformerBlock")
        for attn in _attentions(block):
            if type(attn.processor).__name__ != "JointAttnProcessor2_0":
                raise ValueError(f"{where} has a {type(attn.processor).__name__}; set a JointAttnProcessor2_0 first")
            for norm in (getattr(attn, name, None) for name in NORMS):
                if norm is not None and not (_is_rms_norm(norm) and norm.eps == attn.norm_q.eps):
                    raise ValueError(f"{where} normalises queries and keys by {norm}; expected RMSNorm with weights")
        for ff in (block.ff, block.ff_context):
            if ff is not None and getattr(ff.net[0], "approximate", None) != "tanh":
                raise ValueError(
                    f"{where} has a feed-forward network of {type(ff.net[0]).__name__}, not of GELU by tanh"
                )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.LayerNorm) and (
            module.elementwise_affine or module.eps != transformer.norm_out.norm.eps
        ):
            raise ValueError(f"accelerate_sd3: {name} is {module}; expected one without weights, of the others' eps")
        if isinstance(module, nn.Dropout) and module.p and name.startswith("transformer_blocks") and "lora" not in name:
            raise ValueError(f"accelerate_sd3: {name} drops {module.p:g} of its inputs; expected none")
    _check_hooks(_passed_by(transformer))


def _is_rms_norm(norm: Any) -> bool:
    return type(norm).__name__ == "RMSNorm" and norm.weight is not None and getattr(norm, "bias", None) is None


def _check_hooks(modules: Any) -> None:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise ValueError(
                f"accelerate_sd3: a hook (sharding, offloading, caching) on a {type(module).__name__} would not run; "
                "remove it, or restore_sd3 the transformer"
            )


def _check_table(transformer: Any, table: ModulationTable) -> None:
    layers = modulation_layers(transformer)
    if wrapped := [name for name, layer in layers.items() if not may_wait(layer)]:
        raise ValueError(
            f"accelerate_sd3: an adapter or a quantised layer stands at {wrapped[0]}; use no modulation_table"
        )
    if not table.was_made_from(transformer):
        raise ValueError(
            "accelerate_sd3: modulation_table was made from another transformer, or its weights have changed since"
        )


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
    ):
        if given:
            raise ValueError(f"accelerate_sd3: {name} is not supported; restore_sd3 the transformer to use it")
    state = model._uae
    _check_hooks(state.passed_by)
    if any(attn.processor is not processor for attn, processor in state.processors):
        raise ValueError("accelerate_sd3: an attention processor was set since; restore_sd3 the transformer to use it")
    if state.fp8 is not None:
        _check_hooks(state.fp8.layers())
        state.fp8.begin(model, timestep, hidden_states, encoder_hidden_states, pooled_projections)
    height, width = (size // model.config.patch_size for size in hidden_states.shape[-2:])
    rows = _modulations(model, timestep, pooled_projections, len(hidden_states))
    x, c = model.pos_embed(hidden_states).contiguous(), _context(model, encoder_hidden_states)

    layers = [
        (block, rows[2 * i], rows[2 * i + 1])
        for i, block in enumerate(model.transformer_blocks)
        if i not in (skip_layers or ())
    ]
    entries = [_entry(*layer) for layer in layers]
    exits: list[tuple[Normals, Normals]] = [*entries[1:], ((((rows[-1][0], rows[-1][1]),), ()), ((), ()))]
    if model.gradient_checkpointing and torch.is_grad_enabled():
        for layer in layers:
            x, c = model._gradient_checkpointing_func(functools.partial(_lone_block, state, *layer), x, c)
        (image,) = _join(state, _stream(x, exits[-1][0]))
    else:
        image, *text = _join(state, *map(_stream, (x, c), entries[0]))
        for layer, pairs in zip(layers, exits, strict=True):
            image, *text = _block(state, *layer, image, text[0], *pairs)

    out = model.proj_out(image.normalized[0]).unflatten(-1, (model.config.patch_size,) * 2 + (model.out_channels,))
    out = out.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    if not return_dict:
        return (out,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out)


def _modulations(model: Any, timestep: Tensor, pooled: Tensor, batch: int) -> list[Rows]:
    """Of each modulation layer in order its shifts, scales and gates (B, C)."""
    state = model._uae
    if state.table is not None and (reason := state.table.reason_against(pooled)):
        log.warning("accelerate_sd3: %s; from now on the modulations are computed", reason)
        state.table.put_back(_device(model))
        state.table = None
    if state.table is not None:
        values = state.table.table.rows(timestep)
    else:
        embedding = nn.functional.silu(model.time_text_embed(timestep, pooled))
        values = [layer(embedding) for layer in modulation_layers(model).values()]
    return [value.expand(batch, -1).split(model.inner_dim, 1) for value in values]


def _context(model: Any, given: Tensor) -> Tensor:
    """The embedded context; without gradients, once for as long as the same tensor comes."""
    state, layer = model._uae, model.context_embedder
    if torch.is_grad_enabled() or _is_captured(given) or not _is_plain(layer) or version(given) is None:
        state.contexts = []
        return layer(given)
    weights = layer.weight.data_ptr(), version(layer.weight), version(layer.bias)
    key = version(given), weights, torch.is_autocast_enabled()
    for known, known_key, embedded in state.contexts:
        if known() is given and known_key == key:
            return embedded
    embedded = layer(given)
    state.contexts = [*state.contexts[-1:], (weakref.ref(given), key, embedded)]
    return embedded


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is recorded: what it replays must be computed within it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _join(state: _State, *streams: Stream) -> list[Modulated]:
    return gated_residual(*streams, eps=state.eps, impl=state.impl)


def _stream(x: Tensor, normals: Normals, branches: Iterable[tuple[Tensor, Tensor, Tensor | None]] = ()) -> Stream:
    pairs, forms = normals
    return Stream(x, pairs, tuple(branches), forms)


def _entry(block: Any, rows: Rows, context_rows: Rows) -> tuple[Normals, Normals]:
    """The modulations of the image's and of the text's tokens before a block's attention."""
    attn, pairs = block.attn, [_pair(rows, ATTENTION)]
    forms = [_form(attn.to_q, attn.to_k, attn.to_v)]
    if block.use_dual_attention:
        pairs.append(_pair(rows, SECOND_ATTENTION))
        forms.append(_form(block.attn2.to_q, block.attn2.to_k, block.attn2.to_v))
    # The last block's norm1_context gives scale and shift, as norm_out does
    pair = (context_rows[0], context_rows[1]) if block.context_pre_only else _pair(context_rows, ATTENTION)
    form = _form(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return (tuple(pairs), tuple(forms)), ((pair,), (form,))


def _pair(rows: Rows, sublayer: int) -> tuple[Tensor, Tensor]:
    return rows[sublayer + 1], rows[sublayer]


def _lone_block(
    state: _State, block: Any, rows: Rows, context_rows: Rows, x: Tensor, c: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A block from residual streams to residual streams, as gradient checkpointing keeps them."""
    image, text = _join(state, *map(_stream, (x, c), _entry(block, rows, context_rows)))
    image, *rest = _block(state, block, rows, context_rows, image, text, ((), ()), ((), ()))
    return image.x, rest[0].x if rest else None


def _block(
    state: _State, block: Any, rows: Rows, context_rows: Rows, image: Modulated, text: Modulated,
    normals: Normals, context_normals: Normals,
) -> list[Modulated]:  # fmt: skip
    """A block, from its normalised inputs to the next one's, modulated by `normals` and `context_normals`.

    Of the image's and, but in the last block, of the text's tokens.
    """
    first, second, context = _attend(state, block, image.normalized, text.normalized[0])
    branches = [_gated(first, rows, ATTENTION)] + ([] if second is None else [_gated(second, rows, SECOND_ATTENTION)])
    streams = [_stream(image.x, _middle(block.ff, rows), branches)]
    if context is not None:
        branches = [_gated(context, context_rows, ATTENTION)]
        streams.append(_stream(text.x, _middle(block.ff_context, context_rows), branches))
    image, *rest = _join(state, *streams)
    y = _feed_forward(state, block.ff, image.normalized[0])
    streams = [_stream(image.x, normals, [_gated((y, None), rows, FEED_FORWARD)])]
    for text in rest:
        y = _feed_forward(state, block.ff_context, text.normalized[0])
        streams.append(_stream(text.x, context_normals, [_gated((y, None), context_rows, FEED_FORWARD)]))
    return _join(state, *streams)


def _middle(ff: Any, rows: Rows) -> Normals:
    """The modulation before a feed-forward network."""
    return (_pair(rows, FEED_FORWARD),), (_form(ff.net[0].proj),)


def _gated(branch: Branch, rows: Rows, sublayer: int) -> tuple[Tensor, Tensor, Tensor | None]:
    return branch[0], rows[sublayer + 2], branch[1]


def _attend(
    state: _State, block: Any, image: tuple[Any, ...], text: Any
) -> tuple[Branch, Branch | None, Branch | None]:
    """What the joint attention gives the image's tokens, the second attention, and the joint one the text's."""
    attn = block.attn
    own = _project((attn.to_q, attn.to_k, attn.to_v), image[0])
    added = _project((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text)
    streams = (
        Projections(*own, *_weights(attn.norm_q, attn.norm_k)),
        Projections(*added, *_weights(attn.norm_added_q, attn.norm_added_k)),
    )
    out, text_out = _attention(state, attn, *streams)
    branch = _project_out(state, attn.to_out[0], out)
    context = None if block.context_pre_only else _project_out(state, attn.to_add_out, text_out)
    if not block.use_dual_attention:
        return branch, None, context
    attn = block.attn2
    parts = _project((attn.to_q, attn.to_k, attn.to_v), image[1])
    (out,) = _attention(state, attn, Projections(*parts, *_weights(attn.norm_q, attn.norm_k)))
    return branch, _project_out(state, attn.to_out[0], out), context


def _attention(state: _State, attn: Any, *streams: Projections) -> tuple[Tensor, ...]:
    """What each stream's tokens get of all tokens, (B, N, C)."""
    eps = 1e-6 if attn.norm_q is None else attn.norm_q.eps
    if state.attention == "segments":
        return _segments(streams, attn.heads, eps, state.impl)
    q, k, v = qk_norm(*streams, heads=attn.heads, eps=eps, impl=state.impl)
    out = joint_attention(q, k, v, backend=state.attention)
    return out.split([stream.q.shape[1] for stream in streams], 1)


def _segments(streams: tuple[Projections, ...], heads: int, eps: float, impl: str) -> tuple[Tensor, ...]:
    """`_attention` on the projections (B, N, C) as they are, seen as (B, N, H, D)."""
    parts = [x.unflatten(-1, (heads, -1)) for stream in streams for x in stream[:3]]
    q_weight, k_weight = streams[0][3:]
    q2_weight, k2_weight = streams[1][3:] if len(streams) == 2 else (None, None)
    out = segment_attention(
        *parts, q_weight=q_weight, k_weight=k_weight, q2_weight=q2_weight, k2_weight=k2_weight, eps=eps, impl=impl
    )
    return out if isinstance(out, tuple) else (out,)


def _weights(*norms: Any) -> list[Tensor | None]:
    return [None if norm is None else norm.weight for norm in norms]


def _is_plain(layer: Any) -> bool:
    """Whether this is a linear layer without an adapter, quantisation, sharding or hook, and not trained now."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (layer.weight.requires_grad and torch.is_grad_enabled())
        and layer.bias is not None
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )


def _product(layer: Any) -> Product | None:
    """The product in e4m3 that stands in for a layer."""
    return getattr(base(layer), "product", None)


def _form(*layers: Any) -> str:
    """How a product takes its input: adapters read what is not quantised."""
    if _product(layers[0]) is None:
        return "plain"
    return "fp8" if all(base(layer) is layer for layer in layers) else "both"


def _project(layers: tuple[Any, ...], x: Any) -> tuple[Tensor, ...]:
    """The layers' outputs for x (B, N, C): one product of their weights together, or one of each."""
    if isinstance(x, Quantized):
        return _multiply(layers, x)
    if not all(_is_plain(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    weight, bias = _together([layer.weight for layer in layers]), _together([layer.bias for layer in layers])
    return nn.functional.linear(x, weight, bias).chunk(len(layers), -1)


def _multiply(layers: tuple[Any, ...], x: Quantized) -> tuple[Tensor, ...]:
    """The same in e4m3; an adapter adds its part, of what is not quantised, as its own forward does."""
    product, bases = _product(layers[0]), [base(layer) for layer in layers]
    assert product is not None
    parts = product(x, _together([layer.bias for layer in bases])).chunk(len(layers), -1)
    found = []
    for layer, own, part in zip(layers, bases, parts, strict=True):
        if layer is not own:
            own.result = part
            part = layer(x.plain)
        found.append(part)
    return tuple(found)


def _together(parameters: list[nn.Parameter]) -> Tensor:
    """Parameters of one shape one under another, of which they are made views: no memory is taken twice."""
    first, size = parameters[0], parameters[0].numel()
    start, place = first.storage_offset(), first.untyped_storage().data_ptr()
    if any(
        p.storage_offset() != start + i * size or p.untyped_storage().data_ptr() != place or not p.is_contiguous()
        for i, p in enumerate(parameters)
    ):
        for p, part in zip(parameters, torch.cat([p.detach() for p in parameters]).chunk(len(parameters)), strict=True):
            p.data = part
    return first.detach().as_strided((len(parameters) * first.shape[0], *first.shape[1:]), first.stride())


def _project_out(state: _State, layer: Any, x: Tensor) -> Branch:
    """(y, bias) with y + bias = layer(x): rows (B, N, C) that lie apart are multiplied where they are."""
    if (product := _product(layer)) is not None:
        return _multiply((layer,), _quantize(state, product, x, plain=layer is not base(layer)))[0], None
    if x.is_contiguous() or not _is_plain(layer):
        return layer(x.contiguous()), None
    return torch.bmm(x, layer.weight.t().expand(len(x), -1, -1)), layer.bias


def _quantize(state: _State, product: Product, x: Tensor, *, plain: bool, gelu: bool = False) -> Quantized:
    """What no norm gives, at the level's scale or at each token's own; `plain` where an adapter reads it too."""
    if plain and gelu:
        x, gelu = nn.functional.gelu(x, approximate="tanh"), False
    assert state.fp8 is not None
    made = quantize_rows(x, scale=state.fp8.scales.get(product.name), gelu=gelu, impl=state.impl)
    return made._replace(plain=x.contiguous() if plain else None)


def _feed_forward(state: _State, ff: Any, x: Any) -> Tensor:
    up, down = ff.net[0].proj, ff.net[2]
    if (product := _product(down)) is not None:
        h = _quantize(state, product, _project((up,), x)[0], plain=down is not base(down), gelu=True)
        return _multiply((down,), h)[0]
    if isinstance(x, Quantized):
        return down(nn.functional.gelu(_multiply((up,), x)[0], approximate="tanh"))
    # GELU in the product's epilogue; on sm_120 it is slower than apart (measured in sglang PR 28166)
    epilogue = 0 < _triton.capability(x) < 120 and not torch.is_autocast_enabled()
    if epilogue and _is_plain(up) and not (torch.is_grad_enabled() and x.requires_grad):
        h = torch.ops.aten._addmm_activation(up.bias, x.flatten(0, 1), up.weight.t(), use_gelu=True)
        return down(h.unflatten(0, x.shape[:2]))
    return down(nn.functional.gelu(up(x), approximate="tanh"))
