import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import ON_GPU, relative_error
from uae_kernels import _linear_fused as fused
from uae_kernels import linear_logprobs, reference
from uae_kernels.linear_logprobs import active_logprobs

OPTIONS = [{}, {"softcap": 4.0, "logit_scale": 1.6, "temperature": 0.7}]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 1e-3}


def problem(rows, width, vocabulary, dtype, device):
    generator = torch.Generator().manual_seed(rows + width + vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 4 / width**0.5).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,), generator=generator).to(device)


def run(function, inputs, targets, needed, entropy_grad=True, impl="triton", **options):
    """Log-probs, entropies and the gradients of a random combination of them."""
    inputs = [x.detach().clone().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
    hidden, weight, bias = inputs
    outputs = function(
        hidden, weight, targets, bias=bias, return_entropy=True, entropy_grad=entropy_grad, impl=impl, **options
    )
    generator = torch.Generator().manual_seed(1)
    g = [torch.randn(targets.shape, generator=generator).to(targets.device) for _ in outputs]
    loss = sum((w * o).sum() for w, o in zip(g, outputs, strict=True))
    return outputs, torch.autograd.grad(loss, [x for x, n in zip(inputs, needed, strict=True) if n])


def truth(inputs, targets, needed, entropy_grad=True, **options):
    inputs = [x.double() for x in inputs]
    return run(reference.linear_logprobs, inputs, targets, needed, entropy_grad, impl="auto", **options)


SHAPES = [(1, 8, 3), (5, 33, 17), (37, 40, 100)] + ([(130, 64, 1025), (700, 512, 5003)] if ON_GPU else [])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("needed, entropy_grad", [
    ((True, False, False), False), ((True, False, False), True), ((True, True, True), True), ((False, True, False),
    False),
])  # fmt: skip
def test_close_to_fp64_of_the_same_inputs(shape, dtype, options, needed, entropy_grad, poisoned, device):
    *inputs, targets = problem(*shape, dtype, device)
    if len(targets) > 2:
        targets[1], targets[2] = -100, shape[2]
    actual, grads = run(linear_logprobs, inputs, targets, needed, entropy_grad, **options)
    expected, exact = truth(inputs, targets, needed, entropy_grad, **options)
    for a, t in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and (a - t).abs().max() <= (3e-5 if ON_GPU else 1e-5)
    _, plain = run(reference.linear_logprobs, inputs, targets, needed, entropy_grad, impl="auto", **options)
    for a, t, p in zip(grads, exact, plain, strict=True):
        # e^z is rounded to the weight's dtype before the second product: among few tokens such errors do not average
        # out.
        few = 1 if len(targets) > 30 else 2
        assert a.dtype == p.dtype and relative_error(a, t) <= max(BOUNDS[dtype] * few, 2 * relative_error(p, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype, device):
    hidden, weight, _, targets = problem(32, 256, 300, dtype, device)
    weight = (weight.float() * 2.8).to(dtype)
    logits = hidden.double() @ weight.double().T
    assert 35 < logits.abs().max() < 60
    targets[::2] = logits.argmax(1)[::2]  # confident tokens: log p close to 0
    expected = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    actual = linear_logprobs(hidden, weight, targets, impl="triton")
    plain = torch.log_softmax(hidden.float() @ weight.float().T, 1).gather(1, targets[:, None])[:, 0]
    bound = max(1e-5, 2 * (plain - expected).abs().max().item()) if ON_GPU else 1e-5
    assert (actual - expected).abs().max() <= bound and (actual <= 0).all()


@pytest.mark.parametrize("train", [False, True])
def test_certain_token_keeps_its_digits(train, device):
    hidden, weight = torch.eye(1, 16, device=device), torch.zeros(3, 16, device=device)
    weight[0, 0] = 25.0  # 1 − p = 2·e^−25: 1 − p as a difference would be 0 in fp32
    targets = torch.tensor([0], device=device)
    logp = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(train), targets, impl="triton")
    exact = -torch.log1p(2 * torch.exp(torch.tensor(-25.0, dtype=torch.float64)))
    assert relative_error(logp, exact[None]) < 1e-5
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    assert relative_error(grad[0, 0], 25 * -torch.expm1(exact)) < 1e-5


def test_a_target_far_below_the_others_overflows_nothing(device):
    hidden, weight = torch.ones(2, 16, device=device), torch.zeros(70, 16, device=device)
    weight[1], weight[40] = 12.0, -12.0  # logits 192 and −192
    targets = torch.tensor([40, 1], device=device)
    logp, entropy = linear_logprobs(hidden.requires_grad_(), weight, targets, return_entropy=True, impl="triton")
    torch.testing.assert_close(logp, torch.tensor([-384.0, 0.0], device=device))
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    torch.testing.assert_close(grad[0], torch.full((16,), -24.0, device=device))
    assert (grad[1].abs() < 1e-6).all() and (entropy < 1e-6).all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_is_bitwise_independent_of_neighbours_and_position(train, dtype, device):
    hidden, weight, bias, targets = problem(70, 24, 90, dtype, device)

    def results(rows):
        h = hidden[rows].clone().requires_grad_()
        options = dict(bias=bias, softcap=5.0, return_entropy=True, entropy_grad=True, impl="triton")
        logp, entropy = linear_logprobs(h, weight.clone().requires_grad_(train), targets[rows], **options)
        return logp, entropy, torch.autograd.grad(logp.sum() + entropy.sum(), h)[0]

    whole = results(torch.arange(70))
    for rows in ([3], list(range(8)), list(range(64)), torch.randperm(70).tolist()):
        assert all(torch.equal(part, w[rows]) for part, w in zip(results(rows), whole, strict=True))


def test_blocks_of_rows_and_pieces_of_the_vocabulary(monkeypatch, device):
    """A scratch for few rows at a time changes no bit of a frozen head's results, and little elsewhere."""
    *inputs, targets = problem(50, 24, 150, torch.bfloat16, device)
    for needed in ((True, False, False), (True, True, True)):
        whole = run(linear_logprobs, inputs, targets, needed)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "SCRATCH", 20_000)
            pieces = run(linear_logprobs, inputs, targets, needed)
        for a, b in zip(whole[0], pieces[0], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(whole[1], pieces[1], strict=True):
            assert torch.equal(a, b) if not needed[1] else relative_error(a, b) < 4e-3


def test_ignored_rows_do_not_move_the_others(poisoned, device):
    hidden, weight, _, targets = problem(50, 24, 60, torch.float32, device)
    expected = linear_logprobs(hidden, weight, targets, impl="triton")
    some = targets.clone()
    some[::3] = -100
    hidden[::3] = torch.nan
    for train in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(train)
        actual = linear_logprobs(h, w, some, impl="triton")
        assert (actual[::3] == 0).all() and torch.equal(actual[some != -100], expected[some != -100])
        (actual * torch.where(some == -100, torch.nan, 1.0)).sum().backward()
        assert (h.grad[::3] == 0).all() and (h.grad[1::3] != 0).any()
        assert not train or w.grad.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_forbidden_tokens_and_rows_without_tokens(train, device):
    hidden, weight, bias, targets = problem(4, 16, 40, torch.float32, device)
    bias[:7] = -torch.inf
    targets[:] = torch.tensor([3, 10, 19, -1], device=device)
    arguments = (hidden[1:], weight, bias), targets[1:], (True, train, train)
    actual, grads = run(linear_logprobs, *arguments)
    expected, exact = truth(*arguments)
    for a, t in zip([*actual, *grads], [*expected, *exact], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), t, atol=1e-5, rtol=1e-5)
    assert linear_logprobs(hidden, weight, targets, bias=bias, impl="triton")[0] == -torch.inf
    bias[:] = -torch.inf
    hidden.requires_grad_()
    logp, entropy = linear_logprobs(
        hidden, weight.requires_grad_(train), targets, bias=bias, return_entropy=True, entropy_grad=True, impl="triton"
    )
    assert logp.tolist() == [-torch.inf] * 3 + [0] and (entropy == 0).all()
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), hidden)
    assert (grad == 0).all()


