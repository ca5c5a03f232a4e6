"""Loading: the real layouts, pinned revisions, dtypes, full-size shapes, and random weights without a file."""

import json
import shutil

import pytest
import torch
from layouts import write_decoder, write_encoder, write_image_encoder
from PIL import Image
from safetensors.torch import load_file, save_file

from uae_fast.checkpoint import checkpoints
from uae_fast.config import ConfigError, load_config
from uae_fast.data import ImageFolder
from uae_fast.models.dummy import empty
from uae_fast.models.loading import load_decoder, load_encoder, load_image_encoder, load_models
from uae_fast.models.sources import SHAPES, TINY, Source, find_sources, pooled_file, shipped_shape
from uae_fast.trainer import STAGES, train

COMMIT = "0123456789abcdef" * 2 + "01234567"


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        find_sources(load_config("tiny", list(overrides)))
    return caught.value.problems


# ---- the Hub's layouts ----------------------------------------------------------------------------------------------


def test_the_hubs_layout_of_qwen_loads_into_the_same_weights(tmp_path):
    """Older tensor names and a flat configuration, as the released files have them."""
    options = {"caption_prompt": "describe the image", "condition_length": 28}
    theirs = load_encoder(Source(str(write_encoder(tmp_path / "encoder"))), **options).model
    ours = load_encoder(Source(str(TINY / "encoder")), **options).model
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    a, b = theirs.config.text_config, ours.config.text_config
    assert a.rope_parameters["mrope_section"] == b.rope_parameters["mrope_section"]
    assert a.rope_parameters["rope_theta"] == b.rope_parameters["rope_theta"]


def test_the_pooled_condition_is_diffusers_own_and_is_made_once(tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    folder = write_decoder(tmp_path / "decoder")
    parts = {
        f"{name}{number}": library.from_pretrained(folder / f"{name}{number}")
        for number in ("", "_2")
        for name, library in (("text_encoder", CLIPTextModelWithProjection), ("tokenizer", CLIPTokenizer))
    }
    file = tmp_path / "cache" / "pooled.safetensors"
    decoder = load_decoder(Source(str(folder)), file)
    pipe = StableDiffusion3Pipeline(
        transformer=decoder.transformer, vae=decoder.vae, scheduler=decoder.scheduler,
        text_encoder_3=None, tokenizer_3=None, **parts,
    )  # fmt: skip
    expected = pipe.encode_prompt("", "", "", do_classifier_free_guidance=False)[2][0]
    assert decoder.pooled.shape == (16,) and torch.equal(decoder.pooled, expected)

    assert [path.name for path in file.parent.iterdir()] == ["pooled.safetensors"]
    for number in ("", "_2"):
        shutil.rmtree(folder / f"text_encoder{number}")
    assert torch.equal(load_decoder(Source(str(folder)), file).pooled, expected)


def test_where_the_pooled_condition_is_kept(tmp_path):
    config = load_config("tiny", [f"run={tmp_path / 'run'}"])
    hub = Source("somebody/something", COMMIT)
    assert pooled_file(config, Source(str(tmp_path))) == tmp_path / "pooled.safetensors"
    assert pooled_file(config, hub).parent == tmp_path / "run" / "cache"
    config.models.cache = str(tmp_path / "cache")
    files = {pooled_file(config, source) for source in (hub, Source(hub.name, COMMIT[::-1]), Source(str(tmp_path)))}
    assert len(files) == 3 and {file.parent for file in files} == {tmp_path / "cache"}
    (tmp_path / "pooled.safetensors").touch()
    assert pooled_file(config, Source(str(tmp_path))) == tmp_path / "pooled.safetensors"


def test_a_run_on_the_real_layouts(tmp_path, world, small_config):
    """All stages from separate folders, with a new projector, equal to nothing but finite and moving."""
    config = small_config(
        world, "stages=[0,1,2,3]", "models.path=", f"models.encoder_from={write_encoder(tmp_path / 'encoder')}",
        f"models.decoder_from={write_decoder(tmp_path / 'decoder')}", "evaluate.images=4",
        f"reward.encoders=[{write_image_encoder(tmp_path / 'clip', 'clip')}]",
    )  # fmt: skip
    run = train(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["grad_norm"] > 0 for row in rows if row["stage"] in ("stage0", "stage1"))
    assert (tmp_path / "decoder" / "pooled.safetensors").is_file()


def test_only_safetensors_are_read(tmp_path):
    folder = write_decoder(tmp_path / "decoder")
    weights = load_file(next((folder / "vae").glob("*.safetensors")))
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    torch.save(weights, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="vae"):
        load_decoder(Source(str(folder)), folder / "pooled.safetensors")
    encoder = write_encoder(tmp_path / "encoder")
    torch.save(load_file(encoder / "model.safetensors"), encoder / "pytorch_model.bin")
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="encoder"):
        load_encoder(Source(str(encoder)), caption_prompt="x", condition_length=28)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_hub_repository_needs_its_commit():
    revision = shipped_shape("Qwen/Qwen2.5-VL-3B-Instruct")["revision"]
    (found,) = problems("models.encoder_from=Qwen/Qwen2.5-VL-3B-Instruct")
    assert found.startswith("models.encoder_from: ") and f"Qwen/Qwen2.5-VL-3B-Instruct@{revision}" in found
    assert "the 40 digits of a commit" in problems("models.decoder_from=somebody/something")[0]
    assert "somebody/something@" in problems("models.decoder_from=somebody/something@main")[0]
    assert "neither a folder nor" in problems("models.encoder_from=no such thing")[0]
    source = Source.parse(f"somebody/something@{COMMIT}", "key")
    assert source.pretrained("vae") == {
        "pretrained_model_name_or_path": "somebody/something", "revision": COMMIT, "subfolder": "vae",
    }  # fmt: skip


