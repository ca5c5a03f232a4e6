"""Writing captions token by token: one prefill an image, caches in fixed places, finished captions taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.encoder import Encoder, Prompt
from ..transfer import sent

CHECK_EVERY = 4  # steps between two questions to a GPU: how many captions are unfinished?
SMALLEST = 8  # rows of the smallest batch: fewer cost as much, and a CPU multiplies fewer than 4 in another way
ALIGNED = 8  # a cache's length is a multiple of it, or attention kernels would copy its mask


def choose(logits: Tensor, draws: Tensor, temperature: float, suppressed: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token for each row by inverse-transform sampling, or takes the likeliest at temperature 0.

    Args:
        logits: (N, V) fp32.
        draws: (N,) fp64, uniform in [0, 1).
        temperature: of the softmax.
        suppressed: ids that are never chosen.

    Returns:
        tokens (N,) and their log-probs (N,), fp32: log_softmax(logits / temperature) over the whole vocabulary,
        suppressed ids included, as the trainer computes it; at temperature 0 those of temperature 1.
    """
    scores = logits / (temperature or 1.0)
    allowed = scores.index_fill(1, suppressed, -torch.inf)
    if temperature:
        # In whole units of 2⁻⁵²: sums of integers are exact, ascend, and are the same on every device
        cumulative = (allowed.softmax(-1) * 2.0**52).long().cumsum(-1)
        tokens = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # beyond only where logits are NaN
    else:
        tokens = allowed.argmax(-1)
    return tokens, scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(-1)


def logits_of(head: nn.Linear, states: Tensor) -> Tensor:
    """Logits (N, V), fp32; of 16-bit weights a GPU gives them unrounded, as `linear_logprobs` has them."""
    if states.device.type == "cuda" and head.weight.dtype != torch.float32:
        return torch.mm(states.to(head.weight.dtype), head.weight.T, out_dtype=torch.float32)
    return head(states).float()


class FixedCache:
    """Keys and values of N captions in tensors that stay: their prompt's, then their own.

    A language model that is handed its mask and positions asks a cache of transformers for `update` alone.

    Args:
        prompts: the cache of B prompts; emptied layer by layer.
        group_size: captions of a prompt, N/B: each gets a copy of its prompt's part.
        length: slots of a caption, the prompt's included.
        slot: (1,) where the next token's keys and values go.

    Attributes:
        layers: keys and values (N, heads, length, width) of each layer.
    """

    def __init__(self, prompts: Any, group_size: int, length: int, slot: Tensor):
        self.slot = slot
        self.layers: list[tuple[Tensor, ...]] = []
        for layer in prompts.layers:
            self.layers.append(tuple(_spread(x, group_size, length) for x in (layer.keys, layer.values)))
            layer.keys = layer.values = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Takes in one token's keys and values (N, heads, 1, width); returns all of the layer's."""
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept.index_copy_(2, self.slot, new)
        return self.layers[layer]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some captions."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = tuple(kept[rows] for kept in layer)


def _spread(states: Tensor, group_size: int, length: int) -> Tensor:
    """A prompt's keys or values (B, heads, P, width) for each of its captions, zeros in the slots after them."""
    count, heads, width, size = states.shape
    kept = states.new_zeros(count * group_size, heads, length, size)
    kept[:, :, :width] = states.repeat_interleave(group_size, 0)
    return kept


