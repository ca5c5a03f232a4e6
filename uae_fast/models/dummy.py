"""Models of full size with random weights (`models.load: dummy`): for speed and memory, without a file.

They are laid out without memory, then filled on the device, tensor by tensor, in the dtype they are kept in: no tensor
is ever in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .quantize import quantize_linears

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|> {{ message.role }} {% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }} {% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor -%}
{%- if add_generation_prompt %}<|im_start|> assistant {% endif %}"""


def empty(build: Callable[[], Any], *, buffers: bool = True) -> Any:
    """What `build` builds, its parameters without memory; its buffers are computed, or without memory as well."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        model = build()
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # laying a tensor out without memory parts it from those it is shared with
    return model


def fill(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    quantization: str = "none",
    inside: Iterable[nn.Module] = (),
) -> None:
    """Gives an empty model memory on `device`: normal weights of standard deviation 0.02, norms 1, biases 0.

    Args:
        model: from `empty`; parameters that modules share stay shared.
        device: where every tensor is made; "meta" leaves them without memory.
        dtype: of every tensor but the buffers that are not part of a checkpoint (rotary tables).
        seed: of the weights.
        quantization: "none", "nf4", "int8" or "fp8", of the linear layers in the submodules `inside`.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    made: dict[nn.Parameter, nn.Parameter] = {}

    def make(parameter: nn.Parameter, name: str) -> nn.Parameter:
        data = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            data.normal_(0, 0.02, generator=generator)
        else:
            data.fill_(0.0 if "bias" in name else 1.0)
        return nn.Parameter(data, requires_grad=False)

    if quantization != "none":
        quantize_linears(model, inside, quantization, device, make)
    for parent in model.modules():
        for name, parameter in parent._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.is_floating_point():  # not quantised
                made[parameter] = made[parameter] if parameter in made else make(parameter, name)
                parent._parameters[name] = made[parameter]
        for name, buffer in parent._buffers.items():
            if buffer is not None:
                kept = name not in parent._non_persistent_buffers_set and buffer.is_floating_point()
                parent._buffers[name] = buffer.to(device, dtype if kept else None)


def dummy_tokenizer(config: Any):
    """A tokenizer with one word for every id of a Qwen2.5-VL configuration, and its special tokens at their ids.

    What is sampled decodes to words that are read again as the same ids, so that captions keep their length.
    """
    text = config.text_config
    special = {
        "<|endoftext|>": text.pad_token_id,
        "<|im_end|>": text.eos_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    free = [i for i in range(text.vocab_size) if i not in special.values()]
    special["<|im_start|>"], special["<unk>"] = free[-1], free[-2]
    return word_tokenizer({**{f"w{i}": i for i in free[:-2]}, **special}, [t for t in special if t != "<unk>"])


def word_tokenizer(vocabulary: dict[str, int], special: list[str]):
    """A tokenizer of words between blanks, with a chat template as Qwen2.5-VL's; `special` are its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
