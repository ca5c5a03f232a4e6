"""The reward's image encoders against transformers' own features; mixtures, caching, length control, held-out ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from layouts import write_image_encoder
from PIL import Image

from uae_fast.checkpoint import checkpoints
from uae_fast.config import ConfigError, load_config
from uae_fast.data import ImageFolder
from uae_fast.models.loading import load_image_encoder, load_models
from uae_fast.models.reward import Reward, _Bicubic, to_tensor
from uae_fast.models.sources import Source
from uae_fast.trainer import STAGES, train

KINDS = ["clip", "siglip", "dinov2", "dinov3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_image_encoder(root / kind, kind) for kind in KINDS}


def encoder(folders, kind):
    return load_image_encoder(Source(str(folders[kind])))


def picture(width, height, seed=0):
    """A smooth colourful image."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return Image.fromarray((pixels[0] * 255).byte().permute(1, 2, 0).numpy())


def features(folder, kind, pixels):
    """What the library itself gives for normalised pixels: projected image features, or the CLS token."""
    import transformers as t

    if kind == "clip":
        config = t.CLIPConfig.from_pretrained(folder)
        config.vision_config.projection_dim = config.projection_dim
        return t.CLIPVisionModelWithProjection.from_pretrained(folder, config=config.vision_config)(pixels).image_embeds
    if kind == "siglip":
        return t.SiglipVisionModel.from_pretrained(folder)(pixels).pooler_output
    library = {"dinov2": t.Dinov2Model, "dinov3": t.DINOv3ViTModel}[kind]
    return library.from_pretrained(folder)(pixels).pooler_output


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_transformers_own_features(folders, kind):
    image = picture(16, 16)
    pixels = (to_tensor(image) - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(
        3, 1, 1
    )
    expected = F.normalize(features(folders[kind], kind, pixels), dim=-1)
    assert (encoder(folders, kind)(to_tensor(image)) - expected).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_resized_straight_to_the_square(folders, kind):
    """As PIL's bicubic filter does it, without a crop."""
    f, image = encoder(folders, kind), picture(48, 20)
    straight = f(to_tensor(image.resize((16, 16), Image.Resampling.BICUBIC)))
    cropped = f(to_tensor(image.crop((14, 0, 34, 20)).resize((16, 16), Image.Resampling.BICUBIC)))
    ours = f(to_tensor(image))
    assert f.size == 16
    assert (ours - straight).norm() < min(0.02, 0.2 * (ours - cropped).norm())


def test_a_mixture_is_the_weighted_mean_of_its_cosines(folders):
    encoders = [encoder(folders, kind) for kind in ("clip", "dinov2", "siglip")]
    reward = Reward(encoders, [3, 1, 0])
    images = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sources = [picture(24, 16, seed) for seed in range(4)]
    found = reward(images, reward.embed_sources(sources))
    cosines = [
        F.cosine_similarity(f(images), torch.cat([f(to_tensor(source)) for source in sources]), dim=-1)
        for f in encoders
    ]
    assert (found - (0.75 * cosines[0] + 0.25 * cosines[1])).abs().max() < 1e-6
    found.sum().backward()
    assert images.grad.abs().max() > 0
    equal = Reward(encoders)
    assert (equal(images, equal.embed_sources(sources)) - sum(cosines) / 3).abs().max() < 1e-6
    assert equal.embed(images).norm(dim=-1).sub(1).abs().max() < 1e-6


def test_a_source_is_embedded_once(folders):
    reward, calls = Reward([encoder(folders, "clip")]), []
    reward.encoders[0].register_forward_hook(lambda *_: calls.append(1))
    images = [picture(16, 16, seed) for seed in range(3)]
    fresh = reward.embed_sources(images)
    calls.clear()
    first = reward.embed_sources(images[:2], [7, 8])
    again = reward.embed_sources([images[1], images[2]], [8, 9])
    assert len(calls) == 3
    assert torch.equal(torch.cat([first, again[1:]]), fresh) and torch.equal(again[0], first[1])


def test_the_sources_used_last_are_remembered(folders, monkeypatch):
    monkeypatch.setattr("uae_fast.models.reward.SOURCES", 2)
    reward, calls = Reward([encoder(folders, "clip")]), []
    reward.encoders[0].register_forward_hook(lambda *_: calls.append(1))
    images = [picture(16, 16, seed) for seed in range(3)]
    fresh = [reward.embed_sources([image]) for image in images]
    calls.clear()
    for names, embedded in (([0, 1], 2), ([0], 2), ([2], 3), ([0, 2], 3), ([1], 4), ([2, 1, 0], 5)):
        found = reward.embed_sources([images[i] for i in names], names)
        assert len(calls) == embedded and len(reward.sources) <= 2, names
        assert torch.equal(found, torch.cat([fresh[i] for i in names])), names


def test_a_heldout_encoder_is_reported_and_changes_nothing(world, small_config, folders):
    options = ("stages=[2,3]", "evaluate.images=2", "stage2.lr=1e-3", "render.batch=8")
    plain = train(small_config(world, *options, run="plain"))
    judged = train(small_config(world, *options, f"reward.heldout={folders['dinov2']}", run="judged"))
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (plain, judged)]
    for a, b in zip(*rows, strict=True):
        assert -1 <= b.pop("reward_heldout") <= 1 and b["reward"] == a["reward"] and b["grad_norm"] == a["grad_norm"]
        assert a.keys() == b.keys()
    assert (checkpoints(plain / "checkpoints")[-1] / "state.json").exists()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (plain, judged)]
    assert "heldout_reward" not in summaries[0]["stage3"] and -1 <= summaries[1]["stage3"]["heldout_reward"] <= 1
    assert summaries[0]["stage3"]["reward"] == summaries[1]["stage3"]["reward"]


