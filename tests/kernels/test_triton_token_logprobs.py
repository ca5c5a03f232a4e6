import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import INTERPRETED
from uae_kernels import reference, token_logprobs
from uae_kernels._common import pack_head

SCALES = [{}, {"temperature": 0.7}, {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 4096  # the kernels read this many logits at a time
OPS = torch.ops.uae_kernels


def run(function, logits, targets, weights, **options):
    """log p, the entropy, and the gradient of their sum in `weights`, of which None leaves one out."""
    leaf = logits.detach().requires_grad_()
    outputs = function(leaf, targets, return_entropy=True, entropy_grad=True, **options)
    loss = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True) if w is not None)
    return *(o.detach() for o in outputs), torch.autograd.grad(loss, leaf)[0]


def inputs(*shape, dtype=torch.float32, device="cpu"):
    logits = (4 * torch.randn(shape, device=device)).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], device=device)
    return logits, targets, [torch.randn(shape[:-1], device=device) for _ in range(2)]


def rounding(dtype, device):
    """The relative error of a stored gradient: the interpreter truncates to bf16, a GPU rounds to nearest."""
    return {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if device == "cpu" else 2**-8}[dtype]


@pytest.mark.parametrize("options", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 13), (2, BLOCK), (2, 2 * BLOCK + 40), (2, BLOCK + 3)])
def test_accuracy(options, dtype, shape, device, poisoned):
    if device == "cuda":
        shape = (*(64 * n for n in shape[:-1]), 20 * shape[-1])
    logits, targets, weights = inputs(*shape, dtype=dtype, device=device)
    ours = run(token_logprobs, logits, targets, weights, impl="triton", **options)
    plain = run(reference.token_logprobs, logits.float(), targets, weights, **options)
    truth = run(reference.token_logprobs, logits.double(), targets, weights, **options)
    for i, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert o.dtype == (torch.float32 if i < 2 else dtype)
        allowed = 2 * (p - t).abs().max() + 1e-7 * logits.abs().max()
        if i == 2:
            allowed = allowed + rounding(dtype, device) * t.abs()
        assert ((o - t).abs() <= allowed).all()


