"""The sampler's steps as one CUDA graph: recorded once, replayed without Python between the kernels.

A graph reads and writes the memory it was recorded with, whatever Python does since. So a loop is recorded as a
function of buffers, into which each call's tensors are copied, and reads weights, which optimisers change in place,
where they lie. Whatever else decided what was recorded is the loop's fingerprint: it is taken again before every
replay, and where it differs the loop is recorded anew.

None of this has run on a GPU yet: on a CPU the tests record the operations and replay them on the recorded memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.decoder import Decoder


class CudaGraphs:
    """Records CUDA graphs on one GPU. All take their memory from one pool, for they never run at the same time.

    Attributes:
        bytes: device memory that the recordings hold together.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Runs the function once: what happens the first time alone is not recorded."""
        with torch.cuda.device(self.device):
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                function()
            main.wait_stream(side)

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """The replay, and the tensor that it writes the function's result into."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
            with torch.cuda.graph(graph, pool=self.pool):
                output = function()
            self.bytes += torch.cuda.memory_reserved() - before
        return graph.replay, output


@dataclass(frozen=True)
class _Loop:
    buffers: list[Tensor | None]
    replay: Callable[[], Any]
    output: Tensor
    read: tuple  # the fingerprint it was recorded under
    kept: tuple  # what the fingerprint names by id, so that nothing else gets it


class Loops:
    """The recorded loops of one decoder, by what they were recorded for."""

    def __init__(self, recorder: CudaGraphs):
        self.recorder = recorder
        self.loops: dict[tuple, _Loop] = {}

    def __deepcopy__(self, memo: dict) -> Loops:
        return Loops(self.recorder)  # another decoder's weights lie elsewhere

    def run(self, decoder: Decoder, loop: Callable[..., Tensor], settings: tuple, *tensors: Tensor | None) -> Tensor:
        """`loop(*tensors)`, by a replay; recorded now where there is no recording, or one of something else.

        Args:
            decoder: whose weights the loop reads; the table that is to serve is in use.
            loop: waits for the device nowhere, and gives a tensor.
            settings: with the tensors' shapes and dtypes, all that decides what the loop does beside the decoder.
        """
        key = settings, *(None if x is None else (x.shape, x.dtype) for x in tensors)
        found = self.loops.get(key)
        if found is None or found.read != fingerprint(decoder):
            # The old one goes when there is a new one: a pool that no graph uses is closed
            found = self.loops[key] = self._record(decoder, loop, tensors)
            count, size = len(self.loops), self.recorder.bytes / 2**30
            print(f"the sampler's loop is recorded: {count} in CUDA graphs, {size:.2f} GiB together", flush=True)
        for buffer, x in zip(found.buffers, tensors, strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        found.replay()
        return found.output.clone()  # the next replay of any loop may write there

    def _record(self, decoder: Decoder, loop: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> _Loop:
        buffers = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in tensors]
        function = partial(loop, *buffers)
        self.recorder.warm_up(function)
        read = fingerprint(decoder)
        replay, output = self.recorder.record(function)
        if fingerprint(decoder) != read:
            raise RuntimeError("same_sampler.graph: the decoder's weights moved while the loop was recorded")
        kept = decoder.transformer, vars(decoder.transformer).get("forward"), decoder.table
        return _Loop(buffers, replay, output, read, kept)


def fingerprint(decoder: Decoder) -> tuple:
    """What a recorded loop depends on beside its buffers: equal now and then, a replay computes what a call would.

    Where each tensor on the device lies, not what it holds: that is read by the replay. What was computed from weights
    before, the modulation table, counts by whether they are unchanged. Which computation it is: the transformer and the
    forward pass put into it, and which adapters count for how much.
    """
    transformer, table = decoder.transformer, decoder.table
    tensors = [*transformer.parameters(), *transformer.buffers(), decoder.pooled]
    if table is not None:
        tensors += [table.values, table.timesteps]
    adapters = [
        (m.disable_adapters, tuple(m.active_adapters), tuple(m.scaling.items()), tuple(m.merged_adapters))
        for m in transformer.modules()
        if "scaling" in vars(m)  # of peft
    ]
    return (
        (id(transformer), id(vars(transformer).get("forward")), transformer.training),
        None if table is None else (id(table), table.was_made_from(transformer), decoder.pooled._version),
        adapters,
        [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors if x.device == decoder.device],
    )


def loops_of(decoder: Decoder) -> Loops | None:
    """The decoder's recorded loops; None where loops are not to be recorded, as while each step is noted for fp8."""
    if decoder.runs is not None:
        return None
    if decoder.records and decoder.loops is None:
        decoder.loops = Loops(CudaGraphs(decoder.device))
    return decoder.loops
