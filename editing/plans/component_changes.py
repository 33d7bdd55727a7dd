"""The norm of a plan's change of each component, from the plan's factors."""

from __future__ import annotations

import torch

from editing.plans.plan import ModuleEdit
from neurons.architectures.anatomy import BLOCKS


def component_changes(edit: ModuleEdit, count: int) -> torch.Tensor:
    """||dW_i||_F of each component i, float64 [count]; an estimate if rows or columns are scaled.

    The added part, U K_i^T, and deltas of a component's columns, or of its rows in a gate or linear branch, are exact.
    Scaling column j changes it by (c_j - 1) w_j, but a plan does not have w_j: it is assumed to have the root mean square norm of W's columns, from the note "weight_norm", or norm 1
    without that note, and to be orthogonal to the added part.  If rows are scaled, its entries are assumed equal.

    Args:
        edit: of a module.
        count: number of components of the module (``component_count``).
    """
    squares = torch.zeros(count, dtype=torch.float64)
    if edit.left is not None and edit.right is not None:
        # ||U k||^2 = k^T (U^T U) k, summed over the component's columns.
        left, right = edit.left.double(), edit.right.double()
        squares += ((right @ (left.T @ left)) * right).sum(1).clamp(min=0).view(count, -1).sum(1)
    if edit.column_scale is not None:
        scale = edit.column_scale.double() - 1
        weight = edit.notes.get("weight_norm")
        length = 1.0 if weight is None else float(weight) / len(scale) ** 0.5
        squares += (scale * length).square().view(count, -1).sum(1)
    if edit.row_scale is not None and edit.right is not None:
        rows, weight = edit.row_scale.double() - 1, edit.notes.get("weight_norm")
        squares += float(rows.square().mean()) * (1.0 if weight is None else float(weight) ** 2 / count)
    if edit.columns is not None and edit.column_deltas is not None:
        squares.index_add_(
            0, edit.columns // _width(edit, count), edit.column_deltas.double().square().sum(1)
        )
    if edit.rows is not None and edit.row_deltas is not None and edit.block not in BLOCKS and edit.components:
        of_rows = edit.row_deltas.double().square().sum(1).view(-1, len(edit.components)).sum(0)
        squares[list(edit.components)] += of_rows
    return squares.sqrt()


def _width(edit: ModuleEdit, count: int) -> int:
    """Columns of a component: 1 of a neuron; of a head, from the other factors, else as few as the changed columns allow."""
    factor = edit.right if edit.right is not None else edit.column_scale
    if edit.block == "attn" and factor is not None:
        return len(factor) // count
    return 1 if edit.block != "attn" or edit.columns is None else int(edit.columns[-1]) // count + 1


def component_count(edit: ModuleEdit) -> int:
    """Number of components of the module; of heads, inferred from the changed columns.

    A plan does not have the width of a head.  This is the smallest width at which exactly the edit's heads have
    changed columns, or else the smallest that its highest head allows.
    """
    highest = 1 + max(edit.components, default=0)
    factor = edit.right if edit.right is not None else edit.column_scale
    if factor is None or edit.block not in BLOCKS:
        return highest
    columns = len(factor)
    if edit.block == "mlp":
        return columns
    changed = torch.zeros(columns, dtype=torch.bool)
    if edit.right is not None:
        changed |= (edit.right != 0).any(1)
    if edit.column_scale is not None:
        changed |= edit.column_scale != 1
    counts = [count for count in range(highest, columns + 1) if columns % count == 0]
    for count in reversed(counts):
        if tuple(changed.view(count, -1).any(1).nonzero()[:, 0].tolist()) == edit.components:
            return count
    return counts[0]