class Writing:
    """N captions of B images while they are written, n of them in the batch.

    `step` adds a token to each: a function of these tensors alone, which it changes where they are, in one shape and
    without waiting for the device. So it can be one CUDA graph.

    Args:
        encoder: whose language model `language_model` is.
        language_model: writes.
        prompt: B rows.
        draws: (N, T) fp64, a uniform number for each token; N/B captions of one prompt lie next to each other.
        temperature: of the softmax; 0 takes the likeliest tokens.

    Attributes:
        ids: (N, T) tokens; what is unwritten, and what comes after an end of turn, is padding.
        logprobs: (N, T) of the tokens, fp32, as `choose` defines them; 0 at padding.
        rows: (n,) which of the N captions are in the batch.
        finished: (n,) bool.
    """

    def __init__(self, encoder: Encoder, language_model: Any, prompt: Prompt, draws: Tensor, temperature: float):
        from transformers import DynamicCache

        self.encoder, self.language_model = encoder, language_model
        self.draws, self.temperature = draws, temperature
        self.width = prompt.ids.shape[1]
        count, room = draws.shape
        size, device = count // len(prompt.ids), prompt.ids.device
        length = -(-(self.width + room - 1) // ALIGNED) * ALIGNED  # the last token is never read

        prompts = DynamicCache(config=language_model.config)
        states = language_model(
            inputs_embeds=encoder.embed(prompt), attention_mask=prompt.mask.long(), position_ids=prompt.positions,
            past_key_values=prompts, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        self.slot = torch.full((1,), self.width, device=device)
        self.cache = FixedCache(prompts, size, length, self.slot)
        self.ids = torch.full((count, room), encoder.tokenizer.pad_token_id, device=device)
        self.logprobs = torch.zeros(count, room, device=device)
        self.suppressed = sent(torch.tensor(encoder.suppressed_ids), device)
        self.rows = torch.arange(count, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.tokens = torch.empty(count, dtype=torch.long, device=device)
        self.start = encoder.caption_positions(prompt, 1)[0, :, 0].repeat_interleave(size)
        self.visible = torch.zeros(count, length, dtype=torch.bool, device=device)
        self.visible[:, : self.width] = prompt.mask.repeat_interleave(size, 0)
        self._take(logits_of(encoder.head, states).repeat_interleave(size, 0))

    def step(self) -> None:
        """Reads the batch's last tokens and chooses the next ones."""
        self.visible.index_fill_(1, self.slot, True)
        places = (self.start + self.slot - self.width)[:, None]
        states = self.language_model(
            inputs_embeds=self.encoder.model.get_input_embeddings()(self.tokens)[:, None],
            attention_mask={"full_attention": self.visible[:, None, None]},
            position_ids=places.expand(3, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.slot.add_(1)
        self._take(logits_of(self.encoder.head, states))

    def _take(self, logits: Tensor) -> None:
        """Chooses the batch's next tokens from logits (n, V)."""
        column = self.slot - self.width
        tokens, logprobs = choose(logits, self.draws[self.rows, column], self.temperature, self.suppressed)
        self.tokens.copy_(tokens.masked_fill(self.finished, self.encoder.tokenizer.pad_token_id))
        self.ids.index_put_((self.rows, column), self.tokens)
        self.logprobs.index_put_((self.rows, column), logprobs.masked_fill(self.finished, 0))
        self.finished.logical_or_(self.tokens == self.encoder.eos_id)

    def keep(self, count: int) -> None:
        """Goes on in a batch of `count`: the unfinished captions, and finished ones for the places left."""
        rows = self.finished.long().argsort(stable=True)[:count].sort().values
        self.cache.keep(rows)
        self.rows, self.finished, self.tokens = self.rows[rows], self.finished[rows], self.tokens[rows]
        self.start, self.visible = self.start[rows], self.visible[rows]


def write(encoder: Encoder, prompt: Prompt, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs (N, T) of N captions; arguments as of `Writing`.

    The batch drops to the smallest power of two that holds what is unfinished, where that is less: its shapes follow
    from the captions alone.
    """
    with encoder.acting_as("policy") as language_model:
        writing, again = Writing(encoder, language_model, prompt, draws, temperature), None
        for written in range(1, draws.shape[1]):
            if is_checked(written, encoder.device):
                unfinished = int(writing.finished.logical_not().sum())
                if unfinished == 0:
                    break
                if (count := batch_of(unfinished)) < len(writing.rows):
                    writing.keep(count)
                    again = None
            if again is None:
                again = repeated(writing.step, encoder)
            else:
                again()
    return writing.ids, writing.logprobs


def is_checked(written: int, device: torch.device) -> bool:
    """Whether it is time, after so many tokens, to ask how many captions are unfinished: a CPU never makes one wait."""
    return device.type == "cpu" or written % CHECK_EVERY == 0


def batch_of(unfinished: int) -> int:
    """The smallest batch for so many captions: a power of two."""
    return max(SMALLEST, 1 << (unfinished - 1).bit_length())


def repeated(step: Callable[[], None], encoder: Encoder) -> Callable[[], None]:
    """Makes a step and gives what makes the next ones: on a GPU its CUDA graph, elsewhere the step itself.

    LLM.int8() asks the device for outliers in every layer, which no graph can: its steps stay steps.
    """
    if encoder.device.type != "cuda" or getattr(encoder.model, "is_loaded_in_8bit", False):
        step()
        return step
    aside = torch.cuda.Stream(encoder.device)  # a capture wants what libraries set up the first time behind it
    aside.wait_stream(torch.cuda.current_stream(encoder.device))
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream(encoder.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
