"""The command `uae-fast`. Commands import the heavy libraries they need, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from .config import Config
    from .models import Models

SUITES = ("all", "kernels", "sampler", "trainer")
MOMENTS = ("before", "stage0", "stage1", "stage2", "stage3")
FAILURE, USER_MISTAKE, STOPPED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 after SIGINT (Ctrl-C), 143 after SIGTERM.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        arguments.overrides += rest  # argparse takes no more of them once an option stood between
    from .config import ConfigError

    try:
        return arguments.function(arguments) or 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return STOPPED


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="uae-fast", description="Train a model that describes images and a model that redraws them."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(function=function)
        return added

    config_help = "a YAML file, or a preset's name (see: uae-fast configs)"
    train = command("train", run_train, "run the stages of a configuration")
    train.add_argument("config", metavar="CONFIG", help=config_help)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. stage2.lr=1e-5")
    train.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    train.add_argument(
        "--force-resume", action="append", default=[], metavar="KEY",
        help="go on although KEY is not what it was (stage2.lr, models.path, data.train, …); may be repeated",
    )  # fmt: skip

    fill_help = "choose the largest micro-batches and render.batch that are predicted to fit"
    train.add_argument("--fill-memory", type=float, metavar="GB", help=fill_help)

    check = command("check", run_check, "check a configuration and show what a step of it is made of")
    check.add_argument("config", metavar="CONFIG", help=config_help)
    check.add_argument("overrides", nargs="*", metavar="key=value")
    check.add_argument("--fill-memory", type=float, metavar="GB", help=fill_help)
    check.add_argument("--gpu-memory", type=float, metavar="GB", help="say what to change where a stage needs more")

    configs = command("configs", run_configs, "list the presets, or copy one to edit")
    configs.add_argument("action", nargs="?", choices=("list", "copy"), default="list")
    configs.add_argument("name", nargs="?", help="the preset to copy into this folder")

    caption = command("caption", run_caption, "write captions of images")
    caption.add_argument("images", nargs="+", type=Path, metavar="IMAGE|DIR")
    caption.add_argument("--jsonl", metavar="FILE", help="write {file, caption} lines into FILE (- for the screen)")
    reconstruct = command("reconstruct", run_reconstruct, "caption images, redraw them, and show both side by side")
    reconstruct.add_argument("images", nargs="+", type=Path, metavar="IMAGE|DIR")
    reconstruct.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="default: %(default)s")
    generate = command("generate", run_generate, "draw an image from a text")
    generate.add_argument("text", metavar="TEXT")
    generate.add_argument("--out", type=Path, default=Path("generated.png"), help="default: %(default)s")
    for added in (caption, reconstruct, generate):
        added.add_argument("--run", type=Path, help="a run's folder; without one, the weights in the package")
        added.add_argument("--at", choices=MOMENTS, help="which moment of the run; its last one unless given")
        added.add_argument("--seed", type=int, default=0, help="of captions and drawings (default: 0)")

    imported = command("import-uae", run_import_uae, "read the weights that UAE's authors released into a run's folder")
    imported.add_argument("folder", type=Path, metavar="DIR", help="with llm, llm_lora, dit and dit_lora")
    imported.add_argument("out", type=Path, metavar="OUT", help="the run's folder, for --run")
    imported.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's configuration")
    place = "a folder or owner/name@commit; default: "
    imported.add_argument("--sd3", default="", help=f"Stable Diffusion 3.5 large, {place}DIR/SD3")
    imported.add_argument("--processor", default="", help=f"tokenizer and image processor, {place}DIR/llm_processor")
    imported.add_argument("--reward", default="", help=f"image encoder of the reward, {place}CLIP ViT-L/14")

    evaluate = command(
        "evaluate", run_evaluate, "Unified-Bench: redraw held-out images from their captions, and compare"
    )
    evaluate.add_argument("config", metavar="CONFIG|RUN", help=f"{config_help}, or a run's folder")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="evaluate.images=100, evaluate.encoders=[…]"
    )
    evaluate.add_argument("--at", choices=MOMENTS, help="which moment of the run; its last one unless given")
    evaluate.add_argument(
        "--tokens",
        type=int,
        action="append",
        default=[],
        metavar="K",
        help="also with captions cut to K tokens; may be repeated",
    )
    evaluate.add_argument(
        "--reconstructions",
        type=Path,
        metavar="DIR",
        help="compare these files instead of drawing: of the sources' names, perhaps after recon_",
    )
    evaluate.add_argument("--out", type=Path, default=Path("unified-bench"), help="a new folder; default: %(default)s")
    bench = command("bench", run_bench, "time us and our rivals, predict floors, or compare samplers by their rewards")
    bench.add_argument("suite", nargs="?", choices=SUITES, default="all", help=f"one of {', '.join(SUITES)}")
    bench.add_argument("config", nargs="?", metavar="CONFIG", help=f"with --gate: {config_help}")
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.add_argument("--quick", action="store_true", help="small cases, within a minute; writes no rows")
    bench.add_argument("--budget", metavar="TIME", help="begin nothing that would end later: 10m, 90s, 1h")
    bench.add_argument("--again", action="store_true", help="measure what has rows of this commit and device, too")
    bench.add_argument("--preset", action="append", default=[], metavar="NAME", help="only this one's cases or steps")
    bench.add_argument("--predict", metavar="GPU", help="print predicted floors: H200, H100, A100, RTX 4090, RTX 5090")
    bench.add_argument(
        "--gate", nargs="*", metavar="key=value",
        help="draw captions of held-out images with CONFIG's sampler and with the reference; status 1 if the rewards "
        "agree less than allowed. Where CONFIG has the reference itself: the standard samplers, side by side",
    )  # fmt: skip
    bench.add_argument("--images", type=int, default=64, help="held-out images of --gate (default: %(default)s)")
    bench.add_argument(
        "--out", type=Path, metavar="FOLDER", help="rows and plots; default: benchmarks/results, of --gate bench"
    )

    report = command("report", run_report, "write a run's report.html")
    report.add_argument("run", type=Path, metavar="RUN")
    command("env", run_env, "print versions and hardware")

    tiny = command("tiny", None, "the small world that ships with the package")
    actions = tiny.add_subparsers(metavar="ACTION", required=True)
    export = actions.add_parser("export", help="write scenes as PNG files with captions.jsonl")
    export.set_defaults(function=run_tiny_export)
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--split", choices=("train", "heldout"), default="train")
    export.add_argument("--count", type=int, default=1024)
    export.add_argument("--seed", type=int, default=0)
    pretrain = actions.add_parser("pretrain", help="train the small weights anew (an hour on two cores)")
    pretrain.set_defaults(function=run_tiny_pretrain)
    pretrain.add_argument("--out", type=Path, default=Path("tiny-weights"))
    pretrain.add_argument(
        "--work", type=Path, default=Path(".pretrain"), help="where interrupted training goes on from"
    )
    return parser


def run_train(arguments: argparse.Namespace) -> int:
    from .config import load_config

    config = filled(load_config(arguments.config, arguments.overrides), arguments)
    quiet_libraries()
    from .guards import Interrupted, RunFailed
    from .trainer import train

    print(sampler_line(config), flush=True)
    try:
        folder = train(config, resume=arguments.resume or bool(arguments.force_resume), force=arguments.force_resume)
    except Interrupted as stopped:
        print(stopped)
        return stopped.status
    except RunFailed as error:
        print(error, file=sys.stderr)
        return FAILURE
    print_summary(json.loads((folder / "summary.json").read_text()))
    print(f"\nopen {folder / 'report.html'}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from glob import glob

    from rich import print as show
    from rich.table import Table

    from .config import load_config
    from .models.sources import find_sources

    config = filled(load_config(arguments.config, arguments.overrides), arguments)
    find_sources(config)
    table = Table("stage", "steps", "images", "× group", "= samples", "in micro-batches of", "optimiser steps")
    for number in config.stages:
        stage = getattr(config, f"stage{number}")
        group, updates = getattr(stage, "group_size", 1), getattr(stage, "updates", 1)
        samples = stage.images * group
        passes = f"{stage.micro_batch} ({samples // stage.micro_batch})"
        if number == 3:
            passes += f", at {stage.window} sampler steps"
        row = (number, stage.steps, stage.images, group, samples, passes, stage.steps * updates)
        table.add_row(*map(str, row))
    show(table)
    show(f"renders: {config.render.steps} steps at {config.data.resolution}², {config.render.batch} at once")
    show(sampler_line(config))
    for key in ("train", "heldout"):
        place = getattr(config.data, key)
        if "@" not in place and not glob(place):
            show(f"data.{key}: {place} is not there yet")
    show("the configuration is sound")
    show_memory(config, arguments.gpu_memory)
    return 0


def filled(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration with the batches of `--fill-memory`, which are said; as it is without that."""
    if arguments.fill_memory is None:
        return config
    quiet_libraries()
    from .config import load_config
    from .models.memory import GIB, fill

    changes = fill(config, int(arguments.fill_memory * GIB))
    print(f"predicted to fit {arguments.fill_memory:g} GiB: {' '.join(changes)}", flush=True)
    return load_config(arguments.config, [*arguments.overrides, *changes])


