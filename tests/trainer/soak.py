"""A long run of tiny steps, watched from outside: memory, file handles, threads and step time must stay flat.

    python tests/trainer/soak.py --steps 2000 --out docs/soak.png        (make soak)

Half of the steps are stage 2's, half stage 3's, with a checkpoint every 20. Of each stage's quarters the first is left
out, in which allocators and caches settle; the last is compared with the second. Ends with status 1 where memory grew
by more than 2 %, a handle or a thread was left open, or the median step took more than 15 % longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GROWTH, SLOWER = 0.02, 0.15
PERIOD = 0.25  # seconds between samples


def watch(process: subprocess.Popen, run: Path) -> list[dict]:
    """Samples of a process until it ends: steps done, resident memory in bytes, open files, threads."""
    samples, page = [], os.sysconf("SC_PAGE_SIZE")
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(PERIOD)
        try:
            done = (run / "metrics.jsonl").read_bytes().count(b"\n")
            resident = int((proc / "statm").read_text().split()[1]) * page
            handles, threads = len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        if resident:  # none when the process is on its way out
            samples.append({"step": done, "memory": resident, "handles": handles, "threads": threads})
    return samples


def part(values: list[tuple[int, float]], first: int, steps: int, begin: float, end: float) -> list[float]:
    """The values of a stage of `steps` steps that starts after `first`, between two shares of it."""
    return [value for step, value in values if first + begin * steps < step <= first + end * steps]


def verdict(samples: list[dict], rows: list[dict]) -> list[str]:
    """What did not stay flat, in words."""
    problems, first = [], 0
    for stage in ("stage2", "stage3"):
        steps = sum(row["stage"] == stage for row in rows)
        for name, allowed in (("memory", GROWTH), ("handles", 0.0), ("threads", 0.0), ("seconds", SLOWER)):
            if name == "seconds":
                values = [(row["step"], row["seconds/rollout"] + row["seconds/update"]) for row in rows]
            else:
                values = [(sample["step"], sample[name]) for sample in samples]
            early, late = part(values, first, steps, 0.25, 0.5), part(values, first, steps, 0.75, 0.99)
            middle = statistics.median if name in ("memory", "seconds") else min  # a save opens a file for an instant
            before, after = middle(early), middle(late)
            print(f"{stage} {name}: {before:.6g} early, {after:.6g} late ({after / before - 1:+.1%})")
            if after > before * (1 + allowed):
                problems.append(f"{stage}: {name} went from {before:.6g} to {after:.6g}")
        first += steps
    return problems


def plot(samples: list[dict], rows: list[dict], title: str, out: Path) -> None:
    """Four curves over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = [sample["step"] for sample in samples]
    curves = [
        ("resident memory, MiB", steps, [sample["memory"] / 2**20 for sample in samples]),
        ("open files", steps, [sample["handles"] for sample in samples]),
        ("threads", steps, [sample["threads"] for sample in samples]),
        ("seconds a step", [r["step"] for r in rows], [r["seconds/rollout"] + r["seconds/update"] for r in rows]),
    ]
    for axis, (label, xs, ys) in zip(axes, curves, strict=True):
        axis.plot(xs, ys, linewidth=0.8)
        axis.set_ylim(0, 1.3 * sorted(ys)[int(0.99 * (len(ys) - 1))])  # a stray slow step would hide the rest
        axis.set_ylabel(label)
        axis.axvline(len(rows) / 2, color="0.7", linewidth=0.8)
    axes[0].set_title(title, fontsize=10)
    axes[-1].set_xlabel("step (left of the line stage 2, right of it stage 3)")
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("docs/soak.png"))
    arguments = parser.parse_args()
    from uae_fast.tiny.export import export

    folder, half = Path(tempfile.mkdtemp(prefix="uae-fast-soak-")), arguments.steps // 2
    export(folder / "train", "train", 64, seed=0)
    export(folder / "heldout", "heldout", 8, seed=0)
    run = folder / "run"
    command = [
        sys.executable, "-m", "uae_fast.cli", "train", "tiny", f"run={run}", f"data.train={folder / 'train'}",
        f"data.heldout={folder / 'heldout'}", "stages=[2,3]", "models.encoder=lora", "models.decoder=lora",
        "evaluate.images=4", "checkpoint.every=20", "render.steps=3", "render.batch=4", "caption.max_new_tokens=12",
        f"stage2.steps={half}", "stage2.images=2", "stage2.group_size=2", "stage2.micro_batch=4", "stage2.lr=1e-6",
        f"stage3.steps={half}", "stage3.images=2", "stage3.group_size=2", "stage3.micro_batch=4", "stage3.lr=1e-6",
        "stage3.window=1", "stage3.window_end=2",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        samples = watch(process := subprocess.Popen(command, stdout=log, stderr=log), run)
    if process.returncode:
        print((folder / "log").read_text()[-3000:])
        return 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    problems = verdict(samples, rows)
    plot(samples, rows, f"{len(rows):,} steps of the tiny preset, {os.cpu_count()} CPU cores", arguments.out)
    print("\n".join(problems) or f"flat over {len(rows)} steps; drawn in {arguments.out}")
    shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
