"""Stage 3's update beside plain Flow-GRPO's: the same policy, the same drawings, the same options."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .plain_flow_grpo import Path, PlainFlowGRPO, Recipe


def plain_peer(stage: Any, twin: Any) -> PlainFlowGRPO:
    """Plain Flow-GRPO with a stage's weights and options.

    Args:
        stage: an `UnderstandingForGeneration`, `kind: flow_sde`.
        twin: another of the same configuration but for `same_sampler.accelerate: false`; it gives the transformer.
    """
    settings, decoder = stage.settings, twin.models.decoder
    decoder.transformer.load_state_dict(stage.models.decoder.transformer.state_dict())
    if decoder.reference_copy is not None:
        decoder.reference_copy.load_state_dict(stage.models.decoder.reference_copy.state_dict())
    recipe = Recipe(
        steps=stage.config.render.steps,
        guidance_scale=settings.guidance_scale,
        noise_level=settings.noise_level,
        group_size=settings.group_size,
        micro_batch=settings.micro_batch,
        clip_range=settings.clip_range,
        advantage_clip=settings.advantage_clip,
        beta=settings.beta,
        kl_with_dt={"gaussian": True, "flow_grpo": False}[settings.kl],
    )
    negative = None
    if settings.guidance_scale != 1:
        negative = twin.models.negative(stage.config.render.negative_prompt)
    return PlainFlowGRPO(
        decoder.transformer, decoder.sigmas(recipe.steps), decoder.pooled, negative, recipe, decoder.reference_copy
    )


def as_path(stage: Any, rollout: Any) -> Path:
    """A rollout of ours as plain Flow-GRPO keeps it."""
    path, steps = rollout.trajectory, stage.settings.window
    sigmas = stage.models.decoder.sigmas(stage.config.render.steps)
    latents, next_latents, log_probs = (
        part.unflatten(0, (steps, -1)) for part in (path.latents, path.next_latents, path.log_probs)
    )
    return Path(latents, next_latents, log_probs, first=(sigmas == path.levels[0]).nonzero().item())


def twins(stage: Any, twin: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The twin's parameters that correspond to some of the stage's."""
    names = {id(p): name for name, p in stage.models.decoder.transformer.named_parameters()}
    own = dict(twin.models.decoder.transformer.named_parameters())
    return [own[names[id(parameter)]] for parameter in parameters]
