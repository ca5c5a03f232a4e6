"""A GPU that is not there: tensors that say they are on "cuda", whose numbers a CPU computes, under a GPU's rules.

Operators get the tensors of one device (numbers, 0-d tensors and the ops of `uae_kernels`, which say what they take,
excepted), host and device exchange tensors by copies alone, and whatever makes the host wait is noted with the line
that asks for it. While a CUDA graph is recorded such a line raises, nothing is computed for good, and what a replay
reads must still be there.

To PyTorch's C++, which knows no GPU here, the tensors are on "meta": only Python sees "cuda".
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / part) for part in ("uae_fast", "kernels", "benchmarks"))
DEVICE, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
# The sizes of what these give, or what they check, are known on the device alone
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.repeat_interleave.Tensor, aten.unique_consecutive.default, aten._unique2.default, aten.unique_dim.default,
    aten.bincount.default,
}  # fmt: skip
SHARED = 49152  # bytes of shared memory of a block
INT8 = "bitsandbytes::int8_vectorwise_quant"  # asks for outliers, on a GPU alone
# Without an algorithm on GPUs that repeats bit for bit: `torch.use_deterministic_algorithms` has them raise there
UNREPEATABLE = {
    aten._upsample_bicubic2d_aa_backward.default, aten._upsample_bilinear2d_aa_backward.default,
    aten.upsample_bicubic2d_backward.default, aten.upsample_bilinear2d_backward.default,
    aten.reflection_pad2d_backward.default, aten._adaptive_avg_pool2d_backward.default, aten.histc.default,
    aten.put_.default, aten.grid_sampler_2d_backward.default, aten.median.dim,
}  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor on the GPU; its numbers are in `elem`, a CPU's."""

    elem: torch.Tensor
    away = False  # whether its numbers wait in the host's memory
    device = property(lambda self: torch.device("cpu") if self.away else DEVICE)  # type: ignore[assignment]
    is_cuda, is_meta = property(lambda self: not self.away), property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elem: torch.Tensor, requires_grad: bool = False, **_: Any):
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=META, requires_grad=requires_grad,
        )  # fmt: skip
        made.elem = elem
        return made

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made)
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert _present, "a tensor of a GPU that is gone"
        return _present[-1].compute(function, args, kwargs or {})


_present: list[Gpu] = []


def on_gpu(x: Any) -> bool:
    return isinstance(x, OnGpu) and not x.away


def unwrap(x: Any) -> Any:
    return x.elem if isinstance(x, OnGpu) else x


