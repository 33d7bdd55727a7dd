"""What ``--dry-run`` foresees beside the peak of the command itself, each in a process of its own.

    python benchmarks/memory.py MODEL [MODEL ...] --corpus DIR --dtype bfloat16

Peaks are those that the system keeps of a process (``ru_maxrss``), libraries and mapped weights included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

LIMIT = 0.25


def stages(
    model: str, corpus: Path, source: str, target: str, dtype: str, folder: Path
) -> dict[str, list[str]]:
    """Stage -> its command, in an order in which each finds its files."""
    text = [model, "--corpus", str(corpus), "--dtype", dtype]
    direction, plan, neurons = (str(folder / f"{name}.safetensors") for name in ("d", "e", "n"))
    between = ["--source", source, "--target", target]
    return {
        "counts": ["record", *text, "--for", "lape", "--out", str(folder / "s.safetensors")],
        "gradients": ["identify", *text, "--out", neurons],
        "direction": ["direction", *text, *between, "--out", direction],
        "key": ["edit", *text, "--direction", direction, "--out", plan],
        "ablate": ["ablate", *text, "--neurons", neurons, "--draws", "0", "--out", str(folder / "a.json")],
        "evaluate": [
            "evaluate", *text, *between, "--edit", plan, "--prompts", "64", "--out", str(folder / "v.json"),
        ],
    }  # fmt: skip


def foreseen(command: list[str]) -> int:
    """Bytes that the largest stage of a command is to take."""
    run = [sys.executable, "-m", "cli.main", *command, "--dry-run", "--json"]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return max(stage["peak"] for stage in json.loads(printed)["stages"].values())


def peak(command: list[str]) -> int:
    """Bytes that it took."""
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"broca {' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--source", default="en")
@click.option("--target", default="fr")
@click.option("--dtype", default="auto")
def main(models: tuple[str, ...], corpus: Path, source: str, target: str, dtype: str) -> None:
    """Print a Markdown table; exit 1 where an estimate is further off than a quarter."""
    print("| model | stage | estimate, MB | peak, MB | estimate / peak |\n|---|---|---|---|---|")
    worst = 0.0
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            for stage, command in stages(model, corpus, source, target, dtype, Path(folder)).items():
                estimate, found = foreseen(command), peak(command)
                ratio = estimate / found
                worst = max(worst, abs(ratio - 1))
                row = f"{estimate / 1e6:,.0f} | {found / 1e6:,.0f} | {ratio:.2f}"
                print(f"| {Path(model).name} | {stage} | {row} |", flush=True)
    print(f"\nfurthest off: {worst:.0%} (limit {LIMIT:.0%})")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
