"""What holds for all of uae_kernels.compat, and what its card says."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from uae_kernels.compat import flow_grpo, verl

CARD = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


def test_imports_no_rival():
    code = """
import sys
import uae_kernels
assert not [name for name in sys.modules if name.startswith("uae_kernels.compat")]
from uae_kernels.compat import flow_grpo, liger, trl, verl
rivals = "trl", "liger_kernel", "verl", "flow_grpo", "diffusers", "transformers", "peft"
print([name for name in rivals if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def examples(heading):
    section = CARD.split(f"### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(r"```py\n(.*?)```", section, re.DOTALL)


def test_the_cards_lines_for_liger_run():
    (example,) = examples("Liger")
    names = {}
    exec(example, names)
    assert {names[name].__module__ for name in ("LigerFusedLinearGRPOLoss", "triton_grpo_loss")} == {
        "uae_kernels.compat.liger"
    }


def test_the_cards_lines_for_trl_run():
    utils = pytest.importorskip("trl.trainer.utils")
    before = utils._ChunkedLogProbFunction
    (example,) = examples("TRL")
    names = {}
    exec(example, names)
    assert utils._ChunkedLogProbFunction is not before
    names["undo"].close()
    assert utils._ChunkedLogProbFunction is before


def test_the_cards_lines_for_verl_run(monkeypatch):
    """verl is not installed: modules of its names stand in."""
    registered = {}
    for name in ("verl", "utils", "kernel", "linear_cross_entropy"), ("verl", "trainer", "ppo", "core_algos"):
        for depth in range(1, len(name) + 1):
            path = ".".join(name[:depth])
            monkeypatch.setitem(sys.modules, path, sys.modules.get(path, ModuleType(path)))
            if depth > 1:
                monkeypatch.setattr(
                    sys.modules[path.rpartition(".")[0]], name[depth - 1], sys.modules[path], raising=False
                )
    algorithms = sys.modules["verl.trainer.ppo.core_algos"]
    algorithms.register_adv_est = lambda name: lambda function: registered.setdefault(name, function)
    for example in examples("verl"):
        exec(example, {})
    assert sys.modules["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy is verl.linear_cross_entropy
    assert registered == {"grpo_uae": verl.compute_grpo_outcome_advantage}


def test_the_cards_lines_for_flow_grpo_run():
    step, loss = examples("flow_grpo")
    names = {}
    exec(step, names)
    assert names["sde_step_with_logprob"] is flow_grpo.sde_step_with_logprob
    exec(loss.split("\n\n")[0], names)
    assert names["grpo_loss"] is flow_grpo.grpo_loss
