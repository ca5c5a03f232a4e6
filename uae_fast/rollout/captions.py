"""Sampling captions from the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.encoder import Encoder, Prompt
from ..phases import phase
from ..transfer import sent
from .decoding import choose, write


@dataclass(frozen=True)
class Captions:
    """N sampled captions.

    Attributes:
        ids: (N, T) tokens, the end of turn included where it was reached; padding after it.
        mask: (N, T) bool, True at the tokens; T is the longest caption's.
        texts: the captions as text, special tokens left out.
        logprobs: (N, T) fp32, each token's log-prob when it was drawn, 0 at padding: log_softmax(logits / temperature)
            over the whole vocabulary, as the trainer computes it. That special tokens are never drawn is not in it.
    """

    ids: Tensor
    mask: Tensor
    texts: list[str]
    logprobs: Tensor


@phase("captions")
@torch.no_grad()
def sample_captions(
    encoder: Encoder, prompt: Prompt, seeds: Sequence[int], *,
    temperature: float, max_new_tokens: int, engine: str = "uae",
) -> Captions:  # fmt: skip
    """Samples captions of B images, len(seeds)/B of each, those of an image next to each other.

    Every caption draws from its own seed, so that its text does not depend on the captions beside it. Special tokens
    other than the end of turn are never sampled: an image placeholder in a caption would break the next forward pass.

    Args:
        encoder: whose policy writes.
        prompt: B rows, none of them twice.
        seeds: N seeds, a multiple of B.
        temperature: of the softmax; 0 takes the likeliest tokens, and log-probs are those of temperature 1.
        max_new_tokens: longest caption, T at most.
        engine: "uae" (`decoding.write`), or transformers' "generate": the same tokens up to rounding, from prompts that
            are computed once a caption instead of once an image, in the full batch until the last caption ends.

    Raises:
        ValueError: the seeds are no multiple of the prompts.
    """
    if not seeds or len(seeds) % len(prompt.ids):
        raise ValueError(f"seeds: {len(seeds)} are not the same number for each of {len(prompt.ids)} images")
    # Inverse-transform sampling: one uniform number in [0, 1) a token, (N, max_new_tokens).
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators])
    engines = {"uae": write, "generate": generate}
    ids, logprobs = engines[engine](encoder, prompt, sent(draws, encoder.device), temperature)

    ends = ids == encoder.eos_id
    mask = ends.cumsum(1) - ends.long() == 0
    longest = int(mask.sum(1).amax())
    ids, mask, logprobs = ids[:, :longest], mask[:, :longest], logprobs[:, :longest]
    texts = encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Captions(ids, mask, [text.strip() for text in texts], logprobs.masked_fill(~mask, 0))


def generate(encoder: Encoder, prompt: Prompt, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`decoding.write` by transformers' own generation, whose tokens our draws choose."""
    from transformers import GenerationConfig

    suppressed, found = torch.tensor(encoder.suppressed_ids, device=draws.device), list[Tensor]()

    def chosen(_: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = choose(scores.float(), draws[:, len(found)], temperature, suppressed)
        found.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    prompt, model = prompt.repeat(len(draws) // len(prompt.ids)), encoder.model
    own, model.generation_config = model.generation_config, GenerationConfig()  # its penalties are not the policy's
    processors: Any = [chosen]
    try:
        with encoder.acting_as("policy"):
            ids = model.generate(
                inputs_embeds=encoder.embed(prompt), attention_mask=prompt.mask.long(), position_ids=prompt.positions,
                max_new_tokens=draws.shape[1], do_sample=False, logits_processor=processors,
                eos_token_id=encoder.eos_id, pad_token_id=encoder.tokenizer.pad_token_id,
            )  # fmt: skip
    finally:
        model.generation_config = own
    return ids, torch.stack(found, 1)
