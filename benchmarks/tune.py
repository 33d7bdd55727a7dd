"""Time of a trial of `broca tune`, as a ratio to its own generation and scoring.

A trial makes a plan, applies it to the loaded weights, generates, scores, removes the plan and stores the outcome; the
ratio is the time of all of these to that of generation and scoring.  Computations that all trials share (keys,
importances) are timed separately.

    python benchmarks/tune.py artifacts/demo/model --corpus artifacts/demo/corpus --source en --target fr
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from editing.methods.material import Material
from editing.plans.applied import applied
from editing.study.search import Search
from editing.study.search_scoring import Scoring
from editing.study.search_space import spaces
from editing.study.trial import MEASURED, Trial
from neurons.models.source import load_model
from neurons.text.corpus import read_corpus

LIMIT = 1.1
METHODS = ("keyed", "steer2edit", "bake")


def now() -> float:
    """Seconds; on a CPU processor time, which excludes other processes."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """A scoring that sums the time spent in it."""

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self.ceiling = scoring.ceiling
        self.spent = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        work = getattr(self._scoring, name)

        def timed(*arguments: Any) -> Any:
            begin = now()
            try:
                return work(*arguments)
            finally:
                self.spent += now() - begin

        return timed


@click.command()
@click.argument("model")
@click.option("--corpus", "corpus_path", type=click.Path(path_type=Path), required=True)
@click.option("--source", required=True)
@click.option("--target", required=True)
@click.option("--trials", type=int, default=8, help="Of each method.")
@click.option("--prompts", type=int, default=50)
@click.option("--samples", type=int, default=2)
@click.option("--lines", type=int, default=25)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    corpus_path: Path,
    source: str,
    target: str,
    trials: int,
    prompts: int,
    samples: int,
    lines: int,
    json_path: Path | None,
) -> None:
    """Print the ratios as a Markdown table."""
    loaded = load_model(model)
    estimate, choose = (read_corpus(corpus_path, part=part) for part in ("estimate", "choose"))
    material = Material(loaded, estimate, source, target)
    timed = Timed(Scoring(loaded, choose, source, target, prompts=prompts, samples=samples, lines=lines))
    print("| method | once, s | trial, s | trial / generation and scoring | range | given up early | limit |")
    print("|---|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for method, space in spaces(material, METHODS).items():
        begin = now()
        for settings in space.known:
            space.make(settings)
        once = now() - begin
        whole: list[float] = []
        ratios: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "study.jsonl"
            search = Search(timed, {method: space}, partial(applied, loaded), path)
            mark = [now(), timed.spent]

            def told(
                _: Trial, mark: list[float] = mark, whole: list[float] = whole, ratios: list[float] = ratios
            ) -> None:
                end, spent = now(), timed.spent
                # A trial whose plan is refused generates nothing.
                if spent == mark[1]:
                    mark[0] = end
                    return
                whole.append(end - mark[0])
                ratios.append((end - mark[0]) / (spent - mark[1]))
                mark[:] = now(), timed.spent

            search.run(trials, told)
            early = sum(trial.state != MEASURED for trial in search.trials)
        found[method] = {
            "once": once,
            "seconds": statistics.mean(whole),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "of_all": sum(whole) / sum(a / b for a, b in zip(whole, ratios, strict=True)),
            "early": early,
        }
        row = found[method]
        print(
            f"| {method} | {once:.1f} | {row['seconds']:.1f} | {row['ratio']:.3f} (all together {row['of_all']:.3f}) | "
            f"{row['least']:.3f} to {row['most']:.3f} | {early} of {trials} | {LIMIT} |",
            flush=True,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
