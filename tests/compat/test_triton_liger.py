"""compat.liger against Liger's Triton kernels, interpreted or on a GPU."""

import pytest
import torch
from torch.testing import assert_close
from uae_kernels.compat import liger as compat

pytest.importorskip("liger_kernel")
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

B, T, V = 3, 4, 70


def inputs(device):
    logits, ids = 2 * torch.randn(B, T + 1, V), torch.randint(0, V, (B, T))
    logps = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logps + 0.5 * torch.randn(B, T) for _ in range(2))
    mask = (torch.arange(T) < torch.tensor([T, 2, 3])[:, None]).long()
    return [x.to(device) for x in (logits, old, ref, ids, torch.tensor([1.2, 0.7, -0.4]), mask)]


@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax(device, masked):
    logits, _, _, ids, _, mask = inputs(device)
    prompt = torch.zeros(B, 2, dtype=torch.int64, device=device)
    call = logits, torch.cat([prompt, ids], 1), 0.7, torch.cat([prompt, mask], 1) if masked else None
    ours, theirs = (function(*call) for function in (compat.fused_selective_log_softmax, fused_selective_log_softmax))
    assert not ours.requires_grad
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_close(compat.fused_selective_log_softmax(logits, ids), fused_selective_log_softmax(logits, ids))


CASES = [
    {},
    *(dict(loss_type=name, reduce=True) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")),
    dict(loss_type="grpo", importance_sampling_level="sequence", use_bias_correction_kl=True, reduce=True),
    # A delta below 1 + eps_high would meet Liger's missing gradient (see compat.liger).
    dict(importance_sampling_level="sequence", delta=1.2, eps_high=0.1),
    dict(delta=1.3, eps_low=0.1, eps_high=0.2, use_bias_correction_kl=True),
    dict(loss_type="cispo", eps_high=1.1, temperature=1.0, vllm_is_ratio=torch.rand(B, T)),
    dict(loss_type="vespo", vllm_is_ratio=0.5 + torch.rand(B), reduce=True),
    dict(beta=0.0, num_items_in_batch=40, reduce=True, vllm_is_ratio=torch.rand(B, 1)),
    dict(loss_type="dr_grpo", max_completion_length=9, reduce=True, masked=False),
    dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0, reduce=True, masked=False),
    dict(old=False, masked=False, inplace=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "defaults")
def test_loss(device, case):
    logits, old, ref, ids, advantages, mask = inputs(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    mask = mask if options.pop("masked", True) else None
    old = old if options.pop("old", True) else None
    ref = ref if options.get("beta") != 0.0 else None
    results = []
    for function in (compat.triton_grpo_loss, triton_grpo_loss):
        given = logits.clone().requires_grad_() * 1
        first, *rest = function(given, old, ref, ids, advantages, mask, **options)
        cotangent = torch.linspace(0.5, 2, first.numel(), device=device).view(first.shape)
        (grad,) = torch.autograd.grad(first, given, cotangent)
        rest = rest[0] if options.get("reduce") else rest
        results.append(([first, *rest], grad))
    (ours, grad), (theirs, expected) = results
    assert [x is None for x in ours] == [x is None for x in theirs]
    tolerance = dict(rtol=2e-4 if "vllm_is_ratio" in case and case.get("loss_type") == "vespo" else 1e-5, atol=2e-6)
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            assert a.dtype == torch.float32
            assert_close(a, b, **tolerance)
    assert expected.abs().sum() > 0
    assert_close(grad, expected, **tolerance)
