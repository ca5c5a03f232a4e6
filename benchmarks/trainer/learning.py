"""Reward against time: stage 2 of the tiny preset as it is and in two plainer ways; same loss, seeds, data, decoder.

    python -m benchmarks.trainer.learning                   # three ways, three seeds, 80 s of training each: 15 minutes
    python -m benchmarks.trainer.learning --plot            # the plot again, from the rows

A run ends after so many seconds of training; held-out rewards are measured beside that clock, every ten seconds of it.
Its row is appended to results/trainer-learning-cpu.jsonl when it ends: a command that was stopped goes on with the runs
that are missing for this commit. Lines are means over seeds, thin lines the seeds.

Both other ways start each drawing from a noise of its own, which puts the decoder's variance into the advantages, and
the update has a row for every caption behind a copy of its prompt. One of them is plain practice, as in a trainer of
TRL's kind: transformers' `generate` writes all captions in one batch, prompts repeated, and they are drawn in one
batch. The other writes and draws them one at a time. Loss, optimiser and decoder are ours in all three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from uae_fast.config import Config
from uae_fast.data import ImageFolder
from uae_fast.rollout.captions import Captions, sample_captions
from uae_fast.rollout.renders import draw
from uae_fast.seeds import derive_seed
from uae_fast.stages import generation_for_understanding as stage2

from ..kernels import report
from ..rows import OURS, RESULTS, Row, append, environment, read
from .worlds import Steps, small_world, tiny_config

OP = "trainer-learning"
SEEDS, SECONDS = (0, 1, 2), 80.0
EVERY = 10.0  # seconds of training between measurements
HELDOUT = 128
LEVELS = (0.6, 0.8, 0.9)  # of the held-out reward, whose times the tables give


def one_by_one(encoder: Any, prompt: Any, seeds: Sequence[int], **options: Any) -> Captions:
    """`sample_captions`, a caption at a time."""
    of = [i * len(prompt.ids) // len(seeds) for i in range(len(seeds))]  # the prompt of each
    rows = [
        sample_captions(encoder, prompt.rows(slice(row, row + 1)), [seed], **options)
        for row, seed in zip(of, seeds, strict=True)
    ]
    width = max(row.ids.shape[1] for row in rows)
    ids = [pad(row.ids, (0, width - row.ids.shape[1]), value=encoder.tokenizer.pad_token_id) for row in rows]
    masks = [pad(row.mask, (0, width - row.mask.shape[1])) for row in rows]
    logprobs = [pad(row.logprobs, (0, width - row.logprobs.shape[1])) for row in rows]
    texts = [text for row in rows for text in row.texts]
    return Captions(torch.cat(ids), torch.cat(masks), texts, torch.cat(logprobs))


def from_own_noise(config: Config, models: Any, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """`draw`, each caption from a noise of its own."""
    return draw(config, models, captions, [derive_seed("own", seed, i) for i, seed in enumerate(seeds)])


def drawn_alone(config: Config, models: Any, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """The same, a caption at a time."""
    return from_own_noise(replace(config, render=replace(config.render, batch=1)), models, captions, seeds)


class Way(NamedTuple):
    """Of training stage 2: settings, and what stands in for functions that the stage calls."""

    settings: tuple[str, ...]
    functions: dict[str, Callable]

    @contextmanager
    def taken(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, function in self.functions.items():
                stack.enter_context(mock.patch.object(stage2, name, function))
            yield


FAST = f"{OURS}, uae-fast train"
BATCHED = "one batch by transformers' generate, own noise, no shared prefix"
NAIVE = "one caption at a time, own noise, no shared prefix"
ROWS = "stage2.shared_prefix=false"
WAYS = {
    FAST: Way((), {}),
    BATCHED: Way((ROWS, "caption.engine=generate"), {"draw": from_own_noise}),
    NAIVE: Way((ROWS,), {"draw": drawn_alone, "sample_captions": one_by_one}),
}


@torch.no_grad()
def heldout_reward(config: Config, models: Any, data: ImageFolder) -> float:
    """The mean over held-out images, of the same captions' seeds and noises every time."""
    found = []
    for start in range(0, min(HELDOUT, len(data)), config.render.batch):
        examples = [data[i] for i in range(start, min(start + config.render.batch, HELDOUT, len(data)))]
        prompt = models.encoder.prompt([example.image for example in examples])
        seeds, noise = ([derive_seed(0, name, example.id) for example in examples] for name in ("caption", "noise"))
        captions = sample_captions(
            models.encoder, prompt, seeds, temperature=config.caption.temperature,
            max_new_tokens=config.caption.max_new_tokens,
        )  # fmt: skip
        images = draw(config, models, captions.texts, noise)
        sources = models.reward.embed_sources([e.image for e in examples], [("heldout", e.id) for e in examples])
        found += models.reward(images, sources).tolist()
    return statistics.fmean(found)


