"""Held-out images before and after each stage: image → caption → image, and how much survives."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config import MOMENTS, Config, cheaper
from ..data import Example, ImageFolder
from ..files import write_whole, writing
from ..logging import ProgressLine
from ..models import Models
from ..models.sources import models_folder
from ..parquet import ParquetImages
from ..report import summarise
from ..rollout.captions import Captions, sample_captions
from ..rollout.renders import draw
from ..seeds import derive_seed
from ..team import Team
from ..tiny.classifier import Classifier
from ..tiny.scenes import caption_scores, scenes_by_caption

ImageSet = ImageFolder | ParquetImages


class Evaluator:
    """Measures a run on its held-out images, always the same ones with the same noise.

    Every moment leaves ``samples/MOMENT/scores.jsonl``, a row an image, and the reconstructions of the first few. What
    the images' `captions.jsonl` does not tell (attributes, complete captions) is left null. Of several processes each
    takes whole batches, and process 0 writes.
    """

    def __init__(self, config: Config, models: Models, data: ImageSet, folder: Path):
        self.config, self.models, self.folder, self.team = config, models, folder, Team()
        self.count = min(config.evaluate.images, len(data))
        self.data = data
        self.pictures = picture_names(data.files)
        weights = models_folder(config)
        self.classifier = None
        if weights is not None and (weights / "classifier.safetensors").is_file() and data.captioned:
            self.classifier = Classifier.load(weights)

    def measure(self, moment: str) -> None:
        """Captions, reconstructs and scores the held-out images under the name of `moment`; does so only once."""
        self._run(moment, lambda examples: write_captions(self.config, self.models, examples))

    def forget(self, moment: str) -> None:
        """Removes what a moment left: it lies ahead of where the run goes on."""
        if self.team.rank == 0:
            shutil.rmtree(self.folder / "samples" / moment, ignore_errors=True)

    def ceiling(self) -> None:
        """The same with the complete captions of `captions.jsonl`: what a perfect writer would get."""
        if self.data.captioned:
            self._run("ceiling", lambda examples: [(example.caption or "", None) for example in examples])

    def summary(self, minutes: float) -> dict:
        """Writes `summary.json` from what the moments left, and returns it."""
        rows = {moment: self.scores(moment) for moment in ("ceiling", *MOMENTS)}
        summary: dict = {"seed": self.config.seed, "minutes": round(minutes, 2), "ceiling": None}
        if cheaper(self.config):
            summary["cheaper_sampler"] = cheaper(self.config)
        if rows["ceiling"]:
            summary["ceiling"] = {key: _mean(rows["ceiling"], key) for key in ("reward", "accuracy")}
        previous: list[dict] = []
        for moment in MOMENTS:
            if rows[moment]:
                summary[moment] = summarise(rows[moment], previous)
                previous = rows[moment]
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def scores(self, moment: str) -> list[dict]:
        """The rows that `measure` left for a moment; none if it has not been measured."""
        path = self.folder / "samples" / moment / "scores.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def shown(self, moment: str) -> tuple[dict[str, float], dict[str, tuple[Path, str]]]:
        """What reporters show of a moment: its numbers, and its drawings with what was written of each image."""
        rows, folder = self.scores(moment), self.folder / "samples" / moment
        values = summarise(rows) if rows else {}
        pictures = {
            Path(row["picture"]).stem: (folder / row["picture"], row["caption"]) for row in rows if "picture" in row
        }
        return {name: value for name, value in values.items() if value is not None}, pictures

    @torch.no_grad()
    def _run(self, moment: str, write) -> None:
        if self.count == 0 or self.team.exchange(bool(self.scores(moment)))[0]:
            return
        folder, sources = self.folder / "samples" / moment, self.folder / "samples" / "source"
        writes, size, rows = self.team.rank == 0, self.config.render.batch, list[dict]()
        for path in (folder, sources) if writes else ():
            path.mkdir(parents=True, exist_ok=True)
        with ProgressLine(f"measuring  {moment}", self.count) as progress:
            while len(rows) < self.count:
                # Where no batch is left for a process it takes the last one, too: all go through the same calls
                start = min(len(rows) + self.team.rank * size, (self.count - 1) // size * size)
                told = self.team.exchange(self._rows(start, min(start + size, self.count), write))
                new = [row for found in told for row in found][: self.count - len(rows)]
                for i, (row, picture) in enumerate(new if writes else (), len(rows)):
                    if picture:
                        drawn, source = folder / row["picture"], sources / row["picture"]
                        with writing(drawn):
                            drawn.write_bytes(bytes.fromhex(picture))
                        with writing(source):
                            self.data[i].image.save(source)
                rows += [row for row, _ in new]
                progress.advance(len(new), f"reward {_mean(rows, 'reward'):.3f}")
        if writes:
            write_whole(folder / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _rows(self, start: int, stop: int, write) -> list[tuple[dict, str]]:
        """The scores of a batch of images, each with its drawing, where that is shown: a PNG file in hexadecimal."""
        examples, found = [self.data[i] for i in range(start, stop)], list[tuple[dict, str]]()
        captions = write(examples)
        images = draw_examples(self.config, self.models, examples, [caption for caption, _ in captions])
        rewards, accuracies = self._rewards(images, examples), self._accuracies(images, examples)
        for i, (example, (caption, tokens)) in enumerate(zip(examples, captions, strict=True)):
            said = {name: values[i] for name, values in rewards.items()}
            row, picture = score(example, caption, tokens, said, accuracies[i]), io.BytesIO()
            if start + i < self.config.evaluate.gallery:
                row["picture"] = self.pictures[example.file]
                to_image(images[i]).save(picture, "png")
            found.append((row, picture.getvalue().hex()))
        return found

    def _rewards(self, images: Tensor, examples: list[Example]) -> dict[str, list[float]]:
        """What the reward and, where there is one, the held-out encoder say of the reconstructions."""
        sources, names = [example.image for example in examples], [("heldout", example.id) for example in examples]
        judges = {"reward": self.models.reward, "heldout_reward": self.models.heldout}
        return {
            name: judge(images, judge.embed_sources(sources, names)).tolist()
            for name, judge in judges.items()
            if judge is not None
        }

    def _accuracies(self, images: Tensor, examples: list[Example]) -> list[float | None]:
        found: list[float | None] = [None] * len(examples)
        known = {i: scenes_by_caption().get(example.caption or "") for i, example in enumerate(examples)}
        scenes = {i: scene for i, scene in known.items() if scene}
        if self.classifier is not None and scenes:
            accuracies = self.classifier.accuracy(images[list(scenes)].cpu(), list(scenes.values()))
            for i, accuracy in zip(scenes, accuracies.tolist(), strict=True):
                found[i] = accuracy
        return found


def batches(data: ImageSet, count: int, size: int) -> Iterator[list[Example]]:
    """The first `count` images, `size` at once."""
    for start in range(0, count, size):
        yield [data[i] for i in range(start, min(start + size, count))]


def write_captions(config: Config, models: Models, examples: Sequence[Example]) -> list[tuple[str, int]]:
    """The encoder's captions of held-out images and their lengths in tokens, each from the seed of its image."""
    seeds = [derive_seed(config.seed, "heldout", "caption", example.id) for example in examples]
    captions = sample(config, models, [example.image for example in examples], seeds)
    return list(zip(captions.texts, captions.mask.sum(1).tolist(), strict=True))


