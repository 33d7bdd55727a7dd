"""Algebra of plans: composition, inversion, restriction to components.

With an edit E(W) = diag(r) W diag(c) + U K^T + D, D the dense deltas, E(b) = b + d:

    second after first   r = r2 r1,  c = c2 c1,  U K^T = [r2 U1, U2] [c2 K1, K2]^T,  D = r2 D1 c2 + D2,  d = d1 + d2
    inverse              r = 1/r,    c = 1/c,    U K^T = -(U/r) (K/c)^T,             D = -D / (r c),     d = -d
    on components S      c = 1, K = 0 and D = 0 outside the columns of S; in gates and linear branches, D = 0 outside
                         the rows of S

The factors are used unchanged: if they were computed from a model's weights, as in a directional ablation,
they are not recomputed for the weights after an earlier plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource

Components = Mapping[str, Collection[int]]


def _product(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return (first.double() * second.double()).float()


def _scaled_rows(factor: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return factor if scale is None else (factor.double() * scale.double()[:, None]).float()


Deltas = tuple[torch.Tensor | None, torch.Tensor | None]


def _times(
    places: torch.Tensor | None,
    deltas: torch.Tensor | None,
    along: torch.Tensor | None,
    across: torch.Tensor | None,
) -> torch.Tensor | None:
    """Deltas of rows (columns) times the scales of the rows (columns) and of the columns (rows)."""
    if places is None or deltas is None:
        return None
    product = deltas.double()
    if along is not None:
        product = product * along.double()[places, None]
    return (product if across is None else product * across.double()).float()


def _sum(first: Deltas, second: Deltas) -> Deltas:
    """The union of two sets of rows or columns, and the sums of their deltas."""
    given = [
        (places, deltas) for places, deltas in (first, second) if places is not None and deltas is not None
    ]
    if len(given) < 2:
        return given[0] if given else (None, None)
    places = torch.cat([of_edit for of_edit, _ in given]).unique()
    total = torch.zeros(len(places), given[0][1].shape[1], dtype=torch.float64)
    for of_edit, deltas in given:
        total[torch.searchsorted(places, of_edit)] += deltas.double()
    return places, total.float()


def after(first: ModuleEdit, second: ModuleEdit) -> ModuleEdit:
    """The edit that applies ``first``, then ``second``, to the same module; without details and figures."""
    lefts, rights = [], []
    if first.left is not None and first.right is not None:
        lefts.append(_scaled_rows(first.left, second.row_scale))
        rights.append(_scaled_rows(first.right, second.column_scale))
    if second.left is not None and second.right is not None:
        lefts.append(second.left)
        rights.append(second.right)
    biases = [edit.bias for edit in (first, second) if edit.bias is not None]
    scales = second.row_scale, second.column_scale
    rows, row_deltas = _sum(
        (first.rows, _times(first.rows, first.row_deltas, *scales)), (second.rows, second.row_deltas)
    )
    columns, column_deltas = _sum(
        (first.columns, _times(first.columns, first.column_deltas, *scales[::-1])),
        (second.columns, second.column_deltas),
    )
    # The rows of another module belong to its components in order (``Anatomy.input_rows``).
    known = first.block in BLOCKS or (first.components and second.components)
    return ModuleEdit(
        layer=first.layer,
        block=first.block,
        components=tuple(sorted({*first.components, *second.components})) if known else (),
        rows=rows,
        row_deltas=row_deltas,
        columns=columns,
        column_deltas=column_deltas,
        row_scale=_product(first.row_scale, second.row_scale),
        column_scale=_product(first.column_scale, second.column_scale),
        left=torch.cat(lefts, dim=1) if lefts else None,
        right=torch.cat(rights, dim=1) if rights else None,
        bias=torch.stack(biases).double().sum(0).float() if biases else None,
        notes=_no_figures(first, second),
    )


def _no_figures(*edits: ModuleEdit) -> dict[str, None]:
    """Notes of a derived edit: without figures, but with the mark of edits that are valid for one strength."""
    return {"value_through_norm": None} if any(edit.through_norm for edit in edits) else {}


def inverse(edit: ModuleEdit) -> ModuleEdit:
    """The edit that maps W' back to W, to the precision of float32 factors.

    Raises:
        BrocaError: a scale of 0, which loses W.
    """
    for name, scale in (("row", edit.row_scale), ("column", edit.column_scale)):
        if scale is not None and bool((scale == 0).any()):
            where = int((scale == 0).nonzero()[0, 0])
            raise BrocaError(
                f"{edit.where}: {name} {where} is scaled by 0, which cannot be undone: keep "
                "the unedited checkpoint"
            )
    rows = None if edit.row_scale is None else edit.row_scale.double().reciprocal().float()
    columns = None if edit.column_scale is None else edit.column_scale.double().reciprocal().float()
    row_deltas = _times(edit.rows, edit.row_deltas, rows, columns)
    column_deltas = _times(edit.columns, edit.column_deltas, columns, rows)
    return replace(
        edit,
        row_scale=rows,
        column_scale=columns,
        left=None if edit.left is None else _scaled_rows(-edit.left, rows),
        right=None if edit.right is None else _scaled_rows(edit.right, columns),
        bias=None if edit.bias is None else -edit.bias,
        row_deltas=None if row_deltas is None else -row_deltas,
        column_deltas=None if column_deltas is None else -column_deltas,
        details={},
        notes=_no_figures(edit),
    )


def on_components(edit: ModuleEdit, components: Collection[int], width: int) -> ModuleEdit | None:
    """The edit restricted to components; None if it has none of them.

    Args:
        edit: of one module; of another than an output module, of the rows of its components.
        components: heads or neurons that may change.
        width: columns of a component.

    Raises:
        BrocaError: the edit changes rows of an output module or has a bias, which belong to the whole module, or changes
            another module in other places than the rows of its components.
    """
    if edit.block not in BLOCKS:
        return _on_rows(edit, components)
    kept = [i for i, component in enumerate(edit.components) if component in components]
    if not kept:
        return None
    if edit.row_scale is not None or edit.rows is not None or edit.bias is not None:
        what = "changes rows" if edit.bias is None else "has a bias"
        raise BrocaError(
            f"{edit.where}: the edit {what}, which cannot be restricted to components: "
            "restrict it to layers instead"
        )
    chosen = tuple(edit.components[i] for i in kept)

    def outside(factor: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(len(factor) // width, width, dtype=torch.bool)
        mask[list(chosen)] = False
        return mask.flatten()

    scale, right, columns, deltas = edit.column_scale, edit.right, edit.columns, edit.column_deltas
    if columns is not None and deltas is not None:
        inside = torch.isin(columns // width, torch.tensor(chosen))
        columns, deltas = (columns[inside], deltas[inside]) if bool(inside.any()) else (None, None)
    return replace(
        edit,
        components=chosen,
        columns=columns,
        column_deltas=deltas,
        column_scale=None if scale is None else scale.masked_fill(outside(scale), 1.0),
        right=None if right is None else right.masked_fill(outside(right)[:, None], 0.0),
        details={name: values[kept] for name, values in edit.details.items()},
        notes=_no_figures(edit),
    )


def _on_rows(edit: ModuleEdit, components: Collection[int]) -> ModuleEdit | None:
    rows, deltas = edit.rows, edit.row_deltas
    others = (edit.row_scale, edit.column_scale, edit.left, edit.columns)
    if (
        rows is None
        or deltas is None
        or others != (None,) * 4
        or not edit.components
        or len(rows) % len(edit.components)
    ):
        raise BrocaError(
            f"{edit.where}: the edit changes more than rows that belong to neurons, so it cannot be restricted to neurons: "
            "restrict it to layers instead"
        )
    kept = [i for i, component in enumerate(edit.components) if component in components]
    if not kept:
        return None
    places = torch.arange(len(rows)).view(-1, len(edit.components))[:, kept].flatten()
    return replace(
        edit,
        components=tuple(edit.components[i] for i in kept),
        rows=rows[places],
        row_deltas=deltas[places],
        details={name: values[kept] for name, values in edit.details.items()},
        notes=_no_figures(edit),
    )


def with_norms(source: ModelSource, edits: Sequence[ModuleEdit]) -> list[ModuleEdit]:
    """The edits with ||dW||_F and ||W||_F for this model's weights in their notes.

    Raises:
        BrocaError: an edit of a layer that the model does not have, or of another size.
    """
    weights = Weights(source)
    noted = []
    for edit in edits:
        if edit.layer >= source.anatomy.layers:
            raise BrocaError(f"the plan edits layer {edit.layer}: the model has {source.anatomy.layers}")
        weight = weights.read(edit.layer, edit.block)
        norms = {
            "change_norm": float((edit.apply(weight) - weight).norm()),
            "weight_norm": float(weight.norm()),
        }
        noted.append(replace(edit, notes={**edit.notes, **norms}))
    return noted


def compose(plans: Sequence[Plan], source: ModelSource | None = None) -> Plan:
    """One plan that applies all of them in order.

    Args:
        plans: at least one.
        source: the model that they were made for, to note the norm of the change; None omits the notes.

    Raises:
        UsageError: no plan.
        BrocaError: plans of different models, or of another than the source.
    """
    if not plans:
        raise UsageError("name at least one plan to compose")
    modules: dict[tuple[int, str], ModuleEdit] = {}
    fingerprints = {plan.metadata.get("fingerprint") for plan in plans}
    if len(fingerprints) > 1:
        raise BrocaError(
            f"the plans were made for different models (fingerprints {', '.join(sorted(map(str, fingerprints)))}): make them "
            "for one model"
        )
    for plan in plans:
        if source is not None:
            source.require_fingerprint(plan.metadata, "a plan")
        for edit in plan.edits:
            place = (edit.layer, edit.block)
            modules[place] = after(modules[place], edit) if place in modules else edit
    edits = list(modules.values())
    return make_plan(
        edits if source is None else with_norms(source, edits),
        {**_common(plans), "method": "compose", "settings": {"of": [_provenance(plan) for plan in plans]}},
    )


def inverted(source: ModelSource, plan: Plan) -> Plan:
    """The plan that reverts a plan, for the edited weights of the same model.

    Raises:
        BrocaError: a plan of another model, or one that scales by 0.
    """
    source.require_fingerprint(plan.metadata, "the plan")
    weights = Weights(source)
    edits = []
    for edit in plan.edits:
        edited = edit.apply(weights.read(edit.layer, edit.block))
        back = inverse(edit)
        norms = {
            "change_norm": float((back.apply(edited) - edited).norm()),
            "weight_norm": float(edited.norm()),
        }
        edits.append(replace(back, notes={**back.notes, **norms}))
    return make_plan(edits, {**_common([plan]), "method": "invert", "settings": {"of": [_provenance(plan)]}})


def restricted(
    source: ModelSource,
    plan: Plan,
    layers: Collection[int] | None = None,
    components: Mapping[int, Components] | Components | None = None,
) -> Plan:
    """The plan restricted to layers and components.

    Args:
        source: the model that it was made for.
        plan: to restrict.
        layers: None keeps all.
        components: block -> heads or neurons that may change, the same in every layer, or layer -> such
            a mapping; an absent block is kept whole; None keeps all.

    Raises:
        NothingToChangeError: nothing of the plan is left.
        BrocaError: a plan of another model, or one with row scales or a bias.
    """
    source.require_fingerprint(plan.metadata, "the plan")
    edits = []
    for edit in plan.edits:
        if layers is not None and edit.layer not in layers:
            continue
        of_neurons = edit.block not in BLOCKS and source.anatomy.computes_neurons(edit.layer, edit.block)
        allowed = _allowed(components, edit.layer, "mlp" if of_neurons else edit.block)
        if allowed is None:
            edits.append(edit)
            continue
        cut = on_components(edit, frozenset(allowed), source.anatomy.component_width(edit.block, edit.layer))
        if cut is not None:
            edits.append(cut)
    settings = {
        "of": [_provenance(plan)],
        "layers": None if layers is None else sorted(layers),
        "components": Plan(tuple(edits), {}).components,
    }
    return make_plan(
        with_norms(source, edits), {**_common([plan]), "method": "restrict", "settings": settings}
    )


def _allowed(
    components: Mapping[int, Components] | Components | None, layer: int, block: str
) -> Collection[int] | None:
    if components is None:
        return None
    of_layer: Any = components
    if any(isinstance(key, int) for key in components):
        of_layer = of_layer.get(layer, {"attn": (), "mlp": ()})
    allowed: Collection[int] | None = of_layer.get(block)
    return allowed


def _common(plans: Sequence[Plan]) -> dict[str, Any]:
    """Metadata that all plans have in common: the model, and source and target if equal."""
    first = plans[0].metadata
    metadata = {"model": first.get("model"), "fingerprint": first.get("fingerprint")}
    for name in ("source", "target"):
        values = {plan.metadata.get(name) for plan in plans}
        if len(values) == 1 and None not in values:
            metadata[name] = values.pop()
    metadata["languages"] = list(
        dict.fromkeys(language for plan in plans for language in plan.metadata.get("languages", ()))
    )
    return metadata


def _provenance(plan: Plan) -> dict[str, Any]:
    return {"method": plan.metadata.get("method"), "settings": plan.metadata.get("settings", {})}
