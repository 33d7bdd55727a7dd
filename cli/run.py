"""``broca run``: the whole pipeline from one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.command_line import command_line
from cli.corpora import note_files, read_table
from cli.screen import Screen
from cli.tables import report_table, say_samples

if TYPE_CHECKING:
    from editing.pipeline.recipe import Recipe


@click.command("run")
@click.argument("recipe_path", metavar="RECIPE.toml", type=opt.IN_FILE)
@click.option(
    "--out",
    type=opt.OUT_DIRECTORY,
    help="Directory of the results.  [default: as in the recipe; of a recipe of `broca steer`: <MODEL>-<TO>]",
)
@opt.max_memory
@opt.dry_run
@opt.json
def command(recipe_path: Path, out: Path | None, dry_run: bool, as_json: bool) -> None:
    """Identify neurons, estimate directions, edit, export and evaluate as RECIPE.toml says.

    A recipe that `broca steer` wrote into a checkpoint repeats that edit.

    Stages that are finished and unchanged are skipped, so the same command resumes an interrupted run.

    \b
    Example:
      broca run artifacts/demo/recipe.toml --out demo
    """
    from editing.pipeline.recipe import read_recipe
    from editing.pipeline.steer_recipe import is_steer_recipe, read_steer_recipe

    if is_steer_recipe(recipe_path):
        from cli.steer import steer

        steer(Screen(as_json), read_steer_recipe(recipe_path), out, dry_run=dry_run)
        return
    recipe = read_recipe(recipe_path).with_options(out=out)
    if dry_run:
        from cli.dry_run import dry_run as show
        from editing.pipeline.run import needs

        show(Screen(as_json), recipe, partial(needs, recipe))
        return
    provenance = {
        "command": command_line(out=recipe.out),
        **recipe_provenance(recipe_path, str(recipe_path)),
    }
    run_recipe(recipe, Screen(as_json), provenance)


def recipe_provenance(path: Path, name: str) -> dict[str, Any]:
    """The recipe as result files store it: its text, and the file by this name with its digest."""
    from editing.study.provenance import file_read

    return {
        "inputs": [{**file_read("RECIPE.toml", path), "file": name}],
        "recipe": path.read_text(encoding="utf-8"),
    }


def run_recipe(recipe: Recipe, screen: Screen, provenance: Mapping[str, Any]) -> None:
    """Run a recipe and print its tables, sample texts of base and checkpoint, and paths."""
    from editing.pipeline.run import run
    from neurons.scorers.registry import method_of
    from neurons.text.token_budget import LOSSES, budget_of

    note_files(screen, recipe.corpus, recipe.languages)
    result = run(recipe, screen, provenance)
    method = method_of(recipe.method)
    min_tokens = budget_of(method.moments, method.reads).minimum, LOSSES.minimum
    titles = "text read for the neurons", "text read for the likelihoods"
    for read, minimum, title in zip(result.read, min_tokens, titles, strict=True):
        if read:
            read_table(screen, read, minimum, title)
    screen.table(
        f"{recipe.method}: language neurons",
        ["language", "neurons"],
        [[language, count] for language, count in result.neurons.items()],
    )
    for language, count in result.neurons.items():
        if count == 0:
            screen.warn(f"{recipe.method} found no neurons for {language}")
    for report in result.reports:
        report_table(screen, report)
        for outcome in (report.outcomes[0], report.outcomes[-1]):
            screen.say(f"{outcome.name}:")
            say_samples(screen, outcome)
    screen.say(f"table and plot: {result.out / 'report.md'} {result.out / 'report.png'}")
    checkpoints = [result.out / f"checkpoint-{report.target}" for report in result.reports]
    screen.result(
        "checkpoints: " + " ".join(map(str, checkpoints)),
        out=result.out,
        neurons=result.neurons,
        checkpoints=[str(path) for path in checkpoints],
        reports=[
            {
                "source": report.source,
                "target": report.target,
                "ceiling": report.ceiling,
                "continuations": report.continuations,
                "outcomes": report.outcomes,
                "notes": report.notes,
            }
            for report in result.reports
        ],
    )