def test_every_missing_part_is_named(tmp_path):
    assert problems("models.path=") == [
        f"{key}: names nothing, and neither does models.path"
        for key in ("models.encoder_from", "models.decoder_from", "reward.encoders")
    ]
    (tmp_path / "transformer").mkdir()
    found = problems(f"models.decoder_from={tmp_path}")
    assert found[:2] == [f"models.decoder_from: {tmp_path} has no {part}" for part in ("vae", "scheduler")]
    assert "transformer has no weights" in found[2]
    assert len(found) == 7 and "no pooled.safetensors, and no tokenizer_2 to make it" in found[6]
    assert "is not a checkpoint" in problems(f"models.start={tmp_path}")[0]


@pytest.mark.parametrize(
    "override, words",
    [
        ("caption.image_tokens=200", "do not fit the encoder's context of 128"),
        ("caption.max_new_tokens=125", "do not fit the encoder's context of 128"),
        ("condition.length=129", "does not fit the encoder's context of 128"),
        ("data.resolution=36", "multiples of 8 pixels up to 64"),
        ("data.resolution=128", "multiples of 8 pixels up to 64"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_loads(override, words, monkeypatch):
    monkeypatch.setattr("uae_fast.models.loading.pretrained", None)
    (found,) = problems(override)
    assert words in found and found.startswith(("caption.", "condition.", "data."))


def test_widths_that_do_not_meet_are_told(tmp_path):
    """A projector of other models before anything loads, a pooled condition when the decoder does."""
    shutil.copytree(TINY, folder := tmp_path / "models")
    weights = load_file(folder / "projector.safetensors")
    for name, cut, words in (
        ("up.weight", weights["up.weight"][:, :120], "from 120 channels to 96"),
        ("down.weight", weights["down.weight"][:88], "from 128 channels to 88"),
    ):
        save_file({**weights, name: cut.contiguous()}, folder / "projector.safetensors")
        (found,) = problems(f"models.path={folder}")
        assert words in found and "states have 128 and the decoder's context has 96" in found
    save_file({"up.weight": weights["up.weight"]}, folder / "projector.safetensors")
    assert "down.weight" in problems(f"models.path={folder}")[0]
    save_file({name: value for name, value in weights.items() if name != "up.bias"}, folder / "projector.safetensors")
    with pytest.raises(ConfigError, match=r"projector.safetensors cannot be loaded: .*up\.bias"):
        load_models(load_config("tiny", [f"models.path={folder}"]))
    save_file({"pooled": torch.zeros(15)}, file := tmp_path / "pooled.safetensors")
    with pytest.raises(ConfigError, match=r"pooled condition of 16 channels, .*pooled\.safetensors has 15"):
        load_decoder(Source(str(TINY / "decoder")), file)


def test_a_start_of_another_rank_is_named(world, small_config):
    adapters = ("models.encoder=lora", "models.lora_rank=4", "stages=[2]", "stage2.steps=1", "evaluate.images=0")
    start = checkpoints(train(small_config(world, *adapters)) / "checkpoints")[-1]
    load_models(small_config(world, *adapters, f"models.start={start}"))
    with pytest.raises(ConfigError, match=rf"models\.start: {start} cannot be loaded: .*size mismatch"):
        load_models(small_config(world, *adapters, f"models.start={start}", "models.lora_rank=8"))


def test_images_are_made_smaller_to_keep_to_their_tokens():
    encoder = load_encoder(
        Source(str(TINY / "encoder")), caption_prompt="describe the image", condition_length=28, image_tokens=9
    )
    for size, tokens in ((48, 9), (200, 9), (32, 4)):
        assert len(encoder.prompt([Image.new("RGB", (size, size))]).features[0]) == tokens


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_in_bfloat16_and_adapters_in_float32(world, small_config, checkpointing):
    config = small_config(
        world, "models.encoder=lora", "models.decoder=lora", "models.dtype=bfloat16", "stage3.kind=cps",
        f"models.gradient_checkpointing={checkpointing}",
    )  # fmt: skip
    models = load_models(config)
    with torch.no_grad():
        for name, parameter in models.encoder.adapters.named_parameters():
            if ".lora_" in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    models.encoder.freeze_reader()
    for part in (models.encoder.model, models.decoder):
        for name, parameter in part.named_parameters():
            assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    states = [models.encoder.read(["a red circle"], role)[0] for role in ("policy", "reader", "reference")]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert all(p.dtype == torch.float32 for part in (models.projector, models.reward) for p in part.parameters())
    data = ImageFolder(config.data.train, "data.train")
    for number in (2, 3):
        stage = STAGES[number](config, models)
        stage.groups()
        rollout = stage.rollout(data.batch(0, 2, 0, stage.name), 0)
        loss, metrics = stage.loss(rollout, slice(0, 8))
        loss.backward()
        assert metrics["ratio/mean"].item() == metrics["ratio/max"].item() == 1.0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_checkpointing_changes_no_gradient_and_keeps_less(world, small_config, number):
    found = []
    for checkpointing in (False, True):
        config = small_config(
            world, "models.encoder=lora", "models.decoder=lora", f"models.gradient_checkpointing={checkpointing}"
        )
        stage = STAGES[number](config, load_models(config))
        for name, parameter in stage.models.decoder.transformer.named_parameters():
            if ".lora_B" in name:
                parameter.data.add_(0.01)
        parameters = [p for group in stage.groups() for p in group["params"]]
        rollout = stage.rollout(ImageFolder(config.data.train, "data.train").batch(0, 2, 0, stage.name), 0)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = stage.loss(rollout, slice(0, stage.settings.micro_batch))
        loss.backward()
        found.append((kept, loss.item(), [p.grad for p in parameters]))
    (plain, loss, gradients), (less, other_loss, others) = found
    assert less < 0.8 * plain and loss == other_loss
    for a, b in zip(gradients, others, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert any(a is not None and a.abs().max() > 0 for a in gradients)


def test_what_trains_in_full_is_in_float32(world, small_config):
    models = load_models(small_config(world, "models.encoder=full", "models.decoder=lora", "models.dtype=bfloat16"))
    assert models.encoder.model.dtype == torch.float32 and models.decoder.transformer.dtype == torch.bfloat16


# ---- full size ------------------------------------------------------------------------------------------------------


def build(name, part="model"):
    """A model of a shipped shape, without memory."""
    import transformers as t
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    shape = shipped_shape(name)[part]
    if part != "model":
        library = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}[part]
        return empty(lambda: library.from_config({**shape, "pos_embed_max_size": 64}))  # a buffer, and slow to compute
    if shape["model_type"] == "qwen2_5_vl":
        return empty(lambda: t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(**shape)))
    return empty(lambda: t.AutoModel.from_config(t.AutoConfig.for_model(**shape)))


@pytest.mark.parametrize(
    "name, part, count",
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "model", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "model", 8_292_166_656),
        ("stabilityai/stable-diffusion-3.5-medium", "transformer", 2_243_171_520),
        ("stabilityai/stable-diffusion-3.5-large", "transformer", 8_056_627_520),
        ("stabilityai/stable-diffusion-3.5-large", "vae", 83_819_683),
        ("facebook/dinov2-large", "model", 304_368_640),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "model", 303_129_600),
    ],
)
def test_shapes_that_ship_have_the_published_sizes(name, part, count):
    assert parameters(build(name, part)) == count