def learn(world: Path, contestant: str, seed: int, seconds: float, every: float = EVERY) -> Row:
    """A run of one way with one seed: seconds of training and held-out rewards, and every step's own reward."""
    way = WAYS[contestant]
    config = tiny_config(world, f"seed={seed}", "device=cpu", *way.settings)
    steps, heldout = Steps(2, config), ImageFolder(config.data.heldout, "data.heldout")
    stage = steps.stage
    curve, training = [(0.0, heldout_reward(config, stage.models, heldout))], []
    trained = 0.0
    while trained < seconds:
        began = time.monotonic()
        with way.taken():
            values, bad = steps.take(steps.examples())
        if bad:
            raise SystemExit(f"{contestant}, seed {seed}, step {steps.step}: not finite: {', '.join(bad)}")
        trained += time.monotonic() - began
        training.append((trained, values["reward"]))
        if trained - curve[-1][0] >= every or trained >= seconds:
            curve.append((trained, heldout_reward(config, stage.models, heldout)))
    return {
        "op": OP, "contestant": contestant, "seed": seed, "budget_s": seconds, "steps": steps.step, "heldout": curve,
        "training": training, "images": stage.settings.images, "group_size": stage.settings.group_size,
    }  # fmt: skip


CIRCUMSTANCES = ("budget_s", "commit", "dirty", "device", "threads")  # runs are compared where these are the same


def missing(rows: Sequence[Row], seeds: Sequence[int], here: Row) -> list[tuple[str, int]]:
    """The runs that no row of these circumstances has yet, a seed of all ways after another."""
    done = {(row["contestant"], row["seed"]) for row in rows if alike(row, here)}
    return [(name, seed) for seed in seeds for name in WAYS if (name, seed) not in done]


def alike(row: Row, other: Row) -> bool:
    return all(row.get(key) == other.get(key) for key in CIRCUMSTANCES)


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last circumstances under which seeds have run our way and another, as far as they have run all.

    None where there are none.
    """
    for last in reversed(rows):
        runs = {(r["contestant"], r["seed"]): r for r in rows if alike(r, last)}
        seeds = [{seed for other, seed in runs if other == name} for name in {name for name, _ in runs}]
        shared = set.intersection(*seeds)
        if len(seeds) > 1 and (FAST, min(shared, default=None)) in runs:
            return [row for (_, seed), row in runs.items() if seed in shared]
    return []


def reached(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """When a curve is first at a level, between its points on a straight line; None where it never is."""
    if curve[0][1] >= level:
        return curve[0][0]
    for (x, y), (after, z) in pairwise(curve):
        if z >= level:
            return x + (after - x) * (level - y) / (z - y)
    return None


def at(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """A curve's value at a time, between its points on a straight line."""
    for (x, y), (after, z) in pairwise(curve):
        if seconds <= after:
            return y + (z - y) * (seconds - x) / (after - x)
    return curve[-1][1]


def plot(rows: Sequence[Row], file: Path) -> None:
    """Held-out reward against seconds of training."""
    figure, axis = report.pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name, color in zip(WAYS, ("C0", "C2", "C1"), strict=True):
        curves = [row["heldout"] for row in rows if row["contestant"] == name]
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.5)
        if curves:
            end = min(curve[-1][0] for curve in curves)
            xs = [end * i / 40 for i in range(41)]
            steps = statistics.median(row["steps"] for row in rows if row["contestant"] == name)
            label = f"{name} ({len(curves)} seeds, {steps:.0f} steps)"
            axis.plot(xs, [statistics.fmean(at(c, x) for c in curves) for x in xs], color=color, label=label)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("reward, held-out images")
    axis.set_title(f"Stage 2, tiny preset, {rows[0]['device']}, {rows[0]['threads']} threads, measured", fontsize=10)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    report.save(figure, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rows", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--commit", help="hash, with -dirty behind it where it is: for a copy without .git")
    parser.add_argument("--plot", action="store_true", help="draw what the rows have, and run nothing")
    arguments = parser.parse_args()
    file = arguments.rows / f"{OP}-cpu.jsonl"
    where = environment("cpu", arguments.commit)
    if not arguments.plot:
        with tempfile.TemporaryDirectory() as folder:
            world = small_world(Path(folder), scenes=512)
            left = missing(read(file.name, arguments.rows), arguments.seeds, where | {"budget_s": arguments.seconds})
            for name, seed in left:
                row = learn(world, name, seed, arguments.seconds)
                append(file, [row | where])
                ends = " → ".join(f"{row['heldout'][i][1]:.3f}" for i in (0, -1))
                print(f"{name}, seed {seed}: {row['steps']} steps, held-out reward {ends}", flush=True)
    rows = newest(read(file.name, arguments.rows))
    if rows:
        plot(rows, arguments.rows / "plots" / f"{OP}-cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
