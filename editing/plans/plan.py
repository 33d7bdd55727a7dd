"""The edit plan: what a method decided, in architecture-neutral terms, for every module it changes.

For the output module of one block of one layer, with weight W [d, n] (n inputs: A*D of heads or I of
neurons),

    W' = diag(r) W diag(c) + U K^T

with r [d] and c [n] scales (absent: ones) and U [d, rank], K [n, rank] (absent: zeros), and for its bias

    b' = b + d

How plans are composed, inverted and restricted is in ``editing.plans.algebra``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from editing.directions.direction import Direction
from editing.plans.plan_content import require_plan_content
from editing.plans.rounding import EditedBlock, edited_and_rounded, float32_is_enough
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.files.artifact import artifact_bytes, load_artifact, write_atomically
from neurons.models.source import ModelSource

# The tensors of a module's edit, by their names here and in files.
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
        notes: JSON values for the whole module: ||dW||, ||W||, the key's spread, ...
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
        """W' for a block of rows and columns.

        Args:
            weight: [rows, columns], any float dtype.
            first_row: index of the block's first row in W.
            first_column: index of the block's first column in W.

        Returns:
            [rows, columns] in float64.
        """
        exact = torch.float64
        rows = slice(first_row, first_row + weight.shape[0])
        columns = slice(first_column, first_column + weight.shape[1])
        edited = weight.to(exact)
        where = edited.device
        if self.row_scale is not None:
            edited = edited * self.row_scale[rows].to(where, exact)[:, None]
        if self.column_scale is not None:
            edited = edited * self.column_scale[columns].to(where, exact)
        if self.left is not None and self.right is not None:
            left, right = self.left[rows].to(where, exact), self.right[columns].to(where, exact)
            edited = torch.addmm(edited, left, right.T)
        return edited

    def rounded(
        self, weight: torch.Tensor, first_row: int = 0, first_column: int = 0, transposed: bool = False
    ) -> EditedBlock:
        """W' as a checkpoint holds it, for a block of rows and columns: computed in float32, cast once.

        Args:
            weight: [rows, columns] in its stored dtype, or with ``transposed`` a block of W^T.
            first_row: index of the block's first row in W, or in W^T.
            first_column: likewise.
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
        """||dW||_F / ||W||_F as the constructor noted them; None where it did not."""
        change, whole = self.notes.get("change_norm"), self.notes.get("weight_norm")
        return None if change is None or not whole else float(change) / float(whole)

    @property
    def through_norm(self) -> bool:
        """Whether what is added was solved through the norm after the module, for one strength alone."""
        return "value_through_norm" in self.notes

    @property
    def changes_weight(self) -> bool:
        """Whether W changes at all: an edit may be of the bias alone."""
        return self.row_scale is not None or self.column_scale is not None or self.left is not None

    def changes(self, columns: slice) -> bool:
        """Whether the edit does anything to these columns of W."""
        return (
            self.row_scale is not None
            or (self.column_scale is not None and bool((self.column_scale[columns] != 1).any()))
            or (self.right is not None and bool(self.right[columns].any()))
        )

    def scaled(self, strength: float) -> ModuleEdit:
        """The same edit with its distance from the identity multiplied by ``strength``.

        What is added is multiplied on the side of the values, so that keys stay what the notes say of them.

        Raises:
            UsageError: the norm after the module bends what is added (``through_norm``).
            BrocaError: rows and columns are both scaled: what lies between such an edit and none is not
                of this form.
        """
        if self.through_norm and strength != 1:
            raise UsageError(
                f"layer {self.layer}, {self.block}: what it adds was solved through the norm after it, so {strength:g} times "
                "as much does not do as much more: make the edit again at the strength that it is to have "
                "(broca edit --strength)"
            )
        if self.row_scale is not None and self.column_scale is not None:
            raise BrocaError(
                f"layer {self.layer}, {self.block}: scales rows and columns, so has no strength: make the edit "
                "again with other settings"
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
                # Of the weights that a difference was taken from.
                if name != "worst_in_spacings"
            },
        )


def _scaled_detail(name: str, values: torch.Tensor, strength: float) -> torch.Tensor:
    """What a detail says of the component once the edit is scaled; g and the key itself stay."""
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
        """Whether any edit holds for one strength alone (``ModuleEdit.through_norm``)."""
        return any(edit.through_norm for edit in self.edits)

    @property
    def components(self) -> int:
        """How many heads and neurons change."""
        return sum(len(edit.components) for edit in self.edits)

    def relative_change(self) -> float | None:
        """||dW||_F / ||W||_F over the edited modules together; None where a module does not know it.

        What the constructor noted: a plan composed without its model has no such notes.
        """
        if any(edit.relative_change is None for edit in self.edits):
            return None
        change = sum(float(edit.notes["change_norm"]) ** 2 for edit in self.edits)
        whole = sum(float(edit.notes["weight_norm"]) ** 2 for edit in self.edits)
        return float((change / whole) ** 0.5) if whole else 0.0

    def scaled(self, strength: float) -> Plan:
        """Every edit at ``strength`` times its size, on top of the strength that it has.

        Of a method whose own strength is no multiple of its whole edit the settings say it as "scaled_by".

        Raises:
            UsageError: a strength of 0, or as ``ModuleEdit.scaled``.
            BrocaError: likewise, or numbers that float32 does not hold.
        """
        if strength == 1:
            return self
        if strength == 0:
            raise UsageError(
                "a strength of 0 leaves nothing of the edit: give another, or use the unedited model"
            )
        # What learning measured, and what a file noted of its modules, is of the strength that they had.
        stale = ("learning", "measured", "modules")
        metadata = {name: value for name, value in self.metadata.items() if name not in stale}
        settings = dict(metadata["settings"])
        name = "scaled_by" if _strength_is_of_a_part(metadata) else "strength"
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
                    # A copy: the file format refuses two names for one memory.
                    tensors[f"{prefix}.{name}"] = value.float().clone()
            for name, values in edit.details.items():
                tensors[f"{prefix}.details.{name}"] = values.double()
            modules.append({"layer": edit.layer, "block": edit.block, "notes": dict(edit.notes)})
        return artifact_bytes("edit", tensors, {**self.metadata, "modules": modules})

    def save(self, path: Path | str) -> None:
        write_atomically(path, self.to_bytes())


def language_pair(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """(source, target) of a plan; None where it has not both: of several directions one end may differ."""
    source, target = metadata.get("source"), metadata.get("target")
    return None if source is None or target is None else (str(source), str(target))


def _strength_is_of_a_part(metadata: Mapping[str, Any]) -> bool:
    """Whether twice a plan is another than the plan that its method makes at twice the strength."""
    renormalised = "norm-preserving" in str(metadata["settings"].get("form"))
    return renormalised or metadata.get("method") == "language-arithmetic"


def make_plan(edits: list[ModuleEdit], metadata: Mapping[str, Any]) -> Plan:
    """Order the edits and check them.

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
            raise BrocaError(f"layer {edit.layer}, {edit.block}: the plan names it and changes nothing in it")
        for name in FACTORS:
            value = getattr(edit, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise BrocaError(f"layer {edit.layer}, {edit.block}: the edit's {name} is not finite")
    return Plan(tuple(ordered), dict(metadata))


def load_plan(path: Path | str) -> Plan:
    """Read what ``Plan.save`` wrote.

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
    """What every plan from a direction says of itself."""
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
