"""``broca diff``: the plan of an edited checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from cli import options as opt
from cli.screen import Screen
from cli.tables import modules_as_json


@click.command("diff")
@click.argument("base")
@click.argument("edited")
@click.option(
    "--allow-others",
    is_flag=True,
    help="Allow other differences than edits of output weights; the metadata of the plan lists them.",
)
@opt.out("File for the plan (.safetensors).")
@opt.json
def command(base: str, edited: str, allow_others: bool, out: Path, as_json: bool) -> None:
    """Recover the plan from BASE to EDITED (hub ids or directories), edited with any tool.

    It recovers column scales, row scales, low-rank changes and biases of o_proj and down_proj, and lists all other
    differences.

    \b
    Example:
      broca diff artifacts/demo/model steered --out edit.safetensors
    """
    from editing.checkpoints.difference import compare
    from neurons.models.source import locate, open_model

    screen = Screen(as_json)
    source = open_model(base)
    checkpoint = locate(edited)
    with screen.copying("Comparing") as progress:
        difference = compare(source, checkpoint, progress)
    screen.table(
        f"{len(difference.tensors)} tensors differ, {difference.equal:,} are equal",
        ["tensor", "change", "||dW||/||W||"],
        [[tensor.name, tensor.what, tensor.relative] for tensor in difference.tensors],
        words=2,
    )
    plan = difference.plan(source, allow_others)
    if difference.not_covered:
        screen.warn(f"{out} leaves out {len(difference.not_covered)} tensors with other differences")
    plan.save(out)
    screen.result(
        out=out,
        equal=difference.equal,
        tensors=[
            {
                "name": tensor.name,
                "change": tensor.what,
                "relative": tensor.relative,
                "covered": tensor.covered,
            }
            for tensor in difference.tensors
        ],
        not_covered=list(difference.not_covered),
        modules=modules_as_json(plan),
    )
