"""``broca compare``: the overlap of neuron sets or plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.screen import Screen

if TYPE_CHECKING:
    import torch

    from neurons.neuron_sets.comparison import Comparison, Pair


@click.command("compare")
@click.argument("files", metavar="FILE...", type=opt.IN_FILE, nargs=-1, required=True)
@click.option("--plot", type=opt.OUT_FILE, help="Neuron sets: file for a plot of the overlap (.png or .svg).")
@click.option("--model", help="Edits: their model; needed for the cosine of edits that scale weights.")
@click.option("--details", is_flag=True, help="Neuron sets: also show each language of each pair.")
@opt.json
def command(
    files: tuple[Path, ...], plot: Path | None, model: str | None, details: bool, as_json: bool
) -> None:
    """Compare two or more neuron sets of one model, or two edits module by module.

    Jaccard: the fraction of neurons (or components) in either file that are in both, over all languages or, with
    --details, per language.  Rank correlation: Spearman's, of the scores of the shared neurons, mean over languages.
    Cosine: between the changes of a module's weight.

    \b
    Examples:
      broca compare lape.safetensors gradient.safetensors --plot overlap.png
      broca compare lape.safetensors gradient.safetensors --details
      broca compare keyed.safetensors steer2edit.safetensors
    """
    from neurons.errors import BrocaError, UsageError
    from neurons.files.artifact import load_artifact

    screen = Screen(as_json)
    kinds = [load_artifact(file).kind for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0] or kind not in ("neurons", "edit"):
            other = f", but {files[0]} contains {kinds[0]!r}" if kind != kinds[0] else ""
            raise BrocaError(f"{file}: contains {kind!r}{other}: give only neuron sets, or two edits")
    if kinds[0] == "edit":
        if plot is not None:
            raise UsageError("--plot is not supported for edits: plot one with `broca plot`")
        if details:
            raise UsageError("--details is not supported for edits: leave it out")
        _plans(screen, files, model)
        return
    if model is not None:
        raise UsageError("--model is not supported for neuron sets: leave it out")
    _neuron_sets(screen, files, plot, details)


def _plans(screen: Screen, files: tuple[Path, ...], model: str | None) -> None:
    from editing.plans.plan import load_plan
    from editing.plans.plan_comparison import compare_plans
    from neurons.errors import UsageError
    from neurons.models.source import open_model

    if len(files) != 2:
        raise UsageError(f"give two edits to compare, not {len(files)}")
    modules = compare_plans(
        load_plan(files[0]), load_plan(files[1]), None if model is None else open_model(model)
    )
    screen.table(
        f"first: {files[0].name}; second: {files[1].name}",
        ["layer", "module", "first", "second", "shared", "Jaccard", "cosine"],
        [
            [str(row.layer), row.block, row.first, row.second, row.shared, row.jaccard, row.cosine]
            for row in modules
        ],
        words=2,
    )
    screen.result(edits=list(files), modules=[vars(row) for row in modules])


def _neuron_sets(screen: Screen, files: tuple[Path, ...], plot: Path | None, details: bool) -> None:
    from neurons.neuron_sets.comparison import compare
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.neuron_sets.pictures import comparison_figure, picture_format, save_figure

    if plot is not None:
        picture_format(plot)
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else list(map(str, files))
    comparison = compare([load_neuron_set(file) for file in files], names)
    if plot is not None:
        # Save before printing: the reader of a pipe may close it early.
        save_figure(comparison_figure(comparison), plot)
    for name, languages in zip(comparison.names, comparison.left_out, strict=True):
        if languages:
            screen.warn(f"{name}: {', '.join(languages)} left out, because not every set has it")
    screen.table(
        f"sets of {comparison.unit}s, all of {', '.join(comparison.languages)}",
        ["first", "second", "first size", "second size", "shared", "Jaccard", "rank correlation"],
        [
            [
                comparison.names[pair.first],
                comparison.names[pair.second],
                *(int(comparison.sizes[i].sum()) for i in (pair.first, pair.second)),
                int(pair.shared.sum()),
                pair.overall_jaccard,
                pair.mean_rank_correlation,
            ]
            for pair in comparison.pairs
        ],
        words=2,
    )
    if details:
        _details(screen, comparison)
    left_out = {
        name: list(languages) for name, languages in zip(comparison.names, comparison.left_out, strict=True)
    }
    screen.result(
        plot,
        sets=list(comparison.names),
        unit=comparison.unit,
        languages=list(comparison.languages),
        left_out=left_out,
        sizes=comparison.sizes.tolist(),
        pairs=[
            {
                "first": comparison.names[pair.first],
                "second": comparison.names[pair.second],
                "overall_jaccard": pair.overall_jaccard,
                "mean_rank_correlation": pair.mean_rank_correlation,
                **_columns(pair),
                "by_layer": pair.by_layer.T.tolist(),
            }
            for pair in comparison.pairs
        ],
        across=comparison.across.tolist(),
        plot=plot,
    )


def _columns(pair: Pair) -> dict[str, list[Any]]:
    """The measures of a pair by language."""
    return {
        "shared": pair.shared.tolist(),
        "jaccard": pair.jaccard.tolist(),
        "first_in_second": pair.first_in_second.tolist(),
        "second_in_first": pair.second_in_first.tolist(),
        "rank_correlation": list(pair.rank_correlation),
    }


def _details(screen: Screen, comparison: Comparison) -> None:
    """Print the sizes and overlaps of every language."""

    def overlaps(title: str, matrix: torch.Tensor) -> None:
        rows = zip(comparison.languages, matrix.tolist(), strict=True)
        title = f"Jaccard of languages{title}"
        screen.table(title, ["", *comparison.languages], [[k, *row] for k, row in rows])

    screen.table(
        f"{comparison.unit}s",
        ["set", *comparison.languages],
        [[name, *row] for name, row in zip(comparison.names, comparison.sizes.tolist(), strict=True)],
    )
    for pair in comparison.pairs:
        first, second = comparison.names[pair.first], comparison.names[pair.second]
        rows = zip(*_columns(pair).values(), strict=True)
        screen.table(
            f"first: {first}; second: {second}",
            ["language", "shared", "Jaccard", "first in second", "second in first", "rank correlation"],
            [[k, *row] for k, row in zip(comparison.languages, rows, strict=True)],
        )
        overlaps(f", rows {first}, columns {second}", comparison.across[pair.first, :, pair.second])
    for i, name in enumerate(comparison.names):
        overlaps(f" within {name}", comparison.across[i, :, i])
