"""Quality gates: does a faster sampler reward the captions of an image as the reference sampler does?

Stage 2 learns from the advantages of an image's captions alone. So both samplers draw the same captions from the same
noise, and image by image the rewards are compared: by Spearman's ρ, the share of advantages with the same sign, and the
advantages' cosine; over all images by the slope of the reward's difference against the captions' length, within an
image: a sampler that favours short captions would teach short ones. First comes the noise floor, the reference at
another batch shape and by diffusers' own modules: nobody can agree better than that.

A same sampler (numerics only) must have ρ ≥ 0.97 and a cosine ≥ 0.98, a cheaper one ρ ≥ 0.90. Cheaper ones are ranked
by ρ²·speed: of rewards that agree so far with the exact ones 1/ρ² times as many are needed. Speed is images a second
where a GPU draws, elsewhere the counted FLOPs of the reference over the variant's.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import CheaperSamplerConfig, Config, ConfigError, accelerated, cheaper
from ..data import Example
from ..files import write_whole
from ..logging import ProgressLine
from ..models import Models
from ..models.loading import check_fp8, load_models, run_device
from ..phases import Stopwatch
from ..seeds import derive_seed
from .agreement import agreement

if TYPE_CHECKING:
    from rich.table import Table

FLOOR, SAME, CHEAPER = "noise floor", "same_sampler", "cheaper_sampler"
GATES: dict[str, dict[str, float]] = {FLOOR: {}, SAME: {"spearman": 0.97, "cosine": 0.98}, CHEAPER: {"spearman": 0.90}}
GUIDANCE = 1.5  # of a configuration without any, for the sampler that guides the first half of the steps alone
Configure = Callable[..., Config]  # a configuration with more overrides, "key=value" each


@dataclass(frozen=True)
class Variant:
    """A sampler, and the one it is held against.

    Attributes:
        kind: FLOOR, SAME or CHEAPER.
        against: what `reference` is called.
    """

    name: str
    kind: str
    config: Config
    reference: Config
    against: str = "the reference"


@dataclass(frozen=True)
class Task:
    """What all samplers draw: G captions of each of n images, in chunks of whole batches."""

    examples: list[Example]
    captions: list[list[str]]
    lengths: Tensor  # (n, G) tokens
    seeds: list[int]  # of each image's noise
    chunk: int  # images

    def chunks(self) -> Iterator[tuple[list[Example], list[str], list[int]]]:
        """Examples, and the captions and seeds of all their drawings."""
        size = self.lengths.shape[1]
        for start in range(0, len(self.examples), self.chunk):
            rows = slice(start, start + self.chunk)
            texts = [text for group in self.captions[rows] for text in group]
            yield self.examples[rows], texts, [seed for seed in self.seeds[rows] for _ in range(size)]


@dataclass(frozen=True)
class Drawn:
    """What a sampler made of a task: rewards (n, G), images (n·G, 3, H, W), and images a second on a GPU."""

    rewards: Tensor
    images: Tensor
    per_second: float | None


def misses(kind: str, row: dict[str, Any]) -> list[str]:
    """What of its gate a sampler misses, in words."""
    found = []
    for name, least in GATES[kind].items():
        if row[name] is None:
            found.append(f"{name} is unknown: no image has captions of different rewards")
        elif not row[name] >= least:
            found.append(f"{name} {row[name]:.3f} < {least:.2f}")
    return found


# ---- samplers -------------------------------------------------------------------------------------------------------


def plain(config: Config) -> Config:
    """The reference sampler of a configuration: the one without its cheaper settings and without fp8."""
    config = copy.deepcopy(config)
    config.cheaper_sampler, config.same_sampler.fp8 = CheaperSamplerConfig(), False
    return config


def faster(config: Config) -> str:
    """The settings that `plain` takes away, in words; empty where there are none."""
    words = [f"{key} {value}" for key, value in cheaper(config).items()]
    return ", ".join([fp8(config)] * config.same_sampler.fp8 + words)


def fp8(config: Config) -> str:
    """The name of a sampler in fp8, which says if it is emulated."""
    return "fp8" if run_device(config).type == "cuda" else "fp8, emulated"


def variants(configure: Configure) -> list[Variant]:
    """The noise floor, and then the sampler that is configured; the standard ones where none is."""
    config, reference = configure(), plain(configure())
    batch = config.render.batch
    floor = [f"render.batch={batch // 2 or 2}", *["same_sampler.accelerate=false"] * accelerated(config)]
    slower = "same_sampler.fp8=false"  # which needs the accelerated decoder
    found = [Variant(f"the reference, {other}", FLOOR, plain(configure(other, slower)), reference) for other in floor]
    if name := faster(config):
        return [*found, Variant(name, CHEAPER if cheaper(config) else SAME, config, reference)]
    return found + standard(configure, reference, floor)


def standard(configure: Configure, reference: Config, floor: Sequence[str]) -> list[Variant]:
    """Samplers worth a comparison with `reference`; `floor` are the overrides that leave a sampler what it is."""
    from ..models.sources import find_sources

    found = []
    if reference.models.decoder == "full" or reference.models.dtype == "float32":
        half = ("models.decoder=lora", "models.dtype=bfloat16")  # weights that train in full would be fp32
        coarse = configure(*half)
        found += [Variant(f"bfloat16, {other}", FLOOR, configure(*half, other), coarse, "bfloat16") for other in floor]
        found.append(Variant("bfloat16", SAME, coarse, reference))
    with suppress(ConfigError):  # a decoder that is quantised or takes turns on the device
        eight = configure("same_sampler.fp8=true")
        check_fp8(run_device(eight))
        found.append(Variant(fp8(eight), SAME, eight, reference))
    steps = reference.render.steps
    guided, against = reference, "the reference"
    if reference.render.guidance_scale == 1:
        guided, against = configure(f"render.guidance_scale={GUIDANCE}"), f"guidance {GUIDANCE}"
    scale = f"render.guidance_scale={guided.render.guidance_scale}"
    half_guided = configure(scale, "cheaper_sampler.guided_part=0.5")
    found.append(Variant("guided_part 0.5", CHEAPER, half_guided, guided, against))
    for fewer in dict.fromkeys((steps * 3 // 4, steps // 2)):
        if 2 <= fewer < steps:
            found.append(Variant(f"steps {fewer}", CHEAPER, configure(f"cheaper_sampler.steps={fewer}"), reference))
    reuse = list(range(2, steps, 2))
    if reuse:
        every = configure(f"cheaper_sampler.reuse={reuse}")
        found.append(Variant(f"reuse {reuse}", CHEAPER, every, reference))
    tiny = configure("cheaper_sampler.vae=tiny")
    with suppress(ConfigError):  # there is no such VAE
        find_sources(tiny)
        found.append(Variant("vae tiny", CHEAPER, tiny, reference))
    return found


# ---- drawing --------------------------------------------------------------------------------------------------------


def make_task(config: Config, models: Models, examples: list[Example]) -> Task:
    """`stage2.group_size` captions of each image: half as the policy writes them in training, half beginnings of the
    complete caption (of the policy's first one where there is none), in equal steps up to all of it."""
    from ..rollout.captions import sample_captions

    size = config.stage2.group_size
    written, cut = size - size // 2, size // 2
    chunk = config.render.batch // math.gcd(config.render.batch, size)  # no batch is padded
    captions: list[list[str]] = []
    with ProgressLine("writing captions", len(examples)) as progress:
        for start in range(0, len(examples), chunk):
            some = examples[start : start + chunk]
            texts = sample_captions(
                models.encoder,
                models.encoder.prompt([example.image for example in some]),
                [derive_seed(config.seed, "gate", "caption", e.id, i) for e in some for i in range(written)],
                temperature=config.stage2.temperature,
                max_new_tokens=config.caption.max_new_tokens,
            ).texts
            for i, example in enumerate(some):
                own = texts[i * written : (i + 1) * written]
                words = (example.caption or own[0]).split()
                captions.append(own + [" ".join(words[: -(-len(words) * k // cut)]) for k in range(1, cut + 1)])
            progress.advance(len(some))
    tokens = [[len(models.encoder.tokenizer(text)["input_ids"]) for text in group] for group in captions]
    seeds = [derive_seed(config.seed, "gate", "noise", example.id) for example in examples]
    return Task(examples, captions, torch.tensor(tokens), seeds, chunk)


@torch.no_grad()
def draw_task(config: Config, models: Models, task: Task, title: str) -> Drawn:
    """Rewards and images of a task. On a GPU the first chunk is drawn once more beforehand, and the rest is timed."""
    from ..rollout.renders import draw

    gpu, watch = models.decoder.device.type == "cuda", Stopwatch(models.decoder.device)
    rewards, images = [], []
    if gpu:
        draw(config, models, *next(task.chunks())[1:])
    with ProgressLine(f"drawing  {title}", len(task.examples)) as progress:
        for examples, texts, seeds in task.chunks():
            with watch.running("drawing"):
                drawn = draw(config, models, texts, seeds)
            source = models.reward.embed_sources([e.image for e in examples], [("gate", e.id) for e in examples])
            size = len(texts) // len(examples)
            rewards.append(models.reward(drawn, source.repeat_interleave(size, 0)).view(-1, size).cpu())
            images.append(drawn.cpu())
            progress.advance(len(examples))
    found = torch.cat(images)
    return Drawn(torch.cat(rewards), found, len(found) / watch.seconds()["drawing"] if gpu else None)


def drawing_flops(config: Config) -> int:
    """FLOPs of the matrix products, convolutions and attentions of an image, captions' conditions left out; counted.

    The sampler runs on models without memory, by diffusers' own modules.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from ..models.memory import WORD, Predictor
    from ..rollout.renders import draw

    plain = replace(config.same_sampler, accelerate=False, attention="auto")
    predictor = Predictor(replace(config, same_sampler=plain))
    size = config.stage2.group_size
    rows = math.lcm(config.render.batch, size)
    captions, seeds = [f"{WORD} {i % size}" for i in range(rows)], [i // size for i in range(rows)]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not among the counter's own
    attention = {operator: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    everything, reading = (FlopCounterMode(display=False, custom_mapping=attention) for _ in range(2))
    with predictor.mode, torch.no_grad():
        with everything:
            draw(predictor.config, predictor.models, captions, seeds)
        with reading:
            predictor.models.condition(captions)
    return (everything.get_total_flops() - reading.get_total_flops()) // rows


# ---- the command ----------------------------------------------------------------------------------------------------


def compare(configure: Configure, count: int) -> dict[str, Any]:
    """Draws the first `count` held-out images of a configuration with its variants.

    Returns:
        What `gate.json` holds: the circumstances, and "rows", one a variant; cheaper ones by falling value.
    """
    from ..parquet import open_images

    found = variants(configure)
    base = found[0].reference
    heldout = open_images(base.data.heldout, "data.heldout", base.data)
    examples = [heldout[i] for i in range(min(count, len(heldout)))]
    models: Any = load_models(base)
    models.encoder.freeze_reader()
    task, loaded, device = make_task(base, models, examples), base, models.decoder.device
    pairs = [[json.dumps(asdict(config), sort_keys=True) for config in (v.reference, v.config)] for v in found]
    drawn: dict[str, Drawn] = {}
    rows = []
    for i, (variant, pair) in enumerate(zip(found, pairs, strict=True)):
        samplers = (variant.reference, variant.against), (variant.config, variant.name)
        for key, (config, name) in zip(pair, samplers, strict=True):
            if key not in drawn:
                if config is not loaded:
                    models, loaded = None, config  # the old ones go first
                    models = load_models(config)
                    models.encoder.freeze_reader()
                drawn[key] = draw_task(config, models, task, name)
        rows.append(compared(variant, drawn[pair[0]], drawn[pair[1]], task))
        wanted = {key for later in pairs[i + 1 :] for key in later}  # full-size images are gigabytes a sampler
        drawn = {key: one for key, one in drawn.items() if key in wanted}
    rows.sort(key=lambda row: -math.inf if row["value"] is None else -row["value"])
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "seed": base.seed,
        "images": len(examples),
        "group_size": base.stage2.group_size,
        "resolution": base.data.resolution,
        "steps": base.render.steps,
        "rows": rows,
    }


def compared(variant: Variant, reference: Drawn, own: Drawn, task: Task) -> dict[str, Any]:
    """A variant's row."""
    row: dict[str, Any] = {"variant": variant.name, "against": variant.against, "kind": variant.kind}
    row |= agreement(reference.rewards, own.rewards, task.lengths)
    row["mse"] = (own.images - reference.images).square().mean().item()
    row["psnr"] = -10 * math.log10(row["mse"]) if row["mse"] else None
    row["reward_change"] = (own.rewards - reference.rewards).mean().item()
    row["images_per_second"] = own.per_second
    row["speed"] = row["value"] = None
    if variant.kind == CHEAPER:
        flops = [drawing_flops(config) for config in (variant.reference, variant.config)]
        row["gflops_per_image"] = [count / 1e9 for count in flops]
        row["speed"] = flops[0] / flops[1]
        row["value"] = (row["spearman"] or 0) ** 2 * (own.per_second or row["speed"])
    row["misses"] = misses(variant.kind, row)
    return row


HEADER = (
    "sampler", "against", "ρ", "same sign", "cosine", "Δ reward per 10 tokens", "PSNR", "speed", "ρ²·speed", "gate"
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A variant's line of the table, under HEADER."""

    def number(name: str, digits: int = 3, scale: float = 1, sign: str = "") -> str:
        value, error = row[name], row[f"{name}_stderr"]
        if value is None:
            return "–"
        spread = "" if error is None else f" ± {scale * error:.{digits}f}"
        return f"{scale * value:{sign}.{digits}f}{spread}"

    return [
        row["variant"],
        row["against"],
        number("spearman", 4),
        number("sign"),
        number("cosine", 4),
        number("length_slope", 4, 10, "+"),
        "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
        "" if row["speed"] is None else f"{row['speed']:.2f}×",
        "" if row["value"] is None else f"{row['value']:.2f}",
        "" if row["kind"] == FLOOR else "missed" if row["misses"] else "passed",
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    rows, words = result["rows"], {"spearman": "ρ", "cosine": "a cosine"}
    same, cheap = (
        " and ".join(f"{words[name]} ≥ {least:.2f}" for name, least in GATES[kind].items()) for kind in (SAME, CHEAPER)
    )
    spread = sorted({(row["groups"], row["zero_variance_groups"]) for row in rows})
    groups = ", ".join(f"{kept} ({left} more have captions of one reward and are left out)" for kept, left in spread)
    gpu = any(row["images_per_second"] for row in rows)
    return [
        f"Measured on {result['device']}, torch {result['torch']}, configuration {result['config']}: "
        f"{result['images']} held-out images × {result['group_size']} captions, {result['resolution']}², "
        f"{result['steps']} steps, seed {result['seed']}. Images that count: {groups}. ± is a standard error over "
        "images.",
        f"Gates: a same sampler has {same}, a cheaper one {cheap}.",
        "Speed is counted, not measured: FLOPs of an image, the reference's over the sampler's; "
        + ("ρ²·speed has measured images a second in its place." if gpu else "the rank goes by it."),
    ]


def table(result: dict[str, Any]) -> Table:
    """The comparison for a terminal."""
    from rich.table import Table

    shown = Table(*HEADER, title=f"samplers of {result['config']}", caption="\n".join(notes(result)))
    for row in result["rows"]:
        shown.add_row(*cells(row), style="red" if row["misses"] else None)
    return shown


def plot(result: dict[str, Any], file: Path) -> None:
    """ρ and cosine of each sampler beside its gates, and the slopes against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"][::-1]
    names = [f"{row['variant']}\n{row['kind']}" for row in rows]
    places = list(range(len(rows)))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.45 * len(rows) + 1.4), sharey=True, width_ratios=(3, 2), layout="constrained"
    )

    def points(axis: Any, measure: str, shift: float = 0.0, scale: float = 1.0, **style: Any) -> None:
        axis.errorbar(
            [scale * (row[measure] or 0) for row in rows], [place + shift for place in places],
            xerr=[2 * scale * (row[f"{measure}_stderr"] or 0) for row in rows], fmt="o", markersize=5, **style,
        )  # fmt: skip

    styles = {"spearman": ("#D55E00", 0.12, "Spearman's ρ"), "cosine": ("#0072B2", -0.12, "cosine of advantages")}
    for measure, (colour, shift, label) in styles.items():
        points(left, measure, shift, color=colour, label=label)
        for place, row in zip(places, rows, strict=True):
            if measure in GATES[row["kind"]]:
                ends = (place + shift - 0.12, place + shift + 0.12)
                left.vlines(GATES[row["kind"]][measure], *ends, color=colour, linewidth=2)
    left.set_yticks(places, names, fontsize=8)
    left.set(xlabel="agreement, ± 2 s.e.; strokes are gates", ylim=(-0.6, len(rows) - 0.4))
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    points(right, "length_slope", scale=10, color="#000000")
    right.axvline(0, color="#7F7F7F", linewidth=1)
    right.set(xlabel="Δ reward per 10 tokens, ± 2 s.e.")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(f"{result['config']}: samplers against the reference", x=0.01, ha="left", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def run_gate(configure: Configure, name: str, out: Path, count: int) -> int:
    """Compares, prints the table, and writes `gate.json` and `gate.png` into `out`.

    Args:
        configure: gives the configuration, with more overrides.
        name: of the configuration.
        count: held-out images.

    Returns:
        The exit status: 1 where a configured sampler misses its gate.
    """
    from rich.console import Console

    result = {"config": name, **compare(configure, count)}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "gate.json", json.dumps(result, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table(result))
    print(f"wrote {out / 'gate.json'}")
    try:
        plot(result, out / "gate.png")
        print(f"wrote {out / 'gate.png'}")
    except ModuleNotFoundError as error:
        print(f"no gate.png: {error.name} is not installed")
    failed = [row for row in result["rows"] if row["misses"]]
    for row in failed:
        print(f"{row['variant']} misses its gate: {'; '.join(row['misses'])}")
    return int(bool(failed and faster(configure())))
