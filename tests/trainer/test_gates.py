"""Quality gates: their statistics by hand, and that a sampler which misranks captions is caught."""

import json
import math
import weakref

import pytest
import torch
from test_cheaper_sampler import CHEAPER, weights

from uae_fast.cli import main
from uae_fast.config import load_config
from uae_fast.evaluate import agreement, gates
from uae_fast.models.loading import load_models


def rewards(seed=0, groups=40, size=8):
    return torch.rand(groups, size, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.arange(8).repeat(40, 1) * 5


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_ranks_with_ties():
    values = torch.tensor([[0.3, 0.1, 0.3, 0.9], [2.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert agreement.ranks(values).tolist() == [[2.5, 1, 2.5, 4], [2.5, 2.5, 2.5, 2.5], [4, 3, 2, 1]]


def test_spearman_by_hand():
    """1 − 6Σd²/(n(n²−1)) without ties; with them Pearson's correlation of the mean ranks, as SciPy's spearmanr."""
    a = torch.tensor([[1.0, 2, 3, 4, 5]])
    b = torch.tensor([[5.0, 6, 7, 8, 7]])  # ranks 1, 2, 3.5, 5, 3.5
    found = agreement.correlation(agreement.ranks(a), agreement.ranks(b))
    assert found.item() == pytest.approx(0.8207826816681233)
    swapped = torch.tensor([[2.0, 1, 3, 4, 5]])
    found = agreement.correlation(agreement.ranks(a), agreement.ranks(swapped))
    assert found.item() == pytest.approx(1 - 6 * 2 / (5 * 24))


def test_spearman_as_scipy_has_it():
    stats = pytest.importorskip("scipy.stats")
    a, b = (rewards(seed).mul(6).round() for seed in (0, 1))  # many ties
    found = agreement.correlation(agreement.ranks(a), agreement.ranks(b))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_an_order_is_all_that_spearman_sees():
    reference = rewards()
    found = agreement.agreement(reference, reference.exp() * 3 - 1, LENGTHS)
    assert found["spearman"] == pytest.approx(1) and found["cosine"] < 0.999
    assert agreement.agreement(reference, -reference, LENGTHS)["spearman"] == pytest.approx(-1)
    noise = agreement.agreement(reference, rewards(1), LENGTHS)
    assert abs(noise["spearman"]) < 4 * noise["spearman_stderr"] and noise["spearman_stderr"] < 0.1


def test_scale_and_offset_of_a_group_do_not_matter():
    reference = rewards()
    found = agreement.agreement(reference, 0.5 * reference + torch.rand(40, 1), LENGTHS)
    assert found["cosine"] == pytest.approx(1) and found["sign"] == 1


def test_signs_by_hand():
    reference = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found = agreement.agreement(reference, torch.tensor([[0.0, 1.0, 1.0, 1.0]]), torch.ones(1, 4))
    assert found["sign"] == 0.75
    assert found["cosine"] == pytest.approx(1 / math.sqrt(3), abs=1e-6)  # (−1, −1, 1, 1)·(−3, 1, 1, 1)
    assert found["length_slope"] is None  # captions of one length


def test_standard_errors_are_over_groups():
    mean, error = agreement.mean_error(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert agreement.mean_error(torch.tensor([1.0])) == (1, None)
    assert agreement.mean_error(torch.tensor([])) == (None, None)


def test_groups_without_variance_are_counted_not_scored():
    reference, own = rewards(), rewards()
    reference[:3] = 0.5
    own[3:5] = 0.25  # the sampler alone sees no difference: that is a fault, not an excuse
    found = agreement.agreement(reference, own, LENGTHS)
    assert (found["groups"], found["zero_variance_groups"]) == (37, 3)
    assert found["spearman"] == pytest.approx(35 / 37) and found["cosine"] == pytest.approx(35 / 37)
    nothing = agreement.agreement(torch.ones(4, 8), rewards(0, 4), LENGTHS[:4])
    assert nothing["spearman"] is None and nothing["zero_variance_groups"] == 4
    assert gates.misses(gates.CHEAPER, nothing) == ["spearman is unknown: no image has captions of different rewards"]


def test_a_taste_for_short_captions_shows_in_the_slope():
    reference = rewards()
    offsets = torch.rand(40, 1)  # an image that is easier for one sampler is no matter
    noise = 0.01 * (rewards(1) - 0.5)
    found = agreement.agreement(reference, reference - 0.002 * LENGTHS + offsets + noise, LENGTHS)
    assert found["length_slope"] == pytest.approx(-0.002, abs=5 * found["length_slope_stderr"])
    assert 0 < found["length_slope_stderr"] < 1e-4
    fair = agreement.agreement(reference, reference + noise, LENGTHS)
    assert abs(fair["length_slope"]) < 4 * fair["length_slope_stderr"]


def test_the_slopes_error_is_its_spread():
    """Over 400 draws of the same experiment."""
    found = []
    for seed in range(400):
        noise = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
        found.append(agreement.slope(noise, LENGTHS[:20]))
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.15)


@pytest.mark.parametrize(
    "kind, row, missed",
    [
        (gates.SAME, {"spearman": 0.97, "cosine": 0.98}, 0),
        (gates.SAME, {"spearman": 0.969, "cosine": 0.99}, 1),
        (gates.SAME, {"spearman": 0.96, "cosine": 0.97}, 2),
        (gates.CHEAPER, {"spearman": 0.90, "cosine": 0.5}, 0),
        (gates.CHEAPER, {"spearman": 0.899, "cosine": 1.0}, 1),
        (gates.CHEAPER, {"spearman": math.nan, "cosine": 1.0}, 1),
        (gates.FLOOR, {"spearman": 0.1, "cosine": 0.1}, 0),
    ],
)
def test_gates(kind, row, missed):
    assert len(gates.misses(kind, row)) == missed


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights whose tiny VAE has learned nothing: it draws noise."""
    return weights(tmp_path_factory.mktemp("models") / "weights")


@pytest.fixture
def small(world):
    return [f"data.heldout={world / 'heldout'}", "render.batch=16", "render.steps=3", "stage3.window_end=2"]


def run(out, *overrides, images=4):
    status = main(["bench", "sampler", "tiny", "--gate", *overrides, "--images", str(images), "--out", str(out)])
    return status, json.loads((out / "gate.json").read_text())


def test_the_standard_samplers(small, tmp_path, capsys):
    status, result = run(tmp_path, *small)
    assert status == 0 and (tmp_path / "gate.png").stat().st_size > 5000
    rows = {row["variant"]: row for row in result["rows"]}
    floor = rows["the reference, same_sampler.accelerate=false"]
    assert floor["kind"] == gates.FLOOR and floor["spearman"] > 0.99 and 0 < floor["mse"] < 1e-8
    assert rows["bfloat16"]["kind"] == gates.SAME and rows["bfloat16"]["misses"] == []
    assert rows["bfloat16"]["mse"] > 100 * floor["mse"]  # its decoder is really in bf16
    assert rows["bfloat16, same_sampler.accelerate=false"]["against"] == "bfloat16"
    eight = rows["fp8, emulated"]
    assert eight["kind"] == gates.SAME and eight["mse"] > 3 * rows["bfloat16"]["mse"] and eight["speed"] is None
    half = rows["guided_part 0.5"]
    assert half["against"] == "guidance 1.5"
    # Of two passes at each of three steps the unconditional one of the last is left out; the VAE stays
    assert 1.15 < half["speed"] < 6 / 5
    assert 1.35 < rows["steps 2"]["speed"] < 3 / 2
    assert rows["reuse [2]"]["speed"] == rows["steps 2"]["speed"]
    cheaper = [row for row in result["rows"] if row["kind"] == gates.CHEAPER]
    assert [row["value"] for row in cheaper] == sorted((row["value"] for row in cheaper), reverse=True)
    output = capsys.readouterr().out
    assert "passed" in output and "Measured on cpu" in output


def test_no_more_drawings_are_kept_than_are_compared_again(small, tmp_path, monkeypatch):
    """Of the standard samplers at most the references and the one that is compared."""
    made, alive, real = [], [], gates.draw_task

    def draw_task(*given):
        drawn = real(*given)
        made.append(weakref.ref(drawn))
        alive.append(sum(ref() is not None for ref in made))
        return drawn

    monkeypatch.setattr(gates, "draw_task", draw_task)
    _, result = run(tmp_path, *small, images=2)
    assert len(made) >= 10 and max(alive) <= 3  # the reference, bfloat16's or the guided one, and a sampler
    assert len(result["rows"]) == len(made) - 2  # which is what no row is of: the reference, and the guided one


def test_a_configured_sampler_that_misses_its_gate_fails(folder, small, tmp_path, capsys):
    status, result = run(tmp_path, f"models.path={folder}", CHEAPER, *small)
    (row,) = (row for row in result["rows"] if row["kind"] == gates.CHEAPER)
    assert status == 1 and row["spearman"] < 0.9
    assert f"vae tiny misses its gate: spearman {row['spearman']:.3f} < 0.90" in capsys.readouterr().out
    assert len(result["rows"]) == 3  # the floor and what is configured
    assert row["value"] == pytest.approx(row["spearman"] ** 2 * row["speed"])

    status, result = run(tmp_path / "all", f"models.path={folder}", *small)
    assert status == 0 and any(row["misses"] for row in result["rows"])  # nobody asked for that one


def test_fp8_may_be_what_is_configured(small, tmp_path):
    status, result = run(tmp_path, "same_sampler.fp8=true", *small)
    *floor, row = result["rows"]
    assert [other["kind"] for other in floor] == [gates.FLOOR] * 2 and (row["variant"], row["kind"]) == (
        "fp8, emulated", gates.SAME,
    )  # fmt: skip
    assert status == bool(row["misses"]) and row["mse"] > 0
    both = load_config("tiny", ["same_sampler.fp8=true", "cheaper_sampler.steps=6"])
    assert gates.faster(both) == "fp8, emulated, steps 6" and gates.faster(gates.plain(both)) == ""


def test_captions_have_a_spread(world, small):
    config = load_config("tiny", small)
    models = load_models(config)
    from uae_fast.parquet import open_images

    heldout = open_images(config.data.heldout, "data.heldout", config.data)
    examples = [heldout[i] for i in range(3)]
    task = gates.make_task(config, models, examples)
    for example, captions, lengths in zip(examples, task.captions, task.lengths, strict=True):
        assert len(captions) == 8 and captions[-1] == example.caption
        assert all(example.caption.startswith(caption) for caption in captions[4:])
        assert lengths[4:].tolist() == sorted(set(lengths[4:].tolist()))
    assert len(set(task.seeds)) == 3
    texts, seeds = zip(*((texts, seeds) for _, texts, seeds in task.chunks()), strict=True)
    assert [len(chunk) for chunk in texts] == [16, 8] and sum(map(len, seeds)) == 24
    assert seeds[0] == [task.seeds[0]] * 8 + [task.seeds[1]] * 8  # one noise an image
    assert task.captions == gates.make_task(config, models, examples).captions


def test_counted_flops_by_hand(small):
    """Steps cost one transformer each, and with guidance two: two images' noises fill a batch of their own."""

    def flops(*more):
        return gates.drawing_flops(load_config("tiny", [*small, *more]))

    four, eight = flops("render.steps=4"), flops("render.steps=8")
    step = (eight - four) / 4
    assert flops("render.steps=6") == pytest.approx(four + 2 * step)
    assert transformer_flops(load_config("tiny", small)) == pytest.approx(step, rel=0.01)
    negative = flops("render.steps=4", "render.guidance_scale=2") - (four + 4 * step)
    assert 0 < negative < step / 10  # the negative prompt is read once


def transformer_flops(config):
    """Of a drawing's step by hand: products and attention of a block, four blocks, and what lies around them."""
    shape = load_models(config).decoder.transformer.config
    width, text = shape.num_attention_heads * shape.attention_head_dim, config.condition.length
    side = load_models(config).decoder.latent_shape(config.data.resolution)[1] // shape.patch_size
    images = side**2
    total = 2 * images * shape.in_channels * shape.patch_size**2 * width * 2  # into patches and out of them
    total += 2 * text * shape.joint_attention_dim * width
    for layer in range(shape.num_layers):
        last = layer == shape.num_layers - 1
        total += 2 * width**2 * (12 * images + (3 if last else 12) * text)
        total += 4 * width * (images + text) ** 2
    return total
