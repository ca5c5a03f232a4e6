"""verl's names over our ops: what `actor_rollout_ref.model.use_fused_kernels` calls, and its GRPO advantages.

Results are fp32 (fp64 for fp64 inputs), entropies too, where verl's PyTorch path returns those in the dtype of the
hidden states. A frozen head gets no gradient and costs two matrix products for forward and backward together, verl's
four; an entropy that is differentiated costs three more. Ids outside the vocabulary give 0.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..advantages import group_advantages
from ._entropy import logprobs_and_entropies


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`: log-probabilities and entropies of N tokens.

    Args:
        hidden: (N, H), or (B, T, H) with N = B·T.
        weight: (V, H), a plain dense tensor.
        labels: (N,) or (B, T).
        temperature: positive number, None = 1.
        reduction: "none" or None.
        dist_process_group: None.

    Returns:
        (log-probabilities, entropies), (N,) each, both differentiable.

    Raises:
        NotImplementedError: another reduction; a process group, which would split the vocabulary.
        TypeError, ValueError: as `uae_kernels.linear_logprobs`.
    """
    if reduction is not None and reduction.lower() != "none":
        raise NotImplementedError(f'reduction: only "none", got {reduction!r}; reduce the returned log-probabilities')
    if dist_process_group is not None:
        raise NotImplementedError(
            "dist_process_group: a vocabulary split over processes is not supported; gather the weight and pass None"
        )
    return logprobs_and_entropies(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=1.0 if temperature is None else temperature,
    )


class FusedLinearForPPO(torch.nn.Module):
    """`verl.utils.experimental.torch_functional.FusedLinearForPPO`.

    Args:
        chunk_size: rows verl computes at a time; it changes no result there and nothing here.
    """

    def __init__(self, chunk_size: int = 512):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of `input_ids`, both differentiable.

        Args:
            hidden_states: (N, H) or (B, T, H).
            vocab_weights: (V, H), a plain dense tensor.
            input_ids: (N,) or (B, T) integers: the token each row predicts.
            temperature: positive number, or a tensor of one element (read on the host).

        Returns:
            (log-probabilities, entropies) of `input_ids`' shape.

        Raises:
            NotImplementedError: a temperature per token.
            TypeError, ValueError: as `uae_kernels.linear_logprobs`.
        """
        if isinstance(temperature, Tensor):
            if temperature.numel() != 1:
                raise NotImplementedError(
                    f"temperature: one number for all tokens, got {tuple(temperature.shape)}; "
                    "divide hidden_states by it and pass 1.0"
                )
            temperature = temperature.item()
        return logprobs_and_entropies(hidden_states, vocab_weights, input_ids.long(), temperature=temperature)


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Tensor | Iterable[Hashable],
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """`verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage`: GRPO advantages of whole responses.

    A = (r − mean)/(std + epsilon) over the responses of one prompt, r the sum of a response's token rewards. A prompt
    with one response keeps verl's rule: mean 0, std 1, so that A is its reward. Where all rewards of a prompt are
    equal A is exactly 0; a reward that is NaN or infinite is left out and gets 0.

    Args:
        token_level_rewards: (B, T).
        response_mask: (B, T), multiplies the result.
        index: B group ids: integers in a tensor, or anything hashable, such as verl's array of uid strings.
        epsilon: added to the std (with n − 1).
        norm_adv_by_std_in_grpo: False divides by nothing (Dr. GRPO).
        config: not used, as in verl.

    Returns:
        (advantages, returns): the same (B, T) tensor twice.

    Raises:
        ValueError: an `index` that does not hold B ids.
    """
    rewards = token_level_rewards.detach().sum(-1)
    if isinstance(index, Tensor):
        ids = index.to(rewards.device)
    else:
        numbers: dict[Hashable, int] = {}
        ids = torch.tensor([numbers.setdefault(name, len(numbers)) for name in index], device=rewards.device)
    if ids.shape != rewards.shape:
        raise ValueError(f"index must hold {len(rewards)} group ids, got {tuple(ids.shape)}")
    scale = "group" if norm_adv_by_std_in_grpo else "none"
    advantages = group_advantages(rewards, group_ids=ids, scale=scale, eps=epsilon)
    alone = (ids[:, None] == ids).sum(1) == 1
    own = torch.where(rewards.isfinite(), rewards, 0).to(advantages) / (1 + epsilon if norm_adv_by_std_in_grpo else 1)
    advantages = torch.where(alone, own, advantages)[:, None] * response_mask
    return advantages, advantages
