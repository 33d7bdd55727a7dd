"""Comparison of two plans: the components that both change, and the cosine of their changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.plans.plan import ModuleEdit, Plan, module_order
from editing.plans.weights import Weights
from neurons.errors import BrocaError
from neurons.models.source import ModelSource


@dataclass(frozen=True)
class ModuleAgreement:
    """Comparison of two edits of one module.

    Attributes:
        layer, block: of the module.
        first, second: number of components that each changes.
        shared: number of components that both change.
        jaccard: shared / number that either changes.
        cosine: <dW1, dW2> / (||dW1|| ||dW2||); None if one does not change the module, or if a scale makes dW
            depend on weights that were not given, or one has dense deltas and the other another form.
    """

    layer: int
    block: str
    first: int
    second: int
    shared: int
    jaccard: float
    cosine: float | None


def agreement(
    first: ModuleEdit | None, second: ModuleEdit | None, weight: torch.Tensor | None = None
) -> ModuleAgreement:
    """Compare the edits of one module; one may be missing.

    Args:
        first: edit of a module.
        second: edit of the same module.
        weight: W, float64 [d, n]; needed for the cosine if rows or columns are scaled.
    """
    present = first or second
    assert present is not None
    ours, theirs = (set() if edit is None else set(edit.components) for edit in (first, second))
    either = len(ours | theirs)
    return ModuleAgreement(
        layer=present.layer,
        block=present.block,
        first=len(ours),
        second=len(theirs),
        shared=len(ours & theirs),
        jaccard=len(ours & theirs) / either if either else 1.0,
        cosine=None if first is None or second is None else _cosine(first, second, weight),
    )


def _cosine(first: ModuleEdit, second: ModuleEdit, weight: torch.Tensor | None) -> float | None:
    if weight is not None:
        a, b = (edit.apply(weight) - weight for edit in (first, second))
        product, lengths = (
            float((a * b).sum()),
            float(a.norm() * b.norm()),
        )
        return product / lengths if lengths else None
    if any(edit.row_scale is not None or edit.column_scale is not None for edit in (first, second)):
        return None
    if first.dense or second.dense:
        return _cosine_of_deltas(first, second)
    lengths = (_product(first, first) * _product(second, second)) ** 0.5
    return _product(first, second) / lengths if lengths else None


def _cosine_of_deltas(first: ModuleEdit, second: ModuleEdit) -> float | None:
    for places, deltas in (("rows", "row_deltas"), ("columns", "column_deltas")):
        ours, theirs = getattr(first, places), getattr(second, places)
        if (
            ours is None
            or theirs is None
            or {first.rank, second.rank} != {0}
            or first.dense != len(ours)
            or second.dense != len(theirs)
        ):
            continue
        a, b = getattr(first, deltas).double(), getattr(second, deltas).double()
        shared = ours[torch.isin(ours, theirs)]
        product = float((a[torch.searchsorted(ours, shared)] * b[torch.searchsorted(theirs, shared)]).sum())
        lengths = float(a.norm() * b.norm())
        return product / lengths if lengths else None
    return None


def _product(first: ModuleEdit, second: ModuleEdit) -> float:
    """<U1 K1^T, U2 K2^T> without computing either matrix."""
    if first.left is None or first.right is None or second.left is None or second.right is None:
        return 0.0
    lefts = first.left.double().T @ second.left.double()
    return float((lefts * (first.right.double().T @ second.right.double())).sum())


def compare_plans(
    first: Plan, second: Plan, source: ModelSource | None = None
) -> tuple[ModuleAgreement, ...]:
    """A row for each module that either plan edits, in (layer, block) order.

    Args:
        first: plan of a model.
        second: plan of the same model.
        source: the model, for the cosines of edits with scales.

    Raises:
        BrocaError: plans of different models, or of another than the source.
    """
    fingerprints = [plan.metadata.get("fingerprint") for plan in (first, second)]
    if fingerprints[0] != fingerprints[1]:
        raise BrocaError(
            f"the plans were made for different models (fingerprints {fingerprints[0]} and {fingerprints[1]}): "
            "compare plans of the same model"
        )
    if source is not None:
        source.require_fingerprint(first.metadata, "the plan")
    weights = None if source is None else Weights(source)
    ours, theirs = ({(edit.layer, edit.block): edit for edit in plan.edits} for plan in (first, second))
    places = sorted({*ours, *theirs}, key=lambda place: module_order(*place))
    return tuple(
        agreement(ours.get(place), theirs.get(place), None if weights is None else weights.read(*place))
        for place in places
    )
