"""The edit plan: the result of a method, independent of the architecture, for every module that it changes.

For an output module, "attn" or "mlp" of a layer, with weight W [d, n] (n inputs: A*D of heads or I of
neurons),

    W' = diag(r) W diag(c) + U K^T

with r [d] and c [n] scales (absent: ones) and U [d, rank], K [n, rank] (absent: zeros), and for its bias

    b' = b + d

Composition, inversion and restriction are in ``editing.plans.algebra``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from editing.directions.direction import Direction
from editing.plans.plan_content import require_plan_content
from editing.plans.rounding import EditedChunk, edited_and_rounded, float32_is_enough
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.files.artifact import artifact_bytes, load_artifact, write_atomically
from neurons.models.source import ModelSource

# The tensors of a module's edit, as attributes and in files.
FACTORS = ("row_scale", "column_scale", "left", "right", "bias")


@dataclass(frozen=True)
class ModuleEdit:
    """The change of one output module.

    Attributes:
        layer: index of the layer.
        block: "attn" (o_proj) or "mlp" (down_proj).
        components: indices of the heads or neurons that change, ascending.
        row_scale: float32 [d] or None.
        column_scale: float32 [n] or None.
        left: U, float32 [d, rank] or None.
        right: K, float32 [n, rank] or None, together with ``left``.
        bias: float32 [d] or None, added to the module's bias.
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
    details: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return 0 if self.left is None else self.left.shape[1]

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
        return edited

    def rounded(
        self, weight: torch.Tensor, first_row: int = 0, first_column: int = 0, transposed: bool = False
    ) -> EditedChunk:
        """W' in its stored dtype, for a range of rows and columns: computed in float32, cast once.

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
        if transposed:
            of_rows, of_columns = of_columns, of_rows
        return edited_and_rounded(
            weight,
            part(of_rows[0], rows),
            part(of_columns[0], columns),
            part(of_rows[1], rows),
            part(of_columns[1], columns),
            in_float32=self._in_float32,
        )

    @cached_property
    def _in_float32(self) -> bool:
        return float32_is_enough(self.row_scale, self.column_scale)

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
        return self.row_scale is not None or self.column_scale is not None or self.left is not None

    def changes(self, columns: slice) -> bool:
        """Whether the edit changes these columns of W."""
        return (
            self.row_scale is not None
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
                f"layer {self.layer}, {self.block}: solved through the norm after the module, so it cannot be multiplied by "
                f"{strength:g}: make the edit again with broca edit --strength"
            )
        if self.row_scale is not None and self.column_scale is not None:
            raise BrocaError(
                f"layer {self.layer}, {self.block}: scales rows and columns, so its strength cannot change: "
                "make the edit again with other settings"
            )
        return ModuleEdit(
            layer=self.layer,
            block=self.block,
            components=self.components,
            row_scale=None if self.row_scale is None else 1 + strength * (self.row_scale - 1),
            column_scale=None if self.column_scale is None else 1 + strength * (self.column_scale - 1),
            left=None if self.left is None else self.left * strength,
            right=self.right,
            bias=None if self.bias is None else self.bias * strength,
            details={name: _scaled_detail(name, values, strength) for name, values in self.details.items()},
            notes={
                name: abs(strength) * value if name in ("change_norm", "bias_norm") else value
                for name, value in self.notes.items()
                # A property of the weights of a difference.
                if name != "worst_in_spacings"
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
        return sum(len(edit.components) for edit in self.edits)

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
    renormalised = "norm-preserving" in str(metadata["settings"].get("form"))
    return renormalised or metadata.get("method") == "language-arithmetic"


def make_plan(edits: Sequence[ModuleEdit], metadata: Mapping[str, Any]) -> Plan:
    """Check the edits and sort them.

    Raises:
        NothingToChangeError: no edits.
        BrocaError: a module named twice, an edit without a factor, or values that are not finite.
    """
    if not edits:
        raise NothingToChangeError(
            "the plan changes nothing: loosen its thresholds or choose other layers or neurons"
        )
    ordered = sorted(edits, key=lambda edit: (edit.layer, BLOCKS.index(edit.block)))
    places = [(edit.layer, edit.block) for edit in ordered]
    if len(set(places)) != len(places):
        raise BrocaError("the plan names a module twice")
    for edit in ordered:
        if all(getattr(edit, name) is None for name in FACTORS):
            raise BrocaError(f"layer {edit.layer}, {edit.block}: the plan names it without a change")
        for name in FACTORS:
            value = getattr(edit, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise BrocaError(f"layer {edit.layer}, {edit.block}: the edit's {name} is not finite")
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
                **{name: tensors.get(name) for name in FACTORS},
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
    source: ModelSource, method: str, direction: Direction, settings: dict[str, Any]
) -> dict[str, Any]:
    """Metadata of a plan made from a direction."""
    return {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": method,
        "source": direction.source,
        "target": direction.target,
        "languages": [direction.source, direction.target],
        "direction": {key: direction.metadata.get(key) for key in ("method", "corpus", "tokens", "texts")},
        "settings": settings,
    }
