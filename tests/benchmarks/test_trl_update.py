"""Stage 2's update is TRL's: loss and every gradient, by TRL's own code on the same rollout of the same small model."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.trainer.trl import TRLUpdate
from benchmarks.trainer.worlds import gradients, prepare, tiny_config

BOUND = 1e-5


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """Of each way to train: a stage, and a rollout whose ratios are no longer 1 and whose reference is far off."""
    found = {}

    def make(mode):
        if mode not in found:
            config = tiny_config(
                world, f"run={tmp_path_factory.mktemp('run')}", f"models.encoder={mode}", "render.batch=8",
                "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8",
            )  # fmt: skip
            ready = prepare(2, config)
            rollout = ready.stage.rollout(ready.examples, 0)
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in ready.parameters:
                    parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
                    if mode == "lora":
                        parameter += 0.02 * torch.randn_like(parameter)
            with torch.no_grad():
                logprobs = ready.stage.logprobs(rollout, slice(0, len(rollout)), "policy")
            far = torch.empty_like(logprobs).uniform_(-0.5, 0.5)
            rollout = replace(rollout, old_logprobs=logprobs + far, ref_logprobs=rollout.ref_logprobs + far.flip(1))
            found[mode] = ready, rollout
        return found[mode]

    return make


def compared(prepared, mode, **settings):
    """Our loss, TRL's, the relative error of the gradient, and TRL's metrics."""
    ready, rollout = prepared(mode)
    stage = ready.stage
    before = {key: getattr(stage.settings, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(stage.settings, key, value)
        if not stage.settings.beta:
            rollout = replace(rollout, ref_logprobs=None)
        loss, own = gradients(stage, rollout, ready.parameters)
        theirs = TRLUpdate(stage, rollout, ready.examples)
    finally:
        for key, value in before.items():
            setattr(stage.settings, key, value)
    encoder = stage.models.encoder
    copies = theirs.parameters(encoder.model if encoder.adapters is None else encoder.adapters, ready.parameters)
    their_loss = theirs.loss()
    their_loss.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in copies)
    pairs = [(a.double(), b.grad.double()) for a, b in zip(own, copies, strict=True) if b.grad is not None]
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert worst < 3 * BOUND  # of one tensor alone
    whole = [torch.cat([each[side].flatten() for each in pairs]) for side in (0, 1)]
    error = ((whole[0] - whole[1]).norm() / whole[1].norm()).item()
    assert all(a.norm() == 0 for a, b in zip(own, copies, strict=True) if b.grad is None)
    return loss.item(), their_loss.item(), error, theirs.trainer._metrics["train"]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_loss_and_gradients_are_trls(prepared, mode, beta, loss_type):
    loss, expected, error, metrics = compared(prepared, mode, beta=beta, loss_type=loss_type)
    assert loss == pytest.approx(expected, rel=BOUND) and error < BOUND
    assert 0.05 < metrics["clip_ratio/region_mean"][0] < 0.95  # both sides of the clipping are compared
    assert ("kl" in metrics) == (beta > 0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_sequence_ratios_temperature_and_estimator_are_trls(prepared, mode):
    settings = {"importance_level": "sequence", "clip_low": 0.02, "temperature": 0.7, "kl_estimator": "k3_importance"}
    loss, expected, error, _ = compared(prepared, mode, **settings)
    assert loss == pytest.approx(expected, rel=BOUND, abs=1e-6) and error < BOUND  # a group's advantages add up to 0


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_captions_in_rows_of_their_own_are_trls(prepared, mode):
    """The other tests' share their prompt."""
    assert prepared(mode)[0].stage.settings.shared_prefix
    loss, expected, error, _ = compared(prepared, mode, shared_prefix=False)
    assert loss == pytest.approx(expected, rel=BOUND) and error < BOUND


def test_another_formula_would_be_seen(prepared):
    """Of what TRL is told, one thing at a time is not so here: each is far beyond the bound."""
    ready, rollout = prepared("full")
    stage = ready.stage
    _, own = gradients(stage, rollout, ready.parameters)
    for key, value in {"clip_low": 0.4, "beta": 0.041, "temperature": 1.01, "loss_type": "bnpo"}.items():
        before = getattr(stage.settings, key)
        setattr(stage.settings, key, value)
        try:
            theirs = TRLUpdate(stage, rollout, ready.examples)
        finally:
            setattr(stage.settings, key, before)
        copies = theirs.parameters(stage.models.encoder.model, ready.parameters)
        theirs.loss().backward()
        worst = max(((a - b.grad).norm() / b.grad.norm()).item() for a, b in zip(own, copies, strict=True))
        assert worst > 10 * BOUND, key
