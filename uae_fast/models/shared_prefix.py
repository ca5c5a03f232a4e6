"""Captions of one image in one row: their prompt is computed once, and attention lets each see it and itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from uae_kernels import shared_prefix_attention

from ..transfer import sent

NAME = "uae_shared_prefix"  # of the attention in transformers' registries


@dataclass(frozen=True)
class Ragged:
    """Rows of several lengths whose N tokens lie one after another, without padding.

    Attributes:
        lengths: (rows,) on the tokens' device.
        places: (N,) where in (rows · width) each token is once the rows are padded on the right.
        width: the longest row.
    """

    lengths: Tensor
    places: Tensor
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Ragged:
        width = max(lengths)
        places = [row * width + column for row, length in enumerate(lengths) for column in range(length)]
        return cls(sent(torch.tensor(lengths), device), sent(torch.tensor(places, dtype=torch.long), device), width)

    @property
    def tokens(self) -> int:
        return len(self.places)

    def pad(self, packed: Tensor) -> Tensor:
        """(N, …) as (rows, width, …), zeros at padding."""
        rows = len(self.lengths)
        padded = packed.new_zeros(rows * self.width, *packed.shape[1:]).index_copy_(0, self.places, packed)
        return padded.unflatten(0, (rows, self.width))

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, width, …) as (N, …); no place is read twice, so that gradients add up in one order."""
        return padded.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class SharedPrefix:
    """Where the tokens of B prompts and of their captions, G each, lie in a row: all prompts first, then all captions.

    Attributes:
        prompts: B rows.
        captions: B·G rows, those of a prompt one after another. The last token of a caption is not among them: nothing
            is predicted from it.
        attend: what computes the captions' attention, with the signature of `uae_kernels.shared_prefix_attention`.
    """

    prompts: Ragged
    captions: Ragged
    attend: Callable[..., Tensor] = shared_prefix_attention

    @property
    def group_size(self) -> int:
        return len(self.captions.lengths) // len(self.prompts.lengths)

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one row: query (1, Hq, N, D), key and value (1, Hkv, N, D) to (1, N, Hq, D)."""
        from transformers import AttentionInterface

        parts = [self.split(x[0].transpose(0, 1)) for x in (query, key, value)]
        prefix_q, prefix_k, prefix_v = (self.prompts.pad(prefix) for prefix, _ in parts)
        q, k, v = (self.captions.pad(own) for _, own in parts)
        # Padding is on the right: without a mask, a prompt's tokens see none of it.
        heads = (x.transpose(1, 2) for x in (prefix_q, prefix_k, prefix_v))
        prefix, _ = AttentionInterface()["sdpa"](module, *heads, None, scaling=scale, is_causal=True)
        own = self.attend(
            q, k, v, prefix_k, prefix_v, group_size=self.group_size, lengths=self.captions.lengths,
            prefix_lengths=self.prompts.lengths, scale=scale,
        )  # fmt: skip
        return torch.cat([self.prompts.pack(prefix), self.captions.pack(own)]).unsqueeze(0)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(N, …) as what belongs to prompts and what to captions."""
        return packed[: self.prompts.tokens], packed[self.prompts.tokens :]

    def predicting(self, states: Tensor, length: int) -> Tensor:
        """Of states (N, H) those, (B·G, length, H), from which each caption's tokens are predicted; zeros at padding.

        A first token is predicted from the end of its prompt, which every caption of a group gets.
        """
        prefix, own = self.split(states)
        last = prefix.index_select(0, self.prompts.lengths.cumsum(0) - 1)
        first = last.unsqueeze(1).expand(-1, self.group_size, -1).flatten(0, 1).unsqueeze(1)
        return torch.cat([first, pad(self.captions.pad(own), (0, 0, 0, length - 1 - self.captions.width))], 1)


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Within, the model of `config` takes its attention from transformers' registries under `name`."""
    own, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = own


def sharing_prefixes(language_model: Any) -> Any:
    """Within, a language model wants to be called with `shared_prefix`, a `SharedPrefix`, and with one row."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return attending(language_model.config, NAME)


def recomputing(config: Any) -> tuple[Any, Any]:
    """The `context_fn` of `checkpoint`: a layer that is computed again attends as it did the first time."""
    return nullcontext(), attending(config, config._attn_implementation)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    scaling: float, shared_prefix: SharedPrefix, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if sliding_window is not None:
        raise NotImplementedError(
            f"layer {module.layer_idx} of the encoder sees {sliding_window} tokens back: captions cannot share a "
            "prefix there; set stage2.shared_prefix to false"
        )
    return shared_prefix.attention(module, query, key, value, scaling), None


def _no_mask(**_: Any) -> None:
    """What may be seen is in `SharedPrefix`: no mask is made."""