@pytest.mark.parametrize("left_out", [0, 1])
def test_gradient_of_one_output(left_out, device, poisoned):
    logits, targets, weights = inputs(2, 3, 50, device=device)
    weights[left_out] = None
    *_, grad = run(token_logprobs, logits, targets, weights, impl="triton")
    *_, expected = run(reference.token_logprobs, logits.double(), targets, weights)
    torch.testing.assert_close(grad.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_digits_of_a_certain_token(impl, device):
    """log p = −log1p(r), 1 − p = r/(1 + r) and H are exact to a relative error even where p rounds to 1."""
    logits = torch.randn(5, 600, device=device)
    targets = torch.tensor([7, 0, 599, 100, 333], device=device)[:, None]
    gaps = torch.tensor([5.0, 12.0, 20.0, 30.0, 60.0], device=device)
    logits.scatter_(1, targets, (logits.amax(1) + gaps)[:, None])
    weights = [torch.ones(5, device=device), None]
    logprobs, entropy, grad = run(token_logprobs, logits, targets[:, 0], weights, impl=impl)
    x = logits.double() - logits.double().gather(1, targets)
    e = x.exp().scatter(1, targets, 0)
    r = e.sum(1)
    for actual, expected in (
        (logprobs, -r.log1p()),
        (entropy, r.log1p() - (e * x).sum(1) / (1 + r)),
        (grad.gather(1, targets)[:, 0], r / (1 + r)),
    ):
        torch.testing.assert_close(actual.double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(impl, dtype, device, poisoned):
    v, low = BLOCK + 904, torch.finfo(dtype).min
    logits = torch.randn(16, v, device=device)
    logits[1, : BLOCK + 4] = -torch.inf  # more than a whole block is forbidden
    logits[2] = -torch.inf
    logits[3] = torch.nan  # ignored
    logits[4, 3] = -torch.inf  # the target itself
    logits[5] = -torch.inf
    logits[5, 4900] = 2.0  # only the target is left
    logits[6] = low  # a mask by the lowest finite number everywhere
    logits[7, 1:] = low
    logits[8, 1] = 4e4
    logits[9, 1] = -4e4
    logits[10, 4000] = torch.inf
    logits[11, 4500] = torch.inf
    logits[12, 4999] = torch.nan
    logits[13] = torch.inf  # ignored
    logits[14, :10] = -torch.inf
    logits[14, 4999] = torch.nan
    logits[15] = -torch.inf
    logits[15, 7] = torch.nan
    targets = torch.tensor([-100, 4950, 5, -100, 3, 4900, 9, 0, 1, 1, 9, 4500, 0, v, 4998, 8], device=device)
    logits, weights = logits.to(dtype), [torch.randn(16, device=device) for _ in range(2)]
    actual = run(token_logprobs, logits, targets, weights, impl=impl)
    expected = run(reference.token_logprobs, logits.double(), targets, weights)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        tolerance = rounding(dtype, device) if i == 2 else 0
        torch.testing.assert_close(a.double(), e, atol=2e-6, rtol=2e-6 + tolerance, equal_nan=True)
    broken = [10, 11, 12, 14, 15]
    assert actual[0].isnan().nonzero()[:, 0].tolist() == broken
    assert actual[2].isnan().any(1).nonzero()[:, 0].tolist() == broken
    assert (actual[2][[0, 2, 3, 13]] == 0).all()
    assert actual[0][2] == actual[0][4] == -torch.inf and actual[0][5] == 0


def test_infinite_logits_under_a_softcap(device):
    logits, targets, weights = inputs(2, 20, device=device)
    logits[0, 3:9], logits[1, 4] = -torch.inf, torch.inf
    for options in (SCALES[2], dict(softcap=5.0, logit_scale=-1.0), dict(logit_scale=-1.0)):
        actual = run(token_logprobs, logits, targets, weights, impl="triton", **options)
        expected = run(reference.token_logprobs, logits.double(), targets, weights, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, atol=2e-6, rtol=2e-6, equal_nan=True)


def test_targets(device, poisoned):
    """int32 and int64; ids outside [0, V) are ignored, and nothing is read for them."""
    logits, targets, weights = inputs(6, 12, device=device)
    targets = torch.tensor([0, 11, 12, -1, 4, 2**31 - 1], device=device)
    logits[[2, 3, 4, 5]] = torch.nan
    results = [
        run(token_logprobs, logits, t, weights, ignore_index=4, impl="triton")
        for t in (targets, targets.to(torch.int32))
    ]
    expected = run(reference.token_logprobs, logits.double(), targets, weights, ignore_index=4)
    for a, b, e in zip(*results, expected, strict=True):
        assert torch.equal(a, b) and (a[2:] == 0).all()
        torch.testing.assert_close(a.double(), e, atol=2e-6, rtol=2e-6)
    huge = torch.tensor([2**32, 2**32 + 1, -(2**40), 5, 1, 2], device=device)  # as int32: 0, 1, 0
    assert (token_logprobs(logits, huge, impl="triton")[:3] == 0).all()


def variants(base):
    """(B, T, V) views of every kind of strides."""
    yield "slice", base[:, :-1]
    yield "transposed", base.transpose(1, 2).contiguous().transpose(1, 2)
    yield "rows transposed", base.transpose(0, 1).contiguous().transpose(0, 1)
    yield "every other column", base.repeat_interleave(2, -1)[..., ::2]
    yield "an offset", torch.cat([base, base], -1)[..., 3 : 3 + base.shape[-1]]
    yield "padded rows", torch.nn.functional.pad(base, (0, 5))[..., : base.shape[-1]]
    yield "expanded rows", base[:1, :1].expand(base.shape)
    yield "expanded columns", base[..., :1].expand(base.shape)
    yield "flat", base.flatten(0, 1)
    yield "one row", base[1, 2]
    yield "four dimensions that collapse", base.unflatten(0, (2, 2))
    yield "four dimensions that do not", base.unflatten(0, (2, 2)).transpose(0, 1)
    yield "five dimensions that do not", base.unflatten(1, (3, 1)).unflatten(0, (2, 2)).transpose(0, 2)


@pytest.mark.parametrize("width", [32, 37])
def test_strides(width, device, poisoned):
    base, *_ = inputs(4, 3, width, device=device)
    for name, logits in variants(base):
        targets = torch.randint(0, width, logits.shape[:-1], device=device)
        weights = [torch.randn(logits.shape[:-1], device=device) for _ in range(2)]
        actual = run(token_logprobs, logits, targets, weights, impl="triton")
        expected = run(reference.token_logprobs, logits.double(), targets, weights)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, atol=2e-6, rtol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_strides_of_targets_and_gradients(device, poisoned):
    logits, targets, weights = inputs(2, 3, 20, device=device)
    apart = [x.T.contiguous().T for x in (targets, *weights)]
    results = [run(token_logprobs, logits, t, w, impl="triton") for t, *w in ((targets, *weights), apart)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (2, 0, 3, 5)])
def test_no_rows(shape, device):
    logits, targets, weights = inputs(*shape, device=device)
    logprobs, entropy, grad = run(token_logprobs, logits, targets, weights, impl="triton")
    assert logprobs.shape == entropy.shape == targets.shape and grad.shape == logits.shape


@pytest.mark.parametrize("width", [BLOCK, BLOCK + 1])
def test_nothing_around_the_logits_is_read_or_written(width, device):
    buffer = torch.full((6, width + 64), torch.nan, device=device)
    logits = buffer[1:5, 16 : 16 + width]
    logits.copy_(torch.randn(4, width))
    before = buffer.clone()
    targets = torch.tensor([0, width - 1, -100, 5], device=device)
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs(
        leaf, targets, return_entropy=True, entropy_grad=True, inplace_backward=True, impl="triton"
    )
    (logprobs + entropy).sum().backward()
    assert logprobs.isfinite().all() and buffer[1:5, 16 : 16 + width].isfinite().all()
    assert buffer[1:5, 16 : 16 + width].abs().sum() > 0
    before[1:5, 16 : 16 + width] = buffer[1:5, 16 : 16 + width]
    assert torch.equal(buffer, before) or (buffer.isnan() == before.isnan()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_inplace_backward(dtype, entropy_grad, device):
    grads = []
    base, targets, weights = inputs(3, 7, 20, dtype=dtype, device=device)
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1]
        logits.retain_grad()
        outputs = token_logprobs(
            logits, targets[:, 1:], softcap=2.0, return_entropy=True, entropy_grad=entropy_grad,
            inplace_backward=inplace, impl="triton",
        )  # fmt: skip
        sum((o * w[:, 1:]).sum() for o, w in zip(outputs, weights, strict=True)).backward()
        assert torch.equal(logits.grad, logits) == inplace
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("width", [BLOCK + 8, 4999])
def test_rows_do_not_depend_on_their_neighbors(width, device):
    n = 500 if device == "cuda" else 9
    logits, targets, weights = inputs(n, width, device=device, dtype=torch.bfloat16)
    whole = run(token_logprobs, logits, targets, weights, impl="triton")
    for rows in ([7], [n - 1], list(range(3, 8)), torch.randperm(n).tolist()):
        part = run(token_logprobs, logits[rows], targets[rows], [w[rows] for w in weights], impl="triton")
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("far", ["batch", "row", "column"])
def test_offsets_beyond_int32(far, device):
    """Views that reach past 2^31 elements of memory of which next to nothing is touched."""
    strides = {"batch": (2**31 + 24, 40, 1), "row": (8, 2**31 + 40, 1), "column": (5, 10, 2**30 + 24)}[far]
    shape = (1 if far == "row" else 2, 2, 3) if far != "batch" else (2, 2, 24)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    logits = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    values, targets, weights = inputs(*shape, dtype=torch.bfloat16, device=device)
    expected = run(token_logprobs, values, targets, weights, impl="triton")
    logits.copy_(values)
    outputs = run(token_logprobs, logits, targets, weights, impl="triton")
    in_place = run(token_logprobs, logits, targets, weights, impl="triton", inplace_backward=True)
    assert in_place[2].data_ptr() == logits.data_ptr()
    for o, i, e in zip(outputs, in_place, expected, strict=True):
        torch.testing.assert_close(o, e, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(i, e, atol=1e-6, rtol=1e-6)


def test_dispatch(device):
    logits, targets, _ = inputs(2, 5, device=device)
    with pytest.raises(RuntimeError, match="fp64"):
        token_logprobs(logits.double(), targets, impl="triton")
    assert token_logprobs(logits.double(), targets).dtype == torch.float64
    with pytest.raises(ValueError, match="impl must be"):
        token_logprobs(logits, targets, impl="cuda")


@pytest.mark.parametrize("entropy", [True, False])
def test_compiles(entropy, device):
    logits, targets, _ = inputs(4, 50, device=device)
    logits.requires_grad_()

    def loss(temperature):
        out = token_logprobs(
            logits, targets, temperature=temperature, return_entropy=entropy, entropy_grad=True, impl="triton"
        )
        return sum(o.square().sum() for o in out) if entropy else out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (0.7, 1.0, 1.3):
        for a, b in zip(
            *((x, *torch.autograd.grad(x, logits)) for x in (compiled(temperature), loss(temperature))), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entropy", [True, False])
def test_opcheck(entropy, device):
    logits, targets, weights = inputs(2, 3, 20, device=device)
    packed = pack_head(0.7, None, 1.2)
    given_forward = logits.clone().requires_grad_(), targets, packed, -100, entropy, False, True
    checks = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(OPS.token_logprobs.default, given_forward, test_utils=checks)
    saved = OPS.token_logprobs(logits, *given_forward[1:])
    given_backward = weights[0], weights[1] if entropy else None, logits, targets, packed, *saved, -100, True
    torch.library.opcheck(OPS.token_logprobs_backward.default, given_backward, test_utils=checks)
    torch.library.opcheck(OPS.token_logprobs_backward_.default, given_backward, test_utils=checks)


SPECIAL = [0.0, 1e4, -1e4, -torch.inf, torch.inf, torch.nan]


@st.composite
def problems(draw):
    shape = draw(st.lists(st.integers(0, 3), min_size=0, max_size=3))
    width = draw(st.sampled_from([1, 2, 8, 13, 127, 128, 4093, 4104]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = draw(st.sampled_from([0.0, 1.0, 8.0, 1e3])) * torch.randn(*shape, width, generator=generator)
    for _ in range(draw(st.integers(0, 4)) if logits.numel() else 0):
        start = draw(st.integers(0, logits.numel() - 1))
        logits.view(-1)[start : start + draw(st.integers(1, 2 * width))] = draw(st.sampled_from(SPECIAL))
    logits = logits.to(draw(st.sampled_from(DTYPES)))
    dim = draw(st.integers(-1, len(shape)))
    if dim >= 0:  # the same numbers, with other strides
        logits = logits.transpose(dim, -1).contiguous().transpose(dim, -1)
    targets = torch.randint(
        -1, width + 1, shape, generator=generator, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    weights = [torch.randn(shape, generator=generator) for _ in range(2)]
    options = draw(st.sampled_from([*SCALES, {"temperature": 20.0}, {"softcap": 50.0}, {"logit_scale": -0.5}]))
    return logits, targets, weights, options


@pytest.mark.parametrize("impl", ["torch", "triton"])
@given(problem=problems())
def test_fuzz(impl, problem):
    logits, targets, weights, options = problem
    device = "cpu" if INTERPRETED or impl == "torch" else "cuda"
    logits, targets, weights = logits.to(device), targets.to(device), [w.to(device) for w in weights]
    actual = run(token_logprobs, logits, targets, weights, impl=impl, **options)
    expected = run(reference.token_logprobs, logits.double(), targets, weights, **options)
    finite = (
        logits.double().nan_to_num(0, 0, 0).abs() * abs(options.get("logit_scale", 1)) / options.get("temperature", 1)
    )
    largest = finite.max().item() if logits.numel() else 0
    # z itself is rounded to fp32: its error moves log p, and each p in proportion
    error = 2**-22 * max(largest, 4)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i == 2:
            error = error * (1 + sum(w.abs().max().item() if w.numel() else 0 for w in weights)) * 10
        torch.testing.assert_close(
            a.double(), e, atol=error, rtol=2e-6 + (rounding(logits.dtype, device) if i == 2 else 0), equal_nan=True
        )


@pytest.mark.gpu
def test_more_than_int32_logits():
    n, v = 14_200, 151_936
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n,), device="cuda")
    rows = [0, n // 2, n - 1]
    logits.requires_grad_()
    whole = token_logprobs(logits, targets, impl="triton")
    (grad,) = torch.autograd.grad(whole.sum(), logits)
    few = logits.detach()[rows].requires_grad_()
    part = token_logprobs(few, targets[rows], impl="triton")
    assert torch.equal(whole[rows], part)
    assert torch.equal(grad[rows], torch.autograd.grad(part.sum(), few)[0])


@pytest.mark.gpu
def test_repeats_bit_for_bit():
    logits, targets, weights = inputs(512, 32_000, device="cuda", dtype=torch.bfloat16)
    first = run(token_logprobs, logits, targets, weights, impl="triton")
    noise = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            noise = torch.tanh(noise @ noise)
        again = run(token_logprobs, logits, targets, weights, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def call(
    *shape, dtype=torch.float32, entropy=False, entropy_grad=False, target=torch.int64, view=lambda x: x, **options
):
    """Forward and backward pass on the CPU, for ahead-of-time compilation."""
    logits = view(torch.zeros(shape, dtype=dtype)).requires_grad_()
    targets = torch.zeros(logits.shape[:-1], dtype=target)
    out = token_logprobs(logits, targets, return_entropy=entropy, entropy_grad=entropy_grad, impl="triton", **options)
    (sum(o.sum() for o in out if o.requires_grad) if entropy else out.sum()).backward()


def calls():
    outputs = ({}, {"entropy": True, "entropy_grad": True})
    for dtype, width, options, wanted in itertools.product(DTYPES, (64, 65), SCALES[1:], outputs):
        yield (
            f"{dtype}, V = {width}, {options}, {wanted}",
            lambda d=dtype, w=width, o=options, h=wanted: call(2, 3, w, dtype=d, **o, **h),
        )
    yield "int32 targets", lambda: call(2, 64, target=torch.int32)
    yield "transposed, in place", lambda: call(2, 3, 8, view=lambda x: x.transpose(0, 2), inplace_backward=True)


def numbers():
    for shape in ((1, 1), (1, 16), (3, 17), (16, 5000), (2, 3, 65_536), (2, 2, 70_001), (2, 1, 3, 48), (70_000, 1)):
        yield lambda shape=shape: call(*shape, dtype=torch.bfloat16)
    for temperature, ignore_index in ((1.0, -100), (0.5, 1), (16.0, 0), (1.0, 2**40)):
        yield lambda t=temperature, i=ignore_index: call(3, 64, dtype=torch.bfloat16, temperature=t, ignore_index=i)