def sample(config: Config, models: Models, images: Sequence[Image.Image], seeds: Sequence[int]) -> Captions:
    """Captions of images as the encoder writes them outside of training (`caption`), each from its seed."""
    return sample_captions(
        models.encoder,
        models.encoder.prompt(images),
        seeds,
        temperature=config.caption.temperature,
        max_new_tokens=config.caption.max_new_tokens,
        engine=config.caption.engine,
    )


def draw_examples(config: Config, models: Models, examples: Sequence[Example], captions: Sequence[str]) -> Tensor:
    """Drawings (B, 3, H, W) of captions of held-out images, each from the noise of its image."""
    seeds = [derive_seed(config.seed, "heldout", "noise", example.id) for example in examples]
    return draw(config, models, captions, seeds)


def picture_names(files: Sequence[str]) -> dict[str, str]:
    """A name for the PNG file of each of some image files: its stem; where files share one, with its place."""
    stems = [Path(file).stem for file in files]
    shared = Counter(stems)
    names = (f"{stem}.png" if shared[stem] == 1 else f"{stem[:40]}~{i}.png" for i, stem in enumerate(stems))
    return dict(zip(files, names, strict=True))


def score(
    example: Example, caption: str, tokens: int | None, rewards: dict[str, float], accuracy: float | None
) -> dict:
    """One image's row of `scores.jsonl`, with "reward" and perhaps "heldout_reward"."""
    recall, precision = caption_scores(caption, example.attributes) if example.attributes else (None, None)
    return {
        "file": example.file,
        "caption": caption,
        **rewards,
        "tokens": tokens,
        "recall": recall,
        "precision": precision,
        "accuracy": accuracy,
    }


def to_image(pixels: Tensor) -> Image.Image:
    """A tensor (3, H, W) in [0, 1] as an RGB image."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def print_summary(summary: dict) -> None:
    """`summary.json` as a table, a line a moment."""

    def number(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    title = f"held-out images, {summary['minutes']:.1f} minutes"
    table = Table("", "reward", "± of the gain", "recall", "precision", "caption tokens", "accuracy", title=title)
    for moment in MOMENTS:
        if moment in summary:
            m = summary[moment]
            table.add_row(
                moment if moment == "before" else f"after {moment}",
                f"{number(m['reward'])} ± {number(m['reward_stderr'])}",
                number(m["reward_gain_stderr"], 4),
                number(m["attribute_recall"]),
                number(m["attribute_precision"]),
                number(m["caption_tokens"], 1),
                number(m["accuracy"]),
            )
    if summary["ceiling"]:
        ceiling = summary["ceiling"]
        table.add_row("ceiling", number(ceiling["reward"]), "", "", "", "", number(ceiling["accuracy"]))
    Console().print(table)
