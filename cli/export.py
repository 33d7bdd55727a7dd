"""``broca export``: the permanently steered checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import FILE, json_option, model_argument, out_option
from cli.screen import Screen


@click.command("export")
@model_argument
@click.option("--edit", "edit_path", type=FILE, required=True, help="A plan, from `broca edit`.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@out_option("Directory for the checkpoint.")
@json_option
def command(model: str, edit_path: Path, overwrite: bool, out: Path, as_json: bool) -> None:
    """Copy the checkpoint of MODEL (hub id or directory) with a plan's tensors replaced.

    \b
    Example:
      broca export artifacts/demo/model --edit edit.safetensors --out steered
    """
    from editing.export import export
    from editing.plan import load_plan
    from neurons.source import open_model

    screen = Screen(as_json)
    plan = load_plan(edit_path)
    source = open_model(model)
    with screen.copying("Writing") as tell:
        found = export(source, plan, out, overwrite, tell)
    screen.table(
        f"{len(found.tensors)} tensors, {found.components:,} components, ||dW||/||W|| "
        f"{found.relative_change:.3g}",
        ["tensor", "change on disk / meant", "cosine"],
        [[name, *survived] for name, survived in found.survived.items()],
    )
    for name in found.unedited_copies:
        screen.warn(f"{out / name} still holds the unedited weights in another format: remove it")
    screen.result(
        {
            "out": out,
            "tensors": list(found.tensors),
            "components": found.components,
            "relative_change": found.relative_change,
            "survived": {
                name: {"norm_ratio": ratio, "cosine": cosine}
                for name, (ratio, cosine) in found.survived.items()
            },
            "unedited_copies": list(found.unedited_copies),
        },
        out,
    )
