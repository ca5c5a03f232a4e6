"""What the tests of `uae_kernels.mmdit` share: nested streams of tensors, and a comparison with the definition."""

from __future__ import annotations

import importlib
import itertools

import torch
from measures import relative_error
from torch.utils._pytree import tree_map_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(made):
    """The tensors of (nested) streams, in order."""
    if isinstance(made, torch.Tensor):
        return [made]
    return [] if made is None or isinstance(made, str) else [x for part in made for x in leaves(part)]


def mapped(made, function):
    if made is None or isinstance(made, str):  # a normal's form
        return made
    if isinstance(made, torch.Tensor):
        return function(made)
    parts = [mapped(part, function) for part in made]
    return type(made)(*parts) if hasattr(made, "_fields") else type(made)(parts)


def gradients(function, streams, wanted, **options):
    """Outputs, and gradients of a random combination of them in the tensors that `wanted` picks of each stream."""
    streams = [mapped(s, lambda x: x.detach().clone() if x.is_contiguous() else x.detach()) for s in streams]
    inputs = [x.requires_grad_() for s in streams for x in wanted(s)]
    outputs = leaves(function(*streams, **options))
    generator = torch.Generator().manual_seed(1)
    pairs = [(o, torch.randn(o.shape, generator=generator).to(o)) for o in outputs]
    differentiable = [(o, g) for o, g in pairs if o.requires_grad]
    return outputs, torch.autograd.grad([o for o, _ in differentiable], inputs, [g for _, g in differentiable])


def compare(op, definition, streams, wanted, dtype, **options):
    """No less exact than the definition in the inputs' dtype, and rounded once; gradients of all that is wanted."""
    actual, grads = gradients(op, streams, wanted, impl="triton", **options)
    wide = [mapped(s, torch.Tensor.double) for s in streams]
    exact, exact_grads = gradients(definition, wide, wanted, **options)
    plain, plain_grads = gradients(definition, streams, wanted, **options)
    once = 1e-6 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    for a, e, p in zip([*actual, *grads], [*exact, *exact_grads], [*plain, *plain_grads], strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert relative_error(a, e) <= max(2 * relative_error(p, e), once)


def same_anywhere(op, streams, **options):
    """Of a batch of 5: every sample's results are bit for bit the same beside other samples and at other places."""
    whole = leaves(op(*streams, impl="triton", **options))
    for rows in ([3], [4, 1], [2, 0, 4, 3, 1]):
        some = [mapped(s, lambda x, rows=rows: x[rows] if len(x) == 5 else x) for s in streams]
        for a, w in zip(leaves(op(*some, impl="triton", **options)), whole, strict=True):
            assert torch.equal(a, w[rows])


def run(op, streams, wanted, **options):
    """Forward and backward pass, for the launches they make."""
    streams = [mapped(s, torch.Tensor.detach) for s in streams]
    for x in itertools.chain.from_iterable(map(wanted, streams)):
        x.requires_grad_()
    outputs = [x for x in leaves(op(*streams, impl="triton", **options)) if x.requires_grad]
    sum(x.sum() for x in outputs).backward()


def opcheck(name, call, monkeypatch):
    """torch.library's own checks of an op and of its backward pass, with the arguments that `call` gives them."""
    module, calls = importlib.import_module(f"uae_kernels.mmdit.{name}"), []
    with monkeypatch.context() as patched:
        for part in ("_forward", "_backward"):
            op = getattr(module, part)
            patched.setattr(module, part, lambda *given, op=op: calls.append((op, given)) or op(*given))
        call()
    (forward, given), (backward, back) = calls
    torch.library.opcheck(forward, given)
    torch.library.opcheck(backward, tree_map_only(torch.Tensor, torch.Tensor.detach, back))
