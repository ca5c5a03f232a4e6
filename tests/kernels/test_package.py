"""What holds for every function of the package, and for the package itself."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uae_kernels
from uae_kernels import mmdit as uae_mmdit
from uae_kernels import reference
from uae_kernels.mmdit import Projections, Stream
from uae_kernels.reference import mmdit as mmdit_definitions

FUNCTIONS = [
    "flow_grpo_loss", "flow_step", "group_advantages", "grpo_loss", "linear_grpo_loss", "linear_logprobs",
    "segment_attention", "shared_prefix_attention", "token_logprobs",
]  # fmt: skip


def test_public_names():
    assert uae_kernels.__all__ == sorted(["FlowStep", "GRPOLoss", "reference", *FUNCTIONS])
    assert reference.__all__ == FUNCTIONS
    for name in FUNCTIONS:
        file = {"group_advantages": "advantages"}.get(name, name)
        assert getattr(uae_kernels, name).__module__ == f"uae_kernels.{file}"
        assert getattr(reference, name).__module__ == f"uae_kernels.reference.{file}"


MMDIT = [
    "gated_residual",
    "layer_norm_modulate",
    "qk_norm",
    "quantize_rows",
]  # the ops of uae_kernels.mmdit that have a definition


def test_public_names_of_mmdit():
    assert uae_mmdit.__all__ == sorted(
        ["Fp8Calibration", "Modulated", "ModulationTable", "Projections", "Quantized", "Stream", "accelerate_sd3",
         "calibrate", "fp8_linear", "joint_attention", *MMDIT, "restore_sd3"]
    )  # fmt: skip
    assert mmdit_definitions.__all__ == sorted(["fp8_linear", *MMDIT])
    assert inspect.signature(uae_mmdit.fp8_linear) == inspect.signature(mmdit_definitions.fp8_linear)
    for name in uae_mmdit.__all__:
        assert getattr(uae_mmdit, name).__doc__


@pytest.mark.parametrize(
    "public, definition",
    [(getattr(uae_kernels, name), getattr(reference, name)) for name in FUNCTIONS]
    + [(getattr(uae_mmdit, name), getattr(mmdit_definitions, name)) for name in MMDIT],
    ids=FUNCTIONS + MMDIT,
)
def test_reference_has_the_public_signature(public, definition):
    assert inspect.signature(public) == inspect.signature(definition)
    assert inspect.signature(public).parameters["impl"].default == "auto"
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in public.__doc__


CALLS = {
    "group_advantages": lambda f, impl: f(torch.rand(4), 2, impl=impl),
    "token_logprobs": lambda f, impl: f(torch.rand(4, 5), torch.zeros(4, dtype=torch.int64), impl=impl),
    "linear_logprobs": lambda f, impl: f(
        torch.rand(4, 3), torch.rand(5, 3), torch.zeros(4, dtype=torch.int64), impl=impl
    ),
    "grpo_loss": lambda f, impl: f(torch.rand(4, 5), torch.rand(4), impl=impl).loss,
    "linear_grpo_loss": lambda f, impl: (
        f(torch.rand(4, 2, 3), torch.rand(5, 3), torch.zeros(4, 2).long(), torch.rand(4), impl=impl).loss
    ),
    "shared_prefix_attention": lambda f, impl: f(*torch.rand(5, 1, 2, 1, 4), group_size=1, impl=impl),
    "segment_attention": lambda f, impl: f(*torch.rand(3, 1, 2, 1, 4), impl=impl),
    "flow_step": lambda f, impl: f(torch.rand(2, 3), torch.rand(2, 3), 0.9, 0.8, seed=1, impl=impl).mean,
    "gated_residual": lambda f, impl: f(Stream(torch.rand(1, 2, 3), ((torch.rand(1, 3),) * 2,)), impl=impl)[0].x,
    "layer_norm_modulate": lambda f, impl: f(torch.rand(1, 2, 3), torch.rand(1, 3), torch.rand(1, 3), impl=impl),
    "quantize_rows": lambda f, impl: f(torch.rand(2, 3), impl=impl).scales,
    "qk_norm": lambda f, impl: f(Projections(*torch.rand(3, 1, 2, 4)), heads=2, impl=impl)[0],
    "flow_grpo_loss": lambda f, impl: (
        f(*(torch.rand(2, 3) for _ in range(3)), torch.rand(2), torch.rand(2), 0.9, 0.8, impl=impl).loss
    ),
}


@pytest.mark.parametrize(
    "module, name",
    [(module, name) for module in (uae_kernels, reference) for name in FUNCTIONS]
    + [(module, name) for module in (uae_mmdit, mmdit_definitions) for name in MMDIT],
)
def test_impl(module, name):
    call, function = CALLS[name], getattr(module, name)
    for impl in ("auto", "torch"):
        assert call(function, impl).isfinite().all()
    without = module in (reference, mmdit_definitions)
    with pytest.raises(RuntimeError, match="no Triton kernel" if without else 'impl="triton" needs tensors on a GPU'):
        call(function, "triton")
    with pytest.raises(ValueError, match="impl must be"):
        call(function, "cuda")


def test_import_loads_only_torch_and_changes_no_environment():
    code = """
import os, sys
import torch
before, environment = set(sys.modules), dict(os.environ)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import uae_kernels, uae_kernels.mmdit
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert dict(os.environ) == environment
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
assert not torch.cuda.is_initialized()
loaded = {name.partition(".")[0] for name in sys.modules}
assert not {"transformers", "diffusers", "peft", "trl", "liger_kernel"} & loaded
known = {*sys.stdlib_module_names, "uae_kernels", "torch", "triton"}
others = {name for name in new - known if not name.startswith("_sysconfigdata")}
assert not others, others
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_names_every_function_and_its_example_runs(capsys):
    card = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    others = ["joint_attention", "ModulationTable", "accelerate_sd3", "calibrate", "fp8_linear", "restore_sd3"]
    listed = [*FUNCTIONS, *MMDIT, *others]
    assert [name for name in listed if f"| `{name}(" not in card] == []
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["out"].loss.isfinite() and names["hidden"].grad.abs().sum() > 0
    assert "clip" in example and capsys.readouterr().out