def test_every_shape_that_ships_is_pinned():
    for path in SHAPES.glob("*.json"):
        assert len(json.loads(path.read_text())["revision"]) == 40, path.name
    tower = build("openai/clip-vit-large-patch14")
    assert parameters(tower.vision_model) + parameters(tower.visual_projection) == 303_966_208


# ---- random weights -------------------------------------------------------------------------------------------------


def test_dummy_models_read_no_weights_and_train(world, small_config, monkeypatch, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model*.safetensors", "diffusion*", "tokenizer*"))
    options = (f"models.path={folder}", "models.load=dummy", "evaluate.images=2", "models.encoder=lora")
    config = small_config(world, *options, "stages=[0,1,2,3]", "caption.max_new_tokens=6")
    models, again = load_models(config), load_models(config)
    reference = load_models(small_config(world, "models.encoder=lora"))
    for part in ("encoder", "decoder"):
        ours, theirs, same = (getattr(m, part).state_dict() for m in (models, reference, again))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        assert all(torch.equal(v, same[k]) for k, v in ours.items())
        assert not torch.equal(*(next(v for k, v in s.items() if v.ndim == 2) for s in (ours, theirs)))
    assert models.encoder.model.lm_head.weight is models.encoder.model.get_input_embeddings().weight
    positions = [m.decoder.transformer.pos_embed.pos_embed for m in (models, reference)]
    assert torch.equal(positions[0].half().float(), positions[1])  # computed, and as the files have them
    rotary = [m.encoder.model.model.language_model.rotary_emb.inv_freq for m in (models, reference)]
    assert torch.equal(*rotary)
    rows = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["grad_norm"] == row["grad_norm"] for row in rows)


