import pytest
import torch
from measures import peak_bytes
from torch.profiler import ProfilerActivity, profile
from uae_kernels import reference, token_logprobs
from uae_kernels.token_logprobs import CPU_ELEMENTS

SCALES = [{}, {"temperature": 0.7}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}]


def naive(logits, targets, temperature=1.0, softcap=None, logit_scale=1.0):
    z = logits * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    p = torch.softmax(z, -1)
    log_p = p.log()
    return log_p.gather(-1, targets[..., None])[..., 0], -(p * log_p).sum(-1)


@pytest.mark.parametrize("options", SCALES)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 33), (130, 257), (3, 129, 50)])
@pytest.mark.parametrize("module", [reference.token_logprobs, token_logprobs])
def test_values_and_gradients_in_fp64(options, shape, module, poisoned):
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, shape[-1], shape[:-1])
    expected = naive(logits, targets, **options)
    actual = module(logits, targets, return_entropy=True, entropy_grad=True, **options)
    weights = [torch.randn_like(e) for e in expected]
    (expected_grad,) = torch.autograd.grad(sum((w * e).sum() for w, e in zip(weights, expected, strict=True)), logits)
    (actual_grad,) = torch.autograd.grad(sum((w * a).sum() for w, a in zip(weights, actual, strict=True)), logits)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_pytorch(dtype, poisoned):
    logits = (4 * torch.randn(37, 1001)).to(dtype).requires_grad_()
    targets = torch.randint(0, 1001, (37,))
    g = torch.randn(37)

    def run(function, x):
        out = function(x, targets)
        return out.detach(), torch.autograd.grad((out * g.to(out.dtype)).sum(), x)[0]

    def plain(x, y):
        return torch.log_softmax(x, -1).gather(-1, y[:, None])[:, 0]

    truth = run(plain, logits.detach().double().requires_grad_())
    for ours, theirs, exact in zip(run(token_logprobs, logits), run(plain, logits), truth, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("module", [reference.token_logprobs, token_logprobs])
def test_edges(module, poisoned):
    logits = torch.randn(7, 12)
    logits[1, :8] = -torch.inf  # the first 8 tokens are forbidden
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4, 3] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([-100, 9, 5, -100, 3, 12, -7])
    logprobs, entropy = module(logits, targets, return_entropy=True, entropy_grad=True)
    (logprobs[logprobs.isfinite()].sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert (logprobs[[0, 3, 5, 6]] == 0).all() and (entropy[[0, 2, 3, 5, 6]] == 0).all()
    assert (logits.grad[[0, 2, 3, 5, 6]] == 0).all()
    assert logprobs[2] == logprobs[4] == -torch.inf
    expected = torch.log_softmax(logits[1, 8:], -1)
    torch.testing.assert_close(logprobs[1], expected[1])
    torch.testing.assert_close(entropy[1], -(expected.exp() * expected).sum())
    (grad,) = torch.autograd.grad(module(logits, targets)[:3].sum(), logits)
    assert grad.isfinite().all() and (grad[2] == 0).all()


def test_ignore_index_and_entropy_without_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 4, 2]), ignore_index=4, return_entropy=True)
    assert logprobs[1] == 0 and not entropy.requires_grad and logprobs.requires_grad


def test_strides_without_copies_and_targets_in_int32():
    base = torch.randn(4, 9, 30)
    targets = torch.randint(0, 30, (4, 8), dtype=torch.int32)
    expected = token_logprobs(base[:, :-1].contiguous(), targets)
    assert torch.equal(token_logprobs(base[:, :-1], targets), expected)
    assert torch.equal(token_logprobs(base.transpose(1, 2).contiguous().transpose(1, 2)[:, :-1], targets), expected)
    row = base[:1, :1].expand(4, 8, 30)
    torch.testing.assert_close(token_logprobs(row, targets), token_logprobs(row.contiguous(), targets))
    assert token_logprobs(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_their_neighbours(threads):
    torch.set_num_threads(threads)
    logits, targets = torch.randn(300, 40_000), torch.randint(0, 40_000, (300,))
    whole = token_logprobs(logits, targets, return_entropy=True)
    for rows in ([7], [299], list(range(5, 13)), torch.randperm(300).tolist()):
        part = token_logprobs(logits[rows], targets[rows], return_entropy=True)
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))


def test_inplace_backward():
    base = torch.randn(3, 7, 20, dtype=torch.bfloat16)
    targets = torch.randint(0, 20, (3, 6))
    grads = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1]
        logits.retain_grad()
        token_logprobs(logits, targets, inplace_backward=inplace, softcap=2.0).square().sum().backward()
        assert torch.equal(logits.grad, logits) == inplace
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    with pytest.raises(ValueError, match="expanded"):
        token_logprobs(base[:1].expand(3, 7, 20), torch.zeros(3, 7, dtype=torch.int64), inplace_backward=True)


@pytest.mark.parametrize("options", SCALES)
def test_gradcheck(options):
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 4, -100], [2, 2, 1]])
    for function in (reference.token_logprobs, token_logprobs):
        assert torch.autograd.gradcheck(
            lambda x: function(x, targets, return_entropy=True, entropy_grad=True, **options),  # noqa: B023
            logits,
        )


def test_errors():
    logits, targets = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    for bad in (dict(temperature=0.0), dict(temperature=-1.0), dict(softcap=0.0)):
        with pytest.raises(ValueError, match="positive"):
            token_logprobs(logits, targets, **bad)
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(logits, targets[:1])
    with pytest.raises(TypeError, match="int64"):
        token_logprobs(logits, targets.float())


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_beside_the_logits_is_their_gradient_or_nothing(inplace):
    n, v = 512, 20_000
    leaf, targets = torch.randn(n, v, requires_grad=True), torch.randint(0, v, (n,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        token_logprobs(leaf, targets, return_entropy=True, inplace_backward=inplace)[0].sum().backward()
    tile = CPU_ELEMENTS * 4
    assert 0 < peak_bytes(profiler) - (0 if inplace else n * v * 4) < 6 * tile < n * v * 4


def test_second_derivatives_raise():
    logits = torch.randn(3, 5, requires_grad=True)
    logp = token_logprobs(logits, torch.tensor([0, 4, 2]))
    (grad,) = torch.autograd.grad(logp.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_nan_is_not_hidden():
    logits = torch.randn(3, 5)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    assert token_logprobs(logits, torch.tensor([0, 0, 0])).isnan().tolist() == [True, True, False]
