"""Predicted floors: what no implementation beats on a GPU, for ops at their benchmarks' sizes and presets' steps.

    floor = max(FLOPs / peak, bytes / bandwidth)

FLOPs and bytes are counted by formulas (`kernels/predicted.py`, `uae_fast/speed.py`); peaks and bandwidths stand in
`gpus.py`. Bytes of a step are those of the language model's and the decoder's weights, read once for each pass: of a
token that all captions write, of a batch that is drawn at one level, of a micro-batch. Where rows were measured on the
GPU, their time stands beside the floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from uae_fast.cli import quiet_libraries
from uae_fast.config import Config, load_config, preset_names
from uae_fast.speed import drawing_passes

from .gpus import GPUS, find
from .kernels import predicted
from .kernels.predicted import Need
from .kernels.test_speed import OPS
from .rows import OURS, Row, case_of, newest, read


@dataclass(frozen=True)
class Floor:
    """An op's or a step's, with the measured time in ms where there is one."""

    name: str
    size: str
    need: Need
    milliseconds: float
    bound: str
    measured: float | None = None


def op_floors(gpu: str, rows: Iterable[Row] = ()) -> Iterator[Floor]:
    """Of each case that the ops' benchmarks have on a GPU.

    Args:
        gpu: a name in GPUS.
        rows: measured ones, of any device.
    """
    found = {case_of(row)[:2] + case_of(row)[3:]: row for row in newest(rows) if is_measured(row, gpu)}
    for module in OPS:
        for case in module.cases("cuda", False):
            need = predicted.need(case)
            key = (case.op, case.variant, case.precision, *case.sizes().values())
            row = found.get(key)
            size = ", ".join(f"{name} {value:,}" for name, value in case.sizes().items() if value is not None)
            yield floor(f"{case.op}, {case.variant}", f"{size}, {case.precision}", need, gpu, row and row["median_ms"])


def step_floors(gpu: str, preset: str, rows: Iterable[Row] = ()) -> Iterator[Floor]:
    """Of a step of each stage of a preset, with captions as long as they may be; counted on models without memory."""
    from uae_fast.models.memory import Predictor
    from uae_fast.speed import Sizes, image_tokens, step_flops

    config = load_config(preset)
    predictor = Predictor(config)
    sizes, image = Sizes.of(predictor.models), image_tokens(predictor.models, config.data.resolution)
    found = {(row["preset"], row["stage"]): row["median_ms"] for row in newest(rows) if in_steps(row, gpu)}
    encoder, decoder = predictor.weight_bytes("encoder"), predictor.weight_bytes("decoder")
    for number in config.stages:
        settings = getattr(config, f"stage{number}")
        longest = config.caption.max_new_tokens
        lengths = {"prompts/mean_length": predictor.prompt_length, "completions/mean_length": longest}
        starts = (settings.window_end - settings.window) / 2 if number == 3 else 0
        flops = step_flops(number, config, sizes, image, lengths | {"window_start": starts})
        read, drawn = passes(config, number)
        need = Need(int(flops), read * encoder + drawn * decoder)
        samples = settings.images * getattr(settings, "group_size", 1)
        size = f"{samples} samples, {config.data.resolution}²"
        yield floor(f"{preset}, stage {number}", size, need, gpu, found.get((preset, number)))


def passes(config: Config, number: int) -> tuple[int, int]:
    """How often a stage's step reads the weights of encoder and decoder, at least.

    A guided level is one pass of a doubled batch.
    """
    settings: Any = getattr(config, f"stage{number}")
    micro = settings.images * getattr(settings, "group_size", 1) // settings.micro_batch
    if number == 0:
        return 1, micro
    if number == 1:
        return micro, micro * settings.sampler_steps
    written = config.caption.max_new_tokens + 2  # prompts, tokens, and the captions read again
    if number == 2:
        drawn = batches(settings.images * settings.group_size, config) * drawing_passes(config)[0]
        return written + micro * (1 + settings.updates), drawn
    shared = (settings.window_end - settings.window) // 2  # steps before the window, which a group's drawings share
    rows = settings.images * settings.group_size
    drawn = shared * batches(settings.images, config) + (config.render.steps - shared) * batches(rows, config)
    return written, drawn + micro * settings.window * settings.updates


def batches(rows: int, config: Config) -> int:
    return -(-rows // config.render.batch)


def in_steps(row: Row, gpu: str) -> bool:
    return row["op"] == "trainer-steps" and gpu in row["device"] and row["median_ms"] is not None


def is_measured(row: Row, gpu: str) -> bool:
    return gpu in row["device"] and row["contestant"] == OURS and row["median_ms"] is not None


def floor(name: str, size: str, need: Need, gpu: str, measured: float | None = None) -> Floor:
    known = GPUS[gpu]
    bound = "products" if need.flops / known.bf16 >= need.bytes / known.bandwidth else "bytes"
    return Floor(name, size, need, predicted.floor_ms(need, known), bound, measured)


def table(title: str, floors: Iterable[Floor]) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("what", overflow="fold")
    shown.add_column("size", overflow="fold")
    for name in ("GFLOP", "GB", "predicted floor, ms", "bound by", "measured, ms", "× floor"):
        shown.add_column(name, justify="right")
    for item in floors:
        own = (
            ("", "") if item.measured is None else (f"{item.measured:.3g}", f"{item.measured / item.milliseconds:.2f}")
        )
        shown.add_row(
            item.name, item.size, f"{item.need.flops / 1e9:,.4g}", f"{item.need.bytes / 1e9:,.3g}",
            f"{item.milliseconds:,.3g}", item.bound, *own,
        )  # fmt: skip
    return shown


def show(name: str, presets: list[str]) -> None:
    """Prints the floors on a GPU.

    Args:
        name: of the GPU, see `gpus.find`.
        presets: whose steps; all of full size unless given.

    Raises:
        ValueError: no such GPU.
    """
    gpu = find(name)
    console = Console(width=None if Console().is_terminal else 150)
    known = GPUS[gpu]
    fp8 = f"{known.fp8 / 1e12:.0f}" if known.fp8 else "no"
    console.print(
        f"predicted floors on one {gpu}, nothing here is measured but the columns that say so: products at "
        f"{known.bf16 / 1e12:.0f} TFLOP/s in bf16 ({fp8} in fp8), memory at {known.bandwidth / 1e12:.2f} TB/s"
    )
    rows = [row for row in read("*-gpu.jsonl") if "median_ms" in row]
    console.print(table("ops", op_floors(gpu, rows)))
    quiet_libraries()
    for preset in presets or [preset for preset in preset_names() if preset != "tiny"]:
        console.print(table(f"a step of {preset}", step_floors(gpu, preset, rows)))