def wrap(x: Any) -> Any:
    return OnGpu(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x


def to_meta(x: Any) -> Any:
    """A name of the GPU as C++ is to see it."""
    if isinstance(x, torch.device):
        return META if x.type == "cuda" else x
    return META if isinstance(x, str) and x.split(":")[0] == "cuda" else x


class Names(TorchFunctionMode):
    """Gives C++ the device that it knows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.device, torch._C._nn._parse_to):
            return function(*args, **(kwargs or {}))
        args, kwargs = tuple(map(to_meta, args)), {k: to_meta(v) for k, v in (kwargs or {}).items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            kwargs.pop("device")
            args = tree_map(lambda x: x.item() if isinstance(x, OnGpu) and not x.dim() else x, args)
            return function(*args, **kwargs).to(META)
        if function == torch.Tensor.data.__set__ and isinstance(args[0], OnGpu):
            args[0].elem, args[0].away = unwrap(args[1]), not on_gpu(args[1])
            return None if args[0].away else function(*args)
        if function == torch.Tensor.data.__get__ and isinstance(args[0], OnGpu) and args[0].away:
            return args[0].elem.detach()
        if function is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].to("cpu").tolist()
        if function is torch.Tensor.cuda:
            return args[0].to(META)
        return function(*args, **kwargs)


class Gpu(TorchDispatchMode):
    """Within, "cuda" is a device.

    Attributes:
        waits: how often a line had the host wait for the device, by "file:function:operator".
        pinned: addresses of pinned memory, from which copies need not wait.
        deterministic: whether operators without an algorithm that repeats raise.
        current: the current device, as `set_device` made it.
    """

    def __init__(self, deterministic: bool = False):
        super().__init__()
        self.waits = Counter[str]()
        self.pinned = set[int]()
        self.deterministic = deterministic
        self.current = torch.device("cuda")
        self.tape: Tape | None = None

    def set_device(self, device: torch.device) -> None:
        self.current = device

    def synchronize(self, *_: Any) -> None:
        self.waits[f"{asked()}:synchronize"] += 1

    # ---- operators --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.compute(function, args, kwargs or {})

    def compute(self, function: Any, args: tuple, kwargs: dict) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if on_gpu(x)]
        device = kwargs.get("device")
        target = bool(here) if device is None else torch.device(device).type in ("meta", "cuda")
        if not here and not target:
            return function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        self.check(function, args, kwargs, tensors, here, target)
        given = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
        return self.run(function, args, kwargs, given, target)

    def check(self, function, args, kwargs, tensors, here, target) -> None:
        """A GPU's rules, and notes of what waits."""
        foreign = [x for x in tensors if not on_gpu(x) and x.dim()]
        if function in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if function is aten._to_copy.default else args[1]
            destination = target if function is aten._to_copy.default else on_gpu(args[0])
            if on_gpu(source) != destination and source.numel():
                free = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
                pinned = not destination or source.untyped_storage().data_ptr() in self.pinned
                # A 0-d tensor's number goes along with the launch of an operator, not with a copy
                if not (free and (pinned or self.tape is None) and destination):
                    self.wait(function)
        elif (function in WAITS or function._schema.name == INT8) and here:
            self.wait(function)
        elif function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            for index in args[1]:
                if index is not None and (not on_gpu(index) or index.dtype in (torch.bool, torch.uint8)):
                    self.wait(function)
        elif here and foreign and function.namespace != "uae_kernels":
            raise RuntimeError(f"{function}: tensors on two devices, at {asked()}")
        if function is aten._upsample_bicubic2d_aa.default and here:
            height, width = (2 * -(-2 * a // b) + 1 for a, b in zip(args[0].shape[-2:], args[1], strict=True))
            if 4 * (32 * width + 33 * height) > SHARED:
                raise RuntimeError(f"Too much shared memory required: {width} and {height} pixels, at {asked()}")
        if self.deterministic and here:
            floats = function is aten.cumsum.default and args[0].is_floating_point()
            if floats or function in UNREPEATABLE:
                raise RuntimeError(f"{function} does not have a deterministic implementation, at {asked()}")

    def wait(self, function: Any) -> None:
        if self.tape is not None:
            raise RuntimeError(f"{function} while a CUDA graph is recorded, at {asked()}")
        self.waits[f"{asked()}:{function._schema.name.removeprefix('aten::')}"] += 1

    def run(self, function, args, kwargs, given, target) -> Any:
        if self.tape is not None:
            self.tape.before(function, tree_map(unwrap, (args, given)))
        elems, named = tree_map(unwrap, (args, given))
        found = self.calculate(function, elems, named)
        if self.tape is not None:
            host = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not on_gpu(x)]
            self.tape.keep(map(unwrap, host))  # read when it is recorded
            self.tape.add(function, elems, named, found)
        out = tree_map(wrap, found) if target else found
        if function in (aten._to_copy.default,) or not any(on_gpu(x) for x in tree_leaves((args, kwargs))):
            return out
        return return_and_correct_aliasing(function, args, kwargs, out)

    @staticmethod
    def calculate(function: Any, args: tuple, kwargs: dict) -> Any:
        if function is aten.mm.dtype:  # a GPU's alone
            return args[0].to(args[2]) @ args[1].to(args[2])
        if function is aten.div.Tensor and isinstance(args[1], float) and args[0].dtype == torch.float32:
            return args[0] * (1 / torch.tensor(args[1])).item()  # the reciprocal of a number, rounded
        return function(*args, **kwargs)

    # ---- graphs -----------------------------------------------------------------------------------------------------

    @contextmanager
    def graph(self, graph: Graph, pool: Any = None) -> Iterator[None]:
        assert self.tape is None
        self.tape = graph.tape
        try:
            yield
        finally:
            self.tape = None
            graph.tape.restore()


class Tape:
    """What was done while a graph was recorded, and on which memory."""

    def __init__(self) -> None:
        self.operations: list[tuple] = []
        self.made: dict[int, torch.UntypedStorage] = {}  # during the recording: the graph's own
        self.saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(self, function: Any, given: Any) -> None:
        """Keeps what an operator is about to write over."""
        arguments = [*given[0], *given[1].values()]
        for i, value in enumerate(arguments):
            described = function._schema.arguments[i] if i < len(given[0]) else None
            if isinstance(value, torch.Tensor) and described is not None and described.is_write:
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.made and storage.data_ptr() not in self.saved:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.saved[storage.data_ptr()] = whole, whole.clone()

    def restore(self) -> None:
        for whole, was in self.saved.values():
            whole.copy_(was)
        self.saved.clear()

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        for x in tensors:
            self.made[x.untyped_storage().data_ptr()] = x.untyped_storage()

    def add(self, function: Any, args: Any, kwargs: Any, found: Any) -> None:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.keep(x for x in outputs if x.untyped_storage().data_ptr() not in known)
        self.operations.append((function, *tree_map(self.place, (args, kwargs, found))))

    def place(self, x: Any) -> Any:
        return Place(x, x.untyped_storage().data_ptr() in self.made) if isinstance(x, torch.Tensor) else x

    @torch.no_grad()
    def replay(self) -> None:
        for function, *parts in self.operations:
            args, kwargs, out = tree_map(lambda x: x.tensor() if isinstance(x, Place) else x, parts)
            found = Gpu.calculate(function, args, kwargs)
            if all(result.alias_info is None for result in function._schema.returns):
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Place:
    """Memory that a recording names: its own is kept by it, other memory by whoever has it."""

    def __init__(self, x: torch.Tensor, own: bool):
        self.shape = x.size(), x.stride(), x.storage_offset(), x.dtype
        self.storage = x.untyped_storage() if own else None
        self.weak = StorageWeakRef(x.untyped_storage())

    def tensor(self) -> torch.Tensor:
        storage = self.storage
        if storage is None:
            if self.weak.expired():
                raise RuntimeError(f"a CUDA graph reads memory that was given back: {self.shape}")
            storage = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        size, stride, offset, dtype = self.shape
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class Graph:
    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        apart(self.tape.replay)()


def asked() -> str:
    """Which line of this project's asked: "file:function"."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}"
    return "elsewhere"


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


class Event(Stream):
    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def apart(function: Callable) -> Callable:
    """The function where there is no GPU."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), _pop_mode_temporarily():
            return function(*args, **kwargs)

    return called


@cache
def on_gpu_too(kind: type) -> type:
    """A class of parameters, as bitsandbytes has them, whose instances are on the GPU."""
    if issubclass(kind, OnGpu):
        return kind
    return type(kind.__name__, (kind, OnGpu), {"__torch_dispatch__": OnGpu.__torch_dispatch__})


def same_kind(self: torch.Tensor) -> torch.Tensor:
    """`detach` of such a parameter, as `torch.utils.swap_tensors` wants it."""
    made = torch.Tensor._make_subclass(type(self), self if isinstance(self, OnGpu) else torch.Tensor.detach(self))
    vars(made).update({k: v for k, v in vars(self).items() if k != "elem"})
    return made


def made_on_gpu(make: Callable) -> Callable:
    """`Tensor._make_subclass` that leaves on the GPU what is there."""

    def called(kind: type, data: torch.Tensor, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        if not isinstance(data, OnGpu):
            return make(kind, data, requires_grad, **options)
        return OnGpu.__new__(on_gpu_too(kind), data.elem, requires_grad)

    return called


def quantized_on_gpu(quantize: Callable) -> Callable:
    """`_quantize` of bitsandbytes' parameters: by its CPU's kernels, and then sent, as their library would have it."""

    def called(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        kind = type(self).__mro__[1] if isinstance(self, OnGpu) else type(self)
        options = {k: v for k, v in vars(self).items() if k not in ("elem", "module", "data")}
        host = kind(unwrap(self.data), **{"requires_grad": False} | options)
        apart(quantize)(host, torch.device("cpu"))
        sent = on_gpu_too(kind).__new__(on_gpu_too(kind), wrap(host.data), **{"requires_grad": False} | options)
        for name in ("quant_state", "bnb_quantized", "SCB"):
            if name in vars(host):
                setattr(sent, name, vars(host)[name])
        if getattr(self, "module", None) is not None:
            sent.module, self.module.quant_state = self.module, sent.quant_state
        if getattr(sent, "quant_state", None) is not None:
            sent.quant_state.to(device)
        if getattr(sent, "SCB", None) is not None:
            sent.CB, sent.SCB = sent.data, sent.SCB.to(device)
        return sent

    return called


@contextmanager
def gpu(deterministic: bool = False) -> Iterator[Gpu]:
    """Within, PyTorch has a GPU."""
    from uae_kernels import _triton

    from uae_fast.bnb import import_bitsandbytes
    from uae_fast.models import loading

    bitsandbytes = import_bitsandbytes()  # looks for GPUs

    @contextmanager
    def within(*_: Any, **__: Any) -> Iterator[None]:
        yield

    made = Gpu(deterministic)
    stream = Stream()
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30, multi_processor_count=132)
    stand_ins: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name, "get_device_properties": lambda *_: properties,
        "Stream": Stream, "Event": Event, "stream": within, "device": within, "current_stream": lambda *_: stream,
        "empty_cache": lambda: None, "memory_reserved": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None, "synchronize": made.synchronize, "CUDAGraph": Graph,
        "set_device": made.set_device,
        "graph_pool_handle": lambda: (0, 1), "graph": made.graph, "get_rng_state_all": list,
        "is_current_stream_capturing": lambda: made.tape is not None, "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.empty(0), "set_rng_state": lambda *_: None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patches:
        for name, value in stand_ins.items():
            patches.setattr(torch.cuda, name, value)
        patches.setattr(_triton, "launchable", lambda _: False)
        for name in ("linear_logprobs", "linear_grpo_loss"):  # plain tensors alone pass there
            if "check_linear" in vars(op := sys.modules[f"uae_kernels.{name}"]):
                patches.setattr(op, "check_linear", lambda *_, **__: None)
        patches.setattr(loading, "pretrained", apart(loading.pretrained))  # which lays models out on "meta"

        def pin(x: torch.Tensor, *_: Any) -> torch.Tensor:
            kept = x.clone()
            made.pinned.add(kept.untyped_storage().data_ptr())
            return kept

        patches.setattr(torch.Tensor, "pin_memory", pin)
        patches.setattr(torch.Tensor, "_make_subclass", made_on_gpu(torch.Tensor._make_subclass))
        for kind in (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params):
            patches.setattr(kind, "_quantize", quantized_on_gpu(kind._quantize))
            patches.setattr(kind, "detach", same_kind)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter that moves stays the one it was
        _present.append(made)
        try:
            with torch.autograd.set_multithreading_enabled(False), Names(), made:
                yield made
        finally:
            _present.pop()
            torch.__future__.set_swap_module_params_on_conversion(False)
