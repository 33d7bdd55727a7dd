"""``broca demo``: the included recipe on the included model."""

from __future__ import annotations

from pathlib import Path

import click

from cli import options as opt
from cli.command_line import command_line
from cli.run import recipe_provenance, run_recipe
from cli.screen import Screen
from cli.shipped import DEMO, shipped


@click.command("demo")
@click.option("--source", type=opt.LANGUAGE, help="Language of the prompts.  [default: en]")
@click.option("--target", "targets", type=opt.CommaSeparated(), help="Languages to steer to, as fr,de.")
@click.option("--out", type=opt.OUT_DIRECTORY, help="Directory of the results.  [default: broca-demo]")
@opt.json
def command(source: str | None, targets: tuple[str, ...] | None, out: Path | None, as_json: bool) -> None:
    """Steer the included demo model to other languages and measure it.

    \b
    Example:
      broca demo --source en --target fr --out demo
    """
    from editing.pipeline.recipe import check_recipe, read_recipe
    from neurons.text.corpus_files import language_label

    path = shipped(DEMO) / "recipe.toml"
    recipe = read_recipe(path)
    targets = None if targets is None else tuple(map(language_label, targets))
    if source is not None and targets is None:
        targets = tuple(target for target in recipe.targets if target != source)
    recipe = recipe.with_options(source=source, targets=targets, out=out)
    check_recipe(recipe)
    command_text = command_line(source=recipe.source, targets=recipe.targets, out=recipe.out)
    provenance = {"command": command_text, **recipe_provenance(path, f"Broca's own {path.name}")}
    run_recipe(recipe, Screen(as_json), provenance)
