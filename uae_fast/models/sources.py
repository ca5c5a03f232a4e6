"""Where models come from, folders or revisions of Hub repositories, and what their configurations say in advance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoint import STATE
from ..config import Config, ConfigError
from ..text import printable

TINY = Path(__file__).parent.parent / "tiny" / "weights"
SHAPES = Path(__file__).parent / "shapes"
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(@(?P<revision>[0-9a-f]{40}))?")
FILES = {
    "model": "config.json",
    "preprocessor": "preprocessor_config.json",
    "scheduler": "scheduler/scheduler_config.json",
}  # of other parts PART/config.json
HINT = '"tiny" names the weights in the package'
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Source:
    """A folder, or a Hub repository at one commit.

    Attributes:
        name: the folder, or "owner/name".
        revision: the commit of a Hub repository; None for a folder.
        key: the configuration key that names it, for messages.
    """

    name: str
    revision: str | None = None
    key: str = field(default="models.path", compare=False)

    @classmethod
    def parse(cls, text: str, key: str) -> Source:
        """Reads "folder" or "owner/name@commit", the value of the configuration key `key`.

        Raises:
            ConfigError: no such folder, or a Hub repository without a commit.
        """
        if Path(text).is_dir():
            return cls(text, key=key)
        match = HUB_ID.fullmatch(text)
        if match is None:
            raise ConfigError([f"{key}: {text!r} is neither a folder nor owner/name@commit of a Hub repository"])
        if match["revision"] is None:
            known = shipped_shape(match["name"])
            pinned = f"{text.partition('@')[0]}@{known['revision'] if known else '<the 40 digits of a commit>'}"
            raise ConfigError([f"{key}: there is no folder {text}; a Hub repository needs its revision: {pinned}"])
        return cls(match["name"], match["revision"], key)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def folder(self) -> Path | None:
        """The folder, or None for a Hub repository."""
        return Path(self.name) if self.revision is None else None

    def pretrained(self, subfolder: str = "") -> dict[str, Any]:
        """Keyword arguments for a library's `from_pretrained`: of a folder nothing is looked for elsewhere."""
        if self.revision is None:
            return {"pretrained_model_name_or_path": str(Path(self.name) / subfolder), "local_files_only": True}
        return {"pretrained_model_name_or_path": self.name, "revision": self.revision, "subfolder": subfolder}

    def local(self, *parts: str) -> Path:
        """The folder itself, or one with these subfolders of the repository, downloaded."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        patterns = [f"{part}/*" for part in parts]
        return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))

    def has(self, file: str) -> bool:
        """Whether a folder has a file (or subfolder); a Hub repository is believed to have everything."""
        return self.folder is None or (self.folder / file).exists()

    def configuration(self, part: str) -> dict[str, Any]:
        """A part's configuration ("model", "preprocessor", "transformer", "vae" or "scheduler") as its JSON says.

        Of a folder it is read there; of a repository whose shape ships with the package, from the package; of any
        other it is downloaded.
        """
        name = FILES.get(part, f"{part}/config.json")
        if self.folder is not None:
            path = self.folder / name
        elif shipped := shipped_shape(self.name):
            return shipped[part]
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(self.name, name, revision=self.revision))
        return json.loads(path.read_text(encoding="utf-8"))


def shipped_shape(name: str) -> dict[str, Any] | None:
    """The configurations of a well-known Hub repository, with the "revision" they were read at; None for others."""
    path = SHAPES / f"{name.replace('/', '--')}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class Sources:
    """Where each part of a run comes from.

    Attributes:
        encoder: model, tokenizer and image processor.
        decoder: transformer, vae, scheduler and, for the pooled condition, `pooled.safetensors` or the text encoders.
        projector: `projector.safetensors`, or None for a new one.
        rewards: image encoders whose cosines the reward is made of.
        heldout: the image encoder that is only reported, if there is one.
        judges: the image encoders of `uae-fast evaluate`.
    """

    encoder: Source
    decoder: Source
    projector: Path | None
    rewards: tuple[Source, ...]
    heldout: Source | None
    judges: tuple[Source, ...]


def models_folder(config: Config) -> Path | None:
    """The folder behind `models.path`; None where that is empty."""
    path = config.models.path
    return TINY if path == "tiny" else Path(path) if path else None


def pooled_file(config: Config, decoder: Source) -> Path:
    """Where a decoder's pooled condition is, or will be once its text encoders have made it.

    Beside a decoder in a folder if it is there already; else in `models.cache` if that is given; else beside a decoder
    in a folder, or in the run's folder.
    """
    if decoder.folder is not None:
        beside = decoder.folder / "pooled.safetensors"
        if beside.is_file() or not config.models.cache:
            return beside
    name = hashlib.sha256(json.dumps([decoder.name, decoder.revision]).encode()).hexdigest()[:16]
    return Path(config.models.cache or Path(config.run) / "cache") / f"pooled-{name}.safetensors"


@contextmanager
def named(key: str, what: object) -> Iterator[None]:
    """Within, whatever a library raises on a file that is not what it should be becomes a line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        reason = " ".join(lines[: 1 + lines[0].endswith(":")])  # of load_state_dict's, what is wrong is in the second
        raise ConfigError([f"{key}: {what} cannot be loaded: {printable(reason)}"]) from error


