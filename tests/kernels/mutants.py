"""Seeded faults that the tests must notice: `make mutants`.

Each file of `mutants/` lists faults of one op as {name, file, old, new, test}: in a copy of the kernels the text `old`,
which stands there once, becomes `new`, and the pytest arguments `test` must then fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def survives(mutant: dict[str, str]) -> bool:
    """Whether the tests pass in spite of the fault."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "uae_kernels"
        shutil.copytree(ROOT / "kernels/uae_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
        file = package / mutant["file"]
        text = file.read_text()
        if text.count(mutant["old"]) != 1:
            raise SystemExit(
                f"{mutant['name']}: the text to change stands {text.count(mutant['old'])} times in {mutant['file']}"
            )
        file.write_text(text.replace(mutant["old"], mutant["new"]))
        interpret = {"TRITON_INTERPRET": "1"} if "test_triton" in mutant["test"] else {}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant["test"].split()],
            cwd=ROOT,
            env={
                **os.environ,
                **interpret,
                "PYTHONPATH": folder,
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
        )
        if run.returncode > 1:  # neither passed, nor failed, nor crashed
            raise SystemExit(
                f"{mutant['name']}: pytest stopped with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
            )
        return run.returncode == 0


def main() -> None:
    console, alive, count = Console(), [], 0
    for file in sorted((HERE / "mutants").glob(f"{sys.argv[1] if len(sys.argv) > 1 else '*'}.json")):
        for mutant in json.loads(file.read_text()):
            count += 1
            survived = survives(mutant)
            alive += [mutant["name"]] * survived
            console.print(
                f"[red]survived[/]  {mutant['name']}" if survived else f"[green]found[/]     {mutant['name']}"
            )
    console.print(f"{count - len(alive)} of {count} faults found")
    sys.exit(bool(alive) or not count)


if __name__ == "__main__":
    main()
