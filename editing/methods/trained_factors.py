"""Factors of a plan's edits that are trained: a model that computes with them, without changed weights.

A module computes W' h = W h + U (K^T h) + D h, with the rows or columns of D only: gradients, and the optimizer's state,
have the size of the factors and not of W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from editing.plans.plan import ModuleEdit
from neurons.models.source import LoadedModel

TRAINED = ("row_deltas", "column_deltas", "left", "right")


def factors_of(edits: Sequence[ModuleEdit]) -> list[torch.Tensor]:
    """The trained factors, by edit and then in the order of ``TRAINED``."""
    return [value for edit in edits for name in TRAINED if (value := getattr(edit, name)) is not None]


def with_factors(edits: Sequence[ModuleEdit], factors: Sequence[torch.Tensor]) -> list[ModuleEdit]:
    """The edits with other factors, in the order of ``factors_of``."""
    left = iter(factors)
    changed: list[ModuleEdit] = []
    for edit in edits:
        own: dict[str, Any] = {name: next(left) for name in TRAINED if getattr(edit, name) is not None}
        changed.append(replace(edit, **own))
    return changed


@contextmanager
def computing_with(loaded: LoadedModel, edits: Sequence[ModuleEdit]) -> Iterator[None]:
    """Context in which the modules of the edits compute with W' instead of W.

    Args:
        loaded: the model; its weights do not change.
        edits: with no other factors than ``TRAINED``, which may require gradients; of modules that every token reaches.
    """
    with ExitStack() as undo:
        for edit in edits:
            for part in loaded.anatomy.parts(edit.layer, edit.block):
                if part.experts is None:
                    hook = partial(_add, edit, part.columns)
                    undo.callback(part.module.register_forward_hook(hook).remove)
        yield


def _add(edit: ModuleEdit, within: slice, _: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A module's output with the change of its columns of W added, as a forward hook."""
    hidden = inputs[0]
    device, dtype = output.device, output.dtype
    if edit.rows is not None and edit.row_deltas is not None:
        added = hidden @ edit.row_deltas[:, within].to(device, dtype).T
        output = output.index_add(-1, edit.rows.to(device), added)
    if edit.columns is not None and edit.column_deltas is not None:
        inside = (edit.columns >= within.start) & (edit.columns < within.stop)
        chosen = (edit.columns[inside] - within.start).to(device)
        output = output + hidden[..., chosen] @ edit.column_deltas[inside].to(device, dtype)
    if edit.left is not None and edit.right is not None:
        output = output + (hidden @ edit.right[within].to(device, dtype)) @ edit.left.to(device, dtype).T
    return output
