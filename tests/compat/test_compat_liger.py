"""compat.liger against the installed Liger, where that runs without Triton; test_triton_liger.py has the rest."""

import inspect

import pytest
import torch
from torch.testing import assert_close
from uae_kernels.compat import liger as compat

pytest.importorskip("liger_kernel")
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

B, T, H, V = 4, 6, 16, 50
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
LOSSES = [
    *(dict(loss_type=name) for name in (*CLIPPED, "cispo", "sapo", "vespo")),
    *(dict(loss_type=name, importance_sampling_level="sequence") for name in CLIPPED),
    dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0),
    dict(use_bias_correction_kl=True, beta=0.3),
    dict(use_bias_correction_kl=True, beta=0.3, loss_type="grpo", importance_sampling_level="sequence"),
    dict(delta=1.2, epsilon_low=0.1, epsilon_high=0.3, temperature=0.9),
    dict(loss_type="cispo", epsilon_high=1.1),
    dict(loss_type="sapo", sapo_temperature_pos=0.8, sapo_temperature_neg=1.4),
    dict(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_pos=0.0, vespo_k_neg=2.5, vespo_lambda_neg=1.5),
    dict(use_ref_model=False),
    dict(beta=0.0, chunk_size=3),
]  # fmt: skip


def arguments(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_public_signatures():
    for ours, theirs in (
        (compat.triton_grpo_loss, triton_grpo_loss),
        (compat.fused_selective_log_softmax, fused_selective_log_softmax),
        (compat.LigerFusedLinearGRPOLoss.__init__, LigerFusedLinearGRPOLoss.__init__),
        (compat.LigerFusedLinearGRPOLoss.forward, LigerFusedLinearGRPOLoss.forward),
    ):
        assert arguments(ours) == arguments(theirs)


def inputs(lengths=(T, 3, 1, 5)):
    hidden, weight, ids = torch.randn(B, T, H), 0.3 * torch.randn(V, H), torch.randint(0, V, (B, T))
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logps + 0.3 * torch.randn(B, T) for _ in range(2))
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    return hidden, weight, ids, mask, torch.tensor([1.2, -0.7, 0.4, -1.1]), old, ref


def compare(options, hidden, weight, ids, mask, advantages, trainable=True, only_values=False, rtol=1e-5, **given):
    """Loss, metrics, and gradients for an upstream gradient of 3."""
    results = []
    for function in (compat.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        call = dict(given)
        if "bias" in call:
            call["bias"] = call["bias"].clone().requires_grad_(trainable)
            leaves.append(call["bias"])
        loss, metrics = function(compiled=False, **options)(leaves[0], leaves[1], ids, mask, advantages, **call)
        assert isinstance(metrics, tuple) and not any(x.requires_grad for x in metrics)
        grads = torch.autograd.grad(3 * loss, [x for x in leaves if x.requires_grad])
        results.append(((loss, *metrics), grads))
    (ours, our_grads), (theirs, their_grads) = results
    assert len(ours) == len(theirs) == (2 if options.get("beta") == 0.0 else 3)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=rtol, atol=1e-6)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert b.abs().sum() > 0
        if not only_values:
            assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("on_policy", [False, True])
def test_fused_linear_loss(options, on_policy):
    *tensors, old, ref = inputs()
    if options.get("loss_type") == "dr_grpo":
        options = options | dict(max_completion_length=9)
    compare(options, *tensors, ref_per_token_logps=ref, old_per_token_logps=None if on_policy else old)


@pytest.mark.parametrize("trainable", [False, True])
def test_fused_linear_loss_with_bias_and_a_reference_head(trainable):
    *tensors, old, _ = inputs()
    reference = dict(ref_input=torch.randn(B, T, H), ref_weight=0.3 * torch.randn(V, H), ref_bias=torch.randn(V))
    options = dict(temperature=0.8, beta=0.1)
    compare(options, *tensors, trainable, bias=torch.randn(V), old_per_token_logps=old, **reference)


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_vllm_ratio(shape, loss_type, on_policy):
    *tensors, old, ref = inputs()
    ratio = (0.5 * torch.randn(shape)).exp()
    ratio[0] = 0.0  # dropped by a mask mode
    old[0] -= 0.5
    if shape == (B, T):
        ratio = torch.where(tensors[3] != 0, ratio, 1)  # as TRL gives it
    old = None if on_policy else old
    # Inside vespo's exponential, ρ arrives as a difference of log-probabilities, rounded at their size.
    given = dict(ref_per_token_logps=ref, old_per_token_logps=old, rtol=2e-4 if loss_type == "vespo" else 1e-5)
    options = dict(vespo_k_pos=0.1) if loss_type == "vespo" else {}  # φ(0) is not 0 then
    compare(dict(loss_type=loss_type, **options), *tensors, vllm_is_ratio=ratio, **given)


@pytest.mark.parametrize("items", [50, 50.0, torch.tensor(50), torch.tensor(0)])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo"])
def test_items_in_batch(items, loss_type):
    *tensors, old, ref = inputs()
    given = dict(ref_per_token_logps=ref, old_per_token_logps=old, num_items_in_batch=items)
    compare(dict(loss_type=loss_type), *tensors, **given)


