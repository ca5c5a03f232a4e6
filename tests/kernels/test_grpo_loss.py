import math

import pytest
import torch
from uae_kernels import group_advantages, grpo_loss, reference

TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "luspo_legacy", "cispo", "sapo", "vespo"]
B, T = 6, 7


def batch(dtype=torch.float64):
    b = dict(
        logprobs=-torch.rand(B, T) * 3,
        advantages=torch.tensor([1.3, -0.7, 0.0, 2.0, -1.5, 0.4]),
        mask=torch.arange(T) < torch.tensor([7, 3, 5, 1, 0, 6])[:, None],
        ref_logprobs=-torch.rand(B, T) * 3,
        entropies=torch.rand(B, T),
    )
    b["old_logprobs"] = b["logprobs"] + 0.4 * torch.randn(B, T)
    b["sampling_logprobs"] = b["old_logprobs"] + 0.3 * torch.randn(B, T)
    return {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in b.items()}


def by_hand(logprobs, advantages, mask, old_logprobs, ref_logprobs=None, sampling_logprobs=None,
entropies=None,
            loss_type="grpo", importance_level="token", clip_low=0.2, clip_high=0.2, delta=math.inf, beta=0.0,
            kl_estimator="k3", sapo_temperature=(1.0, 1.05), vespo=(2.0, 3.0, 3.0, 2.0),
            importance_mode="token_truncate", importance_floor=0.0, importance_cap=math.inf,
            off_policy_threshold=math.inf, entropy_quantile=1.0, entropy_coef=0.0, normalizer=None,
            max_length=T):  # fmt: skip
    """The loss with loops over sequences and tokens, in Python floats."""
    new, o = logprobs.tolist(), old_logprobs.tolist()
    keep = [[t for t in range(T) if mask[i, t]] for i in range(B)]
    pooled = sorted(entropies[i, t].item() for i in range(B) for t in keep[i]) if entropies is not None else []
    cut = -math.inf
    if pooled:
        place = (1 - entropy_quantile) * (len(pooled) - 1)
        low = math.floor(place)
        cut = pooled[low] + (place - low) * (pooled[min(low + 1, len(pooled) - 1)] - pooled[low])
    token = [[0.0] * T for _ in range(B)]
    bonus = []
    for i in range(B):
        count = max(len(keep[i]), 1)
        gaps = {t: new[i][t] - o[i][t] if t in keep[i] else 0.0 for t in range(T)}
        rho = dict.fromkeys(range(T), 1.0)
        if sampling_logprobs is not None:
            late = {t: o[i][t] - sampling_logprobs[i, t].item() for t in keep[i]}
            if importance_mode.startswith("sequence"):
                late = dict.fromkeys(range(T), sum(late.values()))
            for t in late:
                r = math.exp(late[t])
                inside = importance_floor <= r <= importance_cap
                limited = min(max(r, importance_floor), importance_cap)
                rho[t] = limited if importance_mode.endswith("truncate") else r * inside
        a = advantages[i].item()
        for t in range(T):
            w = gaps[t] if importance_level == "token" else sum(gaps.values()) / count
            r = math.exp(w)
            clipped = min(max(r, 1 - clip_low), 1 + clip_high)
            if loss_type == "cispo":
                loss = -min(r, clip_high) * a * new[i][t]
            elif loss_type == "sapo":
                tau = sapo_temperature[0 if a > 0 else 1]
                loss = -4 / tau / (1 + math.exp(-tau * (r - 1))) * a
            elif loss_type == "vespo":
                k, lam = vespo[:2] if a >= 0 else vespo[2:]
                s = sum(gaps.values())
                logs = [math.log(max(rho[u], 1e-8)) for u in range(T)]
                s += logs[0] if importance_mode.startswith("sequence") else sum(logs[u] for u in keep[i])
                s = min(max(s, math.log(1e-8)), 20)
                loss = -math.exp(lam + k * s - lam * math.exp(s)) * a * new[i][t]
            else:
                loss = -min(min(r, delta) * a, clipped * a)
            if sampling_logprobs is not None:
                drift = sum(sampling_logprobs[i, u].item() - new[i][u] for u in keep[i]) / count
                if a < 0 and drift > off_policy_threshold:
                    loss = 0.0
            chosen = entropies is None or (t in keep[i] and entropies[i, t].item() >= cut)
            loss *= chosen
            if loss_type != "vespo":
                loss *= rho[t]
            if t in keep[i]:
                if beta:
                    x = ref_logprobs[i, t].item() - new[i][t]
                    k3 = math.exp(x) - x - 1
                    loss += beta * {"k1": -x, "k2": x * x / 2, "k3": k3, "k3_importance": k3 * r}[kl_estimator]
                if chosen and entropies is not None:
                    bonus.append(entropies[i, t].item())
            token[i][t] = loss
    sums = [sum(token[i][t] for t in keep[i]) for i in range(B)]
    total = sum(map(len, keep))
    if loss_type in ("grpo", "sapo"):
        loss = sum(s / max(len(k), 1) for s, k in zip(sums, keep, strict=True)) / (normalizer or B)
    elif loss_type == "luspo":
        loss = sum(sums) / (normalizer or B)
    elif loss_type == "luspo_legacy":
        loss = sum(len(k) * sum(row) / T for row, k in zip(token, keep, strict=True)) / (normalizer or B)
    elif loss_type == "dr_grpo":
        loss = sum(sums) / ((normalizer or B) * max_length)
    else:
        loss = sum(sums) / (normalizer or max(total, 1))
    return loss - entropy_coef * (sum(bonus) / max(len(bonus), 1))


