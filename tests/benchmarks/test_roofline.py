"""Floors: formulas against counts, and against what cannot be beaten."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import roofline
from benchmarks.counts import counted
from benchmarks.gpus import GPUS, Gpu, find
from benchmarks.kernels import predicted
from benchmarks.kernels.harness import Case, peak_and_flops
from benchmarks.kernels.predicted import Need, floor_ms, need
from benchmarks.kernels.test_speed import OPS
from benchmarks.rows import OURS
from uae_fast.config import load_config
from uae_fast.speed import PEAKS

SMALL = {"N": 64, "H": 32, "V": 256}
HEADS = ("frozen", "forward", "entropy", "trainable")
MODULES = {module.__name__.rsplit(".", 1)[1]: module for module in OPS}
# What each op reads and returns in its benchmark: names of its inputs, those with a gradient marked
READ = {
    ("linear_logprobs", "frozen"): "*hidden weight targets upstream",
    ("linear_logprobs", "forward"): "hidden weight targets",
    ("linear_logprobs", "entropy"): "hidden weight targets",
    ("linear_logprobs", "trainable"): "*hidden *weight targets upstream",
    ("linear_grpo_loss", "frozen"): "*hidden weight targets advantages mask old_logprobs ref_logprobs",
    ("token_logprobs", "backward"): "*logits targets upstream",
    ("token_logprobs", "forward"): "logits targets",
    ("grpo_loss", "logprobs"): "*logprobs advantages mask old_logprobs ref_logprobs",
    ("grpo_loss", "logits"): "*logits targets advantages mask old_logprobs ref_logprobs",
    ("flow_step", "draw"): "velocity uncond sample sigma sigma_next seed",
    ("flow_step", "replay"): "*velocity uncond sample next_sample sigma sigma_next upstream",
    ("flow_grpo_loss", "policy"): "*velocity uncond sample next_sample sigma sigma_next old_log_prob advantages",
    ("flow_grpo_loss", "KL"): "*velocity uncond sample next_sample ref sigma sigma_next old_log_prob advantages",
}


def small(name, variant, dtype=torch.bfloat16):
    """A case of few elements, with the module's own choice of sizes."""
    first = next(c for c in MODULES[name].cases("cuda", False) if c.variant == variant)
    sizes = {key: SMALL[key] for key in ("H", "V") if getattr(first, key) is not None}
    if name.startswith("flow"):
        sizes = {"N": 4, "H": 16 * 8 * 8}
    elif first.T is not None:
        sizes |= {"N": 64, "B": 8, "T": 8}
    else:
        sizes["N"] = 64
    return replace(first, device="cpu", dtype=dtype if first.dtype == torch.bfloat16 else first.dtype, **sizes)


def ours(case):
    module = MODULES[case.op]
    given = module.inputs(case)
    return given, module.contestants(case)[0].build(given)


@pytest.mark.parametrize("variant", HEADS)
def test_products_are_those_the_profiler_counts(variant):
    """Of our op; a trainable head's with one more, for its logits are computed again."""
    case = replace(small("linear_logprobs", variant, torch.float32), N=512)
    _, step = ours(case)
    _, flops = peak_and_flops(step, "cpu")
    again = 2 * case.N * case.H * case.V if variant == "trainable" else 0
    assert flops == need(case).flops + again


