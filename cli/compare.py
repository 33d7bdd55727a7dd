"""``broca compare``: how far neuron sets, or plans, agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import IN_FILE, OUT_FILE, json_option
from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.neuron_sets.comparison import Comparison, Pair


@click.command("compare")
@click.argument("files", metavar="FILE...", type=IN_FILE, nargs=-1, required=True)
@click.option("--plot", type=OUT_FILE, help="Neuron sets: file for a picture (.png or .svg).")
@click.option("--model", help="Edits: their model, for the cosines of edits that scale weights.")
@click.option("--details", is_flag=True, help="Neuron sets: also every language of every pair.")
@json_option
def command(
    files: tuple[Path, ...], plot: Path | None, model: str | None, details: bool, as_json: bool
) -> None:
    """Compare two or more neuron sets of one model, or two edits module by module.

    Jaccard: neurons (components) in both, as a share of those in either; all languages together, or with
    --details each.  Rank correlation: Spearman's, of the scores of the neurons in both, mean over languages.
    Cosine: of the two changes of a module's weight.

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
            beside = f", and {files[0]} {kinds[0]!r}" if kind != kinds[0] else ""
            raise BrocaError(f"{file}: holds {kind!r}{beside}: name neuron sets alone, or two edits")
    if kinds[0] == "edit":
        if plot is not None:
            raise UsageError("--plot means nothing to edits: draw one with `broca plot`")
        if details:
            raise UsageError("--details means nothing to edits, whose every module is shown: leave it out")
        _plans(screen, files, model)
        return
    if model is not None:
        raise UsageError("--model means nothing to neuron sets: leave it out")
    _neuron_sets(screen, files, plot, details)


def _plans(screen: Screen, files: tuple[Path, ...], model: str | None) -> None:
    from editing.plans.plan import load_plan
    from editing.plans.plan_comparison import compare_plans
    from neurons.errors import UsageError
    from neurons.models.source import open_model

    if len(files) != 2:
        raise UsageError(f"edits are compared two at a time, and there are {len(files)}")
    found = compare_plans(
        load_plan(files[0]), load_plan(files[1]), None if model is None else open_model(model)
    )
    screen.table(
        f"first: {files[0].name}; second: {files[1].name}",
        ["layer", "block", "first", "second", "shared", "Jaccard", "cosine"],
        [
            [str(row.layer), row.block, row.first, row.second, row.shared, row.jaccard, row.cosine]
            for row in found
        ],
        words=2,
    )
    screen.result({"edits": list(files), "modules": [vars(row) for row in found]})


def _neuron_sets(screen: Screen, files: tuple[Path, ...], plot: Path | None, details: bool) -> None:
    from neurons.neuron_sets.comparison import compare
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.neuron_sets.pictures import comparison_figure, picture_format, save_figure

    if plot is not None:
        picture_format(plot)
    names = _names(files)
    found = compare([load_neuron_set(file) for file in files], names)
    if plot is not None:
        # Before anything is printed: the reader of a pipe may leave early.
        save_figure(comparison_figure(found), plot)
    for name, languages in zip(found.names, found.left_out, strict=True):
        if languages:
            screen.warn(f"{name}: {', '.join(languages)} left out, as not every set has it")
    screen.table(
        f"neuron sets, {', '.join(found.languages)} together",
        ["first", "second", "of first", "of second", "shared", "Jaccard", "rank correlation"],
        [
            [
                found.names[pair.first],
                found.names[pair.second],
                *(int(found.sizes[i].sum()) for i in (pair.first, pair.second)),
                int(pair.shared.sum()),
                pair.overall_jaccard,
                pair.mean_rank_correlation,
            ]
            for pair in found.pairs
        ],
        words=2,
    )
    if details:
        _details(screen, found)
    left_out = {name: list(languages) for name, languages in zip(found.names, found.left_out, strict=True)}
    screen.result(
        {
            "sets": list(found.names),
            "languages": list(found.languages),
            "left_out": left_out,
            "sizes": found.sizes.tolist(),
            "pairs": [
                {
                    "first": found.names[pair.first],
                    "second": found.names[pair.second],
                    "overall_jaccard": pair.overall_jaccard,
                    "mean_rank_correlation": pair.mean_rank_correlation,
                    **_columns(pair),
                    "by_layer": pair.by_layer.T.tolist(),
                }
                for pair in found.pairs
            ],
            "across": found.across.tolist(),
            "plot": plot,
        },
        plot,
    )


def _columns(pair: Pair) -> dict[str, list[Any]]:
    """What a pair of sets agrees in, a language each."""
    return {
        "shared": pair.shared.tolist(),
        "jaccard": pair.jaccard.tolist(),
        "first_in_second": pair.first_in_second.tolist(),
        "second_in_first": pair.second_in_first.tolist(),
        "rank_correlation": list(pair.rank_correlation),
    }


def _details(screen: Screen, found: Comparison) -> None:
    """Every language of every set, alone and beside every other."""
    screen.table(
        "neurons",
        ["set", *found.languages],
        [[name, *row] for name, row in zip(found.names, found.sizes.tolist(), strict=True)],
    )
    for pair in found.pairs:
        first, second = found.names[pair.first], found.names[pair.second]
        rows = zip(*_columns(pair).values(), strict=True)
        screen.table(
            f"first: {first}; second: {second}",
            ["language", "shared", "Jaccard", "of first in second", "of second in first", "rank correlation"],
            [[k, *row] for k, row in zip(found.languages, rows, strict=True)],
        )
        screen.table(
            f"Jaccard of languages, {first} down, {second} across",
            ["", *found.languages],
            [
                [k, *row]
                for k, row in zip(
                    found.languages, found.across[pair.first, :, pair.second].tolist(), strict=True
                )
            ],
        )
    for i, name in enumerate(found.names):
        screen.table(
            f"Jaccard of languages within {name}",
            ["", *found.languages],
            [[k, *row] for k, row in zip(found.languages, found.across[i, :, i].tolist(), strict=True)],
        )


def _names(files: tuple[Path, ...]) -> list[str]:
    """The shortest kind of name that tells all files apart."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
