import pytest
import torch
from measures import peak_bytes, relative_error
from torch.profiler import ProfilerActivity, profile
from uae_kernels import _linear_tiles, linear_logprobs, reference

OPTIONS = [{}, {"softcap": 4.0, "logit_scale": 1.6, "temperature": 0.7}]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 1e-3}


def problem(rows, width, vocabulary, dtype=torch.float32, weight_dtype=None):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 4 / width**0.5).to(weight_dtype or dtype)
    bias = torch.randn(vocabulary).to(weight_dtype or dtype)
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,))


def values_and_gradients(function, inputs, targets, needed, **options):
    inputs = [x.detach().clone().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
    hidden, weight, bias = inputs
    outputs = function(hidden, weight, targets, bias=bias, return_entropy=True, **options)
    generator = torch.Generator().manual_seed(1)
    g = [torch.randn(targets.shape, generator=generator) for _ in outputs]
    loss = sum((w * o).sum() for w, o in zip(g, outputs, strict=True))
    return outputs, torch.autograd.grad(loss, [x for x, n in zip(inputs, needed, strict=True) if n])


@pytest.mark.parametrize("shape", [(1, 8, 3), (5, 33, 17), (130, 64, 1025), (7, 16, 2500)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("needed", [(True, False, False), (True, True, True), (False, True, False)])
def test_close_to_fp64_of_the_same_inputs(shape, dtype, options, entropy_grad, needed, poisoned):
    *inputs, targets = problem(*shape, dtype)
    if len(targets) > 2:
        targets[1], targets[2] = -100, shape[2]
    options = dict(options, entropy_grad=entropy_grad)
    actual, grads = values_and_gradients(linear_logprobs, inputs, targets, needed, **options)
    truth, exact = values_and_gradients(
        reference.linear_logprobs, [x.double() for x in inputs], targets, needed, **options
    )
    for a, t in zip(actual, truth, strict=True):
        assert (a - t).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    for a, t, n in zip(grads, exact, [x for x, n in zip(inputs, needed, strict=True) if n], strict=False):
        assert a.dtype == n.dtype
        assert relative_error(a, t) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype):
    hidden, weight, _, targets = problem(64, 512, 5000, dtype)
    weight = (weight.float() * 2.2).to(dtype)
    logits = hidden.double() @ weight.double().T
    assert 35 < logits.abs().max() < 60
    targets[::2] = logits.argmax(1)[::2]  # confident tokens: log p close to 0
    truth = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    actual = linear_logprobs(hidden, weight, targets)
    assert (actual - truth).abs().max() <= 1e-5 and (actual <= 0).all()


@pytest.mark.parametrize("train", [False, True])
def test_certain_token_keeps_its_digits(train):
    hidden, weight = torch.eye(1, 4), torch.zeros(3, 4)
    weight[0, 0] = 25.0  # 1 − p = 2·e^−25: 1 − p as a difference would be 0 in fp32
    logp = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(train), torch.tensor([0]))
    exact = -torch.log1p(2 * torch.exp(torch.tensor(-25.0, dtype=torch.float64)))
    assert relative_error(logp, exact[None]) < 1e-5
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    assert relative_error(grad[0, 0], 25 * -torch.expm1(exact)) < 1e-5


@pytest.mark.parametrize(
    "threads, shape",
    [*((1, s) for s in [(33, 1), (33, 3), (40, 17), (7, 5000), (130, 1031), (512, 1500)]), (2, (33, 1031))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_is_bitwise_independent_of_neighbours_and_position(threads, shape, dtype):
    torch.set_num_threads(threads)
    hidden, weight, bias, targets = problem(200, *shape, dtype)

    def run(rows, train):
        h, w = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_(train)
        options = dict(bias=bias, softcap=5.0, return_entropy=True, entropy_grad=True)
        logp, entropy = linear_logprobs(h, w, targets[rows], **options)
        return logp, entropy, torch.autograd.grad(logp.sum() + entropy.sum(), h)[0]

    for train in (False, True):
        whole = run(torch.arange(200), train)
        for rows in ([3], [199], list(range(8)), list(range(64)), torch.randperm(200).tolist()):
            assert all(torch.equal(part, w[rows]) for part, w in zip(run(rows, train), whole, strict=True))


def test_ignored_rows_do_not_move_the_others(poisoned):
    hidden, weight, _, targets = problem(150, 24, 300)
    expected = linear_logprobs(hidden, weight, targets)
    some = targets.clone()
    some[::3] = -100
    hidden[::3] = torch.nan
    hidden.requires_grad_()
    actual = linear_logprobs(hidden, weight, some)
    assert (actual[::3] == 0).all() and torch.equal(actual[1::3], expected[1::3])
    (actual * torch.where(some == -100, torch.nan, 1.0)).sum().backward()
    assert (hidden.grad[::3] == 0).all() and (hidden.grad[1::3] != 0).any()


@pytest.mark.parametrize("train", [False, True])
def test_forbidden_tokens_and_rows_without_tokens(train):
    hidden, weight, bias, targets = problem(4, 8, 20)
    bias[:7] = -torch.inf
    targets[:] = torch.tensor([3, 10, 19, -1])
    arguments = (hidden[1:], weight, bias), targets[1:], (True, train, train)
    actual, grads = values_and_gradients(linear_logprobs, *arguments, entropy_grad=True)
    truth, exact = values_and_gradients(reference.linear_logprobs, *arguments, entropy_grad=True)
    for a, t in zip([*actual, *grads], [*truth, *exact], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, t, atol=1e-5, rtol=1e-5)
    assert linear_logprobs(hidden, weight, targets, bias=bias)[0] == -torch.inf
    bias[:] = -torch.inf
    hidden.requires_grad_()
    weight.requires_grad_(train)
    logp, entropy = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, entropy_grad=True)
    assert logp.tolist() == [-torch.inf] * 3 + [0] and (entropy == 0).all()
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), hidden)
    assert (grad == 0).all()


