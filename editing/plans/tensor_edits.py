"""The changes of a plan to each tensor on disk, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.plans.plan import ModuleEdit, Plan
from editing.plans.rounding import EditedChunk, round_once
from editing.plans.weights import Weights
from neurons.architectures.anatomy import StoredPiece
from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry
from neurons.models.source import ModelSource


@dataclass(frozen=True)
class TensorEdit:
    """The change of one stored tensor.

    Attributes:
        entry: the location of the tensor.
        edit: of its module.
        pieces: of the weight W in it: experts if fused, else one; empty for a bias.
    """

    entry: TensorEntry
    edit: ModuleEdit
    pieces: tuple[StoredPiece, ...]

    def rounded(self, chunk: torch.Tensor, first: int) -> EditedChunk:
        """The new values of a chunk of the tensor's rows, rounded to the stored dtype.

        Args:
            chunk: rows of the stored tensor, in its stored dtype.
            first: index of its first row.
        """
        if not self.pieces:
            change = self._bias(chunk, first)
            return EditedChunk(round_once(chunk.double() + change, chunk.dtype), change)
        if self.pieces[0].index is None:
            return self._rounded_piece(self.pieces[0], chunk, first)
        experts = [
            self._rounded_piece(piece, part, 0)
            for piece, part in zip(self.pieces[first : first + len(chunk)], chunk, strict=True)
        ]
        return EditedChunk(
            torch.stack([expert.stored for expert in experts]),
            torch.stack([expert.change.float() for expert in experts]),
        )

    def _rounded_piece(self, piece: StoredPiece, chunk: torch.Tensor, first: int) -> EditedChunk:
        if piece.transposed:
            return self.edit.rounded(chunk, piece.columns.start + first, 0, transposed=True)
        return self.edit.rounded(chunk, first, piece.columns.start)

    def restored(self, chunk: torch.Tensor, first: int) -> torch.Tensor:
        """The values before the edit, up to rounding; not finite where a scale is 0.

        The same on every machine: products and sums are computed one by one in the order of the rank.

        Args:
            chunk: rows of the edited tensor, of any float dtype.
            first: index of its first row.

        Returns:
            float64, of the same shape.
        """
        if not self.pieces:
            return chunk.double() - self._bias(chunk, first)
        if self.pieces[0].index is None:
            return self._restored_piece(self.pieces[0], chunk, first)
        experts = zip(self.pieces[first : first + len(chunk)], chunk, strict=True)
        return torch.stack([self._restored_piece(piece, expert, 0) for piece, expert in experts])

    def _restored_piece(self, piece: StoredPiece, chunk: torch.Tensor, first: int) -> torch.Tensor:
        if piece.transposed:
            return undone(self.edit, chunk.T, 0, piece.columns.start + first).T
        return undone(self.edit, chunk, first, piece.columns.start)

    def _bias(self, chunk: torch.Tensor, first: int) -> torch.Tensor:
        if self.edit.bias is None:
            raise BrocaError(f"{self.entry.name}: the plan has no bias for it")
        return _part(self.edit.bias, first, len(chunk))


def undone(edit: ModuleEdit, weight: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
    """W = diag(1/r) (W' - U K^T - D) diag(1/c) for a part of W' that starts at a row and a column, with deltas D.

    Args:
        edit: from W to W'.
        weight: [rows, columns], any float dtype.
        row: index of the first row.
        column: index of the first column.

    Returns:
        [rows, columns] in float64; not finite where a scale is 0.
    """
    base = weight.double()
    rows, columns = base.shape
    if edit.left is not None and edit.right is not None:
        lefts, rights = _part(edit.left, row, rows), _part(edit.right, column, columns)
        # One by one: the order of sums in a matrix product depends on the machine.
        for left, right in zip(lefts.T, rights.T, strict=True):
            base = base - left[:, None] * right
    deltas = edit.deltas(slice(row, row + rows), slice(column, column + columns))
    if deltas is not None:
        base = base - deltas
    if edit.column_scale is not None:
        base = base / _part(edit.column_scale, column, columns)
    if edit.row_scale is not None:
        base = base / _part(edit.row_scale, row, rows)[:, None]
    return base


def _part(factor: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return factor[first : first + count].double()


def tensor_edits(source: ModelSource, plan: Plan) -> tuple[TensorEdit, ...]:
    """The change of each tensor in the checkpoint, in the order of the plan.

    Raises:
        BrocaError: the plan does not fit the model; names the tensor.
    """
    weights = Weights(source)
    edits = []
    for edit in plan.edits:
        if edit.changes_weight:
            pieces = weights.pieces(edit.layer, edit.block)
            check_shape(edit, pieces, source.anatomy.rows(edit.layer, edit.block))
            # The experts of a mixture may be in one tensor or in one each.
            by_tensor: dict[str, tuple[TensorEntry, list[StoredPiece]]] = {}
            for piece, entry in pieces:
                if len(pieces) > 1 and piece.index is None and not edit.changes(piece.columns):
                    continue
                by_tensor.setdefault(entry.name, (entry, []))[1].append(piece)
            edits += [TensorEdit(entry, edit, tuple(of_tensor)) for entry, of_tensor in by_tensor.values()]
        bias = None if edit.bias is None else weights.bias(edit.layer, edit.block)
        if edit.bias is not None and bias is not None:
            if bias.shape != edit.bias.shape:
                raise BrocaError(
                    f"the plan does not fit tensor {bias.name} of shape {list(bias.shape)}: it has "
                    f"{len(edit.bias)} entries"
                )
            edits.append(TensorEdit(bias, edit, ()))
    return tuple(edits)


def check_shape(edit: ModuleEdit, pieces: Sequence[tuple[StoredPiece, TensorEntry]], rows: int) -> None:
    """Check that the sizes of an edit are those of its weight W [rows, n].

    Raises:
        BrocaError: names the tensor.
    """
    columns = pieces[-1][0].columns.stop
    name = pieces[0][1].name
    for tensor, size in (
        (edit.row_scale, rows),
        (edit.left, rows),
        (edit.column_scale, columns),
        (edit.right, columns),
        (None if edit.row_deltas is None else edit.row_deltas[0], columns),
        (None if edit.column_deltas is None else edit.column_deltas[0], rows),
    ):
        if tensor is not None and len(tensor) != size:
            raise BrocaError(
                f"the plan does not fit tensor {name} of shape {list(pieces[0][1].shape)}: it has "
                f"{len(tensor)} entries where {size} are needed"
            )
    for places, size, what in ((edit.rows, rows, "row"), (edit.columns, columns, "column")):
        if places is not None and int(places[-1]) >= size:
            raise BrocaError(
                f"the plan does not fit tensor {name} of shape {list(pieces[0][1].shape)}: it changes {what} "
                f"{int(places[-1])}"
            )


@dataclass(frozen=True)
class AddedBiases:
    """Tensors and settings that add biases to a checkpoint without them.

    Attributes:
        tensors: name -> values in the stored dtype: the plan's, and zeros for all other biases that the
            config's setting requires.
        settings: of the config, to be set.
    """

    tensors: dict[str, torch.Tensor]
    settings: dict[str, bool]


def added_biases(source: ModelSource, plan: Plan) -> AddedBiases:
    """The biases of a plan for modules without a bias in the checkpoint.

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
