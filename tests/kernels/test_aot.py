"""Every kernel, with the arguments its op really passes, compiled for every GPU it ships for; no GPU is needed.

Each `test_triton_<op>.py` names its cases: `calls()` yields (name, function) that cover its kernels' variants,
`numbers()` yields functions that differ only in sizes and numbers.
"""

import re
from collections import defaultdict
from importlib import import_module

import pytest
from launches import CAPABILITIES, MATRIX_CAPABILITIES, SHARED_LIMIT, recorded, variants

OPS = [
    "advantages", "flow_grpo_loss", "flow_step", "gated_residual", "grpo_loss", "linear_logprobs", "qk_norm",
    "segment_attention", "shared_prefix_attention", "token_logprobs",
]  # fmt: skip
PRODUCTS = ["linear_logprobs", "segment_attention", "shared_prefix_attention"]
CASES = [(op, cap) for op in OPS for cap in (MATRIX_CAPABILITIES if op in PRODUCTS else CAPABILITIES)]


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
        if halves and op in ("gated_residual", "qk_norm"):
            assert re.search(r"ld\.global\S*\.v4", ptx), f"{where} does not load 16 bytes at a time"
        if " = tt.dot" in launch.compiled.asm["ttir"]:
            assert halves or ".tf32" not in ptx, f"{where} rounds fp32 to tf32"
            if capability == 90 and halves:
                assert "wgmma" in ptx, f"{where} does not use wgmma"


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
