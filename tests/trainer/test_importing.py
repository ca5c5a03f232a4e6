"""The released UAE weights: small ones in exactly their layout, made by peft and diffusers, and back."""

import json
import shutil

import pytest
import torch
from layouts import legacy_name, write_decoder, write_encoder, write_image_encoder
from safetensors.torch import load_file, save_file
from torch import nn

from uae_fast.checkpoint import checkpoints
from uae_fast.cli import main
from uae_fast.config import ConfigError, load_config
from uae_fast.models.importing import import_uae
from uae_fast.models.loading import load_models, load_run
from uae_fast.models.sources import TINY
from uae_fast.trainer import train

CAPTION = "a red circle top-left a blue square bottom-right on white"
SMALL = [
    "data.resolution=32", "render.steps=4", "condition.length=28", "caption.max_new_tokens=22", "models.dtype=float32",
    "caption.prompt=describe the image", "caption.image_tokens=0", "stage3.window=2", "stage3.window_end=3",
    "render.guidance_scale=1", "reward.heldout=", "device=cpu", "models.gradient_checkpointing=false",
    "same_sampler.accelerate=false",
]  # fmt: skip


class Theirs(nn.Module):
    """The released model's attributes: `visual`, `model` (the language model, wrapped by peft), `projector`."""

    def __init__(self):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        qwen = load_models(load_config("tiny")).encoder.model
        self.visual, self.model = qwen.model.visual, qwen.model.language_model
        weights = load_file(TINY / "projector.safetensors")
        up, down = weights["up.weight"], weights["down.weight"]
        self.projector = nn.Sequential(nn.Linear(up.shape[1], len(up)), nn.GELU(), nn.Linear(down.shape[1], len(down)))
        self.projector[0].load_state_dict({k[3:]: v.float() for k, v in weights.items() if k.startswith("up.")})
        self.projector[2].load_state_dict({k[5:]: v.float() for k, v in weights.items() if k.startswith("down.")})
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules="all-linear")
        self.model = get_peft_model(self.model, config)
        stir(self.model)


def stir(model, seed=0):
    """Gives every adapter's B values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def shards(folder, tensors, count):
    """Writes tensors into `count` files named as the Hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    for i in range(count):
        part = {name: tensors[name].detach().clone().contiguous() for name in names[i::count]}
        save_file(part, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Their folder, their encoder and projector, and their decoder under its adapter."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, get_peft_model

    from uae_fast.models.decoder import LORA_TARGETS

    folder = tmp_path_factory.mktemp("release")
    theirs = Theirs()
    source = load_models(load_config("tiny")).encoder.model.state_dict()
    llm = {legacy_name(name): value for name, value in source.items() if name != "lm_head.weight"}
    projector = {f"projector.{name}": value for name, value in theirs.projector.state_dict().items()}
    shards(folder / "llm", {**llm, **projector}, 2)
    config = json.loads((write_encoder(folder / "llm_processor") / "config.json").read_text())
    config["architectures"] = ["Qwen2_5_VLWithLongContext"]
    (folder / "llm" / "config.json").write_text(json.dumps(config))
    (folder / "llm_processor" / "model.safetensors").unlink()
    shards(folder / "llm_lora", theirs.state_dict(), 3)

    write_decoder(folder / "SD3")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "SD3" / "transformer", torch_dtype=torch.float32)
    transformer.save_pretrained(folder / "dit")
    adapted = get_peft_model(
        transformer, LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    )
    stir(adapted)
    adapted.save_pretrained(folder / "dit_lora")
    write_image_encoder(folder / "clip", "clip")
    return folder, theirs.eval(), adapted.eval()


def do_import(folder, out, *more):
    return import_uae(folder, out, reward=str(folder / "clip"), overrides=[*SMALL, *more])


@pytest.fixture(scope="module")
def imported(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "uae"
    assert do_import(release[0], out) == []
    return out


@torch.no_grad()
def test_what_is_imported_computes_what_theirs_does(release, imported):
    _, theirs, transformer = release
    config, models = load_run(imported, "stage3")
    assert config.condition.adapter == "live" and config.models.lora_rank == 4 and config.models.lora_alpha == 8
    tokenizer = models.encoder.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "generate", "content": CAPTION}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = theirs.projector(theirs.model(input_ids=ids).last_hidden_state)
    context = models.condition([CAPTION])
    assert (context[:, : ids.shape[1]] - expected).abs().max() < 1e-5 * expected.abs().max()

    latents = torch.randn(2, *models.decoder.latent_shape(32), generator=torch.Generator().manual_seed(0))
    ours = models.decoder.velocity(latents, torch.tensor(0.7), context.expand(2, -1, -1))
    velocity = transformer(
        hidden_states=latents, encoder_hidden_states=context.expand(2, -1, -1), timestep=torch.full((2,), 700.0),
        pooled_projections=models.decoder.pooled.expand(2, -1), return_dict=False,
    )[0]  # fmt: skip
    assert (ours - velocity).abs().max() < 1e-5 * velocity.abs().max()
    base = load_run(imported, "before")[1]
    for part in (
        base.condition([CAPTION]) - context,
        base.decoder.velocity(latents, torch.tensor(0.7), context.expand(2, -1, -1)) - ours,
    ):
        assert part.abs().max() > 1e-3  # the adapters do something


