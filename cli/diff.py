"""``broca diff``: what was edited in a checkpoint, as a plan."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import json_option, out_option
from cli.screen import Screen


@click.command("diff")
@click.argument("base")
@click.argument("edited")
@click.option(
    "--allow-others",
    is_flag=True,
    help="Leave out of the plan what differs and is no edit of output weights; its metadata names it.",
)
@out_option("File for the plan (.safetensors).")
@json_option
def command(base: str, edited: str, allow_others: bool, out: Path, as_json: bool) -> None:
    """Find the plan that leads from BASE to EDITED (hub ids or directories), whatever tool edited it.

    Column scales, row scales, low-rank changes and biases of o_proj and down_proj are found; everything
    else that differs is listed.

    \b
    Example:
      broca diff artifacts/demo/model steered --out edit.safetensors
    """
    from editing.checkpoints.difference import compare
    from neurons.models.source import locate, open_model

    screen = Screen(as_json)
    source = open_model(base)
    checkpoint = locate(edited)
    with screen.copying("Comparing") as tell:
        found = compare(source, checkpoint, tell)
    screen.table(
        f"{len(found.tensors)} tensors differ, {found.equal:,} are the same",
        ["tensor", "change", "||dW||/||W||"],
        [[tensor.name, tensor.what, tensor.relative] for tensor in found.tensors],
        words=2,
    )
    plan = found.plan(source, allow_others)
    if found.not_covered:
        screen.warn(f"{out} leaves out {len(found.not_covered)} tensors that differ in another way")
    plan.save(out)
    screen.result(
        {
            "out": out,
            "equal": found.equal,
            "tensors": [
                {"name": t.name, "change": t.what, "relative": t.relative, "covered": t.covered}
                for t in found.tensors
            ],
            "not_covered": list(found.not_covered),
            "modules": [
                {"layer": edit.layer, "block": edit.block, "rank": edit.rank, **edit.notes}
                for edit in plan.edits
            ],
        },
        out,
    )