def unsafe_weights(folder: Path, key: str) -> list[str]:
    """Why the weights of a model's folder are not read, if they are not: nothing here is unpickled."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            return [f"has its weights as pickles ({', '.join(pickles)}), which may run code; convert to safetensors"]
        return ["has no weights (*.safetensors)"]
    outside = []
    for index in folder.glob("*.index.json"):
        with named(key, index):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside += [f"has a shard outside itself: {printable(name)}" for name in shards if Path(name).name != name]
    return outside


def find_sources(config: Config) -> Sources:
    """The sources of a configuration's models. Of what has no folder here, nothing is loaded without its commit.

    Raises:
        ConfigError: with every part that is missing or misnamed, or has weights that cannot be read without running
            code, and with what does not fit (`problems_of_fit`).
    """
    folder, problems = models_folder(config), []
    if folder is not None and not folder.is_dir():
        raise ConfigError([f"models.path: {folder} is no folder on this machine; {HINT}"])

    def find(text: str, key: str, place: str, needs: tuple[str, ...]) -> Source | None:
        if not text and folder is None:
            problems.append(f"{key}: names nothing, and neither does models.path")
            return None
        try:
            source = Source.parse(text, key) if text else Source(str(folder / place))  # type: ignore[operator]
        except ConfigError as error:
            problems.extend(error.problems)
            return None
        for need in needs:
            if not source.has(need):
                lack = f"{source.folder} has no {need}" if text else f"{folder} has no {place}/{need}; {HINT}"
                problems.append(f"{source.key}: {lack}")
        if source.folder is not None and config.models.load == "pretrained":
            tiny = ("vae_tiny",) if config.cheaper_sampler.vae == "tiny" else ()
            for part in ("transformer", "vae", *tiny) if "vae" in needs else ("",):
                inside = source.folder / part
                if inside.is_dir() and (part or source.has("config.json")):
                    problems.extend(f"{source.key}: {inside} {fault}" for fault in unsafe_weights(inside, source.key))
        return source

    encoder = find(config.models.encoder_from, "models.encoder_from", "encoder", ("config.json",))
    decoder = find(config.models.decoder_from, "models.decoder_from", "decoder", ("transformer", "vae", "scheduler"))
    rewards = [find(text, "reward.encoders", "reward", ("config.json",)) for text in config.reward.encoders or [""]]
    heldout = config.reward.heldout and find(config.reward.heldout, "reward.heldout", "", ("config.json",))
    judges = [find(text, "evaluate.encoders", "", ("config.json",)) for text in config.evaluate.encoders]
    projector = folder / "projector.safetensors" if folder is not None else None
    if projector is not None and not projector.is_file():
        problems.append(f"models.path: {folder} has no projector.safetensors; {HINT}")
    if config.models.start and not (Path(config.models.start) / STATE).is_file():
        problems.append(f"models.start: {config.models.start} is not a checkpoint: it has no {STATE}")
    if decoder is not None and config.models.load == "pretrained" and not pooled_file(config, decoder).is_file():
        lack = f"models.decoder_from: {decoder.name} has no pooled.safetensors, and no"
        needs = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        problems += [f"{lack} {part} to make it" for part in needs if not decoder.has(part)]
    wants_tiny = config.cheaper_sampler.vae == "tiny"
    if decoder is not None and wants_tiny and (decoder.folder is None or not decoder.has("vae_tiny")):
        inside, part = (decoder, "vae_tiny") if config.models.decoder_from else (folder, "decoder/vae_tiny")
        problems.append(f"cheaper_sampler.vae: {inside} has no {part}, an AutoencoderTiny; choose full")
    if problems:
        raise ConfigError(problems)
    assert encoder is not None and decoder is not None
    measured = tuple(filter(None, judges or [*rewards, heldout or None]))
    sources = Sources(encoder, decoder, projector, tuple(filter(None, rewards)), heldout or None, measured)
    if misfits := problems_of_fit(config, sources):
        raise ConfigError(misfits)
    return sources


def image_tokens(config: Config, encoder: Source) -> int:
    """The most tokens an image takes in the encoder's context."""
    if config.caption.image_tokens:
        return config.caption.image_tokens
    processor, vision = encoder.configuration("preprocessor"), encoder.configuration("model")["vision_config"]
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    pixels = processor.get("max_pixels") or (processor.get("size") or {}).get("longest_edge") or 28 * 28 * 1280
    return pixels // side**2


def problems_of_fit(config: Config, sources: Sources) -> list[str]:
    """What does not fit together, told from the parts' configurations alone: nothing has been loaded."""
    found, captions, length, side = [], config.caption, config.condition.length, config.data.resolution
    with named(sources.encoder.key, sources.encoder):
        model, tokens = sources.encoder.configuration("model"), image_tokens(config, sources.encoder)
        context, words = model.get("text_config", model)["max_position_embeddings"], len(captions.prompt.split())
        if tokens + words + captions.max_new_tokens > context:
            found.append(
                f"caption.image_tokens: up to {tokens} tokens of an image, the prompt's {words} words and "
                f"caption.max_new_tokens = {captions.max_new_tokens} do not fit the encoder's context of {context}"
            )
        if length > context:
            found.append(f"condition.length: {length} does not fit the encoder's context of {context}")
    with named(sources.decoder.key, sources.decoder):
        transformer, vae = sources.decoder.configuration("transformer"), sources.decoder.configuration("vae")
        patch = transformer["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        largest = patch * transformer["pos_embed_max_size"]
        if side % patch or not 0 < side <= largest:
            found.append(f"data.resolution: the decoder draws multiples of {patch} pixels up to {largest}, not {side}")
    if sources.projector is not None:
        with named("models.path", sources.projector), safe_open(sources.projector, "pt") as file:
            into, out = file.get_slice("up.weight").get_shape()[1], file.get_slice("down.weight").get_shape()[0]
            states, context = model.get("text_config", model)["hidden_size"], transformer["joint_attention_dim"]
            if (into, out) != (states, context):
                found.append(
                    f"models.path: {sources.projector} leads from {into} channels to {out}, but the encoder's states "
                    f"have {states} and the decoder's context has {context}"
                )
    return found