VARIANTS = {
    "plain": dict(),
    "asymmetric": dict(clip_low=0.1, clip_high=0.28, max_length=11, normalizer=9.0),
    "delta": dict(delta=1.3),
    "k1": dict(beta=0.3, kl_estimator="k1"),
    "k2": dict(beta=0.3, kl_estimator="k2"),
    "k3": dict(beta=0.3),
    "k3_importance": dict(beta=0.3, kl_estimator="k3_importance"),
    "sapo": dict(sapo_temperature=(0.7, 1.4)),
    "vespo": dict(vespo=(1.5, 2.5, 2.0, 1.0)),
    "token_truncate": dict(importance_cap=1.2, importance_floor=0.9),
    "token_mask": dict(importance_mode="token_mask", importance_cap=1.2, importance_floor=0.8),
    "sequence_truncate": dict(importance_mode="sequence_truncate", importance_cap=1.1),
    "sequence_mask": dict(importance_mode="sequence_mask", importance_cap=1.5, importance_floor=0.5),
    "off_policy": dict(off_policy_threshold=-0.2),
    "entropy": dict(entropy_quantile=0.4, entropy_coef=0.2),
}


def inputs_for(variant):
    b = batch()
    if not any(k in VARIANTS[variant] for k in ("importance_cap", "off_policy_threshold")):
        del b["sampling_logprobs"]
    if "entropy_coef" not in VARIANTS[variant]:
        del b["entropies"]
    if "beta" not in VARIANTS[variant]:
        del b["ref_logprobs"]
    return b


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_loops_over_tokens(loss_type, level, variant):
    b, options = inputs_for(variant), dict(VARIANTS[variant], loss_type=loss_type, importance_level=level)
    out = grpo_loss(**b, **options)
    assert out.loss.dtype == torch.float64
    assert out.loss.item() == pytest.approx(by_hand(**b, **options), rel=1e-9, abs=1e-12)
    assert (out.per_token[~b["mask"]] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("variant", ["plain", "delta", "k2", "k3_importance", "token_mask", "entropy"])
def test_gradcheck(loss_type, level, variant):
    b, options = inputs_for(variant), dict(VARIANTS[variant], loss_type=loss_type, importance_level=level)
    logp = b.pop("logprobs").requires_grad_()
    if loss_type in (
        "cispo",
        "vespo",
    ):  # their weight is a constant: r, and with it the numeric derivative, is not
        b["old_logprobs"] = logp.detach() + 30 if loss_type == "vespo" else logp.detach() - 30
        b.pop("sampling_logprobs", None)
        options |= dict(clip_high=0.9) if loss_type == "cispo" else {}
        if "kl_estimator" in options:
            options["kl_estimator"] = "k3"

    entropies = b.pop("entropies", None)
    if entropies is None:
        assert torch.autograd.gradcheck(lambda x: reference.grpo_loss(x, **b, **options).loss, logp)
    else:
        assert torch.autograd.gradcheck(
            lambda x, h: reference.grpo_loss(x, entropies=h, **b, **options).loss,
            (logp, entropies.requires_grad_()),
        )


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_weight_without_gradient(loss_type):
    b = inputs_for("plain")
    b["logprobs"].requires_grad_()
    out = grpo_loss(**b, loss_type=loss_type, clip_high=1.1)
    (grad,) = torch.autograd.grad(out.loss, b["logprobs"])
    # L = −w·A·log π with a constant w: the gradient is L/log π
    expected = out.per_token / b["logprobs"] / b["mask"].sum()
    torch.testing.assert_close(grad, expected.detach())


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_first_update(loss_type, level):
    b = inputs_for("plain")
    del b["old_logprobs"]
    b = {k: v if v.dtype == torch.bool else v.float() for k, v in b.items()}
    b["logprobs"].requires_grad_()
    outs = [grpo_loss(**b, old_logprobs=old, loss_type=loss_type, importance_level=level)
            for old in (None, b["logprobs"].detach().clone())]  # fmt: skip
    grads = [torch.autograd.grad(o.loss, b["logprobs"])[0] for o in outs]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    for out in outs:
        m = out.metrics
        assert m["ratio_mean"] == m["ratio_max"] == 1 and m["clip_fraction_low"] == 0
        assert m["clip_fraction_high"] == 0 or loss_type == "cispo"
        assert torch.equal(out.logprobs, b["logprobs"]) and not out.logprobs.requires_grad


def test_metrics():
    b = batch()
    b["old_logprobs"] = b["logprobs"] - torch.linspace(-1, 1, T, dtype=torch.float64)
    b["advantages"] = torch.tensor([1.0, -1, 0, 0, 2, -2], dtype=torch.float64)
    out = grpo_loss(**b, beta=0.1, group_size=2, clip_low=0.1, clip_high=0.3)
    m = b["mask"]
    ratio = (b["logprobs"] - b["old_logprobs"]).exp()
    a = b["advantages"][:, None].expand(B, T)
    x = b["ref_logprobs"] - b["logprobs"]
    expected = dict(
        kl=(x.exp() - x - 1)[m].mean(),
        ratio_mean=ratio[m].mean(),
        ratio_max=ratio[m].max(),
        clip_fraction_low=((ratio < 0.9) & (a < 0))[m].double().mean(),
        clip_fraction_high=((ratio > 1.3) & (a > 0))[m].double().mean(),
        zero_std_fraction=torch.tensor(1 / 3, dtype=torch.float64),
    )
    assert list(out.metrics) == list(expected)
    for key, value in expected.items():
        assert out.metrics[key].shape == () and not out.metrics[key].requires_grad
        torch.testing.assert_close(out.metrics[key], value)
    assert 0 < expected["clip_fraction_low"] < 1 and 0 < expected["clip_fraction_high"] < 1


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_positions_never_leak(loss_type, level):
    b, options = batch(torch.float32), dict(loss_type=loss_type, importance_level=level, beta=0.1)
    options |= dict(entropy_quantile=0.5, entropy_coef=0.1, off_policy_threshold=0.1, importance_cap=2.0)
    results = []
    for junk in (0.0, torch.nan, -torch.inf, torch.inf):
        given = {k: torch.where(b["mask"], v, junk) if v.shape == (B, T) and k != "mask" else v for k, v in b.items()}
        given["advantages"] = torch.where(b["mask"], b["advantages"][:, None], junk)
        logp, entropies = given["logprobs"].requires_grad_(), given["entropies"].requires_grad_()
        out = grpo_loss(**given, **options)
        results.append((out.loss, *out.metrics.values(), *torch.autograd.grad(out.loss, (logp, entropies))))
    assert all(x.isfinite().all() for x in results[0])
    assert results[0][-2].abs().sum() > 0
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("loss_type", TYPES)
def test_empty_mask(loss_type):
    b = batch(torch.float32)
    b["mask"] = torch.zeros(B, T)
    b["logprobs"].requires_grad_()
    out = grpo_loss(**b, loss_type=loss_type, beta=0.1, entropy_quantile=0.5, entropy_coef=0.1)
    out.loss.backward()
    assert out.loss == 0 and (b["logprobs"].grad == 0).all()
    assert all(out.metrics[k] == 0 for k in ("kl", "ratio_mean", "ratio_max", "clip_fraction_low"))


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_of_probability_zero_and_huge_ratios(loss_type, level):
    b = batch(torch.float32)
    for key in ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs"):
        b[key][0, 1] = -torch.inf
    b["old_logprobs"][1, 0] = -torch.inf
    b["ref_logprobs"][2, 2] = -torch.inf
    b["sampling_logprobs"][5, 2], b["sampling_logprobs"][5, 3] = torch.nan, -torch.inf
    b["logprobs"][2, 3], b["old_logprobs"][2, 3] = -1.0, -400.0
    b["logprobs"].requires_grad_()
    out = grpo_loss(**b, loss_type=loss_type, importance_level=level, beta=0.1, importance_cap=3.0)
    out.loss.backward()
    assert out.loss.isfinite() and out.per_token.isfinite().all() and b["logprobs"].grad.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())
    if level == "token":
        assert out.metrics["ratio_max"] == torch.tensor(20.0).exp()


