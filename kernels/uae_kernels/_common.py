"""What the ops share: result types, the dtype rule, dispatch, and how numbers reach a custom op."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GRPOLoss(NamedTuple):
    """What `grpo_loss`, `linear_grpo_loss` and `flow_grpo_loss` return."""

    loss: Tensor  # 0-d, differentiable
    metrics: dict[str, Tensor]  # 0-d tensors on the inputs' device, without a graph
    per_token: Tensor  # the loss before its reduction: (B, T), or (B,) for a flow policy
    logprobs: Tensor  # detached: the next update's old_logprobs


class FlowStep(NamedTuple):
    """What `flow_step` returns, all in fp32 (fp64 for fp64 inputs)."""

    next_sample: Tensor  # (B, ...)
    log_prob: Tensor | None  # (B,), a mean over the sample's elements; None for a deterministic step
    mean: Tensor  # (B, ...)
    std: Tensor  # (B, 1, ..., 1)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_impl(op: str, impl: str) -> None:
    """Raises unless PyTorch may serve the call."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'{op}: impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "triton":
        raise RuntimeError(f'{op} has no Triton kernel in this version: use impl="auto" or impl="torch"')


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")


def direct(
    op: Any, setup_context: Callable[..., None] | None = None, backward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`op`, but past the dispatcher where nobody is listening: it takes longer than a small op's arithmetic on a CPU.

    torch.compile, fake and meta tensors, tensor subclasses and other devices get the op itself.

    Args:
        op: a custom op.
        setup_context, backward: what its `register_autograd` was given; None for an op that has no gradient.
    """
    plain = torch.Tensor, torch.nn.Parameter
    function: Any = None
    if setup_context is not None and backward is not None:
        parts = {"forward": op._init_fn, "setup_context": setup_context, "backward": once_differentiable(backward)}
        function = type("Direct", (torch.autograd.Function,), {k: staticmethod(f) for k, f in parts.items()})

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not all(type(x) in plain and x.device.type == "cpu" for x in tensors):
            return op(*inputs)
        if function is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return function.apply(*inputs)
        return op._init_fn(*inputs)

    return call


def schema(inputs: type) -> str:
    """The fields of a NamedTuple as the arguments of a custom op."""
    kinds: dict[Any, str] = {
        Tensor | None: "Tensor?",
        int | None: "SymInt?",
        Tensor: "Tensor",
        str: "str",
        bool: "bool",
    }
    return ", ".join(f"{kinds[kind]} {name}" for name, kind in inputs.__annotations__.items())


def pack_head(temperature: float, softcap: float | None, logit_scale: float) -> Tensor:
    """What turns h·Wᵀ into scores; no softcap is 0."""
    return pack(temperature, softcap or 0.0, logit_scale)


def unpack_head(packed: Tensor) -> tuple[float, float | None, float]:
    temperature, softcap, logit_scale = packed.tolist()
    return temperature, softcap or None, logit_scale


def pack(*numbers: float | None) -> Tensor:
    """Numbers as one fp64 CPU tensor, None as NaN.

    A float in an op's schema would make torch.compile specialise on its value; tensor × number is the form it
    keeps symbolic. A CPU tensor is read inside the op without a device synchronisation.
    """
    values = [math.nan if value is None else value for value in numbers]
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


# Of ops that read such numbers. A CUDA graph that torch.compile records around one would keep the numbers of its
# recording, whatever is passed later: these ops are left out of it, and what lies between them is recorded. A PyTorch
# that does not know the tag records nothing where a CPU tensor is used.
UNRECORDED: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def unpack(packed: Tensor) -> list[Any]:
    return [None if math.isnan(value) else value for value in packed.tolist()]


def without_none(values: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors among `values`, and which of these they are.

    A custom op whose list of tensors holds a None gives no gradients, and does not say so.
    """
    return [value for value in values if value is not None], [value is not None for value in values]


def with_none(tensors: Sequence[Tensor | None], present: Sequence[bool]) -> list[Any]:
    """The inverse of `without_none`."""
    given = iter(tensors)
    return [next(given) if there else None for there in present]


def number(value: float, like: Tensor) -> Tensor:
    """A number as a 0-d tensor beside `like`, without a copy from the host."""
    return torch.ones((), dtype=like.dtype, device=like.device) * value


def clamped(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """`x.clamp(low, high)`, but compiled once for all values of the bounds."""
    return x.clamp(*(None if bound is None else number(bound, x) for bound in (low, high)))
