"""The edit plan: the result of a method, independent of the architecture, for every module that it changes.

For an output module, "attn" or "mlp" of a layer, with weight W [d, n] (n inputs: A*D of heads or I of
neurons),

    W' = diag(r) W diag(c) + U K^T + sum_{i in R} e_i D_i^T + sum_{j in C} E_j e_j^T

with r [d] and c [n] scales (absent: ones), U [d, rank], K [n, rank] (absent: zeros), D_i [n] and E_j [d] dense deltas of
chosen rows R and columns C (absent: none), and for its bias

    b' = b + d

The same holds for any other module with a matrix W [outputs, inputs], or an embedding [tokens, d]; of these only the
routers of mixtures can get a bias.

Composition, inversion and restriction are in ``editing.plans.algebra``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from editing.plans.plan_content import require_plan_content
from editing.plans.rounding import EditedChunk, edited_and_rounded, float32_is_enough
from neurons.architectures.anatomy import BLOCKS, OUTSIDE
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.files.artifact import artifact_bytes, load_artifact, write_atomically
from neurons.models.source import ModelSource

# The tensors of a module's edit, as attributes and in files.
FACTORS = ("row_scale", "column_scale", "left", "right", "bias", "row_deltas", "column_deltas")
PLACES = ("rows", "columns")  # of the deltas


@dataclass(frozen=True)
class ModuleEdit:
    """The change of one module.

    Attributes:
        layer: index of the layer, or ``OUTSIDE``.
        block: "attn" (o_proj), "mlp" (down_proj), or the path of another module in its layer, as ``mlp.gate_proj``, or,
            outside the layers, in the model, as ``model.embed_tokens``.
        components: indices of the heads or neurons that change, ascending; of another module, of the neurons whose
            gates or linear branches are the changed rows (``Anatomy.input_rows``), or ().
        row_scale: float32 [d] or None.
        column_scale: float32 [n] or None.
        left: U, float32 [d, rank] or None.
        right: K, float32 [n, rank] or None, together with ``left``.
        bias: float32 [d] (of a router [E]) or None, added to the module's bias.
        rows: R, int64 [k], ascending, or None.
        row_deltas: D, float32 [k, n] or None, together with ``rows``.
        columns: C, int64 [m], ascending, or None.
        column_deltas: E, float32 [m, d] or None, together with ``columns``.
        details: per component, name -> float64 [len(components)]: the method's g, lambda, c, ...
        notes: JSON values for the whole module: ||dW||, ||W||, standard deviation of the key, ...
    """

    layer: int
    block: str
    components: tuple[int, ...]
    row_scale: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_deltas: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    column_deltas: torch.Tensor | None = None
    details: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The module in messages."""
        return self.block if self.layer == OUTSIDE else f"layer {self.layer}, {self.block}"

    @property
    def rank(self) -> int:
        return 0 if self.left is None else self.left.shape[1]

    @property
    def dense(self) -> int:
        """Number of rows and columns with dense deltas."""
        return sum(len(places) for places in (self.rows, self.columns) if places is not None)

    def deltas(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """The dense deltas in a range of W, float64 [rows, columns]; None if it has none.

        Other numbers are -0, which changes no bit of what it is added to.
        """
        total = None
        for places, deltas, along, across, axis in (
            (self.rows, self.row_deltas, rows, columns, 0),
            (self.columns, self.column_deltas, columns, rows, 1),
        ):
            if places is None or deltas is None:
                continue
            first, last = torch.searchsorted(places, torch.tensor([along.start, along.stop])).tolist()
            if first == last:
                continue
            if total is None:
                shape = rows.stop - rows.start, columns.stop - columns.start
                total = torch.full(shape, -0.0, dtype=torch.float64)
            part = deltas[first:last, across].double()
            total.index_add_(axis, places[first:last] - along.start, part if axis == 0 else part.T)
        return total

    def apply(self, weight: torch.Tensor, first_row: int = 0, first_column: int = 0) -> torch.Tensor:
        """W' for a range of rows and columns.

        Args:
            weight: [rows, columns], any float dtype.
            first_row: index of the first row in W.
            first_column: index of the first column in W.

        Returns:
            [rows, columns] in float64.
        """
        float64 = torch.float64
        rows = slice(first_row, first_row + weight.shape[0])
        columns = slice(first_column, first_column + weight.shape[1])
        edited = weight.to(float64)
        device = edited.device
        if self.row_scale is not None:
            edited = edited * self.row_scale[rows].to(device, float64)[:, None]
        if self.column_scale is not None:
            edited = edited * self.column_scale[columns].to(device, float64)
        if self.left is not None and self.right is not None:
            left, right = self.left[rows].to(device, float64), self.right[columns].to(device, float64)
            edited = torch.addmm(edited, left, right.T)
        deltas = self.deltas(rows, columns)
        return edited if deltas is None else edited + deltas.to(device)

    def rounded(
        self, weight: torch.Tensor, first_row: int = 0, first_column: int = 0, transposed: bool = False
    ) -> EditedChunk:
        """W' in its stored dtype, for a range of rows and columns: computed in float32, or float64 where it has deltas, and
        cast once.

        Args:
            weight: [rows, columns] in its stored dtype, of W or, if ``transposed``, of W^T.
            first_row: index of the first row in W, or in W^T.
            first_column: index of the first column.
            transposed: (W')^T = diag(c) W^T diag(r) + K U^T.
        """
        rows = slice(first_row, first_row + weight.shape[0])
        columns = slice(first_column, first_column + weight.shape[1])

        def part(factor: torch.Tensor | None, places: slice) -> torch.Tensor | None:
            return None if factor is None else factor[places].to(weight.device, torch.float32)

        of_rows, of_columns = (self.row_scale, self.left), (self.column_scale, self.right)
        deltas = self.deltas(columns, rows) if transposed else self.deltas(rows, columns)
        if transposed:
            of_rows, of_columns = of_columns, of_rows
            deltas = None if deltas is None else deltas.T
        return edited_and_rounded(
            weight,
            part(of_rows[0], rows),
            part(of_columns[0], columns),
            part(of_rows[1], rows),
            part(of_columns[1], columns),
            None if deltas is None else deltas.to(weight.device),
            in_float32=self._in_float32,
        )

    @cached_property
    def _in_float32(self) -> bool:
        # Chunks with and without deltas must agree on what other factors give.
        mixed = self.dense > 0 and (self.row_scale, self.column_scale, self.left) != (None, None, None)
        return not mixed and float32_is_enough(self.row_scale, self.column_scale)

    @property
    def relative_change(self) -> float | None:
        """||dW||_F / ||W||_F from the notes; None without them."""
        change, weight = self.notes.get("change_norm"), self.notes.get("weight_norm")
        return None if change is None or not weight else float(change) / float(weight)

    @property
    def through_norm(self) -> bool:
        """Whether the change was solved through the norm after the module, so that it is valid for one strength."""
        return "value_through_norm" in self.notes

    @property
    def changes_weight(self) -> bool:
        """Whether W changes: an edit may change only the bias."""
        return any(getattr(self, name) is not None for name in FACTORS if name != "bias")

    def changes(self, columns: slice) -> bool:
        """Whether the edit changes these columns of W."""
        return (
            self.row_scale is not None
            or self.rows is not None
            or (
                self.columns is not None
                and bool(((self.columns >= columns.start) & (self.columns < columns.stop)).any())
            )
            or (self.column_scale is not None and bool((self.column_scale[columns] != 1).any()))
            or (self.right is not None and bool(self.right[columns].any()))
        )

    def scaled(self, strength: float) -> ModuleEdit:
        """The same edit with its distance from the identity multiplied by ``strength``.

        The values are multiplied and the keys unchanged, so that notes about keys remain valid.

        Raises:
            UsageError: the edit is not linear in its strength (``through_norm``).
            BrocaError: rows and columns are both scaled, so that interpolation does not have this form.
        """
        if self.through_norm and strength != 1:
            raise UsageError(
                f"{self.where}: solved through the norm after the module, so it cannot be multiplied by "
                f"{strength:g}: make the edit again with broca edit --strength"
            )
        if self.row_scale is not None and self.column_scale is not None:
            raise BrocaError(
                f"{self.where}: scales rows and columns, so its strength cannot change: "
                "make the edit again with other settings"
            )

        def times(factor: torch.Tensor | None) -> torch.Tensor | None:
            return None if factor is None else factor * strength

        return replace(
            self,
            row_scale=None if self.row_scale is None else 1 + strength * (self.row_scale - 1),
            column_scale=None if self.column_scale is None else 1 + strength * (self.column_scale - 1),
            left=times(self.left),
            bias=times(self.bias),
            row_deltas=times(self.row_deltas),
            column_deltas=times(self.column_deltas),
            details={name: _scaled_detail(name, values, strength) for name, values in self.details.items()},
            notes={
                name: abs(strength) * value if name in ("change_norm", "bias_norm", "kept") else value
                for name, value in self.notes.items()
                # Properties of the weights of a difference, and of outputs at full strength.
                if name not in ("worst_in_spacings", "distance")
            },
        )


def _scaled_detail(name: str, values: torch.Tensor, strength: float) -> torch.Tensor:
    """A detail of a scaled edit; g and the key do not change."""
    if name in ("lambda", "c", "offset"):
        return values * strength
    return 1 + strength * (values - 1) if name in ("factor", "scale") else values


@dataclass(frozen=True)
class Plan:
    """All module edits of one checkpoint.

    Attributes:
        edits: by (layer, block), one for each module that changes.
        metadata: method, settings, model, fingerprint, languages, source, target.
    """

    edits: tuple[ModuleEdit, ...]
    metadata: dict[str, Any]

    @property
    def through_norm(self) -> bool:
        """Whether any edit is valid only for its strength (``ModuleEdit.through_norm``)."""
        return any(edit.through_norm for edit in self.edits)

    @property
    def components(self) -> int:
        """Number of heads and neurons that change."""
        kinds = [(edit.layer, edit.block == "attn", edit.components) for edit in self.edits]
        return len({(layer, head, component) for layer, head, of_edit in kinds for component in of_edit})

    def relative_change(self) -> float | None:
        """||dW||_F / ||W||_F over all edited modules, from their notes; None if a module has none.

        A plan composed without its model has no such notes.
        """
        if any(edit.relative_change is None for edit in self.edits):
            return None
        change = sum(float(edit.notes["change_norm"]) ** 2 for edit in self.edits)
        whole = sum(float(edit.notes["weight_norm"]) ** 2 for edit in self.edits)
        return float((change / whole) ** 0.5) if whole else 0.0

    def scaled(self, strength: float) -> Plan:
        """Every edit multiplied by ``strength``, in addition to its current strength.

        If the edit of a method is not proportional to its strength, the factor is saved as "scaled_by".

        Raises:
            UsageError: a strength of 0, or as ``ModuleEdit.scaled``.
            BrocaError: as ``ModuleEdit.scaled``, or overflow of float32.
        """
        if strength == 1:
            return self
        if strength == 0:
            raise UsageError("a strength of 0 removes the edit: use another, or the unedited model")
        # These describe the edit at its previous strength.
        stale = ("learning", "measured", "modules")
        metadata = {name: value for name, value in self.metadata.items() if name not in stale}
        settings = dict(metadata["settings"])
        name = "scaled_by" if _is_nonlinear(metadata) else "strength"
        settings[name] = settings.get(name, 1.0) * strength
        return make_plan([edit.scaled(strength) for edit in self.edits], {**metadata, "settings": settings})

    def to_bytes(self) -> bytes:
        """The plan as a Broca file."""
        tensors: dict[str, torch.Tensor] = {}
        modules = []
        for edit in self.edits:
            prefix = f"{edit.layer}.{edit.block}"
            tensors[f"{prefix}.components"] = torch.tensor(edit.components, dtype=torch.int64)
            for name in FACTORS:
                value = getattr(edit, name)
                if value is not None:
                    # A copy: the file format rejects tensors that share memory.
                    tensors[f"{prefix}.{name}"] = value.float().clone()
            for name in PLACES:
                value = getattr(edit, name)
                if value is not None:
                    tensors[f"{prefix}.{name}"] = value.clone()
            for name, values in edit.details.items():
                tensors[f"{prefix}.details.{name}"] = values.double()
            modules.append({"layer": edit.layer, "block": edit.block, "notes": dict(edit.notes)})
        return artifact_bytes("edit", tensors, {**self.metadata, "modules": modules})

    def save(self, path: Path | str) -> None:
        write_atomically(path, self.to_bytes())


def language_pair(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """(source, target) of a plan; None unless it has both."""
    source, target = metadata.get("source"), metadata.get("target")
    return None if source is None or target is None else (str(source), str(target))


def _is_nonlinear(metadata: Mapping[str, Any]) -> bool:
    """Whether the method's plan is not proportional to its strength."""
    settings = metadata["settings"]
    # Solved or renormalised on the model that is edited at one strength.
    fixed = (
        settings.get("jointly")
        or settings.get("corrections")
        or "norm-preserving" in str(settings.get("form"))
    )
    return bool(fixed) or metadata.get("method") in ("language-arithmetic", "selective-steering")


def module_order(layer: int, block: str) -> tuple[int, int, str]:
    """A sort key of modules: by layer, output modules first."""
    return layer, BLOCKS.index(block) if block in BLOCKS else len(BLOCKS), block


def make_plan(edits: Sequence[ModuleEdit], metadata: Mapping[str, Any]) -> Plan:
    """Check the edits and sort them.

    Raises:
        NothingToChangeError: no edits.
        BrocaError: a module named twice, an edit without a factor, a bias outside the layers, or values that are not
            finite.
    """
    if not edits:
        raise NothingToChangeError(
            "the plan changes nothing: loosen its thresholds or choose other layers or neurons"
        )
    ordered = sorted(edits, key=lambda edit: module_order(edit.layer, edit.block))
    places = [(edit.layer, edit.block) for edit in ordered]
    if len(set(places)) != len(places):
        raise BrocaError("the plan names a module twice")
    for edit in ordered:
        if all(getattr(edit, name) is None for name in FACTORS):
            raise BrocaError(f"{edit.where}: the plan names it without a change")
        if edit.bias is not None and edit.layer == OUTSIDE:
            raise BrocaError(f"{edit.where}: a plan adds biases only to output modules and routers")
        for name in FACTORS:
            value = getattr(edit, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise BrocaError(f"{edit.where}: the edit's {name} is not finite")
    return Plan(tuple(ordered), dict(metadata))


def load_plan(path: Path | str) -> Plan:
    """Read a file of ``Plan.save``.

    Raises:
        UsageError, BrocaError: as ``load_artifact``, ``require_plan_content`` and ``make_plan``.
    """
    artifact = load_artifact(path, "edit")
    require_plan_content(artifact, Path(path))
    edits = []
    for module in artifact.metadata["modules"]:
        prefix = f"{module['layer']}.{module['block']}"
        tensors = {
            name.removeprefix(prefix + "."): tensor
            for name, tensor in artifact.tensors.items()
            if name.startswith(prefix + ".")
        }
        edits.append(
            ModuleEdit(
                layer=module["layer"],
                block=module["block"],
                components=tuple(tensors["components"].tolist()),
                **{name: tensors.get(name) for name in (*FACTORS, *PLACES)},
                details={
                    name.removeprefix("details."): values
                    for name, values in tensors.items()
                    if name.startswith("details.")
                },
                notes=module["notes"],
            )
        )
    return make_plan(edits, artifact.metadata)


def plan_metadata(
    source: ModelSource, method: str, settings: dict[str, Any], provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The metadata of a plan; ``provenance`` says what it is made from: source, target, languages, direction, ..."""
    return {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": method,
        "languages": [],
        "settings": settings,
        **(provenance or {}),
    }