def test_nan_reaches_the_result(device):
    hidden, weight, _, targets = problem(20, 16, 40, torch.float32, device)
    hidden[4, 3] = torch.nan
    logp = linear_logprobs(hidden, weight, targets, impl="triton")
    assert logp[4].isnan() and logp.isnan().sum() == 1


def test_strides_and_mixed_dtypes(device):
    hidden = torch.randn(2, 7, 24, device=device, requires_grad=True)
    weight = torch.randn(24, 50, device=device).T  # not contiguous
    targets = torch.randint(0, 50, (2, 6), dtype=torch.int32, device=device)
    actual = linear_logprobs(hidden[:, 1:], weight, targets, impl="triton")
    torch.testing.assert_close(actual, reference.linear_logprobs(hidden[:, 1:], weight, targets), atol=1e-5, rtol=1e-5)
    for h_dtype, w_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        h, w = hidden.detach()[:, 1:].to(h_dtype).requires_grad_(), weight.to(w_dtype)
        mixed = linear_logprobs(h, w, targets, impl="triton"), reference.linear_logprobs(h, w, targets)
        torch.testing.assert_close(*mixed, atol=2e-5, rtol=1e-6)
        grads = [torch.autograd.grad(m.sum(), h)[0] for m in mixed]
        assert grads[0].dtype == h_dtype and relative_error(*grads) < 5e-3
    nothing = linear_logprobs(hidden[0, :0], weight, targets[0, :0], impl="triton")
    assert nothing.shape == (0,) and nothing.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors_change_no_bit(dtype, monkeypatch, device):
    """The tensor-memory path of sm_90 and the pointer path load the same tiles."""
    if ON_GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    *inputs, targets = problem(37, 48, 75, dtype, device)
    results = []
    for make in (fused._descriptor, lambda *_: None):
        if not ON_GPU:
            monkeypatch.setattr(fused._triton, "capability", lambda tensor: 90)
            small = {(90, size, False): fused.Tiles(16, 32, 16, 4, 1) for size in (2, 4)}
            monkeypatch.setattr(fused, "TILES", small)
        monkeypatch.setattr(fused, "_descriptor", make)
        results.append(
            [run(linear_logprobs, inputs, targets, needed) for needed in ((True, False, False), (True,) * 3)]
        )
    for a, b in zip(*results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


def test_rows_that_share_memory_have_no_descriptor(monkeypatch):
    monkeypatch.setattr(fused._triton, "capability", lambda tensor: 90)
    rows = torch.zeros(16, 72, dtype=torch.bfloat16)
    assert fused._descriptor(rows, 16, 16) is not None and fused._descriptor(rows[:, :64], 16, 16) is not None
    for shared in (rows[:1].expand(16, 72), rows.as_strided((8, 72), (64, 1))):
        assert fused._descriptor(shared, 16, 16) is None


def test_inactive_rows_have_values_and_no_jacobian(device):
    hidden, weight, _, targets = problem(50, 24, 60, torch.float32, device)
    active = torch.arange(50, device=device) % 3 == 0
    options = None, 1.0, None, 1.0, -100, False, False, "triton"
    h = hidden.clone().requires_grad_()
    logp = active_logprobs(h, weight, targets, active, *options)
    assert torch.equal(logp, linear_logprobs(hidden, weight, targets, impl="triton"))
    (grad,) = torch.autograd.grad(logp.sum(), h)
    full = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(linear_logprobs(full, weight, targets, impl="triton").sum(), full)
    assert torch.equal(grad[active], expected[active]) and (grad[~active] == 0).all()


def test_tiles_without_active_rows_take_no_part_in_the_second_product(monkeypatch, poisoned, device):
    hidden, weight, _, targets = problem(300, 24, 60, torch.float32, device)
    active, untouched = torch.arange(300, device=device) % 3 == 0, []

    def product(a, b, out, product=fused._product, **options):
        product(a, b, out, **options)
        untouched.append(out.isnan().all(2).all(0).cpu())

    monkeypatch.setattr(fused, "_product", product)
    active_logprobs(
        hidden.requires_grad_(), weight, targets, active, None, 1.0, None, 1.0, -100, False, False, "triton"
    )
    filled = -(-100 // fused.tiles_for(weight).rows) * fused.tiles_for(weight).rows
    assert len(untouched) == 1 and untouched[0].tolist() == [i >= filled for i in range(len(untouched[0]))]
    assert filled < 300


@pytest.mark.parametrize("strides", [(2**30 + 16, 1), (3, 2**30 + 16)])
def test_offsets_beyond_int32(strides, device):
    hidden, weight, bias, targets = problem(40, 3, 3, torch.bfloat16, device)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)  # on a CPU only what is touched exists
    far = memory.as_strided(weight.shape, strides).copy_(weight)
    for train in (False, True):
        results = []
        for w in (weight, far):
            h, w = hidden.clone().requires_grad_(), w.detach().requires_grad_(train)
            outputs = linear_logprobs(h, w, targets, bias=bias, return_entropy=True, entropy_grad=True, impl="triton")
            results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), [h, w] if train else [h])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_more_than_65535_rows(device):
    hidden, weight, _, targets = problem(65_600, 4, 3, torch.float32, device)
    logp = linear_logprobs(hidden.requires_grad_(), weight, targets, impl="triton")
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    expected = reference.linear_logprobs(hidden, weight, targets)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, *torch.autograd.grad(expected.sum(), hidden), atol=1e-5, rtol=1e-5)


