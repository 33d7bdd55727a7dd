"""``broca compare``: how far neuron sets, or plans, agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import FILE, json_option
from cli.screen import Screen


@click.command("compare")
@click.argument("files", metavar="FILE...", type=FILE, nargs=-1, required=True)
@click.option("--plot", type=FILE, help="Neuron sets: file for a picture (.png or .svg).")
@click.option("--model", help="Edits: their model, for the cosines of edits that scale weights.")
@json_option
def command(files: tuple[Path, ...], plot: Path | None, model: str | None, as_json: bool) -> None:
    """Compare two or more neuron sets of one model, language by language, or two edits, module by module.

    Jaccard: neurons (components) in both, as a share of those in either.  Rank correlation: Spearman's, of
    the scores of the neurons in both.  Cosine: of the two changes of a module's weight.

    \b
    Examples:
      broca compare lape.safetensors gradient.safetensors --plot overlap.png
      broca compare keyed.safetensors steer2edit.safetensors
    """
    from neurons.artifact import load_artifact
    from neurons.errors import UsageError

    screen = Screen(as_json)
    if all(load_artifact(file).kind == "edit" for file in files):
        if plot is not None:
            raise UsageError("--plot means nothing to edits: draw one with `broca plot`")
        _plans(screen, files, model)
        return
    if model is not None:
        raise UsageError("--model means nothing to neuron sets: leave it out")
    _neuron_sets(screen, files, plot)


def _plans(screen: Screen, files: tuple[Path, ...], model: str | None) -> None:
    from editing.plan import load_plan
    from editing.plan_comparison import compare_plans
    from neurons.errors import UsageError
    from neurons.source import open_model

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


def _neuron_sets(screen: Screen, files: tuple[Path, ...], plot: Path | None) -> None:
    from neurons.comparison import compare
    from neurons.neuron_set import load_neuron_set
    from neurons.pictures import comparison_figure, picture_format, save_figure

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
    sizes = found.sizes.tolist()
    screen.table(
        "neurons",
        ["set", *found.languages],
        [[name, *row] for name, row in zip(found.names, sizes, strict=True)],
    )
    pairs: list[dict[str, Any]] = []
    for pair in found.pairs:
        first, second = found.names[pair.first], found.names[pair.second]
        columns = {
            "shared": pair.shared.tolist(),
            "jaccard": pair.jaccard.tolist(),
            "first_in_second": pair.first_in_second.tolist(),
            "second_in_first": pair.second_in_first.tolist(),
            "rank_correlation": list(pair.rank_correlation),
        }
        screen.table(
            f"first: {first}; second: {second}",
            ["language", "shared", "Jaccard", "of first in second", "of second in first", "rank correlation"],
            [[k, *row] for k, row in zip(found.languages, zip(*columns.values(), strict=True), strict=True)],
        )
        pairs.append({"first": first, "second": second, **columns, "by_layer": pair.by_layer.T.tolist()})
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
    left_out = {name: list(languages) for name, languages in zip(found.names, found.left_out, strict=True)}
    screen.result(
        {
            "sets": list(found.names),
            "languages": list(found.languages),
            "left_out": left_out,
            "sizes": sizes,
            "pairs": pairs,
            "across": found.across.tolist(),
            "plot": plot,
        },
        plot,
    )


def _names(files: tuple[Path, ...]) -> list[str]:
    """The shortest kind of name that tells all files apart."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