def test_length_control_takes_a_penalty_for_every_token_beyond(world, small_config):
    found = {}
    for penalty in (0.0, 0.1):
        config = small_config(
            world, f"reward.token_penalty={penalty}", "reward.free_tokens=10", "stage2.scale_advantages=none"
        )
        stage = STAGES[2](config, load_models(config))
        found[penalty] = stage.rollout(ImageFolder(config.data.train, "data.train").batch(0, 2, 0, "stage2"), 0)
    plain, controlled = found[0.0], found[0.1]
    over = (plain.captions.mask.sum(1).float() - 10).clamp(min=0).view(2, 4)
    assert over.max() > 0
    difference = (controlled.advantages - plain.advantages).view(2, 4)
    assert (difference + 0.1 * (over - over.mean(1, keepdim=True))).abs().max() < 1e-5
    assert "reward_similarity" not in plain.metrics
    assert controlled.metrics["reward_similarity"].item() == pytest.approx(plain.metrics["reward"].item())
    assert controlled.metrics["reward"] < plain.metrics["reward"]


@pytest.mark.parametrize("height, width, size", [(32, 32, 24), (20, 31, 28), (40, 24, 40)])
def test_gradients_pass_the_resizing(height, width, size):
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=draws, requires_grad=True)
    upstream = torch.randn(2, 3, size, size, dtype=torch.float64, generator=draws)
    found = _Bicubic.apply(images, (size, size))
    expected = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    assert torch.equal(found, expected)
    (gradient,), (truth,) = (torch.autograd.grad(x, images, upstream) for x in (found, expected))
    assert (gradient - truth).abs().max() < 1e-12


@pytest.mark.parametrize(
    "override, words",
    [
        ("reward.weights=[1,2]", "2 weights for 1 encoders"),
        ("reward.weights=[0]", "nor all 0"),
        ("reward.token_penalty=-1", "negative"),
        ("reward.heldout=facebook/dinov2-large", "facebook/dinov2-large@"),
    ],
)
def test_mistakes_are_named(override, words):
    from uae_fast.models.sources import find_sources

    with pytest.raises(ConfigError, match=words):
        find_sources(load_config("tiny", [override]))
