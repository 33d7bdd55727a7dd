"""What the modules of a plan write, as a tensor of its own that can be learned: V_m of W_m' = W_m + V_m K_m^T."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from editing.plans.plan import ModuleEdit, Plan
from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.errors import UsageError
from neurons.models.source import LoadedModel


def values_of(plan: Plan) -> torch.Tensor:
    """float64 [modules, d, r], the values of a plan whose edits all have the rank r.

    Raises:
        UsageError: edits of several ranks, or one that is more than a left and a right factor.
    """
    ranks = {edit.rank for edit in plan.edits}
    for edit in plan.edits:
        scaled = edit.row_scale is not None or edit.column_scale is not None or edit.bias is not None
        if len(ranks) > 1 or edit.rank == 0 or scaled:
            raise UsageError(
                f"values are learned of edits that have one rank and nothing else, and {edit.block} of layer "
                f"{edit.layer} has rank {edit.rank}{' and scales or a bias' if scaled else ''}: make the plan by "
                "--method keyed"
            )
    return torch.stack([edit.left.double() for edit in plan.edits if edit.left is not None])


def with_value(edit: ModuleEdit, value: torch.Tensor) -> ModuleEdit:
    """An edit with other values, float64 [d, r]."""
    assert edit.right is not None
    # What holds for another value through a norm does not hold for this one.
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
    """While entered, each module of the plan writes values[m] (K_m^T h) besides its own output.

    Args:
        loaded: the model; its weights do not change.
        plan: gives modules and keys.
        values: [modules, d, r], in the order of the plan's edits; gradients reach it.
    """
    inputs: dict[tuple[int, str], torch.Tensor] = {}

    def hook_in(edit: ModuleEdit) -> SiteHook:
        def keep(values: torch.Tensor, _: Routed | None) -> torch.Tensor:
            inputs[edit.layer, edit.block] = values
            return values

        return keep

    def hook_out(edit: ModuleEdit, value: torch.Tensor) -> SiteHook:
        assert edit.right is not None
        keys = edit.right

        def add(written: torch.Tensor, _: Routed | None) -> torch.Tensor:
            read = inputs.pop((edit.layer, edit.block))
            for column in range(edit.rank):
                coefficient = read @ keys[:, column].to(read.device, read.dtype)
                written = written + coefficient[..., None] * value[:, column].to(
                    written.device, written.dtype
                )
            return written

        return add

    hooks: dict[tuple[str, int], SiteHook] = {}
    for edit, value in zip(plan.edits, values, strict=True):
        hooks[f"{edit.block}_in", edit.layer] = hook_in(edit)
        hooks[f"{edit.block}_out", edit.layer] = hook_out(edit, value)
    with site_hooks(loaded.anatomy, hooks):
        yield