def test_shapes_strides_and_mixed_dtypes():
    hidden = torch.randn(2, 7, 24, requires_grad=True)
    weight = torch.randn(24, 50).T  # not contiguous
    targets = torch.randint(0, 50, (2, 6), dtype=torch.int32)
    actual = linear_logprobs(hidden[:, 1:], weight, targets)
    assert actual.shape == (2, 6)
    torch.testing.assert_close(actual, reference.linear_logprobs(hidden[:, 1:], weight, targets))
    row = hidden.detach()[:1, :1].expand(2, 6, 24)
    torch.testing.assert_close(linear_logprobs(row, weight, targets), reference.linear_logprobs(row, weight, targets))
    for h_dtype, w_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        h, w = hidden.detach()[:, 1:].to(h_dtype).requires_grad_(), weight.to(w_dtype)
        mixed = [f(h, w, targets) for f in (linear_logprobs, reference.linear_logprobs)]
        torch.testing.assert_close(*mixed, atol=2e-5, rtol=1e-6)
        grads = [torch.autograd.grad(m.sum(), h)[0] for m in mixed]
        assert grads[0].dtype == h_dtype and relative_error(*grads) < 5e-3
    nothing = linear_logprobs(torch.randn(0, 24), weight, torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0,) and nothing.dtype == torch.float32


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(options, frozen):
    hidden, weight, bias, targets = (
        x.double() if x.is_floating_point() else x for x in problem(3, 4, 6, torch.float64)
    )
    targets[1] = -100
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    for function in (reference.linear_logprobs, linear_logprobs):
        assert torch.autograd.gradcheck(
            lambda h, w, b: function(  # noqa: B023
                h, w, targets, bias=b, return_entropy=True, entropy_grad=True, **options
            ),
            (hidden, weight, bias),
        )


