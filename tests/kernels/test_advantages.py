import math
import statistics

import pytest
import torch
from uae_kernels import group_advantages, reference


def by_hand(rewards, ids, scale="group", unbiased=True, eps=1e-4, leave_one_out=False):
    """GRPO advantages with Python lists, one group at a time."""
    members = {g: [i for i in range(len(rewards)) if ids[i] == g and math.isfinite(rewards[i])] for g in set(ids)}
    std = statistics.stdev if unbiased else statistics.pstdev
    everything = [r for r in rewards if math.isfinite(r)]
    result = [0.0] * len(rewards)
    for indices in members.values():
        values = [rewards[i] for i in indices]
        if len(set(values)) < 2:
            continue
        for i in indices:
            others = [rewards[j] for j in indices if j != i]
            a = rewards[i] - (sum(others) / len(others) if leave_one_out else sum(values) / len(values))
            if scale != "none":
                a /= std(values if scale == "group" else everything) + eps
            result[i] = a
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_a_loop_over_groups(scale, unbiased, leave_one_out, dtype):
    rewards = torch.randn(21).to(dtype)
    rewards[4], rewards[12] = torch.nan, torch.inf
    rewards[14:21] = 0.3
    options = dict(scale=scale, unbiased=unbiased, leave_one_out=leave_one_out)
    ids = [i // 7 for i in range(21)]
    expected = by_hand(rewards.tolist(), ids, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for actual in (
        group_advantages(rewards, 7, **options),
        group_advantages(rewards, group_ids=torch.tensor(ids) * -(10**12) + 5, **options),
    ):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
        assert (actual[[4, 12, *range(14, 21)]] == 0).all()


def test_ragged_groups_in_any_order():
    rewards, ids = torch.randn(11), torch.tensor([3, 1, 3, 3, 9, 1, 3, 1, 1, 1, 7])
    expected = by_hand(rewards.tolist(), ids.tolist())
    torch.testing.assert_close(group_advantages(rewards, group_ids=ids).double(), expected, atol=1e-5, rtol=1e-5)
    order = torch.randperm(11)
    shuffled = group_advantages(rewards[order], group_ids=ids[order])
    torch.testing.assert_close(shuffled.double(), expected[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -7e-9])
def test_zero_variance_is_exactly_zero(value):
    rewards = torch.full((12,), value)
    rewards[:6] += torch.arange(6)
    advantages = group_advantages(rewards, 6, eps=0.0)
    assert (advantages[6:] == 0).all() and (advantages[:6] != 0).all()


@pytest.mark.parametrize("options", [{}, {"leave_one_out": True}, {"scale": "batch"}, {"scale": "none"}])
def test_group_of_one_and_group_of_nan(options):
    assert (group_advantages(torch.randn(5), 1, **options) == 0).all()
    rewards = torch.tensor([torch.nan, torch.nan, torch.nan, 1.0, 2.0, torch.nan])
    advantages = group_advantages(rewards, 3, **options)
    assert (advantages[[0, 1, 2, 5]] == 0).all() and advantages[3] < 0 < advantages[4]


def test_several_rewards_and_weights():
    rewards = torch.randn(8, 3, dtype=torch.float64)
    rewards[2, 1] = torch.nan
    weights = [0.5, 2.0, -1.0]
    summed = rewards.nan_to_num(0) @ torch.tensor(weights, dtype=torch.float64)
    for given in (weights, torch.tensor(weights)):
        actual = group_advantages(rewards, 4, reward_weights=given)
        torch.testing.assert_close(actual, by_hand(summed.tolist(), [0] * 4 + [1] * 4))


def test_gdpo():
    rewards = torch.randn(12, 2, dtype=torch.float64)
    rewards[8:] = 0.7
    z = torch.stack([by_hand(column.tolist(), [i // 4 for i in range(12)]) for column in rewards.T])
    total = z[0] * 0.3 + z[1] * 2
    expected = (total - total.mean()) / (total.std() + 1e-4)
    actual = group_advantages(rewards, 4, reward_weights=[0.3, 2.0], aggregation="normalize_then_sum")
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    assert (actual[8:] == 0).all()


def test_clip_and_strides():
    rewards = torch.randn(8, 2)[:, 0]
    advantages = group_advantages(rewards, 4)
    assert torch.equal(advantages, group_advantages(rewards.contiguous(), 4))
    assert torch.equal(group_advantages(rewards, 4, clip=0.5), advantages.clamp(-0.5, 0.5))
    assert advantages.abs().max() > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "batch"},
        {"scale": "none", "leave_one_out": True},
        {"aggregation": "normalize_then_sum", "reward_weights": [1.0, 2.0]},
    ],
)
@pytest.mark.parametrize("function", [group_advantages, reference.group_advantages])
def test_gradcheck(options, function):
    rewards = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: function(r, 3, **options), rewards)
    ids = torch.tensor([0, 1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda r: function(r, group_ids=ids, **options), rewards)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(group_size=4),
        dict(),
        dict(group_size=3, group_ids=torch.zeros(6, dtype=torch.int64)),
        dict(group_ids=torch.zeros(5, dtype=torch.int64)),
        dict(group_size=3, scale="groups"),
        dict(group_size=3, reward_weights=[1.0, 1.0]),
        dict(group_size=3, aggregation="normalize_then_sum", scale="none"),
    ],
)
def test_errors(arguments):
    with pytest.raises(ValueError, match="group_advantages"):
        group_advantages(torch.randn(6), **arguments)
