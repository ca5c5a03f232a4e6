"""The encoder: Qwen2.5-VL writes captions of images, and re-reads captions as conditions for the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from uae_kernels import shared_prefix_attention

from ..config import ConfigError
from ..phases import phase
from ..text import unicode_text
from ..transfer import sent
from .batches import pick
from .shared_prefix import Ragged, SharedPrefix, recomputing, sharing_prefixes

LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
READER = "reader"  # the name of the adapter that re-reads captions; the policy's is "default"


@dataclass(frozen=True)
class Patches:
    """An image as the vision tower takes it.

    Attributes:
        pixels: (patches, width) of the resized image, normalised.
        grid: (1, 3), its frames, rows and columns of patches.
    """

    pixels: Tensor
    grid: Tensor


@dataclass(frozen=True)
class Prompt:
    """The caption prompt of B images, ready for the language model.

    Attributes:
        ids: (B, P) token ids, padded on the left; image placeholders already expanded.
        mask: (B, P) bool, False at padding.
        positions: (3, B, P) multimodal rotary positions.
        features: B tensors (image tokens, H) from the vision tower.
        lengths: B numbers of tokens, padding left out.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    features: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    def repeat(self, times: int) -> Prompt:
        """Every prompt `times` times in a row: (B·times, P)."""
        return self.take([row for row in range(len(self.lengths)) for _ in range(times)])

    def rows(self, rows: slice) -> Prompt:
        """The prompts of some rows."""
        return self.take(list(range(*rows.indices(len(self.lengths)))))

    def take(self, rows: Sequence[int]) -> Prompt:
        """The prompts of these rows, each as often as it is named."""
        return Prompt(
            pick(self.ids, rows),
            pick(self.mask, rows),
            pick(self.positions.transpose(0, 1), rows).transpose(0, 1),
            tuple(self.features[row] for row in rows),
            tuple(self.lengths[row] for row in rows),
        )