def test_every_tensor_comes_through_bit_for_bit(release, imported):
    folder, theirs, _ = release
    state = {name: value for name, value in theirs.state_dict().items() if ".lora_" in name}
    (checkpoint,) = checkpoints(imported / "checkpoints")
    ours = load_file(checkpoint / "encoder" / "adapter_model.safetensors")
    assert len(ours) == len(state) == 2 * 7 * 3
    for name, value in ours.items():
        old = name.replace("base_model.model.model.language_model.", "model.base_model.model.")
        assert torch.equal(value, state[old.replace(".weight", ".default.weight")]), name
    adapter = load_file(folder / "dit_lora" / "adapter_model.safetensors")
    ours = load_file(checkpoint / "decoder" / "pytorch_lora_weights.safetensors")
    assert len(ours) == len(adapter)
    for name, value in ours.items():
        assert torch.equal(value, adapter[f"base_model.model.{name.removeprefix('transformer.')}"]), name
    llm = {k: v for file in (folder / "llm").glob("*.safetensors") for k, v in load_file(file).items()}
    kept = load_file(imported / "models" / "encoder" / "model.safetensors")
    assert kept.keys() == {name for name in llm if not name.startswith("projector.")}
    assert all(torch.equal(value, llm[name]) for name, value in kept.items())