def test_luspo_of_tokens():
    """The older definition, with every token: as Liger. With padding: ratio 1 there, and no gradient from it."""
    *tensors, old, ref = inputs(lengths=[T] * B)
    compare(dict(loss_type="luspo"), *tensors, ref_per_token_logps=ref, old_per_token_logps=old)
    hidden, weight, ids, mask, advantages, old, ref = inputs()
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (torch.where(mask != 0, x, logps) for x in (old, ref))
    given = dict(ref_per_token_logps=ref, old_per_token_logps=old)
    compare(dict(loss_type="luspo"), hidden, weight, ids, mask, advantages, only_values=True, **given)
    leaf = hidden.requires_grad_()
    compat.LigerFusedLinearGRPOLoss(loss_type="luspo")(leaf, weight, ids, mask, advantages, **given)[0].backward()
    assert (leaf.grad[mask == 0] == 0).all() and leaf.grad[mask != 0].abs().sum() > 0


def test_nothing_under_the_mask_is_read():
    hidden, weight, ids, mask, advantages, old, ref = inputs()
    given = dict(ref_per_token_logps=ref, old_per_token_logps=old)
    results = []
    for spoiled in (False, True):
        leaf = (torch.where(mask[..., None] != 0, hidden, torch.nan) if spoiled else hidden.clone()).requires_grad_()
        loss, metrics = compat.LigerFusedLinearGRPOLoss()(leaf, weight, ids, mask, advantages, **given)
        results.append((loss, *metrics, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_luspo_ratio_per_sequence():
    *tensors, old, ref = inputs()
    options = dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0)
    given = dict(ref_per_token_logps=ref, old_per_token_logps=old)
    compare(options, *tensors, vllm_is_ratio=torch.rand(B), **given)
    with pytest.raises(NotImplementedError, match="vllm_is_ratio"):
        compat.LigerFusedLinearGRPOLoss(**options)(*tensors, vllm_is_ratio=torch.rand(B, T), **given)


def test_several_processes_share_the_count(monkeypatch):
    *tensors, old, ref = inputs()
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("all_reduce", None)):
        monkeypatch.setattr(torch.distributed, name, lambda *a, value=value, **k: value)
    for items in (None, 50):
        given = dict(ref_per_token_logps=ref, old_per_token_logps=old, num_items_in_batch=items)
        compare({}, *tensors, **given)


def test_logits_are_overwritten_in_place_only():
    ids, mask = torch.randint(0, V, (B, T)), torch.arange(T) < torch.tensor([T, 3, 1, 5])[:, None]
    advantages, ref = torch.randn(B), -torch.rand(B, T) - 3
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        logits = torch.randn(B, T + 1, V).requires_grad_() * 1
        kept = logits.detach().clone()
        loss, _ = compat.triton_grpo_loss(logits, None, ref, ids, advantages, mask, inplace=inplace, reduce=True)
        grads.append(torch.autograd.grad(loss, logits)[0])
        assert (grads[-1].data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(logits, kept) != inplace
    assert torch.equal(*grads)
    assert (grads[0][:, -1] == 0).all() and (grads[0][:, :-1][~mask] == 0).all() and grads[0].abs().sum() > 0


def test_ids_outside_the_vocabulary_are_not_read():
    logits = torch.randn(2, 4, V)
    ids = torch.tensor([[1, 2, -100], [V, 3, 4]])
    ours = compat.fused_selective_log_softmax(logits, ids)
    assert ours[0, 2] == ours[1, 0] == 0
    expected = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.clamp(0, V - 1)[..., None])[..., 0]
    assert_close(ours[:, 1], expected[:, 1])


def test_unsupported_arguments_raise():
    *tensors, old, ref = inputs()
    module = compat.LigerFusedLinearGRPOLoss
    for options, message in (
        (dict(loss_type="ppo"), "loss_type"),
        (dict(loss_type="dr_grpo"), "max_completion_length"),
        (dict(importance_sampling_level="turn"), "importance_sampling_level"),
        (dict(loss_type="vespo", importance_sampling_level="sequence"), "importance_sampling_level"),
        (dict(loss_type="cispo", delta=2.0), "delta"),
        (dict(delta=0.0), "delta"),
        (dict(sapo_temperature_neg=0.0), "sapo_temperature_neg"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**options)
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        module()(*tensors)
    for ratio in (torch.rand(B + 1), torch.rand(B, T - 1), torch.rand(B, T, 1)):
        with pytest.raises(ValueError, match="vllm_is_ratio"):
            module()(*tensors, ref_per_token_logps=ref, vllm_is_ratio=ratio)
    with pytest.raises(ValueError, match="advantages"):
        module(use_ref_model=False)(*tensors[:4], torch.rand(B, 2))
    logits, ids = torch.randn(B, T + 1, V), tensors[2]
    with pytest.raises(ValueError, match="ref_logp"):
        compat.triton_grpo_loss(logits, old, None, ids, tensors[4])
    with pytest.raises(ValueError, match="ids"):
        compat.triton_grpo_loss(logits[:, :-1], old, ref, ids, tensors[4])