def test_masked_rows_need_no_products():
    torch.manual_seed(0)
    case = replace(small("linear_grpo_loss", "frozen", torch.float32), N=2048, T=256)
    given, step = ours(case)
    _, flops = peak_and_flops(step, "cpu")
    rows = int(given.mask.sum())
    padded = -(-rows // 128) * 128  # ours computes in tiles of so many rows
    assert flops == 2 * 2 * padded * case.H * case.V
    assert need(case).flops == pytest.approx(2 * 2 * rows * case.H * case.V, rel=0.1)


@pytest.mark.parametrize("name, variant", READ)
def test_bytes_are_those_of_inputs_and_results(name, variant):
    case = small(name, variant)
    torch.manual_seed(0)
    given, _ = ours(case)
    total = 0
    for word in READ[name, variant].split():
        tensor = getattr(given, word.removeprefix("*"))
        total += tensor.nbytes * (2 if word.startswith("*") else 1)
    results = {"frozen": case.N, "forward": case.N, "entropy": 2 * case.N, "trainable": case.N, "backward": case.N}
    if name in ("linear_logprobs", "token_logprobs"):
        total += 4 * results[variant]
    elif name.endswith("loss"):
        total += 4  # the loss
    else:
        total += 4 * (case.N * case.H if variant == "draw" else case.N)  # a sample, or log-probs
    assert need(case).bytes == total


@pytest.mark.parametrize(
    "name, variant, least",
    [
        ("group_advantages", "forward", 0.85),  # a variance for each group
        ("token_logprobs", "forward", 0.9),
        ("token_logprobs", "backward", 0.6),  # the logits are read twice
        ("grpo_loss", "logprobs", 0.45),  # it returns the loss of each token, and metrics
        ("flow_step", "draw", 0.6),  # it writes the mean beside the next sample
    ],
)
def test_our_kernels_move_no_less_and_not_much_more(name, variant, least):
    """Bytes of the recorded Triton launches, as `counts` sees them."""
    case = small(name, variant)
    case = replace(case, N=4096, T=case.T and 512) if case.op != "flow_step" else case  # scalars do not matter then
    _, step = ours(case)
    moved = sum(kernel.bytes for kernel in counted(step).kernels)
    assert least <= need(case).bytes / moved <= 1


def test_attention_needs_seven_products():
    case = next(MODULES["shared_prefix_attention"].cases("cpu", quick=True))
    group, tokens, prompt, width = case.G, case.T, case.V, case.H
    pairs = group * sum(prompt + i + 1 for i in range(tokens))  # causal
    assert need(case).flops == 7 * 2 * pairs * width
    given = MODULES["shared_prefix_attention"].inputs(case)
    leaves = sum(leaf.nbytes for leaf in given.leaves.values())
    assert need(case).bytes == 2 * leaves + 2 * given.upstream.nbytes  # gradients; the result and its gradient


def test_a_floor_is_of_the_slower_of_arithmetic_and_bytes():
    gpu = Gpu(bf16=100e12, fp8=200e12, bandwidth=1e12)
    assert floor_ms(Need(int(100e9), int(1e6)), gpu) == pytest.approx(1)
    assert floor_ms(Need(int(100e9), int(3e9)), gpu) == pytest.approx(3)
    assert floor_ms(Need(int(100e9), 0), gpu, "float8_e4m3fn") == pytest.approx(0.5)


def test_no_predicted_time_is_below_its_floor():
    """Measured rates are below the makers' peaks, and implementations move more than they must."""
    for module in OPS:
        for case in module.cases("cuda", False):
            for time in predicted.times(case).values():
                assert time >= floor_ms(need(case), GPUS["H200"]), case


@pytest.mark.parametrize(
    "text, name", [("H200", "H200"), ("h100", "H100"), ("4090", "RTX 4090"), ("rtx-5090", "RTX 5090")]
)
def test_names_of_gpus(text, name):
    assert find(text) == name


@pytest.mark.parametrize("text", ["", "RTX", "V100"])
def test_unknown_gpus_are_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match="known are H200, H100, A100, RTX 4090, RTX 5090"):
        find(text)


def test_a_measured_time_stands_beside_its_floor():
    case = next(c for c in MODULES["linear_logprobs"].cases("cuda", False))
    row = {"op": case.op, "variant": case.variant, "dtype": case.precision, **case.sizes(), "contestant": OURS}
    row |= {"device": "NVIDIA H200", "median_ms": 5.0, "date": "1", "config": {}}
    on_another = row | {"device": "NVIDIA H100 80GB HBM3", "median_ms": 9.0}
    found = {item.name + item.size: item for item in roofline.op_floors("H200", [row, on_another])}
    (measured,) = (item for item in found.values() if item.measured is not None)
    assert measured.measured == 5.0 and measured.name == "linear_logprobs, frozen" and "N 2,400" in measured.size
    assert measured.milliseconds == pytest.approx(1e3 * 4 * 2400 * 2048 * 151_936 / 989.5e12)


def test_a_preset_s_steps():
    rows = [
        {"op": "trainer-steps", "variant": "tiny", "dtype": "float32", "contestant": f"{OURS}, stage 2", "config": {}}
        | {"preset": "tiny", "stage": 2, "device": "NVIDIA H200", "median_ms": 7.0, "date": "1", "N": 64}
    ]
    found = {item.name: item for item in roofline.step_floors("H200", "tiny", rows)}
    assert [name[-1] for name in found] == ["1", "2", "3"]
    assert found["tiny, stage 2"].measured == 7.0 and found["tiny, stage 3"].measured is None
    fewer = {item.name: item for item in roofline.step_floors("A100", "tiny")}
    for name, item in found.items():
        assert item.need == fewer[name].need and item.milliseconds < fewer[name].milliseconds


def test_passes_by_hand():
    changed = ["stage2.micro_batch=16", "render.batch=10", "render.steps=8", "caption.max_new_tokens=20"]
    config = load_config("tiny", changed)
    # 64 captions: prompts, 20 tokens, re-reading, 4 micro-batches forward and backward; 7 batches at 8 levels
    assert roofline.passes(config, 2) == (22 + 8, 56)
    assert roofline.passes(config, 1) == (1, 8)
    config.cheaper_sampler.steps, config.cheaper_sampler.reuse = 6, [2, 4]
    assert roofline.passes(config, 2) == (22 + 8, 28)
    config.stage3.images, config.stage3.group_size, config.stage3.micro_batch = 16, 8, 32
    config.stage3.window, config.stage3.window_end, config.stage3.updates = 2, 7, 3
    # Two steps shared by a group: 16 drawings, 2 batches; six of 128, 13 batches; 4 micro-batches of 2 steps, thrice
    assert roofline.passes(config, 3) == (22, 2 * 2 + 6 * 13 + 4 * 2 * 3)


def test_peaks_are_those_of_the_trainers_share():
    for name, gpu in GPUS.items():
        assert gpu.bf16 == pytest.approx(PEAKS[name], rel=0.005)


def test_every_case_has_a_floor():
    for gpu in GPUS:
        assert all(item.milliseconds > 0 for item in roofline.op_floors(gpu))
    with pytest.raises(ValueError, match="not known"):
        need(Case("square", "only", "cuda", torch.float32, N=1))
