"""What importing and installing do, and do not do."""

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import tomllib
from setuptools import find_packages

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernels_folder_does_not_shadow_the_package_of_that_name(tmp_path):
    """Hugging Face's `kernels`, wherever it is installed, wins over our source root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(*names): return 'theirs'\n")
    code = "import uae_kernels; from kernels import get_kernel; print(get_kernel())"
    assert python(code, PYTHONPATH=str(tmp_path)) == "theirs"
    assert python("import uae_kernels, transformers.modeling_utils, diffusers; print('fine')").endswith("fine")


def test_importing_does_nothing_else():
    for package in ("uae_kernels", "uae_fast"):
        code = f"""
import os, sys
before = dict(os.environ)
import {package}
assert dict(os.environ) == before
heavy = "transformers diffusers peft accelerate bitsandbytes trl liger_kernel tensorboard wandb trackio".split()
print([name for name in heavy if name in sys.modules])
"""
        assert python(code) == "[]"


def test_help_imports_no_library():
    code = """
import sys
from uae_fast.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print([name for name in ("torch", "transformers", "yaml") if name in sys.modules])
"""
    assert python(code).endswith("[]")


def test_every_module_and_data_file_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for root, name in ((ROOT, "uae_fast"), (ROOT / "kernels", "uae_kernels")):
        modules = {path.parent for path in (root / name).rglob("*.py")}
        shipped = {root / package.replace(".", "/") for package in find_packages(root, include=[f"{name}*"])}
        assert modules == shipped
    data = [path.relative_to(ROOT / "uae_fast").as_posix() for path in (ROOT / "uae_fast").rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")]  # fmt: skip
    data += [f"configs/{path.name}" for path in (ROOT / "configs").iterdir()]
    patterns = [pattern.replace("**/*", "*") for pattern in settings["package-data"]["uae_fast"]]
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    assert "configs/tiny.yaml" in data


def test_shipped_weights_are_small_and_hold_no_pickle():
    weights = [path for path in (ROOT / "uae_fast" / "tiny" / "weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in weights) <= 12e6
    assert max(path.stat().st_size for path in weights) <= 3e6
    assert {path.suffix for path in weights} <= {".safetensors", ".json", ".jinja", ".md"}
