"""The ablation matrix: zero a language's neurons in a checkpoint, read every language with it.

For each scorer and language: identify on one text, zero the neurons' ``down_proj`` columns through
``broca edit --method scale --factor 0`` and ``broca export``, load the exported checkpoint and measure
the rise of each language's negative log-likelihood (nats a token) on another text.  Beside it, as many
random neurons in the same layers (mean and largest of several draws).

    python benchmarks/ablation.py artifacts/demo/model --corpus artifacts/demo/corpus --part estimate \\
        --held-out artifacts/demo/corpus --held-out-part report
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from cli.options import CommaSeparated
from editing.edits.scale import scale_plan
from editing.export import export
from editing.likelihood import nll_by_language
from neurons.batches import language_batches
from neurons.corpus import PARTS, read_corpus
from neurons.errors import BrocaError
from neurons.identify import identify
from neurons.neuron_set import NeuronSet, neuron_set
from neurons.scorers.random_control import random_like
from neurons.source import LoadedModel, load_model, open_model


def ablated_nll(loaded: LoadedModel, neurons: NeuronSet, language: str, batches: Any) -> dict[str, float]:
    """NLL of every language under the exported checkpoint without a language's neurons."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ablated"
        export(open_model(loaded.name), scale_plan(loaded, neurons, [language], 0.0), out)
        return nll_by_language(load_model(str(out), str(loaded.device)), batches)


def as_set(neurons: NeuronSet, language: str, rows: torch.Tensor) -> NeuronSet:
    """Rows as a neuron set of one language, of the same model."""
    scores = torch.zeros(len(rows), dtype=torch.float64)
    return neuron_set({language: rows}, {language: scores}, neurons.layers, neurons.neurons, neurons.metadata)


def matrix(
    loaded: LoadedModel, neurons: NeuronSet, batches: Any, base: dict[str, float], seeds: int
) -> dict[str, Any]:
    """Rises by ablated language and evaluated language; None for a language without neurons."""
    rises: dict[str, Any] = {}
    for language in neurons.languages:
        if len(neurons.of(language)) == 0:
            rises[language] = None
            continue
        own = ablated_nll(loaded, neurons, language, batches)
        controls = [
            ablated_nll(
                loaded,
                as_set(
                    neurons,
                    language,
                    random_like(neurons.of(language), neurons.layers, neurons.neurons, seed),
                ),
                language,
                batches,
            )
            for seed in range(seeds)
        ]
        rises[language] = {
            "neurons": len(neurons.of(language)),
            "rise": {k: own[k] - base[k] for k in base},
            "random": [control[language] - base[language] for control in controls],
        }
    return rises


@click.command()
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="To identify on.")
@click.option("--part", type=click.Choice(list(PARTS)), default="all")
@click.option("--held-out", type=click.Path(path_type=Path), required=True, help="To measure on.")
@click.option("--held-out-part", type=click.Choice(list(PARTS)), default="all")
@click.option("--languages", type=CommaSeparated())
@click.option("--methods", type=CommaSeparated(), default=("lape", "gradient-contrast"))
@click.option("--top-rate", type=float, default=0.01)
@click.option("--seeds", type=int, default=3, help="Random draws a language.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    corpus: Path,
    part: str,
    held_out: Path,
    held_out_part: str,
    languages: tuple[str, ...] | None,
    methods: tuple[str, ...],
    top_rate: float,
    seeds: int,
    json_path: Path | None,
) -> None:
    """Print the matrix of each scorer as a Markdown table."""
    loaded = load_model(model)
    text = read_corpus(corpus, languages, part)
    batches = language_batches(loaded, read_corpus(held_out, text.languages, held_out_part))
    base = nll_by_language(loaded, batches)
    numbers: dict[str, Any] = {"base": base}
    for method in methods:
        neurons = identify(loaded, text, method, top_rate)
        found = matrix(loaded, neurons, batches, base, seeds)
        numbers[method] = found
        print(f"\n{method}, top rate {top_rate}: rise of NLL, nats a token\n")
        print(f"| ablated | neurons | {' | '.join(base)} | own language, random neurons |")
        print("|---|---|" + "---|" * len(base) + "---|")
        for language, row in found.items():
            if row is None:
                print(f"| {language} | none found |{' |' * (len(base) + 1)}")
                continue
            cells = [f"{row['rise'][k]:+.3f}" for k in base]
            own = list(base).index(language)
            cells[own] = f"**{cells[own]}**"
            mean = sum(row["random"]) / len(row["random"])
            print(
                f"| {language} | {row['neurons']} | {' | '.join(cells)} | {mean:+.4f} (largest "
                f"{max(row['random'], key=abs):+.4f}) |"
            )
    if json_path is not None:
        json_path.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BrocaError as error:
        raise SystemExit(f"ablation: {error}") from error
