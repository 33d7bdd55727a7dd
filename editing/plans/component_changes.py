"""How far a plan moves each component of a module, from the plan's factors alone."""

from __future__ import annotations

import torch

from editing.plans.plan import ModuleEdit


def component_changes(edit: ModuleEdit, count: int) -> torch.Tensor:
    """||dW_i||_F of each component i, float64 [count]; an estimate where columns are scaled.

    What is added, U K_i^T, is known to the last digit.  Scaling column j changes it by (c_j - 1) w_j, and a
    plan does not know w_j: it is taken to be as long as W's columns are in the root mean square, by the note
    "weight_norm", or of length 1 without that note, and orthogonal to what is added.

    Args:
        edit: of a module.
        count: how many components the module has (``component_count``).
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
    return squares.sqrt()


def component_count(edit: ModuleEdit) -> int:
    """How many components the module has; of heads, as its changed columns lie.

    A plan does not say how wide a head is.  Heads are of the narrowest width at which just the edit's own have
    a column that changes, or, where there is none, as narrow as its highest head allows.
    """
    highest = 1 + max(edit.components, default=0)
    factor = edit.right if edit.right is not None else edit.column_scale
    if factor is None:
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
