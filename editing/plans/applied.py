"""Apply a plan to a loaded model, and revert it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from editing.plans.plan import ModuleEdit, Plan
from editing.plans.rounding import round_once
from editing.plans.tensor_edits import check_shape
from editing.plans.weights import Weights
from neurons.architectures.anatomy import OUTSIDE, Part, StoredPiece
from neurons.architectures.offload import has_offloaded, replaced, with_bias
from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry, read_tensor
from neurons.models.source import LoadedModel


@contextmanager
def applied(loaded: LoadedModel, plan: Plan | None) -> Iterator[None]:
    """Context in which the model computes with the plan's weights.

    The edited weights are those of an exported checkpoint: computed from the weights on
    disk and rounded to their stored dtype.  None leaves the model unchanged.

    Raises:
        BrocaError: the plan was made for another model or names a layer that it does not have, or the
            model's weights are quantised.
    """
    if plan is None:
        yield
        return
    loaded.require_fingerprint(plan.metadata, "the plan")
    loaded.require_exact("an edit")
    weights = Weights(loaded)
    with ExitStack() as undo:
        for edit in plan.edits:
            if edit.layer >= loaded.anatomy.layers:
                raise BrocaError(f"the plan edits layer {edit.layer}: the model has {loaded.anatomy.layers}")
            _apply_weight(loaded, weights, edit, undo)
            if edit.bias is not None:
                _apply_bias(loaded, weights, edit, edit.bias, undo)
        yield


def _apply_weight(loaded: LoadedModel, weights: Weights, edit: ModuleEdit, undo: ExitStack) -> None:
    pieces = weights.pieces(edit.layer, edit.block)
    check_shape(edit, pieces, loaded.anatomy.rows(edit.layer, edit.block))
    for part in loaded.anatomy.parts(edit.layer, edit.block):
        columns = part.columns
        of_part = [
            (piece, entry) for piece, entry in pieces if columns.start <= piece.columns.start < columns.stop
        ]
        if edit.layer == OUTSIDE and has_offloaded(part.module):
            raise BrocaError(
                f"{edit.where}: offloaded, and possibly tied to other weights: load it with --device cpu"
            )
        _apply_part(part, of_part, weights, edit, undo)


def _apply_part(
    part: Part,
    pieces: Sequence[tuple[StoredPiece, TensorEntry]],
    weights: Weights,
    edit: ModuleEdit,
    undo: ExitStack,
) -> None:
    # Only experts that change need a second copy.
    pieces = [(piece, entry) for piece, entry in pieces if edit.changes(piece.columns)]
    if not pieces:
        return
    # Unedited embeddings and LM head remain for those who keep them, as ``evaluation.likelihood`` does.
    exchanged = edit.layer == OUTSIDE or has_offloaded(part.module)
    live = part.values.clone() if exchanged else part.values
    for piece, entry in pieces:
        stored = weights.read_piece(piece, entry)
        edited = edit.rounded(stored, 0, piece.columns.start).stored
        target = part.cut(live, piece.columns)
        if not exchanged:
            undo.callback(target.copy_, target.clone())
        target.copy_(edited)
    if exchanged:
        undo.enter_context(replaced(part.module, part.parameter, part.oriented(live)))


def _apply_bias(
    loaded: LoadedModel, weights: Weights, edit: ModuleEdit, bias: torch.Tensor, undo: ExitStack
) -> None:
    entry = weights.bias(edit.layer, edit.block)
    place = loaded.anatomy.bias_place(edit.layer, edit.block)
    if entry is not None and place is not None:
        stored = read_tensor(entry)
        edited = round_once(stored.double() + bias.double(), stored.dtype)
        undo.enter_context(replaced(*place, edited))
        return
    weights.switched_biases(edit.block)  # raises if a checkpoint cannot hold the bias
    rounded = round_once(bias.double(), weights.stored_dtype(edit.layer, edit.block))
    module = loaded.anatomy.parts(edit.layer, edit.block)[0].module
    undo.enter_context(with_bias(module, rounded))