def show_memory(config: Config, limit: float | None) -> None:
    """The predicted memory of each stage, and what to change where it is more than `limit` GiB."""
    from rich import print as show
    from rich.table import Table

    quiet_libraries()
    from .models.memory import CUDA_BYTES, GIB, advise, predict, worst

    table = Table("stage", "needs most while", "weights and optimiser", "passing", "in all", title="predicted GiB")
    predicted = predict(config)
    for number, phases in predicted.items():
        peak = worst(phases)
        table.add_row(
            str(number), peak.name, *(f"{size / GIB:.2f}" for size in (peak.resident, peak.passing, peak.total))
        )
    show(table)
    show(f"every sum has {CUDA_BYTES / GIB:.1f} GiB for CUDA itself; nothing here is measured")
    for number, phases in predicted.items():
        if limit is not None and worst(phases).total > limit * GIB:
            _, changes, needs = advise(config, number, phases, int(limit * GIB))
            verdict = "would need" if needs.total <= limit * GIB else "would still need"
            words = f"with {' '.join(changes)} it {verdict} {needs.total / GIB:.2f}" if changes else "nothing to change"
            show(f"stage {number} does not fit {limit:g} GiB: {words}")


def run_configs(arguments: argparse.Namespace) -> int:
    from .config import PRESETS, ConfigError, find_config, preset_names, printable

    if arguments.action == "list":
        for name in preset_names():
            first_line = (PRESETS / f"{name}.yaml").read_text().splitlines()[0]
            print(f"{name:<12} {first_line.removeprefix('# ')}")
        return 0
    if arguments.name is None:
        raise ConfigError([f"configs copy: name a preset: {', '.join(preset_names())}"])
    source, target = find_config(arguments.name), Path(f"{arguments.name}.yaml")
    if arguments.name not in preset_names():
        names = ", ".join(preset_names())
        raise ConfigError([f"configs copy: {printable(arguments.name)} is no preset; presets: {names}"])
    if target.exists():
        raise ConfigError([f"configs copy: {target} exists already"])
    target.write_text(source.read_text())
    print(f"wrote {target}; run it with: uae-fast train {target}")
    return 0


