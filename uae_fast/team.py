"""The processes that train one run together: what they tell each other, and what becomes of trouble in one of them.

A launcher (torchrun, or one that sets its environment variables) starts them, on one machine or several, and
torch.distributed's default group holds them. Where nobody launched, one process is a team of one: nothing is
initialised and nothing is sent.

Every process goes through the same calls in the same order. What is said travels by gloo, from host to host; gradients
travel by NCCL where they are on a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import Config, ConfigError
from .environment import launched

FINE, OUT_OF_MEMORY, MISTAKE = 0, 1, 128  # how a process does; what lies between is a signal that asks it to stop
PATIENCE = timedelta(minutes=30)  # for a process that does not answer; one that has ended is noticed at once
BUCKET = 1 << 26  # elements of gradients that are sent together


class Trouble(Exception):
    """Memory ran out in some process, one was asked to stop, or found a mistake: all learn it in the same exchange.

    Attributes:
        code: OUT_OF_MEMORY, a signal's number, or MISTAKE.
        problems: the mistakes, a line each.
    """

    def __init__(self, code: int, problems: Iterable[str] = ()):
        super().__init__(code)
        self.code, self.problems = code, list(problems)


class Lost(Exception):
    """Another process has ended, or does not answer."""


class Team:
    """The processes that train together: those of torch.distributed's default group, or this one alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        here = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)

    def part(self, count: int) -> slice:
        """Which of `count` things, a multiple of the size, are this process's."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def exchange(self, value: Any = None, code: int = FINE) -> list[Any]:
        """What every process gives, by rank. All wait here for all.

        Args:
            value: JSON; of a MISTAKE its lines.
            code: how this process does.

        Raises:
            Trouble: some process does not do fine; of several codes the greatest.
            Lost: some process has ended.
        """
        told = [[code, value]] if self.size == 1 else self._all_told([code, value])
        if worst := max(code for code, _ in told):
            lines = [line for code, value in told if code == MISTAKE for line in value]
            raise Trouble(worst, dict.fromkeys(lines))
        return [value for _, value in told]

    def _all_told(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with _answered():
            dist.all_gather(lengths, torch.tensor([len(text)]))
            longest = int(torch.cat(lengths).amax())
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
            dist.all_gather(texts, torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8))
        return [json.loads(each.numpy().tobytes()) for each in texts]

    @contextmanager
    def first(self, needed: Callable[[], bool]) -> Iterator[None]:
        """Process 0 goes through what is within before the others do, if it is `needed`: it leaves something behind.

        Args:
            needed: asked in every process before process 0 begins; all must find the same.
        """
        wait = self.size > 1 and needed()
        self.exchange()
        if wait and self.rank:
            self.exchange()
        yield
        if wait and not self.rank:
            self.exchange()

    def merge(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers of every process as one: means, of what is called a maximum the greatest, of a minimum the least.

        A NaN is kept. Every process gets the same bits.
        """
        if self.size == 1:
            return values
        told = self.exchange(values)
        return {name: merged(name, torch.tensor([row[name] for row in told]).double()).item() for name in values}

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every process the mean of all processes' gradients, bucket by bucket."""
        gradients = [p.grad for p in parameters if p.grad is not None] if self.size > 1 else []
        ends = accumulate(gradient.numel() for gradient in gradients)
        for _, pairs in groupby(zip(ends, gradients, strict=True), lambda pair: pair[0] // BUCKET):
            bucket = [gradient for _, gradient in pairs]
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self.exchange()  # nobody waits for a process whose memory has run out before
            with _answered():
                dist.all_reduce(flat)
            means = flat.div_(self.size).split([gradient.numel() for gradient in bucket])
            for gradient, mean in zip(bucket, means, strict=True):
                gradient.copy_(mean.view_as(gradient))


def merged(name: str, values: Tensor) -> Tensor:
    """Of a metric's values (N,) the mean; the greatest or least of one whose name says max or min."""
    words = name.rpartition("/")[2].split("_")
    return values.amax() if "max" in words else values.amin() if "min" in words else values.mean()


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's when a connection ends, NCCL's when it gives up
        raise Lost("another process of the run has ended or does not answer; it may have said why") from error


@contextmanager
def joined(config: Config) -> Iterator[Team]:
    """Within, the processes that a launcher started are a team, each with the GPU of its number on its machine.

    A default group of torch.distributed that is there already is taken as it is.

    Raises:
        ConfigError: the device or the batches cannot be shared among so many.
    """
    started = launched() > 1 and not dist.is_initialized()
    if started:
        _start(config)
    try:
        team = Team()
        with _mistakes_of_all(team):
            if problems := _indivisible(config, team.size):
                raise ConfigError(problems)
            yield team
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def _mistakes_of_all(team: Team) -> Iterator[None]:
    """Within, a ConfigError in one process is raised in all of them: process 0 says it."""
    try:
        try:
            yield
        except ConfigError as error:
            if team.size == 1:
                raise
            team.exchange(error.problems, MISTAKE)
    except Trouble as trouble:
        raise ConfigError(trouble.problems) from None


def _start(config: Config) -> None:
    """Starts the default group as the launcher's environment variables say."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError([f"device: each process takes a GPU of its own: auto, cpu or cuda, not {config.device}"])
    if config.device == "cpu" or not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=PATIENCE)
        return
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
    if wanted > count:
        raise ConfigError([f"device: {wanted} processes on a machine where PyTorch finds {count} GPUs: start {count}"])
    torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=torch.device("cuda", place))


def _indivisible(config: Config, size: int) -> list[str]:
    """What of the configured stages does not divide among so many processes."""
    problems = []
    for name in (f"stage{number}" for number in config.stages):
        stage = getattr(config, name)
        rows = stage.images // size * getattr(stage, "group_size", 1)
        if stage.images % size:
            problems.append(f"{name}.images: {stage.images} images do not divide among {size} processes")
        elif rows % stage.micro_batch:
            given = f"the {rows} samples of each of {size} processes"
            problems.append(f"{name}.micro_batch: {given} do not divide into micro-batches of {stage.micro_batch}")
    return problems
