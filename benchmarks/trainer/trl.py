"""Stage 2's update as TRL's GRPOTrainer computes it, of the same policy on the same rollout.

TRL's own are the trainer, constructed as its users construct it, `_compute_loss` and all it calls: the fused LM head,
the chunked log-probs, the loss and its metrics. Ours are the inputs, such as `_generate_and_score_completions` gives:
every caption in a row of its own, behind a copy of its prompt, with a copy of its image's patches. TRL's processor is
left out, for its video half needs torchvision: a trainer with a tokenizer computes the same loss of the same inputs.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uae_fast.data import Example


class TRLUpdate:
    """TRL's trainer around a copy of a stage's policy.

    Args:
        stage: a `GenerationForUnderstanding` whose parameters train.
        rollout: what it is updated on, in one batch.
        examples: the images the rollout was made from.
    """

    def __init__(self, stage: Any, rollout: Any, examples: Sequence[Example]):
        encoder = stage.models.encoder
        self.model = copy.deepcopy(encoder.model if encoder.adapters is None else encoder.adapters)
        self.trainer = _trainer(self.model, encoder.tokenizer, stage, len(rollout))
        self.inputs = batch(stage, rollout, examples)

    def parameters(self, named: nn.Module, wanted: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The copies of some parameters of `named`, the model that was copied, in their order."""
        names = {id(parameter): name for name, parameter in named.named_parameters()}
        own = dict(self.model.named_parameters())
        return [own[names[id(parameter)]] for parameter in wanted]

    def loss(self) -> Tensor:
        return self.trainer._compute_loss(self.trainer.model, self.inputs)


def batch(stage: Any, rollout: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """A rollout as TRL's `_compute_loss` takes it."""
    encoder, size = stage.models.encoder, stage.settings.group_size
    prompt = encoder.prompt([example.image for example in examples]).repeat(size)
    images = [example.image for example in examples for _ in range(size)]
    pixels = encoder.image_processor(images, return_tensors="pt").to(encoder.device)
    captions = rollout.captions
    ids = torch.cat([prompt.ids, captions.ids], 1)
    return {
        "prompt_ids": prompt.ids,
        "prompt_mask": prompt.mask.long(),
        "completion_ids": captions.ids,
        "completion_mask": captions.mask.long(),
        "advantages": rollout.advantages,
        "old_per_token_logps": rollout.old_logprobs,
        "ref_per_token_logps": rollout.ref_logprobs,
        "num_items_in_batch": captions.mask.sum(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
        "num_images": [1] * len(images),
        "mm_token_type_ids": (ids == encoder.model.config.image_token_id).int(),
    }


def _trainer(model: nn.Module, tokenizer: Any, stage: Any, rows: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = stage.settings
    options = {
        "report_to": [],
        "use_cpu": stage.models.encoder.device.type == "cpu",
        "bf16": False,  # dtypes are those of the policy that was copied
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": settings.group_size,
        "max_completion_length": stage.config.caption.max_new_tokens,
        "temperature": settings.temperature,
        "loss_type": settings.loss_type,
        "importance_sampling_level": settings.importance_level,
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "use_bias_correction_kl": {"k3": False, "k3_importance": True}[settings.kl_estimator],
        "beta": 0.0,  # for any other it would load a reference model, whose log-probs are in the batch
    }
    prompts = Dataset.from_dict({"prompt": [""] * rows})
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:  # it insists on one
            warnings.simplefilter("ignore", FutureWarning)
            arguments = GRPOConfig(folder, **options)
            trainer = GRPOTrainer(model, _no_reward, arguments, train_dataset=prompts, processing_class=tokenizer)
    finally:
        logging.disable(level)
    trainer.beta = settings.beta
    trainer.current_gradient_accumulation_steps = 1  # which the loop sets that is not run here
    trainer.model.train()
    return trainer


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