def run_caption(arguments: argparse.Namespace) -> int:
    from .config import printable

    config, models = open_models(arguments)
    lines = []
    for path, caption in zip(*caption_images(arguments, config, models)[::2], strict=True):
        row = json.dumps({"file": path.name, "caption": caption})
        lines.append(row if arguments.jsonl else f"{printable(str(path))}: {printable(caption)}")
    if arguments.jsonl in (None, "-"):
        print("\n".join(lines))
    else:
        Path(arguments.jsonl).write_text("\n".join(lines) + "\n")
    return 0


def run_reconstruct(arguments: argparse.Namespace) -> int:
    from .config import printable
    from .evaluate.heldout import to_image
    from .rollout.renders import draw
    from .seeds import derive_seed

    config, models = open_models(arguments)
    paths, images, captions = caption_images(arguments, config, models)
    drawn = draw(config, models, captions, [derive_seed(arguments.seed, "draw")] * len(captions))
    rewards = models.reward(drawn, models.reward.embed_sources(images)).tolist()
    rows = list(zip(images, map(to_image, drawn), captions, rewards, strict=True))
    side_by_side(rows).save(arguments.out)
    for path, caption, reward in zip(paths, captions, rewards, strict=True):
        print(f"{printable(str(path))}: {printable(caption)}  (reward {reward:.3f})")
    print(f"wrote {arguments.out}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from .config import ConfigError, load_config
    from .models.loading import load_models, load_run
    from .models.sources import find_sources
    from .parquet import open_images

    place = Path(arguments.config)
    is_run = place.is_dir() and (place / "config.yaml").is_file()
    config = load_config(place / "config.yaml" if is_run else arguments.config, arguments.overrides)
    problems = [f"--tokens {k}: must be at least 1" for k in arguments.tokens if k < 1]
    if arguments.out.exists():
        problems.append(f"--out {arguments.out}: exists already; name a new folder")
    if arguments.at and not is_run:
        problems.append(f"--at {arguments.at}: {arguments.config} is no run's folder")
    if arguments.reconstructions and (arguments.tokens or arguments.at):
        problems.append("--reconstructions: is instead of drawing; leave out --tokens and --at")
    if problems:
        raise ConfigError(problems)
    sources = find_sources(config)
    data = open_images(config.data.heldout, "data.heldout", config.data)
    quiet_libraries()
    from .evaluate.unified_bench import WHOLE, compare, reconstruct, save_scores

    tokens = sorted(set(arguments.tokens))
    drawn = arguments.reconstructions
    if drawn is None:
        models = load_run(place, arguments.at, arguments.overrides)[1] if is_run else load_models(config)
        reconstruct(config, models, data, arguments.out, tokens)
        del models  # the image encoders need its memory
        drawn = arguments.out / WHOLE
    whole = compare(config, data, sources.judges, drawn)
    by_tokens = {k: compare(config, data, sources.judges, arguments.out / str(k)) for k in tokens}
    save_scores(arguments.out, whole, by_tokens)
    print_scores(whole, by_tokens)
    print(f"wrote {arguments.out}")
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    from .evaluate.heldout import to_image
    from .rollout.renders import draw
    from .seeds import derive_seed

    config, models = open_models(arguments)
    drawn = draw(config, models, [arguments.text], [derive_seed(arguments.seed, "draw")])
    to_image(drawn[0]).save(arguments.out)
    print(f"wrote {arguments.out}")
    return 0


def run_import_uae(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    from .models.importing import import_uae

    notes = import_uae(
        arguments.folder,
        arguments.out,
        sd3=arguments.sd3,
        processor=arguments.processor,
        reward=arguments.reward,
        overrides=arguments.overrides,
    )
    for note in notes:
        print(note)
    print(f"wrote {arguments.out}; caption with it: uae-fast caption IMAGE --run {arguments.out}")
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    if arguments.gate is not None:
        return run_gate(arguments)
    import subprocess

    from .config import ConfigError

    checkout = Path(__file__).parents[1]
    if arguments.config or arguments.overrides:
        raise ConfigError([f"bench: {arguments.config} is for --gate; what is timed is one of {', '.join(SUITES)}"])
    if not (checkout / "benchmarks" / "run.py").is_file():
        missing = f"bench: the suites are part of a source checkout, and {checkout} is none"
        raise ConfigError([f"{missing}: get the repository of uae-fast, and call make bench there (--gate works here)"])
    command = [sys.executable, "-m", "benchmarks.run", arguments.suite]
    for name in ("budget", "predict"):
        if value := getattr(arguments, name):
            command += [f"--{name}", value]
    for name in ("quick", "again"):
        command += [f"--{name}"] * getattr(arguments, name)
    for preset in arguments.preset:
        command += ["--preset", preset]
    if arguments.out is not None:
        command += ["--out", str(arguments.out.resolve())]
    return subprocess.run(command, cwd=checkout).returncode


def run_gate(arguments: argparse.Namespace) -> int:
    from .config import ConfigError, load_config

    if arguments.suite not in ("all", "sampler") or arguments.config is None:
        raise ConfigError(["bench: --gate compares the samplers of a configuration: bench sampler CONFIG --gate"])
    overrides = [*arguments.overrides, *arguments.gate]
    load_config(arguments.config, overrides)  # its mistakes, before anything heavy is imported
    quiet_libraries()
    from .evaluate.gates import gate

    def configure(*more: str) -> Config:
        return load_config(arguments.config, [*overrides, *more])

    return gate(configure, arguments.config, arguments.out or Path("bench"), arguments.images)


def run_report(arguments: argparse.Namespace) -> int:
    from .config import ConfigError
    from .report import write_report

    try:
        print(f"wrote {write_report(arguments.run)}")
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    return 0


def run_env(arguments: argparse.Namespace) -> int:
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .determinism import describe_determinism

    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    names = ("uae-fast", "uae-kernels", "torch", "triton", "transformers", "diffusers", "peft", "accelerate")
    for name in (*names, "bitsandbytes", "safetensors", "pyyaml", "flash-attn", "xformers"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        print("GPU none")
    print(describe_determinism())
    return 0


def run_tiny_export(arguments: argparse.Namespace) -> int:
    from .config import ConfigError
    from .tiny.export import export

    try:
        export(arguments.folder, arguments.split, arguments.count, arguments.seed)
    except ValueError as error:
        raise ConfigError([f"tiny export: {error}"]) from None
    print(f"wrote {arguments.count} scenes of the {arguments.split} split into {arguments.folder}")
    return 0


def run_tiny_pretrain(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    from .tiny.pretrain import pretrain

    pretrain(arguments.out, arguments.work)
    return 0


def sampler_line(config: Config) -> str:
    """How images will be drawn: what computes them, and what makes them another sampler's."""
    import torch
    from uae_kernels.mmdit.joint_attention import check_backend

    from .config import ConfigError, accelerated, cheaper

    sampler = config.same_sampler
    try:
        attention = check_backend(sampler.attention)
    except RuntimeError as error:
        raise ConfigError([f"same_sampler.attention: {error}"]) from None
    line = f"decoder: accelerated, attention by {attention}" if accelerated(config) else "decoder: by diffusers"
    if sampler.fp8:
        emulated = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
        line += ", products in fp8 where it is frozen" + (" (emulated)" if emulated else "")
    if sampler.accelerate and config.models.offload:
        line += ", because of models.offload"
    if sampler.graph:
        from .models.loading import records_graphs

        line += ", its steps in CUDA graphs" * records_graphs(config)
    changed = ", ".join(f"{key} {value}" for key, value in cheaper(config).items())
    return f"{line}; cheaper sampler: {changed}" if changed else line


def open_models(arguments: argparse.Namespace) -> tuple[Config, Models]:
    """Configuration and networks of `--run` at `--at`, or those of the package."""
    quiet_libraries()
    from .config import ConfigError, load_config
    from .models.loading import load_models, load_run

    if arguments.run is not None:
        return load_run(arguments.run, arguments.at)
    if arguments.at not in (None, "before"):
        raise ConfigError([f"--at {arguments.at}: name the run with --run"])
    config = load_config("tiny")
    return config, load_models(config)


def caption_images(
    arguments: argparse.Namespace, config: Config, models: Models
) -> tuple[list[Path], list[Image.Image], list[str]]:
    """Paths, images and captions of the files and folders given; unreadable files are named and left out."""
    from .config import ConfigError, printable
    from .data import SUFFIXES, load_image
    from .rollout.captions import sample_captions
    from .seeds import derive_seed

    paths: list[Path] = []
    for path in arguments.images:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        paths += inside
    images, readable = [], []
    for path in paths:
        try:
            images.append(load_image(path))
            readable.append(path)
        except Exception as error:  # whatever a decoder raises on a broken file
            print(printable(f"skipped {path}: {error}"), file=sys.stderr)
    if not images:
        raise ConfigError([printable("no readable image among " + ", ".join(map(str, arguments.images)))])
    captions: list[str] = []
    for start in range(0, len(images), config.render.batch):
        chunk = slice(start, start + config.render.batch)
        captions += sample_captions(
            models.encoder,
            models.encoder.prompt(images[chunk]),
            [derive_seed(arguments.seed, "caption", path.name) for path in readable[chunk]],
            temperature=config.caption.temperature,
            max_new_tokens=config.caption.max_new_tokens,
            engine=config.caption.engine,
        ).texts
    return readable, images, captions


def side_by_side(rows: list[tuple[Image.Image, Image.Image, str, float]], panel: int = 256) -> Image.Image:
    """One picture: a row for each (source, reconstruction, caption, reward)."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font, gap = ImageFont.load_default(15), 16
    captions = [textwrap.wrap(f"{caption}  (reward {reward:.3f})", 68) for _, _, caption, reward in rows]
    heights = [panel + gap + 20 * len(lines) + gap for lines in captions]
    sheet = Image.new("RGB", (2 * panel + 3 * gap, sum(heights) + gap), "white")
    pen, top = ImageDraw.Draw(sheet), gap
    for (source, drawn, _, _), lines, height in zip(rows, captions, heights, strict=True):
        for column, image in enumerate((source, drawn)):
            method = Image.Resampling.NEAREST if max(image.size) < panel else Image.Resampling.LANCZOS
            shown = ImageOps.contain(image, (panel, panel), method)
            sheet.paste(shown, (gap + column * (panel + gap) + (panel - shown.width) // 2, top))
        pen.text((gap, top + panel + 6), "\n".join(lines), "black", font)
        top += height
    return sheet


def print_summary(summary: dict) -> None:
    """The moments of a run as a table."""
    from rich.console import Console
    from rich.table import Table

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


def print_scores(whole: dict, by_tokens: dict[int, dict]) -> None:
    """Mean cosines as the published tables have them, times 100: a row for each length of captions."""
    from rich.console import Console
    from rich.table import Table

    table = Table("captions", *whole["encoders"], "overall", title="cosine of source and reconstruction × 100")
    for name, found in {"whole": whole, **{f"{k} tokens": found for k, found in by_tokens.items()}}.items():
        averages = [encoder["average"] for encoder in found["encoders"].values()]
        table.add_row(name, *(f"{100 * value:.2f}" for value in (*averages, found["overall"])))
    Console().print(table)


def quiet_libraries() -> None:
    """Turns off the libraries' own progress bars and advice; their errors still show."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module="PIL")  # of files that it reads all the same
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
