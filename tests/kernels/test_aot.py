"""Every kernel, with the arguments its op really passes, compiled for every GPU it ships for; no GPU is needed.

Each `test_triton_<op>.py` names its cases: `calls()` yields (name, function) that cover its kernels' variants,
`numbers()` yields functions that differ only in sizes and numbers.
"""

import re
from collections import defaultdict
from importlib import import_module

import pytest
from launches import CAPABILITIES, FP8_CAPABILITIES, MATRIX_CAPABILITIES, SHARED_LIMIT, recorded, variants

OPS = [
    "advantages", "flow_grpo_loss", "flow_step", "fp8", "gated_residual", "grpo_loss", "linear_logprobs", "qk_norm",
    "segment_attention", "shared_prefix_attention", "token_logprobs",
]  # fmt: skip
PRODUCTS = ["linear_logprobs", "segment_attention", "shared_prefix_attention"]
SHIPS_FOR = dict.fromkeys(PRODUCTS, MATRIX_CAPABILITIES) | {"fp8": FP8_CAPABILITIES}
CASES = [(op, capability) for op in OPS for capability in SHIPS_FOR.get(op, CAPABILITIES)]


@pytest.mark.parametrize("op, capability", CASES)
def test_compiles_within_the_chips_limits(op, capability):
    for name, launch in variants(op, capability):
        where = f"{launch.name} for {name} on sm_{capability}"
        assert launch.resources["stack"] == 0, f"{where} spills: {launch.resources}"
        assert launch.resources["shared"] <= SHARED_LIMIT[capability], f"{where}: {launch.resources}"
        ptx = launch.compiled.asm["ptx"]
        halves = any(
            str(kind[0]).removeprefix("tensordesc<").lstrip("*")[:4] in ("bf16", "fp16")
            for kind in launch.specialization
        )
        if (halves and op in ("fp8", "gated_residual", "qk_norm")) or launch.name == "_sum_kernel":
            assert re.search(r"ld\.global\S*\.v4", ptx), f"{where} does not load 16 bytes at a time"
        if op == "fp8":
            assert "cvt.rn.satfinite.e4m3x2.f32" in ptx, f"{where} does not round to e4m3 in hardware"
            assert "st.global.b8" not in ptx, f"{where} stores e4m3 numbers one by one"
        if " = tt.dot" in launch.compiled.asm["ttir"]:
            assert halves or ".tf32" not in ptx, f"{where} rounds fp32 to tf32"
            if launch.arguments.get("bias") is None:  # whose numbers come one by one
                assert not re.search(r"ld\.global\S*\.[bu]16", ptx), f"{where} loads 2 bytes at a time"
            if capability == 90 and halves:
                assert "wgmma" in ptx, f"{where} does not use wgmma"


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c not in FP8_CAPABILITIES])
def test_e4m3_is_not_compiled_for_older_gpus(capability):
    with recorded(capability) as launches:
        for _, call in import_module("test_triton_fp8").calls():
            with pytest.raises(RuntimeError, match=f"8.9 or newer .* this GPU has {capability / 10}: use fp8=False"):
                call()
    assert not launches


@pytest.mark.parametrize("op", OPS)
def test_no_new_kernel_for_other_numbers(op):
    compiled = defaultdict(set)
    with recorded(90) as launches:
        for call in import_module(f"test_triton_{op}").numbers():
            call()
    for launch in launches:
        compiled[launch.name].add(launch.key)
    assert compiled and {name: len(keys) for name, keys in compiled.items() if len(keys) > 3} == {}


def test_every_program_id_is_widened():
    """Offsets pass 2^31 at 14,135 rows of 151,936 logits: no program id may enter arithmetic as an int32."""
    from pathlib import Path

    import uae_kernels

    for file in Path(uae_kernels.__file__).parent.rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for found in re.finditer(r"tl\.program_id\(\w\)", line):
                assert line[found.end() :].startswith(".to(tl.int64)"), f"{file.name}:{number}: {line.strip()}"