@torch.no_grad()
def test_adapters_load_with_their_own_libraries_calls(imported):
    """`PeftModel.from_pretrained` on the encoder and `load_lora_weights` on a pipeline, from our checkpoint."""
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, models = load_run(imported, "stage3")
    (checkpoint,) = checkpoints(imported / "checkpoints")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(imported / "models" / "encoder", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, checkpoint / "encoder")
    ids = torch.tensor([models.encoder.words(CAPTION)])
    theirs = adapted.base_model.model.model.language_model(input_ids=ids).last_hidden_state
    with models.encoder.acting_as("policy") as language_model:
        ours = language_model(input_ids=ids).last_hidden_state
    assert torch.equal(ours, theirs)

    plain = load_run(imported, "before")[1].decoder
    latents = torch.ones(1, *models.decoder.latent_shape(32))
    context = models.condition([CAPTION])
    fresh = type(plain.transformer).from_pretrained(
        imported / "models" / "decoder" / "transformer", torch_dtype=torch.float32
    )
    pipe = StableDiffusion3Pipeline(
        transformer=fresh, vae=plain.vae, scheduler=plain.scheduler, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.load_lora_weights(checkpoint / "decoder")
    plain.transformer = pipe.transformer
    drawn = [decoder.velocity(latents, torch.tensor(0.5), context) for decoder in (plain, models.decoder)]
    assert torch.equal(*drawn)


def test_a_run_goes_on_from_what_was_imported(release, imported, world, tmp_path):
    (checkpoint,) = checkpoints(imported / "checkpoints")
    small = [
        f"run={tmp_path / 'run'}", f"data.train={world / 'train'}", f"data.heldout={world / 'heldout'}",
        "stages=[2]", "stage2.steps=1", "evaluate.images=0", "reporters=[]", f"models.start={checkpoint}",
    ]  # fmt: skip
    config = load_config(imported / "config.yaml", small)
    models = load_models(config)
    reference = load_run(imported, "stage3")[1]
    assert torch.equal(models.condition([CAPTION]), reference.condition([CAPTION]))
    assert len((train(config) / "metrics.jsonl").read_text().splitlines()) == 1


def copy_with(release, tmp_path, part, edit):
    """A copy of the release in which the tensors of one folder's first file are edited."""
    folder = tmp_path / "release"
    shutil.copytree(release[0], folder)
    file = sorted((folder / part).glob("*.safetensors"))[0]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "part, edit, words",
    [
        ("llm", lambda t: t.pop("projector.0.weight"), "llm: no tensor projector.0.weight"),
        ("llm", lambda t: t.update(extra=torch.zeros(2)), "unknown tensor extra"),
        ("llm", lambda t: t.pop(next(k for k in t if "layers.1.mlp" in k)), "layers.1.mlp"),
        ("llm_lora", lambda t: t.update(extra=torch.zeros(2)), "llm_lora: unknown tensor extra (2,)"),
        ("llm_lora", lambda t: t.pop(next(k for k in t if "lora_A" in k)), "without"),
        ("dit", lambda t: t.update(extra=torch.zeros(2)), "unknown tensor extra"),
        ("dit", lambda t: t.pop("proj_out.weight"), "no tensor proj_out.weight"),
        ("dit_lora", lambda t: t.update(extra=torch.zeros(2)), "dit_lora: unknown tensor extra (2,)"),
        (
            "dit_lora",
            lambda t: t.update({n.replace("to_q", "to_x"): t.pop(n) for n in [*t] if "0.attn.to_q" in n}),
            "to_x",
        ),
        ("dit_lora", lambda t: t.pop(next(n for n in t if "lora_B" in n)), "without"),
    ],
)
def test_unknown_and_missing_tensors_are_listed(release, tmp_path, part, edit, words):
    with pytest.raises(ConfigError) as caught:
        do_import(copy_with(release, tmp_path, part, edit), tmp_path / "out")
    assert any(words in problem for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_the_shards_weights_replace_those_of_llm_and_that_is_told(release, tmp_path):
    def edit(tensors):
        name = next(name for name in tensors if "base_layer.weight" in name)
        tensors[name] = tensors[name] + 1

    folder = copy_with(release, tmp_path, "llm_lora", edit)
    (note,) = do_import(folder, tmp_path / "out")
    assert note == "llm_lora: 1 tensors differ from those of llm, and replace them"
    kept = load_file(tmp_path / "out" / "models" / "encoder" / "model.safetensors")
    before = {k: v for file in (folder / "llm").glob("*.safetensors") for k, v in load_file(file).items()}
    changed = [name for name, value in kept.items() if not torch.equal(value, before[name])]
    assert len(changed) == 1 and torch.equal(kept[changed[0]], before[changed[0]] + 1)


def test_adapters_of_two_ranks_and_scales_are_kept_exactly(release, tmp_path):
    """A decoder's adapter of rank 2 and α/r = 3 beside the encoder's rank 4 and 2."""

    def edit(tensors):
        for name in tensors:
            tensors[name] = (tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]).contiguous()

    folder = copy_with(release, tmp_path, "dit_lora", edit)
    config = json.loads((folder / "dit_lora" / "adapter_config.json").read_text())
    (folder / "dit_lora" / "adapter_config.json").write_text(json.dumps({**config, "r": 2, "lora_alpha": 6}))
    do_import(folder, tmp_path / "out")
    theirs = load_file(folder / "dit_lora" / "adapter_model.safetensors")
    _, models = load_run(tmp_path / "out", None)
    layer = models.decoder.transformer.transformer_blocks[1].attn.to_k
    ours = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    name = "base_model.model.transformer_blocks.1.attn.to_k"
    expected = 3 * theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "said, scale",
    [({"use_rslora": True}, 4.0), ({"alpha_pattern": {"to_q": 32}}, None), ({"rank_pattern": {"to_q": 2}}, None)],
)
def test_a_scale_is_the_adapters_own_or_refused(release, tmp_path, said, scale):
    """Of rank 4 with α = 8: rank-stabilised α / √r; one of its own for some modules is no single one."""
    shutil.copytree(release[0], folder := tmp_path / "release")
    config = json.loads((folder / "dit_lora" / "adapter_config.json").read_text())
    (folder / "dit_lora" / "adapter_config.json").write_text(json.dumps({**config, **said}))
    if scale is None:
        with pytest.raises(ConfigError, match=f"dit_lora: {next(iter(said))} = .* is not supported"):
            do_import(folder, tmp_path / "out")
        return
    do_import(folder, tmp_path / "out")
    name = "transformer_blocks.1.attn.to_k"
    layer = load_run(tmp_path / "out", None)[1].decoder.transformer.get_submodule(name)
    theirs = load_file(folder / "dit_lora" / "adapter_model.safetensors")[f"base_model.model.{name}.lora_B.weight"]
    assert torch.equal(layer.scaling["default"] * layer.lora_B["default"].weight, scale * theirs)


@pytest.mark.parametrize(
    "file", ["llm/config.json", "llm/model-00001-of-00002.safetensors", "dit_lora/adapter_config.json"]
)
def test_a_file_that_cannot_be_read_is_named(release, tmp_path, file):
    shutil.copytree(release[0], folder := tmp_path / "release")
    (folder / file).write_bytes((folder / file).read_bytes()[:20])
    with pytest.raises(ConfigError, match=f"import-uae: {folder / file} cannot be loaded: "):
        do_import(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_names_what_is_missing(release, tmp_path, capsys):
    assert main(["import-uae", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no llm" in capsys.readouterr().err
    folder = release[0]
    arguments = [*SMALL, "--reward", str(folder / "clip")]
    assert main(["import-uae", str(folder), str(tmp_path / "out"), *arguments]) == 0
    assert f"--run {tmp_path / 'out'}" in capsys.readouterr().out
    assert main(["import-uae", str(folder), str(tmp_path / "out"), *arguments]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["generate", CAPTION, "--run", str(tmp_path / "out"), "--out", str(tmp_path / "drawn.png")]) == 0