@given(
    rows=st.integers(0, 40), width=st.integers(1, 40), vocabulary=st.integers(1, 80),
    dtype=st.sampled_from(list(BOUNDS)), temperature=st.floats(0.3, 3), softcap=st.none() | st.floats(2, 30),
    train=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fuzz(impl, rows, width, vocabulary, dtype, temperature, softcap, train, seed):
    device = "cuda" if ON_GPU else "cpu"
    *inputs, targets = problem(rows, width, vocabulary, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    odd = torch.rand(rows, generator=generator).to(device)
    targets = torch.where(odd < 0.2, -100, torch.where(odd < 0.3, vocabulary, targets))
    needed, options = (True, train, train), dict(temperature=temperature, softcap=softcap)
    actual, grads = run(linear_logprobs, inputs, targets, needed, impl=impl, **options)
    expected, exact = truth(inputs, targets, needed, **options)
    for a, t in zip(actual, expected, strict=True):
        assert rows == 0 or (a - t).abs().max() <= 3e-5
    _, plain = run(reference.linear_logprobs, inputs, targets, needed, impl="auto", **options)
    for a, t, p in zip(grads, exact, plain, strict=True):
        # Where p is close to 1 the gradient is a small difference: an absolute bound as well.
        bound = max(2 * BOUNDS[dtype] * t.norm(), 2 * (p.double() - t).norm()) + 2e-3 * BOUNDS[dtype] * t.numel() ** 0.5
        assert (a.double() - t).norm() <= bound + 1e-6


def calls():
    """Every kernel variant, on CPU tensors."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for train in (False, True):
            for entropy in (False, True):
                for softcap in (None, 5.0):
                    if dtype == torch.float16 and (entropy or softcap):
                        continue  # as in bf16
                    hidden, weight = torch.zeros(200, 2048, dtype=dtype), torch.zeros(1000, 2048, dtype=dtype)
                    bias = torch.zeros(1000, dtype=dtype, requires_grad=train) if softcap else None

                    def call(h=hidden, w=weight, bias=bias, train=train, entropy=entropy, softcap=softcap):
                        out = linear_logprobs(
                            h.requires_grad_(), w.requires_grad_(train), torch.zeros(200, dtype=torch.int64), bias=bias,
                            softcap=softcap, return_entropy=entropy, entropy_grad=entropy, impl="triton",
                        )  # fmt: skip
                        (out[0].sum() + out[1].sum() if entropy else out.sum()).backward()

                    yield f"{dtype} train={train} entropy={entropy} softcap={softcap}", call


def numbers():
    weight = torch.zeros(1000, 256, dtype=torch.bfloat16)
    for rows, temperature in ((1, 1.0), (16, 0.7), (300, 1.3), (1024, 2.0), (2400, 0.5)):
        for train in (False, True):

            def call(rows=rows, temperature=temperature, train=train):
                hidden = torch.zeros(rows, 256, dtype=torch.bfloat16, requires_grad=True)
                targets = torch.zeros(rows, dtype=torch.int64)
                w = weight.clone().requires_grad_(train)
                linear_logprobs(hidden, w, targets, temperature=temperature, impl="triton").sum().backward()

            yield call
