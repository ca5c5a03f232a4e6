"""compat.verl against verl's formulas, written out in plain PyTorch."""

import inspect

import pytest
import torch
from torch.testing import assert_close
from uae_kernels.compat import verl as compat

B, T, H, V = 3, 5, 16, 70


def test_public_signatures():
    """verl 0.10's, as written down from its source."""
    for function, expected in (
        (
            compat.linear_cross_entropy,
            "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None",
        ),
        (compat.FusedLinearForPPO, "chunk_size=512"),
        (compat.FusedLinearForPPO().forward, "hidden_states, vocab_weights, input_ids, temperature=1.0"),
        (
            compat.compute_grpo_outcome_advantage,
            "token_level_rewards, response_mask, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, config=None",
        ),
    ):
        parameters = inspect.signature(function).parameters.values()
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == expected


def definition(hidden, weight, labels, temperature):
    """log softmax(h·Wᵀ/temperature) of the labels, and logsumexp − Σ p·logit, in fp64."""
    logits = hidden.double() @ weight.double().T / temperature
    lse = logits.logsumexp(-1)
    return logits.gather(-1, labels[..., None])[..., 0] - lse, lse - (logits.softmax(-1) * logits).sum(-1)


def inputs(trainable=True, dtype=torch.float32):
    hidden, weight = torch.randn(B, T, H, dtype=dtype), (0.3 * torch.randn(V, H)).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(trainable), torch.randint(0, V, (B, T))


def compare(ours, theirs, leaves, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, check_dtype=False, **tolerance)
    cotangents = [torch.randn(x.shape) for x in ours]
    ours, theirs = (torch.autograd.grad(outputs, leaves, [c.to(outputs[0]) for c in cotangents])
                    for outputs in (ours, theirs))  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, check_dtype=False, **tolerance)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_cross_entropy(trainable, temperature):
    hidden, weight, labels = inputs(trainable)
    leaves = [hidden, weight] if trainable else [hidden]
    theirs = definition(hidden, weight, labels, temperature)
    flat = compat.linear_cross_entropy(hidden.reshape(-1, H), weight, labels.reshape(-1), temperature)
    compare(flat, [x.reshape(-1) for x in theirs], leaves, rtol=1e-5, atol=2e-6)
    batched = compat.linear_cross_entropy(hidden, weight, labels, temperature, "NONE", None)
    assert all(torch.equal(a, b) for a, b in zip(batched, flat, strict=True))


def test_none_takes_verls_defaults():
    hidden, weight, labels = inputs()
    for a, b in zip(
        compat.linear_cross_entropy(hidden, weight, labels, None, None),
        compat.linear_cross_entropy(hidden, weight, labels),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor(0.7), torch.tensor([0.7])])
def test_fused_linear_for_ppo(trainable, temperature):
    hidden, weight, labels = inputs(trainable)
    leaves = [hidden, weight] if trainable else [hidden]
    module = compat.FusedLinearForPPO(chunk_size=4)
    assert list(module.parameters()) == [] and module.chunk_size == 4
    ours = module(hidden, weight, labels.int(), temperature=temperature)
    compare(ours, definition(hidden, weight, labels, 0.7), leaves, rtol=1e-5, atol=2e-6)
    flat = module(hidden.flatten(0, 1), weight, labels.flatten(), temperature)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(ours, flat, strict=True))


def test_bf16_states_give_fp32_results():
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    ours = compat.linear_cross_entropy(hidden, weight, labels)
    theirs = [x.reshape(-1) for x in definition(hidden, weight, labels, 1.0)]
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, check_dtype=False, rtol=1e-5, atol=2e-6)
    grads = [torch.autograd.grad(x[0].sum() + x[1].square().sum(), (hidden, weight)) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a, b, rtol=2**-7, atol=1e-3)


def test_unsupported_arguments_raise():
    hidden, weight, labels = inputs()
    for reduction in ("mean", "sum"):
        with pytest.raises(NotImplementedError, match="reduction"):
            compat.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    with pytest.raises(NotImplementedError, match="dist_process_group"):
        compat.linear_cross_entropy(hidden, weight, labels, dist_process_group=object())
    with pytest.raises(NotImplementedError, match="temperature"):
        compat.FusedLinearForPPO()(hidden, weight, labels, torch.rand(B * T))
    for call in (compat.linear_cross_entropy, compat.FusedLinearForPPO()):
        with pytest.raises(ValueError, match="temperature"):
            call(hidden, weight, labels, temperature=0.0)
    for index in (["a", "b"], torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="index"):
            compat.compute_grpo_outcome_advantage(torch.rand(3, T), torch.ones(3, T), index)


def outcome_advantage(token_level_rewards, response_mask, index, epsilon, normalize):
    scores = token_level_rewards.sum(-1)
    advantages = torch.zeros_like(scores)
    for name in set(index):
        group = [i for i, other in enumerate(index) if other == name]
        mean, std = (scores[group].mean(), scores[group].std()) if len(group) > 1 else (0.0, 1.0)
        advantages[group] = (scores[group] - mean) / (std + epsilon) if normalize else scores[group] - mean
    return advantages[:, None] * response_mask


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_outcome_advantage(normalize, epsilon):
    numpy = pytest.importorskip("numpy")
    names = ["a", "b", "a", "c", "b", "a", "d", "d"]
    rewards = torch.zeros(8, T)
    rewards[torch.arange(8), torch.randint(0, T, (8,))] = torch.rand(8)
    mask = (torch.rand(8, T) > 0.3).long()
    expected = outcome_advantage(rewards, mask, names, epsilon, normalize)
    assert expected[3].abs().sum() > 0  # "c" is alone
    numbers = torch.tensor([ord(name) for name in names])
    for index in (names, numpy.array(names, dtype=object), numbers, numbers.numpy()):
        given = rewards.clone()
        advantages, returns = compat.compute_grpo_outcome_advantage(
            given, mask, index, epsilon=epsilon, norm_adv_by_std_in_grpo=normalize, config=object()
        )
        assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(advantages, returns) and torch.equal(given, rewards)


def test_outcome_advantage_stays_defined():
    rewards = torch.tensor([[0.1], [0.1], [0.1], [torch.nan], [0.5], [0.7], [torch.inf]])
    index = ["equal"] * 3 + ["some"] * 3 + ["alone"]
    advantages, _ = compat.compute_grpo_outcome_advantage(rewards, torch.ones(7, 2), index)
    assert (advantages[:4] == 0).all() and (advantages[6] == 0).all()
    expected = outcome_advantage(rewards[4:6], torch.ones(2, 2), ["some"] * 2, 1e-6, True)
    assert_close(advantages[4:6], expected)