def products(events):
    """FLOPs of every matrix product, from the profiled shapes: TorchDispatchMode is blind inside a custom op."""
    total = 0
    for event in events:
        shapes = event.input_shapes
        if event.name == "aten::mm":
            total += 2 * shapes[0][0] * shapes[0][1] * shapes[1][1]
        elif event.name in ("aten::addmm", "aten::addmm_"):
            total += 2 * shapes[1][0] * shapes[1][1] * shapes[2][1]
        elif event.name in ("aten::bmm", "aten::baddbmm", "aten::linear"):
            raise AssertionError(event.name)
    return total


def test_one_product_less_than_trl():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    n, h, v = 256, 128, 4096
    hidden, weight, _, targets = problem(n, h, v)
    hidden.requires_grad_()
    count = {}
    for name, function in {
        "trl": lambda: ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 1024, None, 1.0, ())[0],
        "ours": lambda: linear_logprobs(hidden, weight, targets),
    }.items():
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            function().sum().backward()
        count[name] = products(profiler.events()) / (n * h * v)
    assert count["trl"] == 6 and 4 <= count["ours"] <= 4.05


@pytest.mark.parametrize("needed, order, count", [(0, False, 4), (0, True, 6), (1, False, 8)])
def test_flops(needed, order, count):
    n, h, v = 256, 128, 4096
    hidden, weight, _, targets = problem(n, h, v)
    hidden.requires_grad_()
    weight.requires_grad_(bool(needed))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True, entropy_grad=order)
        (logp.sum() + (entropy.sum() if order else 0)).backward()
    assert (count - 0.05) * n * h * v <= products(profiler.events()) <= (count + 0.05) * n * h * v
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, torch.no_grad():
        linear_logprobs(hidden, weight, targets)
    assert products(profiler.events()) <= 2.05 * n * h * v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_far_below_the_logits(dtype):
    n, h, v = 512, 64, 32_768  # fp32 logits: 67 MB
    hidden, weight, _, targets = problem(n, h, v, dtype)
    hidden.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_logprobs(hidden, weight, targets).sum().backward()
    assert 0 < peak_bytes(profiler) < 4e6


def test_nothing_for_a_weight_that_needs_no_gradient():
    hidden, weight, bias, targets = problem(8, 64, 20_000)
    for train in (False, True):
        bias.requires_grad_(train)
        hidden.grad, _ = None, hidden.requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            linear_logprobs(hidden, weight, targets, bias=bias).sum().backward()
        sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(sizes) < weight.numel() * 4 / 2


def test_errors():
    hidden, weight, _, targets = problem(4, 8, 20)
    linear = torch.nn.Linear(8, 20)
    for bad in (linear, weight.to_sparse(), weight.to(torch.int8)):
        with pytest.raises(TypeError, match="plain dense float tensor"):
            linear_logprobs(hidden, bad, targets)

    class Quantised(torch.nn.Parameter):
        pass

    with pytest.raises(TypeError, match="Quantised"):
        linear_logprobs(hidden, Quantised(weight), targets)
    linear_logprobs(hidden, linear.weight, targets)
    for shape in ((21,), (1, 20)):
        with pytest.raises(ValueError, match="bias"):
            linear_logprobs(hidden, weight, targets, bias=torch.zeros(shape))
    with pytest.raises(ValueError, match="expected hidden"):
        linear_logprobs(hidden, weight.T, targets)
    with pytest.raises(TypeError, match="int64"):
        linear_logprobs(hidden, weight, targets.float())
    with pytest.raises(TypeError, match="hidden must be"):
        linear_logprobs(hidden.long(), weight, targets)
    with pytest.raises(TypeError, match="float8"):
        linear_logprobs(hidden, weight.to(torch.float8_e4m3fn), targets)


