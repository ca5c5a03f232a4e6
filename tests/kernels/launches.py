"""What an op would launch, found and compiled for any GPU on a machine without one.

`recorded(capability)` lets an op run on CPU tensors up to each launch, which is noted with the very specialisation
Triton would derive from its arguments, and not made. Works in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from uae_kernels import _triton

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
MATRIX_CAPABILITIES = CAPABILITIES[1:]
FP8_CAPABILITIES = CAPABILITIES[3:]
# Shared memory one block may use, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"
SHARED_LIMIT = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Per multiprocessor
REGISTERS, THREADS = 65_536, {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}


@dataclass
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    specialization: Any
    options: dict[str, Any]
    capability: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def key(self) -> str:
        """Launches with equal keys share one compiled kernel."""
        return f"{self.name} {self.specialization} {sorted(self.options.items())}"

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count

    @cached_property
    def compiled(self) -> Any:
        target = GPUTarget("cuda", self.capability, 32)
        backend = make_backend(target)
        options, signature, constexprs, attrs = self.kernel._pack_args(
            backend, dict(self.options), self.arguments, self.specialization, dict(self.options)
        )
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return triton.compile(source, target=target, options=options.__dict__)

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread, stack and shared bytes, threads, and the share of a multiprocessor's threads resident."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        shared, threads = self.compiled.metadata.shared, 32 * self.compiled.metadata.num_warps
        blocks = min(
            REGISTERS // (threads * -(-registers // 8) * 8),  # handed out in eights
            (SHARED_LIMIT[self.capability] + 1024) // (shared + 1024),
            THREADS[self.capability] // threads,
        )
        return {
            "registers": registers,
            "stack": stack,
            "shared": shared,
            "threads": threads,
            "occupancy_percent": round(100 * blocks * threads / THREADS[self.capability]),
        }


@contextmanager
def recorded(capability: int):
    """A list that fills with the launches made inside the block; their outputs hold whatever memory held."""
    launches: list[Launch] = []
    backend = make_backend(GPUTarget("cuda", capability, 32))

    def run(kernel, *args, grid, warmup, **options):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        options = {"debug": False, **options}
        arguments, specialization, rest = binder(*args, **options)
        launches.append(Launch(kernel, tuple(grid), arguments, specialization, rest, capability))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_triton, "launchable", lambda tensor: True),
        mock.patch.object(_triton, "capability", lambda tensor: capability),
    ):
        yield launches


def variants(op: str, capability: int) -> list[tuple[str, Launch]]:
    """Each kernel that the `calls()` of test_triton_<op>.py compile, once, with the name of a call that does."""
    found: dict[str, tuple[str, Launch]] = {}
    with recorded(capability) as launches:
        for name, call in import_module(f"test_triton_{op}").calls():
            launches.clear()
            call()
            assert launches, f"{name} launches nothing"
            for launch in launches:
                found.setdefault(launch.key, (name, launch))
    return list(found.values())
