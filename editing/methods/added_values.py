"""The values V_m of a plan's edits W_m' = W_m + V_m K_m^T, as a tensor that can be learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from editing.plans.plan import ModuleEdit, Plan
from neurons.errors import UsageError
from neurons.models.source import LoadedModel


def values_of(plan: Plan) -> torch.Tensor:
    """float64 [modules, d, r], the values of a plan whose edits all have rank r.

    Raises:
        UsageError: edits of different ranks, or an edit with more than a left and a right factor.
    """
    ranks = {edit.rank for edit in plan.edits}
    for edit in plan.edits:
        scaled = edit.dense or any(
            factor is not None for factor in (edit.row_scale, edit.column_scale, edit.bias)
        )
        if len(ranks) > 1 or edit.rank == 0 or scaled:
            raise UsageError(
                "values are learned for edits of the same rank without scales and biases, but the edit of "
                f"{edit.block} of layer {edit.layer} has rank {edit.rank}{' and scales, deltas or a bias' if scaled else ''}: "
                "make the plan with --method keyed"
            )
    return torch.stack([edit.left.double() for edit in plan.edits if edit.left is not None])


def with_value(edit: ModuleEdit, value: torch.Tensor) -> ModuleEdit:
    """The edit with other values, float64 [d, r]."""
    assert edit.right is not None
    # These notes were measured with the previous value.
    unknown = dict.fromkeys({"value_through_norm", "value_error"} & edit.notes.keys())
    return replace(
        edit,
        left=value.float(),
        notes={**edit.notes, **unknown, "change_norm": change_norm(value, edit.right)},
    )


def change_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of left right^T."""
    left, right = left.double(), right.double()
    if left.shape[1] == 1:
        return float(left.norm() * right.norm())
    return float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())


@contextmanager
def adding(loaded: LoadedModel, plan: Plan, values: torch.Tensor) -> Iterator[None]:
    """Context in which each module of the plan adds values[m] (K_m^T h) to its output.

    Args:
        loaded: the model; its weights do not change.
        plan: the modules and keys.
        values: [modules, d, r], in the order of the plan's edits; differentiable.
    """
    with ExitStack() as undo:
        for edit, value in zip(plan.edits, values, strict=True):
            part = loaded.anatomy.common(edit.layer, edit.block)
            assert part is not None and edit.right is not None
            hook = partial(_add, edit.right[part.columns], value)
            undo.callback(part.module.register_forward_hook(hook).remove)
        yield


def _add(
    keys: torch.Tensor, value: torch.Tensor, _: nn.Module, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    """A module's output with V K^T h added, as a forward hook."""
    hidden = inputs[0]
    for column in range(keys.shape[1]):
        coefficient = hidden @ keys[:, column].to(hidden.device, hidden.dtype)
        output = output + coefficient[..., None] * value[:, column].to(output.device, output.dtype)
    return output
