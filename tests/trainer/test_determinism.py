"""`deterministic: true` reaches PyTorch, is said and stored, and every stage gets through it with the same numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from uae_fast.checkpoint import checkpoints
from uae_fast.config import load_config
from uae_fast.determinism import set_deterministic
from uae_fast.trainer import train


@pytest.fixture
def pytorch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def test_a_strict_run_is_said_stored_and_the_same(world, small_config, capsys, pytorch_as_it_was):
    sizes = [f"stage{i}.steps=1" for i in range(4)]
    options = ("stages=[0,1,2,3]", *sizes, "evaluate.images=4")
    found = {}
    for name in ("free", "strict"):
        products = "high" if name == "strict" else "highest"  # the same where there are no tensor cores
        chosen = (f"deterministic={name == 'strict'}", f"float32_products={products}")
        run = train(small_config(world, *options, *chosen, run=name))
        assert torch.get_float32_matmul_precision() == products
        assert torch.are_deterministic_algorithms_enabled() == (name == "strict")
        said = "yes" if name == "strict" else "as PyTorch chooses"
        assert capsys.readouterr().out.startswith(f"deterministic: {said}, float32 products {products},")
        assert load_config(run / "config.yaml").deterministic == (name == "strict")
        assert f"deterministic: {'true' if name == 'strict' else 'false'}" in (run / "report.html").read_text()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = checkpoints(run / "checkpoints")[-1]
        weights = {f"{file.name}:{key}": value for file in sorted(last.rglob("*.safetensors"))
                   for key, value in load_file(file).items()}  # fmt: skip
        found[name] = [row["loss"] for row in rows], weights
    assert found["free"][0] == found["strict"][0] and len(found["free"][0]) == 4
    for key, value in found["free"][1].items():
        assert torch.equal(value, found["strict"][1][key]), key


def test_an_operation_without_a_repeatable_algorithm_raises(pytorch_as_it_was):
    assert set_deterministic(True).startswith("deterministic: yes")
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert set_deterministic(False).startswith("deterministic: warnings only")
