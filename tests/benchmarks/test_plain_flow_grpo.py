"""Plain Flow-GRPO computes the paper's step, and stage 3's update is its: loss and every gradient."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.trainer.flow import as_path, plain_peer, twins
from benchmarks.trainer.plain_flow_grpo import PlainFlowGRPO, Recipe, group_advantages, sde_step
from benchmarks.trainer.worlds import gradients, prepare, tiny_config

BOUND = 1e-5
SMALL = ["render.batch=8", "stage3.images=2", "stage3.group_size=4", "stage3.micro_batch=4",
         "stage3.clip_range=1e-2"]  # fmt: skip
CASES = {
    "tiny": [],
    "paper": ["stage3.window=7", "stage3.window_end=7", "stage3.beta=0.04", "stage3.kl=flow_grpo",
              "stage3.guidance_scale=4.5"],
    "kl with dt": ["stage3.beta=0.5", "stage3.kl=gaussian"],
}  # fmt: skip


def compared(world, tmp_path, mode, *options, **wrong):
    """Our loss, plain Flow-GRPO's, the relative error of the whole gradient, and the largest of a parameter's.

    Args:
        wrong: options of the plain one that are not ours.
    """
    config = tiny_config(world, f"run={tmp_path}", f"models.decoder={mode}", *SMALL, *options)
    ready, twin = prepare(3, config), prepare(3, replace_accelerate(config))
    stage, parameters = ready.stage, ready.parameters
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:  # away from the reference
            parameter += 0.003 * torch.randn_like(parameter)
    rollout = stage.rollout(ready.examples, 0)
    far = torch.tensor([2.0, -0.5, -2.0, 0.5]).repeat(len(rollout) // 4)  # every second ratio is out of range
    log_probs = rollout.trajectory.log_probs + config.stage3.clip_range * far
    trajectory = replace(rollout.trajectory, log_probs=log_probs)
    rollout = replace(rollout, trajectory=trajectory)
    loss, own = gradients(stage, rollout, parameters)

    peer = plain_peer(stage, twin.stage)
    peer.recipe = replace(peer.recipe, **wrong)
    expected = peer.update(as_path(stage, rollout), rollout.advantages, trajectory.context)
    theirs = [p.grad for p in twins(stage, twin.stage, parameters)]
    reached = [(a, b) for a, b in zip(own, theirs, strict=True) if b is not None and b.norm() > 0]
    assert len(reached) > len(own) / 2
    assert all(a.norm() == 0 for a, b in zip(own, theirs, strict=True) if b is None or b.norm() == 0)
    differences = torch.stack([(a - b).norm() for a, b in reached])
    norms = torch.stack([b.norm() for _, b in reached])
    return loss.item(), expected.item(), (differences.norm() / norms.norm()).item(), (differences / norms).max().item()


def replace_accelerate(config):
    return replace(config, same_sampler=replace(config.same_sampler, accelerate=False))


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_stage_3_is_plain_flow_grpo(world, tmp_path, mode, case):
    loss, expected, whole, worst = compared(world, tmp_path, mode, *CASES[case])
    assert loss == pytest.approx(expected, rel=BOUND, abs=1e-6)  # a group's advantages add up to 0
    assert whole < 2 * BOUND and worst < 5 * BOUND


@pytest.mark.parametrize(
    "case, key, value",
    [("tiny", "clip_range", 5e-2), ("tiny", "noise_level", 0.701), ("paper", "guidance_scale", 4.49),
     ("paper", "beta", 0.041), ("paper", "kl_with_dt", True)],
)  # fmt: skip
def test_another_recipe_would_be_seen(world, tmp_path, case, key, value):
    _, _, whole, _ = compared(world, tmp_path, "lora", *CASES[case], **{key: value})
    assert whole > 10 * BOUND


def test_a_step_is_the_papers():
    """Its log-prob is the normal distribution's; without noise it is Euler's; its noise is a·√(σ/(1−σ))·√(−dt)."""
    torch.manual_seed(0)
    v, x, noise = torch.randn(3, 2, 3, 4, 4).double().unbind()
    sigma, after, largest = (torch.tensor(s, dtype=torch.float64) for s in (0.8, 0.7, 0.95))
    drawn, log_prob, mean, std, s = sde_step(v, x, sigma, after, largest, 0.7, noise=noise)
    exact = torch.distributions.Normal(mean, std).log_prob(drawn).mean((1, 2, 3))
    assert torch.allclose(log_prob, exact, atol=1e-6)
    assert s.item() == pytest.approx(0.7 * (0.8 / 0.2) ** 0.5) and std.item() == pytest.approx(s.item() * 0.1**0.5)
    euler = sde_step(v, x, sigma, after, largest, 0.0, noise=noise)[0].float()
    assert torch.allclose(euler, (x - 0.1 * v).float(), atol=1e-6)
    start = sde_step(v, x, torch.ones(()).double(), largest, largest, 0.7, noise=noise)[4]
    assert start.item() == pytest.approx(0.7 * (1 / 0.05) ** 0.5)


def test_the_sde_keeps_the_flows_marginals():
    """x0 = 0 and ε normal: x_σ has the standard deviation σ, and so it has after many small stochastic steps."""
    torch.manual_seed(0)
    sigmas = torch.linspace(0.9, 0.5, 401)
    x = sigmas[0] * torch.randn(1, 1, 400, 400)
    for sigma, after in pairwise(sigmas):
        x, *_ = sde_step(x / sigma, x, sigma, after, sigmas[0], 0.7)
    assert x.std().item() == pytest.approx(0.5, rel=0.01)


def test_a_rollouts_first_ratio_is_one():
    """Of plain Flow-GRPO's own rollout the gradient is the plain policy gradient's: every ratio is 1."""

    class Model(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, hidden_states, encoder_hidden_states, **_):
            return (self.scale * hidden_states * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1),)

    torch.manual_seed(0)
    recipe = Recipe(steps=4, micro_batch=2, beta=0.0, group_size=2)
    peer = PlainFlowGRPO(Model(), torch.linspace(1, 0, 5), torch.zeros(3), torch.ones(1, 5, 6), recipe)
    context = torch.randn(4, 5, 6)
    path, latents = peer.rollout(torch.randn(4, 2, 3, 3), context)
    assert path.log_probs.shape == (3, 4) and latents.shape == (4, 2, 3, 3)
    advantages = group_advantages(torch.tensor([1.0, 2.0, 5.0, 3.0]), 2)
    assert advantages.tolist() == pytest.approx([-0.5 / 1.4791, 0.5 / 1.4791, 1 / 1.4791, -1 / 1.4791], rel=1e-3)
    loss = peer.update(path, advantages, context)
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-6)
    assert peer.transformer.scale.grad.abs() > 0
