"""A plan, whose terms are modules, as what it does to each tensor on disk: forwards, and back to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.plans.plan import ModuleEdit, Plan
from editing.plans.rounding import EditedBlock, round_once
from editing.plans.weights import Weights
from neurons.architectures.anatomy import StoredPiece
from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry
from neurons.models.source import ModelSource


@dataclass(frozen=True)
class TensorEdit:
    """The change of one stored tensor.

    Attributes:
        entry: where the tensor lies.
        edit: of the module that it belongs to.
        pieces: of the weight W that lie in it: experts where it is fused, else one; none: it is the bias.
    """

    entry: TensorEntry
    edit: ModuleEdit
    pieces: tuple[StoredPiece, ...]

    def rounded(self, block: torch.Tensor, first: int) -> EditedBlock:
        """The new values of a block of the tensor's rows, rounded to the stored dtype.

        Args:
            block: rows of the stored tensor, in its stored dtype.
            first: index of its first row.
        """
        if not self.pieces:
            change = self._bias(block, first)
            return EditedBlock(round_once(block.double() + change, block.dtype), change)
        if self.pieces[0].index is None:
            return self._rounded_piece(self.pieces[0], block, first)
        experts = [
            self._rounded_piece(piece, own, 0)
            for piece, own in zip(self.pieces[first : first + len(block)], block, strict=True)
        ]
        return EditedBlock(
            torch.stack([expert.stored for expert in experts]),
            torch.stack([expert.change.float() for expert in experts]),
        )

    def _rounded_piece(self, piece: StoredPiece, block: torch.Tensor, first: int) -> EditedBlock:
        if piece.transposed:
            return self.edit.rounded(block, piece.columns.start + first, 0, transposed=True)
        return self.edit.rounded(block, first, piece.columns.start)

    def restored(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """What the values were before, up to rounding: not finite where a scale of 0 has removed them.

        The same numbers on every machine: products and sums are taken one by one, in the order of the rank.

        Args:
            block: rows of the edited tensor, of any float dtype.
            first: index of its first row.

        Returns:
            float64, of the same shape.
        """
        if not self.pieces:
            return block.double() - self._bias(block, first)
        if self.pieces[0].index is None:
            return self._restored_piece(self.pieces[0], block, first)
        experts = zip(self.pieces[first : first + len(block)], block, strict=True)
        return torch.stack([self._restored_piece(piece, own, 0) for piece, own in experts])

    def _restored_piece(self, piece: StoredPiece, block: torch.Tensor, first: int) -> torch.Tensor:
        if piece.transposed:
            return taken_back(self.edit, block.T, 0, piece.columns.start + first).T
        return taken_back(self.edit, block, first, piece.columns.start)

    def _bias(self, block: torch.Tensor, first: int) -> torch.Tensor:
        if self.edit.bias is None:
            raise BrocaError(f"{self.entry.name}: the plan has no bias for it")
        return _part(self.edit.bias, first, len(block))


def taken_back(edit: ModuleEdit, weight: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
    """W = diag(1/r) (W' - U K^T) diag(1/c) for a block of W' that starts at a row and a column.

    Args:
        edit: that made W' of W.
        weight: [rows, columns], any float dtype.
        row: index of the block's first row.
        column: index of the block's first column.

    Returns:
        [rows, columns] in float64; not finite where a scale is 0.
    """
    base = weight.double()
    rows, columns = base.shape
    if edit.left is not None and edit.right is not None:
        lefts, rights = _part(edit.left, row, rows), _part(edit.right, column, columns)
        # One after another: a matrix product adds in an order of its own on each machine.
        for left, right in zip(lefts.T, rights.T, strict=True):
            base = base - left[:, None] * right
    if edit.column_scale is not None:
        base = base / _part(edit.column_scale, column, columns)
    if edit.row_scale is not None:
        base = base / _part(edit.row_scale, row, rows)[:, None]
    return base


def _part(factor: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return factor[first : first + count].double()


def tensor_edits(source: ModelSource, plan: Plan) -> tuple[TensorEdit, ...]:
    """What the plan does to each tensor that the checkpoint has, in the order of the plan.

    Raises:
        BrocaError: the plan does not fit the model, by tensor name.
    """
    weights = Weights(source)
    found = []
    for edit in plan.edits:
        if edit.changes_weight:
            pieces = weights.pieces(edit.layer, edit.block)
            check_shape(edit, pieces, source.anatomy.residual)
            # The experts of a mixture may lie in one tensor or in one each.
            by_tensor: dict[str, tuple[TensorEntry, list[StoredPiece]]] = {}
            for piece, entry in pieces:
                if len(pieces) > 1 and piece.index is None and not edit.changes(piece.columns):
                    continue
                by_tensor.setdefault(entry.name, (entry, []))[1].append(piece)
            found += [TensorEdit(entry, edit, tuple(own)) for entry, own in by_tensor.values()]
        bias = None if edit.bias is None else weights.bias(edit.layer, edit.block)
        if edit.bias is not None and bias is not None:
            if len(edit.bias) != source.anatomy.residual:
                raise BrocaError(
                    f"the plan does not fit tensor {bias.name} of shape {list(bias.shape)}: it has "
                    f"{len(edit.bias)} entries"
                )
            found.append(TensorEdit(bias, edit, ()))
    return tuple(found)


def check_shape(edit: ModuleEdit, pieces: Sequence[tuple[StoredPiece, TensorEntry]], rows: int) -> None:
    """Refuse an edit whose sizes are not those of its weight W [rows, n].

    Raises:
        BrocaError: by tensor name.
    """
    columns = pieces[-1][0].columns.stop
    name = pieces[0][1].name
    for tensor, size in (
        (edit.row_scale, rows),
        (edit.left, rows),
        (edit.column_scale, columns),
        (edit.right, columns),
    ):
        if tensor is not None and len(tensor) != size:
            raise BrocaError(
                f"the plan does not fit tensor {name} of shape {list(pieces[0][1].shape)}: it has "
                f"{len(tensor)} entries where {size} are needed"
            )


@dataclass(frozen=True)
class AddedBiases:
    """What a checkpoint needs to hold biases that it has no place for.

    Attributes:
        tensors: name -> values in the stored dtype: the plan's, and zeros wherever else the config's
            setting asks for one.
        settings: of the config, to be set.
    """

    tensors: dict[str, torch.Tensor]
    settings: dict[str, bool]


def added_biases(source: ModelSource, plan: Plan) -> AddedBiases:
    """The biases of a plan whose module has none in the checkpoint.

    Raises:
        BrocaError: the architecture has no setting for such a bias.
    """
    weights = Weights(source)
    tensors: dict[str, torch.Tensor] = {}
    settings = {}
    for edit in plan.edits:
        if edit.bias is None or weights.bias(edit.layer, edit.block) is not None:
            continue
        dtype = weights.stored_dtype(edit.layer, edit.block)
        for name, length in weights.switched_biases(edit.block).items():
            tensors.setdefault(name, torch.zeros(length, dtype=dtype))
        name = weights.bias_name(edit.layer, edit.block)
        if len(edit.bias) != source.anatomy.residual:
            raise BrocaError(
                f"the plan does not fit tensor {name}: it has {len(edit.bias)} entries where "
                f"{source.anatomy.residual} are needed"
            )
        tensors[name] = round_once(edit.bias, dtype)
        settings[source.anatomy.layout.bias_switches[edit.block].setting] = True
    return AddedBiases(tensors, settings)
