import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED, ON_GPU
from test_grpo_loss import TYPES, VARIANTS
from uae_kernels import grpo_loss, reference
from uae_kernels._triton import launch

KERNELS = importlib.import_module("uae_kernels.grpo_loss")
LEVELS = ["token", "sequence"]
ALL = dict(
    beta=0.3,
    kl_estimator="k3_importance",
    delta=1.5,
    importance_cap=1.3,
    importance_floor=0.7,
    off_policy_threshold=0.05,
    entropy_quantile=0.6,
    entropy_coef=0.2,
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several blocks of tokens, rewards and sequences at the interpreter's small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            for name, size in (("BLOCK", 8), ("MEMBERS", 4), ("SEQUENCES", 4)):
                patch.setattr(KERNELS, name, size)
        yield


def batch(device, B=3, T=5, dtype=torch.float32):
    """Every input; the sequences have T, T/2, 0, T, T/2, … tokens."""
    lengths = torch.tensor([T, T // 2, 0])[torch.arange(B) % 3]
    b = dict(
        logprobs=-3 * torch.rand(B, T),
        advantages=torch.tensor([1.3, -0.7, 2.0, -1.5])[torch.arange(B) % 4],
        mask=torch.arange(T) < lengths[:, None],
        ref_logprobs=-3 * torch.rand(B, T),
        entropies=torch.rand(B, T),
    )
    b["old_logprobs"] = b["logprobs"] + 0.4 * noise(b["mask"])
    b["sampling_logprobs"] = b["old_logprobs"] + 0.3 * noise(b["mask"])
    return {k: v.to(device, torch.bool if k == "mask" else dtype) for k, v in b.items()}


def noise(mask):
    """Normal numbers; a long sequence's sum is that of five of them, or it would leave every limit."""
    x = torch.randn(mask.shape)
    if x.shape[1] > 5:
        x -= ((x * mask).sum(1, keepdim=True) - x[:, :5].sum(1, keepdim=True)) / mask.sum(1, keepdim=True).clamp(min=1)
    return x


def outputs(function, given, options, weights=None):
    """Loss, metrics, loss of each token, and the gradients of log-probs and entropies of a random function of them."""
    given = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    leaves = [given[k].requires_grad_() for k in ("logprobs", "entropies") if k in given]
    out = function(**given, **options)
    heads, upstream = [out.loss], [torch.full_like(out.loss, 1.7)]
    if weights is not None:
        heads, upstream = [*heads, out.per_token], [*upstream, weights.to(out.per_token)]
    grads = torch.autograd.grad(heads, leaves, upstream, materialize_grads=True)
    return out.loss.detach(), torch.stack(list(out.metrics.values())), out.per_token.detach(), *grads


def double(given):
    floats = {k for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {k: v.detach().double() if k in floats else v for k, v in given.items()}


def triton(*args, **kwargs):
    return grpo_loss(*args, impl="triton", **kwargs)


def check(given, options, tolerance=4e-7, function=triton):
    """The error against the fp64 definition is at most twice that of the definition in the inputs' own dtype."""
    weights = torch.randn(given["logprobs"].shape, device=given["logprobs"].device)
    actual, plain = (outputs(f, given, options, weights) for f in (function, reference.grpo_loss))
    truth = outputs(reference.grpo_loss, double(given), options, weights)
    for name, x, y, z in zip(
        ("loss", "metrics", "per token", "d logp", "d entropy"), actual, plain, truth, strict=False
    ):
        assert x.dtype == y.dtype and x.shape == z.shape, name
        assert torch.equal(x.isnan(), y.isnan()), name
        x, y, z = (v.double().nan_to_num() for v in (x, y, z))
        if not z.numel():
            continue
        scale = max(1.0, z.abs().max().item())
        error, allowed = (x - z).abs().max().item(), 2 * (y - z).abs().max().item() + tolerance * scale
        assert error <= allowed, f"{name}: {error} > {allowed}"
    return actual


ONLY = {"delta": TYPES[:6], "sapo": ["sapo"], "vespo": ["vespo"]}  # elsewhere they are the plain variant
CASES = [(loss_type, variant) for variant in VARIANTS for loss_type in ONLY.get(variant, TYPES)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type, variant", CASES)
def test_accuracy(loss_type, level, variant, device):
    options = dict(VARIANTS[variant], loss_type=loss_type, importance_level=level)
    # Of 3,000 limited corrections the product, which is vespo's weight, is 0
    b = batch(device, *((7, 40 if loss_type == "vespo" else 3000) if ON_GPU else (2, 5)))
    needs = dict(
        sampling_logprobs={"importance_cap", "off_policy_threshold"}, entropies={"entropy_coef"}, ref_logprobs={"beta"}
    )
    for name, wanted in needs.items():
        if not wanted & options.keys():
            del b[name]
    # The weight of vespo is exp of a sum over the sequence; luspo_legacy sums tokens that cancel, and takes no mean
    _, metrics, _, d_logp, *_ = check(b, options, {"vespo": 4e-6, "luspo_legacy": 8e-7}.get(loss_type, 4e-7))
    assert d_logp.abs().sum() > 0 and metrics[1] > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo", importance_mode="sequence_mask"),
        dict(loss_type="luspo_legacy", importance_level="sequence", importance_mode="sequence_truncate"),
        dict(loss_type="vespo", importance_level="sequence", importance_mode="token_mask"),
    ],
)
def test_several_blocks(options, device, monkeypatch):
    """Of tokens, of rewards and of sequences."""
    if INTERPRETED:
        monkeypatch.setattr(KERNELS, "BLOCK", 4)
    b = batch(device, *((700, 3000) if ON_GPU else (5, 6)))
    del b["advantages"]
    b["rewards"] = torch.randn(len(b["mask"]), device=device)
    group = 100 if ON_GPU else 5
    check(b, ALL | options | dict(group_size=group), 4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    b = batch(device, dtype=dtype)
    _, _, _, d_logp, d_entropy = check(b, ALL)
    assert d_logp.dtype == d_entropy.dtype == dtype and d_logp.abs().sum() > 0 and d_entropy.abs().sum() > 0


def test_mixed_dtypes(device):
    b = batch(device)
    b |= {"advantages": b["advantages"].double(), "ref_logprobs": b["ref_logprobs"].half()}
    b |= {"entropies": b["entropies"].double(), "old_logprobs": b["old_logprobs"].bfloat16()}
    assert check(b, ALL)[-1].dtype == torch.float64


def equal(*results):
    return all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(dtype, device):
    b = batch(device, 2)
    mask = b["mask"].to(dtype) * (0.5 if dtype.is_floating_point else 3)
    assert torch.equal(triton(**b | dict(mask=mask.to(dtype))).per_token, triton(**b).per_token)


def test_strides_and_expanded_inputs(device):
    b = batch(device, 2, 5)
    b |= {"ref_logprobs": b["ref_logprobs"][:1].expand(2, 5), "entropies": b["entropies"][:, :1].expand(2, 5)}
    b["mask"] = b["mask"][:1].expand(2, 5)
    expected = outputs(triton, {k: v.contiguous() for k, v in b.items()}, ALL)
    assert equal(outputs(triton, b, ALL), expected)
    assert equal(outputs(triton, b | dict(advantages=b["advantages"][:, None].expand(2, 5)), ALL), expected)
    for strided in (
        {k: torch.stack([v, v.clone()], -1)[..., 1] for k, v in b.items()},
        {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in b.items()},
        {k: torch.cat([v, v], -1)[..., v.shape[-1] :] for k, v in b.items()},
    ):
        assert equal(outputs(triton, strided, ALL), expected)


def test_gradient_of_any_strides(device):
    b = batch(device)
    b["logprobs"].requires_grad_()
    out, weights = triton(**b), torch.randn(5, 3, device=device)
    grads = [
        torch.autograd.grad(out.per_token, b["logprobs"], w, retain_graph=True)
        for w in (weights.T, weights.T.contiguous())
    ]
    assert torch.equal(*grads[0], *grads[1]) and grads[0][0].abs().sum() > 0


def test_offsets_beyond_32_bits(device):
    """Rows, then columns, that lie 2^31 elements apart; only the pages in use are touched."""
    b = batch(device, 2, 2)
    b["mask"][:] = True
    b["mask"][1, 1] = False
    expected = outputs(triton, b, ALL)
    memory = torch.empty(2**31 + 8, dtype=torch.float32, device=device)
    for strides in ((2**31, 3), (3, 2**31)):
        for name in ("logprobs", "sampling_logprobs", "mask"):
            dtype = torch.uint8 if name == "mask" else torch.float32
            far = memory.view(dtype).as_strided((2, 2), strides)
            far.copy_(b[name])
            assert equal(outputs(triton, b | {name: far}, ALL), expected)


@pytest.mark.gpu
def test_more_than_2_31_tokens(device):
    T, B = 2**16, 2**15 + 2
    b = {k: v.bfloat16() if k != "mask" else v for k, v in batch(device, 2, T).items() if k != "advantages"}
    b["mask"][:] = True
    given = {k: v.repeat(1, 1)[:1].expand(B, T) for k, v in b.items() if k not in ("entropies", "sampling_logprobs")}
    advantages = torch.zeros(B, device=device)
    advantages[-1] = 1.5
    logprobs = given.pop("logprobs").detach().requires_grad_()
    out = triton(logprobs, advantages, **given, beta=0.0)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    one = triton(logprobs[:1].detach(), advantages[-1:], **{k: v[:1] for k, v in given.items()}, beta=0.0)
    assert torch.equal(out.per_token[-1], one.per_token[0]) and (out.per_token[:-1] == 0).all()
    assert grad[-1].abs().sum() > 0 and (grad[0] == 0).all()


def test_rewards(device):
    """The advantages of `group_advantages`, with rewards that are not finite and groups without variance."""
    b, inf, nan = batch(device, 8, 1), math.inf, math.nan
    del b["advantages"], b["mask"]
    rewards = torch.tensor([1.0, 2, nan, -inf, 0.1, 0.1, 0.3, inf], device=device)
    for values, groups in ((rewards, (2, 4, 8)), (rewards.nan_to_num(0.2, 0.4, 0.6) + 1e6, (8,))):  # fp32 sums lose 0.1
        for group in groups:
            advantages = reference.group_advantages(values.double(), group)
            expected = reference.grpo_loss(**double(b), advantages=advantages, group_size=group)
            out = triton(**b, rewards=torch.stack([values, rewards], 1)[:, 0], group_size=group)
            torch.testing.assert_close(out.per_token.double(), expected.per_token, atol=2e-6, rtol=2e-6)
            zeros = [result.metrics["zero_std_fraction"].item() for result in (out, expected)]
            assert zeros[0] == pytest.approx(zeros[1], abs=1e-7)


def test_sequences_of_zero_advantage(device):
    b = batch(device, 4, 2)
    b["mask"][:] = True
    b["mask"][0, 1] = False
    for advantages in ([0, -0.0, 1.5, torch.nan], [[0, torch.nan], [0, -0.0], [0, 1], [torch.nan, 0]]):
        out = triton(**b | dict(advantages=torch.tensor(advantages, device=device)))
        assert out.metrics["zero_std_fraction"] == 0.5


def test_groups_of_zero_advantage(device):
    """Groups that begin, end and lie across the blocks in which the sequences are added up."""
    zero = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0.0], device=device)
    sums = torch.zeros(KERNELS.SUMS, 12, device=device)
    for flags in (zero, zero * 0, zero * 0 + 1):
        sums[5] = flags
        for group in (1, 2, 3, 4, 6, 12):
            loss, metrics, state = (torch.empty(n, device=device) for n in (1, 6, 2))
            launch(
                KERNELS._reduce_kernel, (1,), sums, None, loss, metrics, state, 12, group, math.nan, 0.0,
                BY_TOKENS=True, SUMS=KERNELS.SUMS, SEQUENCES=4,
            )  # fmt: skip
            assert metrics[5].item() == pytest.approx(flags.view(-1, group).all(1).float().mean().item(), abs=1e-7)
            assert state[0] == 1


@pytest.mark.parametrize("loss_type", TYPES)
def test_first_update(loss_type, device):
    b = {k: v for k, v in batch(device, 2).items() if k in ("logprobs", "advantages", "mask")}
    options = dict(loss_type=loss_type, importance_level=LEVELS[TYPES.index(loss_type) % 2])
    results = [outputs(triton, b | old, options) for old in ({}, dict(old_logprobs=b["logprobs"].clone()))]
    assert equal(*results) and results[0][-1].abs().sum() > 0
    kl, mean, largest, low, high, _ = results[0][1].tolist()
    assert mean == largest == 1 and kl == low == 0 and (high == 0 or loss_type == "cispo")


@pytest.mark.parametrize("loss_type", ["grpo", "luspo_legacy", "cispo", "sapo", "vespo"])
def test_masked_positions_never_leak(loss_type, device, poisoned):
    b = batch(device, 3, 8)
    options = ALL | dict(loss_type=loss_type, importance_level=LEVELS[TYPES.index(loss_type) % 2])
    results = []
    for values in ([0.0], [torch.nan, -torch.inf, torch.inf, 1e30]):
        junk = torch.tensor(values, device=device).repeat(8)[:8]
        hidden = {k: torch.where(b["mask"], v, junk) if v.dim() == 2 and k != "mask" else v for k, v in b.items()}
        hidden["advantages"] = torch.where(b["mask"], b["advantages"][:, None], junk)
        results.append(outputs(triton, hidden, options, torch.where(b["mask"], 0.3, junk)))
    assert all(x.isfinite().all() for x in results[0]) and results[0][-2].abs().sum() > 0
    assert all((x[~b["mask"]] == 0).all() for x in results[0][2:])
    assert equal(*results)


BOUNDARIES = {
    "both bounds are the ratio": dict(clip_low=0.0, clip_high=0.0),
    "delta is the ratio": dict(clip_low=0.5, clip_high=1.0, delta=1.0),
    "delta is the upper bound": dict(clip_high=0.5, delta=1.5),
    "delta is below the lower bound": dict(clip_low=0.25, delta=0.5),
    "the cap is the ratio": dict(loss_type="cispo", clip_high=1.0),
    "sapo": dict(loss_type="sapo"),
    "vespo": dict(loss_type="vespo"),
    "limits are the correction": dict(importance_floor=1.0, importance_cap=1.0, importance_mode="token_mask"),
    "the threshold is the drift": dict(off_policy_threshold=0.0),
}


OF_RATIOS = list(BOUNDARIES)[:6]


@pytest.mark.parametrize(
    "level, case", [("token", case) for case in BOUNDARIES] + [("sequence", case) for case in OF_RATIOS]
)
def test_ties_and_boundaries(case, level, device):
    """Values at which a min or a clamp turns, against the gradients of autograd in the same dtype."""
    # log-ratio                       0     20     −20    > 20   < −20  0 of −∞   at the floor   below it
    logprobs = torch.tensor([[-1.0, -1.0, -21.0, -1.0, -30.0, -torch.inf, -1e4, -2e4]], device=device)
    old = torch.tensor([[-1.0, -21.0, -1.0, -30.0, -1.0, -torch.inf, -1e4, -1.0]], device=device)
    extremes = dict(
        logprobs=logprobs.repeat(3, 1),
        old_logprobs=old.repeat(3, 1),
        ref_logprobs=(logprobs + torch.tensor([0.0, 20, -20, 20, 25, 0, 20, 0], device=device)).repeat(3, 1),
        sampling_logprobs=old.repeat(3, 1),
        advantages=torch.tensor([1.5, -1.5, 0.0], device=device),
    )
    if level == "sequence":  # of one token, or the extremes would hide the rest
        extremes = {k: v[:1].T if v.dim() == 2 else v[:2].repeat(4) for k, v in extremes.items()}
    options = dict(importance_level=level, beta=0.01, kl_estimator="k3") | BOUNDARIES[case]
    actual, expected = (outputs(f, extremes, options) for f in (triton, reference.grpo_loss))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)
    assert actual[-1].isfinite().all()


@pytest.mark.parametrize("loss_type", TYPES)
def test_nan_reaches_the_loss(loss_type, device):
    b, level = batch(device, 2), LEVELS[TYPES.index(loss_type) % 2]
    b["advantages"] *= -1
    options = dict(loss_type=loss_type, importance_level=level, off_policy_threshold=5.0)
    for name in ("logprobs", "ref_logprobs", "advantages")[: 3 if loss_type == "grpo" else 1]:
        broken = b | {name: b[name].clone()}
        broken[name].view(-1)[0] = torch.nan
        actual, expected = (f(**broken, **options) for f in (triton, reference.grpo_loss))
        assert actual.loss.isnan() and torch.equal(actual.per_token.isnan(), expected.per_token.isnan())
        for key, value in expected.metrics.items():
            assert torch.equal(actual.metrics[key].isnan(), value.isnan()), key


def test_empty_inputs(device):
    for B, T in ((0, 3), (2, 0), (0, 0)):
        for loss_type in TYPES[TYPES.index("luspo") :] if T else TYPES:
            options = ALL | dict(loss_type=loss_type)
            loss, metrics, *rest = outputs(triton, batch(device, B, T), options)
            assert loss == 0 and (metrics == 0).all() and all(x.shape == (B, T) for x in rest)


@pytest.mark.parametrize("loss_type, level", [("grpo", "token"), ("luspo_legacy", "sequence")])
def test_empty_mask(loss_type, level, device):
    b = batch(device, 2, 3)
    b |= dict(mask=torch.zeros_like(b["mask"]), advantages=b["advantages"] * torch.nan)
    assert all((x == 0).all() for x in outputs(triton, b, ALL | dict(loss_type=loss_type, importance_level=level)))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_normalizer(loss_type, device):
    b, tensor = batch(device, 2), torch.tensor
    for normalizer in (0.25, tensor(7, device=device), tensor(0.25, device=device), tensor(7.0).half()):
        actual, expected = (
            f(**b, loss_type=loss_type, normalizer=normalizer, max_length=3).loss for f in (triton, reference.grpo_loss)
        )
        torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("loss_type, level", [("grpo", "token"), ("dapo", "sequence"), ("vespo", "token")])
def test_sequences_are_independent(loss_type, level, device):
    """A sequence's bits depend neither on the others nor on its place, and a second run gives the same."""
    b, weights = batch(device, 3, 5), torch.randn(3, 5, device=device)
    b["mask"][:] = True
    options = ALL | dict(loss_type=loss_type, importance_level=level, normalizer=5.0)
    options |= dict(entropy_quantile=None, entropy_coef=0.0)
    whole = outputs(triton, b, options, weights)
    for rows in ([0, 1, 2], [2, 0]):
        part = outputs(triton, {k: v[rows] for k, v in b.items()}, options, weights[rows])
        for x, y in zip(whole[2:], part[2:], strict=True):
            assert torch.equal(x[rows], y)


def test_only_what_is_needed(device):
    """The gradient of one input, of one output, and of none."""
    b = batch(device, 2)
    weights = torch.randn(2, 5, device=device)
    _, _, _, d_logp, d_entropy = outputs(triton, b, ALL)
    for name, expected in (("logprobs", d_logp), ("entropies", d_entropy)):
        given = b | {name: b[name].clone().requires_grad_()}
        (grad,) = torch.autograd.grad(1.7 * triton(**given, **ALL).loss, given[name])
        assert torch.equal(grad, expected)
    given = b | {k: b[k].clone().requires_grad_() for k in ("logprobs", "entropies")}
    leaves = given["logprobs"], given["entropies"]
    grads = torch.autograd.grad(triton(**given, **ALL).per_token, leaves, weights)
    expected = torch.autograd.grad(reference.grpo_loss(**given, **ALL).per_token, leaves[:1], weights)
    torch.testing.assert_close(grads[0], expected[0])
    assert (grads[1] == 0).all()
    out = triton(**given, **ALL)
    assert not any(x.requires_grad for x in (*out.metrics.values(), out.logprobs))


def test_opcheck(device, monkeypatch):
    calls, b = [], batch(device, 1, 2)
    for name in ("_forward", "_backward"):
        op = getattr(KERNELS, name)
        monkeypatch.setattr(KERNELS, name, lambda *given, op=op: calls.append((op, given)) or op(*given))
    outputs(triton, b, dict(entropy_quantile=0.5, entropy_coef=0.1, importance_level="sequence"))
    for op, arguments in calls:
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        if op is calls[0][0]:
            arguments[0].requires_grad_()
            torch.library.opcheck(op, arguments)
        else:
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_impl(device):
    b = batch(device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="fp64"):
        triton(**b)
    assert grpo_loss(**b).loss.dtype == torch.float64
    b = batch("cpu")
    assert torch.equal(grpo_loss(**b).loss, grpo_loss(**b, impl="torch").loss)
    with pytest.raises(ValueError, match="impl"):
        grpo_loss(**b, impl="cuda")


@pytest.mark.gpu
def test_repeatable_without_synchronisation(device):
    b = batch(device, 512, 3000)
    b["rewards"] = b.pop("advantages")
    options = ALL | dict(group_size=8, importance_level="sequence")
    expected = outputs(triton, b, options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [outputs(triton, b, options) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(equal(expected, result) for result in results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@given(data=st.data())
def test_fuzz(impl, data):
    device = "cuda" if ON_GPU else "cpu"
    choose = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    B, T = data.draw(st.integers(0, 3)), choose(0, 1, 2, 5, 7, 8, 13)
    torch.manual_seed(data.draw(st.integers(0, 999)))
    b = batch(device, B, T, choose(torch.float32, torch.float32, torch.bfloat16))
    if B * T:
        b["mask"] = torch.rand(B, T, device=device) < choose(0.0, 0.5, 0.9, 1.0)
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs", "entropies"):
            place = data.draw(st.integers(0, B * T - 1))
            extreme = choose(0.0, -1e4, -20.0, -torch.inf, torch.nan)
            if name in ("entropies", "logprobs", "ref_logprobs") and math.isnan(extreme):
                b["mask"].view(-1)[place] = False
            if name == "entropies" and extreme == -torch.inf:
                extreme = 1e4
            b[name].view(-1)[place] = extreme
    for name in ("ref_logprobs", "entropies", "mask", "old_logprobs", "sampling_logprobs"):
        if choose(True, True, True, False):
            continue
        del b[name]
    if choose(False, True):
        b["advantages"] = b["advantages"][:, None] * torch.randn(B, T, device=device)
    if choose(False, False, True):
        b = {k: torch.stack([v, v], -1)[..., 0] for k, v in b.items()}
    options = dict(
        loss_type=choose(*TYPES),
        importance_level=choose(*LEVELS),
        kl_estimator=choose("k1", "k2", "k3", "k3_importance"),
        importance_mode=choose("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        clip_low=choose(0.0, 0.2),
        clip_high=choose(None, 0.0, 1.3),
        delta=choose(None, 0.5, 1.1),
        beta=choose(0.0, 0.01) if "ref_logprobs" in b else 0.0,
        importance_floor=choose(None, 0.5),
        importance_cap=choose(None, 1.2),
        off_policy_threshold=choose(None, 0.05),
        entropy_quantile=choose(None, 0.3, 1.0) if "entropies" in b else None,
        entropy_coef=choose(0.0, 0.1) if "entropies" in b else 0.0,
        normalizer=choose(None, 0.5, 11.0),
        max_length=choose(None, 9),
        group_size=choose(None, max(B, 1)) if B else None,
    )
    check(b, options, 1e-5, lambda **kwargs: grpo_loss(**kwargs, impl=impl))


def forward_and_backward(b, options):
    def call():
        leaves = [b[k].requires_grad_() for k in ("logprobs", "entropies") if k in b]
        out = triton(**b, **options)
        torch.autograd.grad(out.loss + out.per_token.sum(), leaves)

    return call


def calls():
    """Each choice of each option, in the heaviest combinations and in the lightest."""
    cases = [
        ("grpo", "token", "k3_importance", "sequence_truncate", "rewards", torch.float32),
        ("bnpo", "sequence", "k1", "token_mask", "token", torch.bfloat16),
        ("dr_grpo", "token", "k2", "token_truncate", "sequence", torch.float16),
        ("luspo", "sequence", "k3", "sequence_mask", "rewards", torch.float32),
        ("luspo_legacy", "sequence", "k3_importance", "token_truncate", "token", torch.float32),
        ("cispo", "token", "k3", "token_mask", "token", torch.bfloat16),
        ("sapo", "token", "k3_importance", "token_truncate", "rewards", torch.float32),
        ("vespo", "token", "k3_importance", "token_truncate", "rewards", torch.float32),
        ("vespo", "sequence", "k3", "sequence_mask", "token", torch.float16),
    ]
    for loss_type, level, kl, mode, advantages, dtype in cases:
        b, options = batch("cpu", 4, 6, dtype), ALL | dict(loss_type=loss_type, importance_level=level)
        options |= dict(kl_estimator=kl, importance_mode=mode, group_size=2)
        if advantages == "rewards":
            b["rewards"] = b.pop("advantages")
        elif advantages == "token":
            b["advantages"] = torch.randn(4, 6)
        yield f"{loss_type} {level}", forward_and_backward(b, options)
    light = {k: v for k, v in batch("cpu").items() if k in ("logprobs", "advantages")}
    yield "dapo", forward_and_backward(light, dict(loss_type="dapo", normalizer=torch.tensor(3)))


def numbers():
    for i, (B, T) in enumerate(((1, 1), (3, 7), (16, 32), (16, 48), (17, 65_537), (64, 4096))):
        b = batch("cpu", B, T)
        b["rewards"] = b.pop("advantages")
        options = {k: v if isinstance(v, str) else v + i / 7 for k, v in ALL.items()}
        options |= dict(
            entropy_quantile=0.1 + i / 8, clip_low=i / 9, group_size=B, normalizer=i + 1.0, max_length=T + i
        )
        yield forward_and_backward(b, options)