class Encoder(nn.Module):
    """Qwen2.5-VL in its three parts of a run.

    * ``policy`` writes captions and is trained in stages 1 and 2.
    * ``reader`` re-reads captions into conditions: the policy as it was when the decoder was last trained (METHOD §2,
      ``condition.adapter: frozen``).
    * ``reference`` is what the KL term pulls the policy towards.

    With LoRA the three share their weights: reader and policy have an adapter each, the reference has none. When the
    language model trains in full, reader and reference are one frozen copy of it. The vision tower and the LM head
    never train.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration`.
        tokenizer: its tokenizer, with a chat template that knows the role "generate".
        image_processor: its (PIL) image processor.
        caption_prompt: the user's words, put before the image.
        condition_length: number of positions of a condition; re-read captions are cut or padded to it.
        buckets: ascending lengths below it, of which the decoder sees the smallest that holds a caption.

    Attributes:
        special_ids: every id that stands for no word. The text of a special token makes none of them.

    Raises:
        ConfigError: the prompt has special tokens, the template lacks a role or takes up the whole condition.
    """

    model: Any
    place: Tensor  # empty; says which device inputs belong on

    def __init__(
        self, model, tokenizer, image_processor, *,
        caption_prompt: str, condition_length: int, buckets: Sequence[int] = (),
    ):  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.condition_length, self.buckets = condition_length, tuple(buckets)
        self.reader_copy: Any = None
        self.adapters: Any = None  # the PeftModel around self.model
        self.prefix_attention: Callable[..., Tensor] = shared_prefix_attention
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.requires_grad_(False).eval()

        visual = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        self.special_ids = {
            *tokenizer.all_special_ids,
            *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
            *(i for name in visual if (i := getattr(model.config, name, None)) is not None),
        }
        self._no_words = self.special_ids - {tokenizer.unk_token_id}
        found = [i for i in self._ids(caption_prompt) if i in self._no_words]
        if found:
            token = tokenizer.convert_ids_to_tokens(found[0])
            raise ConfigError([f"caption.prompt: {token} is a special token of the encoder; write words"])

        def turn(role: str, content: Any) -> str:
            messages = [{"role": role, "content": content}]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        self._prompt_text = turn("user", [{"type": "text", "text": caption_prompt}, {"type": "image"}])
        self._image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        frame = turn("generate", "\x00").split("\x00")
        if len(frame) != 2 or self._prompt_text.count(self._image_token) != 1:
            needed = f'one {self._image_token} an image, and what the role "generate" says'
            raise ConfigError([f"models.path: the chat template of the encoder must write {needed}"])
        self._read_prefix, self._read_suffix = map(self._ids, frame)
        self._room = condition_length - len(self._read_prefix) - len(self._read_suffix)
        if self._room <= 0:
            words = f"leave no room; the chat template alone takes {condition_length - self._room}"
            raise ConfigError([f"condition.length: {condition_length} positions {words}"])

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def head(self) -> nn.Linear:
        """The frozen LM head: weight (V, H), no bias."""
        return self.model.lm_head

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids never sampled in a caption: every special token but the end of the turn."""
        return sorted(self.special_ids - {self.eos_id})

    def words(self, caption: str) -> list[int]:
        """A caption's token ids. Special-token text in it is read as plain words, or left out where it cannot be."""
        ids = self._ids(unicode_text(caption.strip()), split_special_tokens=True)
        return [i for i in ids if i not in self._no_words]

    def _ids(self, text: str, **options: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def answers(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Given captions as a policy would have written them: ids and mask (B, T), each with its end of turn."""
        rows = [[*self.words(caption), self.eos_id] for caption in captions]
        return self._pad(rows, max(map(len, rows)))

    def _pad(self, rows: Sequence[list[int]], length: int) -> tuple[Tensor, Tensor]:
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return sent(ids, self.device), sent(mask, self.device)

    # ---- what trains ------------------------------------------------------------------------------------------------

    def prepare_training(self, mode: str, rank: int, alpha: int) -> None:
        """Decides what may train: "lora" adds an adapter on all linear layers of the language model, "full" nothing."""
        if mode == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            self.adapters = get_peft_model(self.model, config)
            self.adapters.requires_grad_(False)

    def trainable(self) -> list[nn.Parameter]:
        """Makes the policy trainable and returns its parameters: the adapter's, or the language model's layers."""
        if self.adapters is not None:
            parameters = [p for name, p in self.adapters.named_parameters() if ".default." in name]
        else:
            language_model = self.model.model.language_model
            parameters = [*language_model.layers.parameters(), *language_model.norm.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def checkpoint_gradients(self) -> None:
        """From now on layers of the language model are computed again in the backward pass, not kept for it."""
        language_model = self.model.model.language_model
        for layer in language_model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, context_fn=partial(recomputing, language_model.config)
            )
        language_model.register_forward_pre_hook(_checkpoint_where_gradients_flow)

    def freeze(self) -> None:
        """Nothing of the encoder trains."""
        self.model.requires_grad_(False)

    def freeze_reader(self) -> None:
        """From now on captions are re-read with the policy's present weights, whatever is trained later."""
        if self.adapters is None:
            self.reader_copy = copy.deepcopy(self.model.model.language_model).requires_grad_(False)
            return
        if READER not in self.adapters.peft_config:
            self.adapters.add_adapter(READER, self.adapters.peft_config["default"])
        weights = dict(self.adapters.named_parameters())
        for name, parameter in weights.items():
            if f".{READER}." in name:
                parameter.requires_grad_(False).copy_(weights[name.replace(f".{READER}.", ".default.")].detach())

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Any]:
        """Gives the language model of `role`: "policy", "reader" or "reference"."""
        language_model = self.model.model.language_model
        if role == "policy":
            yield language_model
        elif self.adapters is None:
            yield self.reader_copy if self.reader_copy is not None else language_model
        elif role == "reader" and READER in self.adapters.peft_config:
            trains = [p for p in self.adapters.parameters() if p.requires_grad]  # set_adapter resets requires_grad
            self.adapters.set_adapter(READER)
            try:
                yield language_model
            finally:
                self.adapters.set_adapter("default")
                self.adapters.requires_grad_(False)
                for parameter in trains:
                    parameter.requires_grad_(True)
        else:
            with self.adapters.disable_adapter():
                yield language_model

    # ---- writing ----------------------------------------------------------------------------------------------------

    def patches(self, image: Image.Image) -> Patches:
        """What of `prompt` needs no device: an image resized, normalised and cut up, on the host."""
        found = self.image_processor([image], return_tensors="pt")
        return Patches(found["pixel_values"], found["image_grid_thw"])

    @phase("captions")
    @torch.no_grad()
    def prompt(self, images: Sequence[Image.Image | Patches]) -> Prompt:
        """Runs the vision tower once over B images and lays out their caption prompts."""
        cut = [image if isinstance(image, Patches) else self.patches(image) for image in images]
        grid = torch.cat([each.grid for each in cut])
        pixels, places = (sent(x, self.device) for x in (torch.cat([each.pixels for each in cut]), grid))
        features = self.model.model.get_image_features(pixels, places).pooler_output
        texts = [self._prompt_text.replace(self._image_token, self._image_token * len(each)) for each in features]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        lengths, types = mask.sum(1).tolist(), (ids == self.model.config.image_token_id).int()
        # Read number by number: on the host
        positions, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
        ids, mask, positions = (sent(x, self.device) for x in (ids, mask.bool(), positions))
        return Prompt(ids, mask, positions, tuple(features), tuple(lengths))

    def embed(self, prompt: Prompt) -> Tensor:
        """Input embeddings (B, P, H) of a prompt, image features in their places."""
        embeds = self.model.get_input_embeddings()(prompt.ids)
        places = (prompt.ids == self.model.config.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(places, torch.cat(prompt.features).to(embeds.dtype))

    def caption_states(self, prompt: Prompt, caption_ids: Tensor, caption_mask: Tensor, role: str = "policy") -> Tensor:
        """Last hidden states (B, T, H) from which the caption's T tokens are predicted.

        Args:
            prompt: the images' prompts, B rows.
            caption_ids: (B, T) sampled or given tokens, the end of turn included, padded on the right.
            caption_mask: (B, T) bool, True at the caption's tokens.
            role: whose language model: "policy" or "reference".
        """
        states = self._prompted_states(prompt, caption_ids, caption_mask, role)
        start = prompt.ids.shape[1] - 1
        return states[:, start : start + caption_ids.shape[1]]

    def group_states(self, prompt: Prompt, caption_ids: Tensor, lengths: Sequence[int], role: str = "policy") -> Tensor:
        """As `caption_states`, of G captions an image whose prompt is computed once; no padding is computed.

        Args:
            prompt: the images' prompts, B rows.
            caption_ids: (B·G, T) tokens, those of an image one after another, padded on the right.
            lengths: B·G numbers of tokens, at least 1; how many there are says what G is.
            role: whose language model: "policy" or "reference".

        Returns:
            states (B·G, T, H), zeros at padding.
        """
        shared = SharedPrefix(
            Ragged.of(prompt.lengths, self.device),
            Ragged.of([length - 1 for length in lengths], self.device),
            self.prefix_attention,
        )
        width, size = prompt.ids.shape[1], shared.group_size
        kept = [row * width + i for row, n in enumerate(prompt.lengths) for i in range(width - n, width)]
        places = sent(torch.tensor(kept), self.device)
        written = caption_ids[:, : shared.captions.width]
        positions = self.caption_positions(prompt, written.shape[1]).repeat_interleave(size, 1)
        parts = [
            (self.embed(prompt), self.model.get_input_embeddings()(written)),
            (prompt.positions.permute(1, 2, 0), positions.permute(1, 2, 0)),
        ]
        embeds, positions = (
            torch.cat([prefix.flatten(0, 1).index_select(0, places), shared.captions.pack(own)])
            for prefix, own in parts
        )
        with self.acting_as(role) as language_model, sharing_prefixes(language_model):
            states = language_model(
                inputs_embeds=embeds.unsqueeze(0),
                position_ids=positions.T.unsqueeze(1),
                use_cache=False,
                shared_prefix=shared,
            ).last_hidden_state
        return shared.predicting(states[0], caption_ids.shape[1])

    def answer_states(self, prompt: Prompt, caption_ids: Tensor, caption_mask: Tensor) -> Tensor:
        """The policy's last hidden states (B, T, H) *at* the caption's tokens, with the image in sight."""
        return self._prompted_states(prompt, caption_ids, caption_mask, "policy")[:, prompt.ids.shape[1] :]

    def _prompted_states(self, prompt: Prompt, caption_ids: Tensor, caption_mask: Tensor, role: str) -> Tensor:
        caption_embeds = self.model.get_input_embeddings()(caption_ids)
        with self.acting_as(role) as language_model:
            return language_model(
                inputs_embeds=torch.cat([self.embed(prompt), caption_embeds], 1),
                attention_mask=torch.cat([prompt.mask, caption_mask], 1).long(),
                position_ids=torch.cat([prompt.positions, self.caption_positions(prompt, caption_ids.shape[1])], 2),
                use_cache=False,
            ).last_hidden_state

    def caption_positions(self, prompt: Prompt, length: int) -> Tensor:
        """Rotary positions (3, B, length) of the tokens after a prompt: they go on from its largest."""
        start = prompt.positions.amax((0, 2)) + 1  # (B,)
        steps = torch.arange(length, device=start.device)
        return (start[:, None] + steps).expand(3, -1, -1)

    # ---- re-reading -------------------------------------------------------------------------------------------------

    def read(self, captions: Sequence[str], role: str = "reader") -> tuple[Tensor, Tensor]:
        """Re-reads captions in the role "generate".

        A caption too long for `condition_length` loses its end, never the template around it.

        Returns:
            states (B, condition_length, H) and mask (B, condition_length), True at tokens of template and caption.
        """
        ids, mask = self._pad(self._framed(captions), self.condition_length)
        with self.acting_as(role) as language_model:
            states = language_model(
                inputs_embeds=self.model.get_input_embeddings()(ids), attention_mask=mask.long(), use_cache=False
            ).last_hidden_state
        return states, mask

    def _framed(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of captions in the template, cut to `condition_length`."""
        return [self._read_prefix + self.words(caption)[: self._room] + self._read_suffix for caption in captions]

    def bucket(self, tokens: int) -> int:
        """The smallest length that holds so many tokens."""
        return next((length for length in self.buckets if tokens <= length), self.condition_length)

    def buckets_of(self, captions: Sequence[str]) -> list[int]:
        """The bucket of each caption as it is re-read, from the caption alone."""
        return [self.bucket(len(ids)) for ids in self._framed(captions)]


def _checkpoint_where_gradients_flow(language_model: Any, _: Any) -> None:
    """transformers checkpoints layers in training mode, and takes their cache away: sampling must not be in it."""
    for layer in language_model.layers:
        layer.training = torch.is_grad_enabled()  # of the layer alone: its parts stay in evaluation mode