@pytest.mark.parametrize("module", [reference.linear_logprobs, linear_logprobs])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_definition(module, softcap):
    hidden, weight, bias, targets = problem(9, 12, 70, torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    actual = module(
        hidden, weight, targets, bias=bias, temperature=0.6, softcap=softcap, logit_scale=1.4,
        return_entropy=True, entropy_grad=True,
    )  # fmt: skip
    z = 1.4 * (hidden @ weight.T + bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.6
    log_p = torch.log_softmax(z, 1)
    expected = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)
        grads = [torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (a, e)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11, msg=lambda m, i=i: f"output {i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [False, True])
def test_no_less_exact_than_pytorch(dtype, train):
    *inputs, targets = problem(200, 96, 3000, dtype)
    g = torch.randn(200, dtype=torch.float64)

    def run(function, inputs):
        hidden, weight, bias = (x.detach().clone().requires_grad_() for x in inputs)
        out = function(hidden, weight.requires_grad_(train), targets, bias=bias.requires_grad_(train))
        leaves = [hidden, weight, bias] if train else [hidden]
        return out, *torch.autograd.grad((out * g.to(out.dtype)).sum(), leaves)

    def plain(hidden, weight, targets, bias):
        z = torch.nn.functional.linear(hidden, weight, bias)
        return torch.log_softmax(z, 1).gather(1, targets[:, None])[:, 0]

    truth = run(plain, [x.double() for x in inputs])
    for ours, theirs, exact in zip(run(linear_logprobs, inputs), run(plain, inputs), truth, strict=True):
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 1e-7


@pytest.mark.parametrize("entropy", [False, True])
def test_same_bits_with_and_without_a_gradient(entropy):
    hidden, weight, bias, targets = problem(140, 40, 2100)
    results = []
    for h, w in ((False, False), (True, False), (True, True), (False, True)):
        inputs = hidden.clone().requires_grad_(h), weight.clone().requires_grad_(w)
        for grad in (False, True):
            out = linear_logprobs(
                *inputs, targets, bias=bias, temperature=0.9, return_entropy=entropy, entropy_grad=grad
            )
            results.append(out if entropy else (out,))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    assert torch.equal(results[0][0], linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.9))


def test_ignored_rows_cost_nothing():
    hidden, weight, _, targets = problem(400, 16, 1000)
    targets[10:] = -100
    for keep, tiles in ((targets, 1), (torch.full_like(targets, -100), 0)):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            linear_logprobs(hidden.requires_grad_(), weight, keep).sum().backward()
        assert products(profiler.events()) == tiles * 4 * 128 * 16 * 1008


@pytest.mark.parametrize("every_row", [False, True])  # a GPU computes ignored rows too
def test_rows_that_do_not_count_leave_no_trace_in_the_weight(every_row, monkeypatch):
    if every_row:
        monkeypatch.setattr(
            _linear_tiles._Head,
            "row_tiles",
            lambda head, scored: list(torch.arange(len(scored)).split(head.rows)),
        )
    hidden, weight, bias, targets = problem(6, 8, 40)
    bias += 200  # exp(bias) overflows: only log Σ e^z, which such rows lack, keeps it finite
    targets[2] = -100
    arguments = (hidden, weight, bias), targets, (True, True, True)
    truth, exact = values_and_gradients(reference.linear_logprobs, *arguments, entropy_grad=True)
    hidden[2] = torch.nan
    actual, grads = values_and_gradients(linear_logprobs, *arguments, entropy_grad=True)
    for a, t in zip([*actual, *grads], [*truth, *exact], strict=True):
        torch.testing.assert_close(a, t, atol=5e-5, rtol=5e-5)


def test_nan_is_not_hidden():
    hidden, weight, bias, targets = problem(3, 8, 40)
    hidden[1, 0] = torch.nan
    assert linear_logprobs(hidden, weight, targets).isnan().tolist() == [False, True, False]
    bias[5] = torch.inf
    assert linear_logprobs(hidden, weight, targets, bias=bias).isnan().all()


@pytest.mark.parametrize("train", [False, True])
def test_second_derivatives_raise(train):
    hidden, weight, _, targets = problem(3, 8, 40)
    logp = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(train), targets)
    (grad,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
