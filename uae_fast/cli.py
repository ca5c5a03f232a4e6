"""The command `uae-fast`: what can be said to it. What a command does is a function with its options as parameters.

Functions import the heavy libraries they need, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import MOMENTS, PRESETS, Config, ConfigError, find_config, load_config, preset_names
from .environment import describe_environment, first_process_speaks, quiet_libraries
from .text import printable

SUITES = ("all", "kernels", "sampler", "trainer")
FAILURE, USER_MISTAKE, STOPPED = 1, 2, 130
GROUPS = {"tiny": "the small world that ships with the package"}  # first words of commands of two
COMMANDS: dict[str, tuple[Callable[..., int | None], str, tuple[Any, ...]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 after SIGINT (Ctrl-C), 143 after SIGTERM.
    """
    parser = build_parser()
    parsed, rest = parser.parse_known_args(argv)
    options = vars(parsed)
    function = options.pop("function")
    if rest and ("overrides" not in options or any("=" not in word or word[0] == "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options["overrides"] += rest  # argparse takes no more of them once an option stood between
    with first_process_speaks():
        try:
            return function(**options) or 0
        except ConfigError as error:
            print(error, file=sys.stderr)
            return USER_MISTAKE
        except KeyboardInterrupt:
            return STOPPED


def build_parser() -> argparse.ArgumentParser:
    """A parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="uae-fast", description="Train a model that describes images and a model that redraws them."
    )
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for words, (function, help, options) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            added = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = added.add_subparsers(metavar="ACTION", required=True)
        added = groups[group].add_parser(name, help=help, description=help)
        for names, settings in options:
            added.add_argument(*names, **settings)
        added.set_defaults(function=function)
    return parser


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An option or argument, as `ArgumentParser.add_argument` takes it."""
    return names, settings


def command(words: str, help: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> Callable:
    """Makes a function a command: its parameters are named as the options are, its result is the exit status."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        COMMANDS[words] = function, help, options
        return function

    return register


CONFIG_HELP = "a YAML file, or a preset's name (see: uae-fast configs)"
PLACE_HELP = "a folder or owner/name@commit; default: "
CONFIG = option("name", metavar="CONFIG", help=CONFIG_HELP)
OVERRIDES = option("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. stage2.lr=1e-5")
FILL_MEMORY = option(
    "--fill-memory", type=float, metavar="GiB",
    help="choose the largest micro-batches and render.batch that are predicted to fit",
)  # fmt: skip
IMAGES = option("images", nargs="+", type=Path, metavar="IMAGE|DIR")
RUN = option("--run", type=Path, help="a run's folder; without one, the weights in the package")
AT = option("--at", choices=MOMENTS, help="which moment of the run; its last one unless given")
SEED = option("--seed", type=int, default=0, help="of captions and drawings (default: 0)")


def configure(name: str, overrides: list[str], fill_memory: float | None) -> Config:
    """The configuration, with the batches of `--fill-memory` if that is given."""
    config = load_config(name, overrides)
    if fill_memory is None:
        return config
    from .check import fill_batches

    return load_config(name, [*overrides, *fill_batches(config, fill_memory)])


@command(
    "train", "run the stages of a configuration", CONFIG, OVERRIDES,
    option("--resume", action="store_true", help="go on from the run's last checkpoint"),
    option(
        "--force-resume", action="append", default=[], metavar="KEY",
        help="go on although KEY is not what it was (stage2.lr, models.path, data.train, …); may be repeated",
    ),
    FILL_MEMORY,
)  # fmt: skip
def run_train(
    name: str, overrides: list[str], resume: bool, force_resume: list[str], fill_memory: float | None
) -> int | None:
    config = configure(name, overrides, fill_memory)
    quiet_libraries()
    from .check import sampler_line
    from .evaluate.heldout import print_summary
    from .guards import Interrupted, RunFailed
    from .trainer import train

    print(sampler_line(config), flush=True)
    try:
        folder = train(config, resume=resume or bool(force_resume), force=force_resume)
    except Interrupted as stopped:
        print(stopped)
        return stopped.status
    except RunFailed as error:
        print(error, file=sys.stderr)
        return FAILURE
    print_summary(json.loads((folder / "summary.json").read_text()))
    print(f"\nopen {folder / 'report.html'}")
    return None


@command(
    "check", "check a configuration and show what a step of it is made of", CONFIG, OVERRIDES, FILL_MEMORY,
    option("--gpu-memory", type=float, metavar="GiB", help="say what to change where a stage needs more"),
)  # fmt: skip
def run_check(name: str, overrides: list[str], fill_memory: float | None, gpu_memory: float | None) -> None:
    config = configure(name, overrides, fill_memory)
    from .check import show_check

    show_check(config, gpu_memory)


@command(
    "configs", "list the presets, or copy one to edit",
    option("action", nargs="?", choices=("list", "copy"), default="list"),
    option("name", nargs="?", help="the preset to copy into this folder"),
)  # fmt: skip
def run_configs(action: str, name: str | None) -> None:
    texts = {preset: (PRESETS / f"{preset}.yaml").read_text() for preset in preset_names()}
    if action == "list":
        for preset, text in texts.items():
            print(f"{preset:<12} {text.splitlines()[0].removeprefix('# ')}")
        return
    if name is None:
        raise ConfigError([f"configs copy: name a preset: {', '.join(texts)}"])
    if name not in texts:
        find_config(name)  # says what is near it, unless it is a file
        raise ConfigError([f"configs copy: {printable(name)} is no preset; presets: {', '.join(texts)}"])
    target = Path(f"{name}.yaml")
    if target.exists():
        raise ConfigError([f"configs copy: {target} exists already"])
    target.write_text(texts[name])
    print(f"wrote {target}; run it with: uae-fast train {target}")


@command(
    "caption", "write captions of images", IMAGES,
    option("--jsonl", metavar="FILE", help="write {file, caption} lines into FILE (- for the screen)"), RUN, AT, SEED,
)  # fmt: skip
def run_caption(images: list[Path], jsonl: str | None, run: Path | None, at: str | None, seed: int) -> None:
    quiet_libraries()
    from .inference import caption_images, open_models

    found = caption_images(*open_models(run, at), images, seed)
    lines = [json.dumps({"file": each.path.name, "caption": each.caption}) for each in found]
    if jsonl is None:
        lines = [f"{printable(str(each.path))}: {printable(each.caption)}" for each in found]
    if jsonl in (None, "-"):
        print("\n".join(lines))
    else:
        Path(jsonl).write_text("\n".join(lines) + "\n")


@command(
    "reconstruct", "caption images, redraw them, and show both side by side", IMAGES,
    option("--out", type=Path, default=Path("reconstruction.png"), help="default: %(default)s"), RUN, AT, SEED,
)  # fmt: skip
def run_reconstruct(images: list[Path], out: Path, run: Path | None, at: str | None, seed: int) -> None:
    quiet_libraries()
    from .inference import open_models, reconstruct, side_by_side

    found = reconstruct(*open_models(run, at), images, seed)
    side_by_side(found).save(out)
    for each in found:
        print(f"{printable(str(each.path))}: {printable(each.caption)}  (reward {each.reward:.3f})")
    print(f"wrote {out}")


@command(
    "generate", "draw an image from a text", option("text", metavar="TEXT"),
    option("--out", type=Path, default=Path("generated.png"), help="default: %(default)s"), RUN, AT, SEED,
)  # fmt: skip
def run_generate(text: str, out: Path, run: Path | None, at: str | None, seed: int) -> None:
    quiet_libraries()
    from .inference import generate, open_models

    generate(*open_models(run, at), text, seed).save(out)
    print(f"wrote {out}")


@command(
    "import-uae", "read the weights that UAE's authors released into a run's folder",
    option("folder", type=Path, metavar="DIR", help="with llm, llm_lora, dit and dit_lora"),
    option("out", type=Path, metavar="OUT", help="the run's folder, for --run"),
    option("overrides", nargs="*", metavar="key=value", help="of the run's configuration"),
    option("--sd3", default="", help=f"Stable Diffusion 3.5 large, {PLACE_HELP}DIR/SD3"),
    option("--processor", default="", help=f"tokenizer and image processor, {PLACE_HELP}DIR/llm_processor"),
    option("--reward", default="", help=f"image encoder of the reward, {PLACE_HELP}CLIP ViT-L/14"),
)  # fmt: skip
def run_import_uae(folder: Path, out: Path, overrides: list[str], sd3: str, processor: str, reward: str) -> None:
    quiet_libraries()
    from .models.importing import import_uae

    for note in import_uae(folder, out, sd3=sd3, processor=processor, reward=reward, overrides=overrides):
        print(note)
    print(f"wrote {out}; caption with it: uae-fast caption IMAGE --run {out}")


@command(
    "evaluate", "Unified-Bench: redraw held-out images from their captions, and compare",
    option("place", metavar="CONFIG|RUN", help=f"{CONFIG_HELP}, or a run's folder"),
    option("overrides", nargs="*", metavar="key=value", help="evaluate.images=100, evaluate.encoders=[…]"),
    AT,
    option(
        "--tokens", type=int, action="append", default=[], metavar="K",
        help="also with captions cut to K tokens; may be repeated",
    ),
    option(
        "--reconstructions", type=Path, metavar="DIR",
        help="compare these files instead of drawing: of the sources' names, perhaps after recon_",
    ),
    option("--out", type=Path, default=Path("unified-bench"), help="a new folder; default: %(default)s"),
)  # fmt: skip
def run_evaluate(
    place: str, overrides: list[str], at: str | None, tokens: list[int], reconstructions: Path | None, out: Path
) -> None:
    from .evaluate.unified_bench import evaluate

    evaluate(place, overrides, out, at=at, tokens=tokens, reconstructions=reconstructions)


@command(
    "bench", "time us and our rivals, predict floors, or compare samplers by their rewards",
    option("suite", nargs="?", choices=SUITES, default="all", help=f"one of {', '.join(SUITES)}"),
    option("name", nargs="?", metavar="CONFIG", help=f"with --gate: {CONFIG_HELP}"),
    option("overrides", nargs="*", metavar="key=value"),
    option("--quick", action="store_true", help="small cases, within a minute; writes no rows"),
    option("--budget", metavar="TIME", help="begin nothing that would end later: 10m, 90s, 1h"),
    option("--again", action="store_true", help="measure what has rows of this commit and device, too"),
    option("--preset", action="append", default=[], metavar="NAME", help="only this one's cases or steps"),
    option("--predict", metavar="GPU", help="print predicted floors: H200, H100, A100, RTX 4090, RTX 5090"),
    option(
        "--gate", nargs="*", metavar="key=value",
        help="draw captions of held-out images with CONFIG's sampler and with the reference; status 1 if the rewards "
        "agree less than allowed. Where CONFIG has the reference itself: the standard samplers, side by side",
    ),
    option("--images", type=int, default=64, help="held-out images of --gate (default: %(default)s)"),
    option("--out", type=Path, metavar="FOLDER", help="rows and plots; default: benchmarks/results, of --gate bench"),
)  # fmt: skip
def run_bench(
    suite: str, name: str | None, overrides: list[str], quick: bool, budget: str | None, again: bool,
    preset: list[str], predict: str | None, gate: list[str] | None, images: int, out: Path | None,
) -> int:  # fmt: skip
    if gate is not None:
        if suite not in ("all", "sampler") or name is None:
            raise ConfigError(["bench: --gate compares the samplers of a configuration: bench sampler CONFIG --gate"])
        given = [*overrides, *gate]
        load_config(name, given)  # its mistakes, before anything heavy is imported
        quiet_libraries()
        from .evaluate.gates import run_gate

        return run_gate(lambda *more: load_config(name, [*given, *more]), name, out or Path("bench"), images)
    checkout = Path(__file__).parents[1]
    if name or overrides:
        raise ConfigError([f"bench: {name} is for --gate; what is timed is one of {', '.join(SUITES)}"])
    if not (checkout / "benchmarks" / "run.py").is_file():
        missing = f"bench: the suites are part of a source checkout, and {checkout} is none"
        raise ConfigError([f"{missing}: get the repository of uae-fast, and call make bench there (--gate works here)"])
    command = [sys.executable, "-m", "benchmarks.run", suite]
    for key, value in {"budget": budget, "predict": predict}.items():
        command += [f"--{key}", value] if value else []
    command += ["--quick"] * quick + ["--again"] * again
    for each in preset:
        command += ["--preset", each]
    command += ["--out", str(out.resolve())] if out else []
    return subprocess.run(command, cwd=checkout).returncode


@command("report", "write a run's report.html", option("run", type=Path, metavar="RUN"))
def run_report(run: Path) -> None:
    from .report import write_report

    print(f"wrote {write_report(run)}")


@command("env", "print versions and hardware")
def run_env() -> None:
    for line in describe_environment():
        print(line)


@command(
    "tiny export", "write scenes as PNG files with captions.jsonl",
    option("folder", type=Path, metavar="DIR"),
    option("--split", choices=("train", "heldout"), default="train"),
    option("--count", type=int, default=1024),
    option("--seed", type=int, default=0),
)  # fmt: skip
def run_tiny_export(folder: Path, split: str, count: int, seed: int) -> None:
    from .tiny.export import export

    try:
        export(folder, split, count, seed)
    except ValueError as error:
        raise ConfigError([f"tiny export: {error}"]) from None
    print(f"wrote {count} scenes of the {split} split into {folder}")


@command(
    "tiny pretrain", "train the small weights anew (an hour on two cores)",
    option("--out", type=Path, default=Path("tiny-weights")),
    option("--work", type=Path, default=Path(".pretrain"), help="where interrupted training goes on from"),
)  # fmt: skip
def run_tiny_pretrain(out: Path, work: Path) -> None:
    quiet_libraries()
    from .tiny.pretrain import pretrain

    pretrain(out, work)


if __name__ == "__main__":
    sys.exit(main())
