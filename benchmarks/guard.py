"""What ops and training steps launch, move, multiply and allocate, against what they did before: counts, no times.

    python -m benchmarks.guard             # compares with tests/benchmarks/baseline.json, and says what differs
    python -m benchmarks.guard --update    # writes it anew: the change of that file belongs to the commit that made it

Counted are every op of uae_kernels on a small call, forward and backward, as it runs on a GPU (Triton's launches noted,
not made) and on a CPU, and one step of each stage of the tiny preset on a CPU, optimiser included. Counts repeat; one
that fell is as much of a difference as one that rose: the baseline is always what is true.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .counts import NO_KERNEL, _flops, touched
from .rows import ROOT

BASELINE = ROOT / "tests/benchmarks/baseline.json"
PACKAGES = ("torch", "transformers", "diffusers", "peft", "bitsandbytes", "triton")  # whose versions decide counts too
ROWS = (19, 64)  # of a small call: one size fills no block, the other does
SMALL = [
    "stage1.images=4", "stage1.micro_batch=4", "stage2.images=2", "stage2.group_size=4", "stage2.micro_batch=8",
    "stage3.images=2", "stage3.group_size=4", "stage3.micro_batch=8", "render.batch=8", "evaluate.images=0",
    "optimizer.warmup_steps=0",
]  # fmt: skip

Count = dict[str, int]
Counts = dict[str, Count]


class Tally(TorchDispatchMode):
    """Within, counts what PyTorch's dispatcher is asked for, inside the ops of uae_kernels too.

    Attributes:
        launches: operations but views and bare allocations, and of `triton` each launch.
        flops: of matrix products and convolutions.
        bytes: read and written by everything else, each element of an operand once.
        allocations, allocated: storages made, and their bytes.
        kernels: Triton's kernels that would be compiled.
    """

    def __init__(self, triton: list[Any] | None = None):
        super().__init__()
        self.launches = self.flops = self.bytes = self.allocations = self.allocated = 0
        self.triton, self.kernels = triton, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace == "uae_kernels":
            with self:
                out = OPDEFS[name]._init_fn(*args, **(kwargs or {}))
            self._note_triton()
            return out
        out = func(*args, **(kwargs or {}))
        short = name.partition("::")[2]
        read, written = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        known = {x.untyped_storage()._cdata for x in read}
        made = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in written}
        self.allocations += len(made.keys() - known)
        self.allocated += sum(size for key, size in made.items() if key not in known)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and short not in NO_KERNEL:
            flops = _flops(short.removesuffix("_"), read, written)
            self.launches += 1
            self.flops += flops
            self.bytes += 0 if flops else touched(read) + touched(written)
        return out

    def _note_triton(self) -> None:
        for launch in self.triton or ():
            self.launches += 1
            self.bytes += touched(x for x in launch.arguments.values() if isinstance(x, Tensor))
            self.kernels.add(launch.key)
        if self.triton:
            self.triton.clear()

    def count(self) -> Count:
        names = ("launches", "flops", "bytes", "allocations", "allocated")
        found = {name: getattr(self, name) for name in names}
        return found if self.triton is None else {**found, "kernels": len(self.kernels)}


def ops() -> Counts:
    """Of every call in tests/kernels/small.py."""
    sys.path.insert(0, str(ROOT / "tests/kernels"))
    try:
        from launches import recorded
        from small import CASES
    finally:
        sys.path.pop(0)
    found = {}
    for name, (make, call) in CASES.items():
        torch.manual_seed(0)
        given = [make("cpu", rows) for rows in ROWS]
        with Tally() as cpu:
            for inputs in given:
                call("torch", **inputs)
        with recorded(90) as launches, Tally(launches) as gpu:
            for inputs in given:
                call("triton", **inputs)
        found[f"{name}, on a CPU"], found[f"{name}, as on an H200"] = cpu.count(), gpu.count()
    return found


def steps(world: Path) -> Counts:
    """Of a stage's second step, when everything that is made once has been made."""
    from .trainer.worlds import Steps, tiny_config

    found = {}
    for number in (1, 2, 3):
        stage = Steps(number, tiny_config(world, *SMALL))
        for _ in range(2):
            examples = stage.examples()
            with Tally() as tally:
                stage.take(examples)
        found[f"stage {number}, a step"] = tally.count()
    return found


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def measured(world: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"versions": versions(), "counts": {**ops(), **steps(world)}}
    finally:
        torch.set_num_threads(threads)


def differences(before: Counts, after: Counts) -> list[str]:
    """In words, what rose, what fell, what is new, and what is gone."""
    words = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        if not old or not new:
            words.append(f"{name}: {'new' if new else 'gone'}")
            continue
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                words.append(f"{name}: {key} {'new' if key in new else 'gone'}")
            elif old[key] != new[key]:
                change = f" ({new[key] / old[key] - 1:+.2%})" if old[key] else ""
                way = "rose" if new[key] > old[key] else "fell"
                words.append(f"{name}: {key} {way} from {old[key]:,} to {new[key]:,}{change}")
    return words


def read() -> dict[str, Any]:
    return json.loads(BASELINE.read_text())


def main(measure: Callable[[Path], dict[str, Any]] = measured) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what is counted now")
    arguments = parser.parse_args()
    from .trainer.worlds import small_world

    with tempfile.TemporaryDirectory() as folder:
        found = measure(small_world(Path(folder)))
    before = read() if BASELINE.is_file() else {"versions": {}, "counts": {}}
    changed = differences(before["counts"], found["counts"])
    print("\n".join(changed) or "all counts are those of the baseline")
    if arguments.update:
        BASELINE.write_text(json.dumps(found, indent=1) + "\n")  # a count a line: its change is a line of the commit
        print(f"written to {BASELINE}")
        return 0
    if before["versions"] != found["versions"]:
        print(f"the baseline is of {before['versions']}, this is {found['versions']}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