def test_rewards_are_normalised_inside():
    b, rewards = batch(torch.float32), torch.randn(B)
    rewards[3:] = 0.7
    del b["advantages"]
    out = grpo_loss(**b, rewards=rewards, group_size=3)
    expected = grpo_loss(**b, advantages=group_advantages(rewards, 3), group_size=3)
    assert torch.equal(out.loss, expected.loss) and out.metrics["zero_std_fraction"] == 0.5


def test_advantages_per_token_and_strides():
    b = batch(torch.float32)
    per_token = b["advantages"][:, None].expand(B, T)
    expected = grpo_loss(**b)
    assert torch.equal(grpo_loss(**(b | dict(advantages=per_token))).loss, expected.loss)
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in b.items()}
    assert torch.equal(grpo_loss(**strided).loss, expected.loss)
    assert torch.equal(grpo_loss(**(b | dict(mask=b["mask"].long()))).loss, expected.loss)
    normalizer = torch.tensor(5.0)
    assert torch.equal(grpo_loss(**b, normalizer=normalizer).loss, grpo_loss(**b, normalizer=5).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", TYPES)
def test_half_inputs_are_computed_in_fp32(dtype, loss_type):
    b = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in batch().items()}
    b["logprobs"].requires_grad_()
    out = grpo_loss(**b, loss_type=loss_type, beta=0.1)
    assert out.loss.dtype == torch.float32
    exact = {k: v if v.dtype == torch.bool else v.detach().double() for k, v in b.items()}
    truth = grpo_loss(**exact, loss_type=loss_type, beta=0.1)
    torch.testing.assert_close(out.loss.double(), truth.loss, atol=1e-6, rtol=2e-6)
    assert torch.autograd.grad(out.loss, b["logprobs"])[0].dtype == dtype


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss_type="ppo"), "loss_type"),
        (dict(kl_estimator="k4"), "kl_estimator"),
        (dict(importance_mode="token"), "importance_mode"),
        (dict(importance_level="batch"), "importance_level"),
        (dict(rewards=torch.rand(B)), "exactly one"),
        (dict(advantages=None), "exactly one"),
        (dict(advantages=None, rewards=torch.rand(B)), "group_size"),
        (dict(group_size=4), "groups of 4"),
        (dict(mask=torch.ones(B, T + 1)), "mask"),
        (dict(beta=0.1, ref_logprobs=None), "ref_logprobs"),
        (dict(entropy_coef=0.1, entropies=None), "entropies"),
        (dict(entropy_quantile=0.1, entropies=None), "entropies"),
        (dict(logprobs=torch.zeros(B)), "logprobs"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(batch() | change))
