"""What the modules of a rank-1 plan write, as a tensor of its own that can be learned: v_m of W_m' = W_m + v_m k_m^T."""

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
    """float64 [modules, d], the values that a plan has.

    Raises:
        UsageError: an edit that is not of rank 1, or that is more than that.
    """
    for edit in plan.edits:
        scaled = edit.row_scale is not None or edit.column_scale is not None or edit.bias is not None
        if edit.rank != 1 or scaled:
            raise UsageError(
                f"values are learned of rank-1 edits alone, and {edit.block} of layer {edit.layer} has another: "
                "make the plan by --method keyed"
            )
    return torch.stack([edit.left[:, 0].double() for edit in plan.edits if edit.left is not None])


def with_value(edit: ModuleEdit, value: torch.Tensor) -> ModuleEdit:
    """An edit with another value, float64 [d]."""
    assert edit.right is not None
    # What was found for another value through a norm does not hold for this one.
    unknown = dict.fromkeys({"value_through_norm", "value_error"} & edit.notes.keys())
    change = float(value.norm() * edit.right.double().norm())
    return replace(edit, left=value[:, None].float(), notes={**edit.notes, **unknown, "change_norm": change})


@contextmanager
def adding(loaded: LoadedModel, plan: Plan, values: torch.Tensor) -> Iterator[None]:
    """While entered, each module of the plan writes values[m] (k_m^T h) besides its own output.

    Args:
        loaded: the model; its weights do not change.
        plan: gives modules and keys.
        values: [modules, d], in the order of the plan's edits; gradients reach it.
    """
    inputs: dict[tuple[int, str], torch.Tensor] = {}

    def hook_in(edit: ModuleEdit) -> SiteHook:
        def keep(values: torch.Tensor, _: Routed | None) -> torch.Tensor:
            inputs[edit.layer, edit.block] = values
            return values

        return keep

    def hook_out(edit: ModuleEdit, value: torch.Tensor) -> SiteHook:
        assert edit.right is not None
        key = edit.right[:, 0]

        def add(written: torch.Tensor, _: Routed | None) -> torch.Tensor:
            read = inputs.pop((edit.layer, edit.block))
            coefficient = read @ key.to(read.device, read.dtype)
            return written + coefficient[..., None] * value.to(written.device, written.dtype)

        return add

    hooks: dict[tuple[str, int], SiteHook] = {}
    for edit, value in zip(plan.edits, values, strict=True):
        hooks[f"{edit.block}_in", edit.layer] = hook_in(edit)
        hooks[f"{edit.block}_out", edit.layer] = hook_out(edit, value)
    with site_hooks(loaded.anatomy, hooks):
        yield