def test_dummy_captions_keep_their_length_when_read_again():
    config = load_config("tiny", ["models.load=dummy"])
    encoder = load_models(config).encoder
    ids = [i for i in range(encoder.model.config.text_config.vocab_size) if i not in encoder.tokenizer.all_special_ids]
    assert encoder.words(encoder.tokenizer.decode(ids)) == ids


def test_dummy_weights_are_made_once_in_their_dtype():
    """The bytes handed out while a model is filled are those of its parameters, in the dtype asked for."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from uae_fast.models.dummy import fill

    config = Qwen2_5_VLConfig(**Source(str(TINY / "encoder")).configuration("model"))
    model = empty(lambda: Qwen2_5_VLForConditionalGeneration(config))
    assert all(p.is_meta for p in model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        fill(model, torch.device("cpu"), torch.bfloat16, 0)
    handed_out = sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.nbytes() > 0)
    assert parameters(model) * 2 <= handed_out < parameters(model) * 2.2


def test_image_encoders_of_a_shape_load_without_a_file():
    encoder = load_image_encoder(Source(str(TINY / "reward")), seed=3)
    assert encoder(torch.rand(2, 3, 40, 40)).norm(dim=-1).sub(1).abs().max() < 1e-6
    assert not hasattr(encoder.model, "text_model")


def test_an_image_encoder_of_another_kind_is_refused(tmp_path):
    folder = shutil.copytree(TINY / "reward", tmp_path / "reward")
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(ConfigError, match="the model type bert, none of clip, siglip, dinov2, dinov3_vit"):
        load_image_encoder(Source(str(folder)))


def test_weights_that_do_not_match_their_configuration_are_refused(tmp_path):
    folder = write_decoder(tmp_path / "decoder", text_encoders=False)
    save_file({"pooled": torch.zeros(16)}, folder / "pooled.safetensors")
    edit(folder / "transformer" / "config.json", num_layers=5)
    with pytest.raises(ConfigError, match=r"transformer cannot be loaded: .*norm1_context"):
        load_decoder(Source(str(folder)), folder / "pooled.safetensors")
    encoder = write_encoder(tmp_path / "encoder")
    edit(encoder / "config.json", num_hidden_layers=4, layer_types=None)
    with pytest.raises(ConfigError, match=r"encoder: no tensor .*layers\.3\."):
        load_encoder(Source(str(encoder)), caption_prompt="x", condition_length=28)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
