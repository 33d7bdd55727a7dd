"""Memory estimates of ``--dry-run`` compared with the peak of the command, each in its own process.

    python benchmarks/memory.py MODEL [MODEL ...] --corpus DIR --dtype bfloat16 [--longer DIR]

Peaks are those that the system records for a process (``ru_maxrss``), including libraries and mapped weights.  With
``--longer``, a corpus with three times the text, every stage also runs on that corpus; its peak may be 5 % higher.
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
LONGER_LIMIT = 0.05


def stages(
    model: str, corpus: Path, source: str, target: str, dtype: str, folder: Path
) -> dict[str, list[str]]:
    """Stage -> its command, in an order in which the input files of each exist."""
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
    """The estimated peak of a command's largest stage, in bytes."""
    run = [sys.executable, "-m", "cli.main", *command, "--dry-run", "--json"]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return max(stage["peak"] for stage in json.loads(printed)["stages"].values())


def peak(command: list[str]) -> int:
    """The measured peak of a command, in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"broca {' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--longer", type=click.Path(path_type=Path), help="A corpus of three times the text.")
@click.option("--source", default="en")
@click.option("--target", default="fr")
@click.option("--dtype", default="auto")
@click.option("--only", help="Stages, separated by commas; the files of earlier ones must be among them.")
def main(
    models: tuple[str, ...],
    corpus: Path,
    longer: Path | None,
    source: str,
    target: str,
    dtype: str,
    only: str | None,
) -> None:
    """Print a Markdown table; exit 1 if an estimate or the growth with the text exceeds its limit."""
    print("| model | stage | estimate, MB | peak, MB | estimate / peak | longer text: peak / peak |")
    print("|---|---|---|---|---|---|")
    furthest = growth = 0.0
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            of_longer = {} if longer is None else stages(model, longer, source, target, dtype, folder)
            for stage, command in stages(model, corpus, source, target, dtype, folder).items():
                if only is not None and stage not in only.split(","):
                    continue
                estimate, measured = foreseen(command), peak(command)
                furthest = max(furthest, abs(estimate / measured - 1))
                grown = "-"
                if of_longer:
                    ratio = peak(of_longer[stage]) / measured
                    growth, grown = max(growth, ratio - 1), f"{ratio:.3f}"
                row = f"{estimate / 1e6:,.0f} | {measured / 1e6:,.0f} | {estimate / measured:.2f} | {grown}"
                print(f"| {Path(model).name} | {stage} | {row} |", flush=True)
    print(
        f"\nfurthest off: {furthest:.0%} (limit {LIMIT:.0%}); growth: {growth:.1%} (limit {LONGER_LIMIT:.0%})"
    )
    sys.exit(furthest > LIMIT or growth > LONGER_LIMIT)


if __name__ == "__main__":
    main()
