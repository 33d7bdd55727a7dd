"""A random edit of the size of another: a control of ``selective-steering`` and ``ara``.

A rotation turns by the same angle in a random plane, one for each norm.  Other edits add the same multiples of their keys
in random directions: U is rotated by a random orthogonal matrix, and row scales are left out, with U lengthened to the
same ||dW||.

    python benchmarks/random_edit.py artifacts/demo/model --edit edit.safetensors --out control.safetensors
    broca evaluate artifacts/demo/model --edit control.safetensors --corpus artifacts/demo/corpus --source en --target fr \\
        --part report --out control.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from editing.methods.added_values import change_norm
from editing.methods.selective_steering import Rotated
from editing.plans.plan import ModuleEdit, load_plan, make_plan
from editing.plans.weights import Weights
from neurons.models.source import open_model


@click.command()
@click.argument("model")
@click.option("--edit", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: str, edit: Path, seed: int, out: Path) -> None:
    """Write the control of a plan."""
    plan, weights = load_plan(edit), Weights(open_model(model))
    generator = torch.Generator().manual_seed(seed)
    planes: dict[tuple[int, str], torch.Tensor] = {}

    def orthonormal(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        basis: torch.Tensor = torch.linalg.qr(drawn).Q
        return basis

    def rotated(of: ModuleEdit, theta: float) -> ModuleEdit:
        assert of.right is not None
        norm = (of.layer, of.notes["norm"])
        if norm not in planes:
            planes[norm] = orthonormal(len(of.right), 2)
        image = weights.read(of.layer, of.block) @ planes[norm]
        return Rotated(of.layer, of.block, planes[norm], image, of.notes).edit(theta)

    def turned(of: ModuleEdit) -> ModuleEdit:
        assert of.left is not None and of.right is not None
        left = orthonormal(len(of.left), len(of.left)) @ of.left.double()
        left *= of.notes["change_norm"] / change_norm(left, of.right)
        return replace(of, left=left.float(), row_scale=None)

    theta = plan.metadata["settings"].get("theta")
    edits = [turned(of) if theta is None else rotated(of, theta) for of in plan.edits]
    make_plan(edits, {**plan.metadata, "method": "random"}).save(out)


if __name__ == "__main__":
    main()
