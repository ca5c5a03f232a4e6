"""Sampling captions from the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.encoder import Encoder, Prompt
from ..phases import phase


@dataclass(frozen=True)
class Captions:
    """B sampled captions.

    Attributes:
        ids: (B, T) tokens, the end of turn included where it was reached; padding after it.
        mask: (B, T) bool, True at the tokens.
        texts: the captions as text, special tokens left out.
    """

    ids: Tensor
    mask: Tensor
    texts: list[str]


@phase("captions")
@torch.no_grad()
def sample_captions(
    encoder: Encoder, prompt: Prompt, seeds: Sequence[int], *, temperature: float, max_new_tokens: int
) -> Captions:
    """Samples one caption for each row of `prompt`.

    Every row draws from its own seed, so that a caption does not depend on the rows beside it. Special tokens other
    than the end of turn are never sampled: an image placeholder in a caption would break the next forward pass.

    Args:
        encoder: whose policy writes.
        prompt: B rows.
        seeds: B seeds.
        temperature: of the softmax, above 0.
        max_new_tokens: longest caption, T at most.
    """
    from transformers import DynamicCache

    batch, width = prompt.ids.shape
    # Inverse-transform sampling: one uniform number in [0, 1) a token, (B, max_new_tokens).
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators])
    draws = draws.to(encoder.device)
    positions = encoder.caption_positions(prompt, max_new_tokens)
    suppressed = torch.tensor(encoder.suppressed_ids, device=encoder.device)
    pad = encoder.tokenizer.pad_token_id

    cache = DynamicCache(config=encoder.model.config.text_config)
    embeds, position_ids = encoder.embed(prompt), prompt.positions
    mask = torch.cat([prompt.mask, prompt.mask.new_ones(batch, max_new_tokens)], 1)
    tokens: list[Tensor] = []
    finished = torch.zeros(batch, dtype=torch.bool, device=encoder.device)
    with encoder.acting_as("policy") as language_model:
        for step in range(max_new_tokens):
            states = language_model(
                inputs_embeds=embeds,
                attention_mask=mask[:, : width + step].long(),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = encoder.head(states[:, -1]).float() / temperature
            logits[:, suppressed] = -torch.inf
            cumulative = logits.softmax(-1).cumsum(-1).double()
            token = (cumulative <= draws[:, step, None] * cumulative[:, -1:]).sum(-1)
            token = token.masked_fill(finished, pad)
            tokens.append(token)
            finished |= token == encoder.eos_id
            if finished.all():
                break
            embeds = encoder.model.get_input_embeddings()(token).unsqueeze(1)
            position_ids = positions[:, :, step : step + 1]
    ids = torch.stack(tokens, 1)
    ended_before = ((ids == encoder.eos_id).cumsum(1) - (ids == encoder.eos_id).long()) > 0
    texts = encoder.tokenizer.batch_decode(ids.masked_fill(ended_before, pad), skip_special_tokens=True)
    return Captions(ids, ~ended_before, [text.strip() for text in texts])
