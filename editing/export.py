"""Plan and checkpoint in, permanently steered checkpoint out: loads like the one that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from editing.checkpoint import write_checkpoint
from editing.model_card import model_card
from editing.plan import ModuleEdit, Plan
from editing.rounding import round_once
from editing.weights import Weights
from neurons.anatomy import StoredPiece
from neurons.errors import BrocaError
from neurons.fingerprint import PLAN_IN_CHECKPOINT
from neurons.source import ModelSource
from neurons.tensor_files import OTHER_WEIGHT_SUFFIXES, TensorEntry, weight_files


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        path: of the checkpoint.
        tensors: names of the tensors whose bytes were replaced.
        components: heads and neurons edited.
        relative_change: ||dW||_F / ||W||_F over these tensors.
        survived: tensor name -> (norm ratio, cosine) of the change that is on disk to the change that
            was meant: a small edit can vanish in the rounding to the stored dtype.
        unedited_copies: files of the output that hold the source's weights in another format; a loader
            that prefers them would run the unsteered model.
    """

    path: Path
    tensors: tuple[str, ...]
    components: int
    relative_change: float
    survived: dict[str, tuple[float, float]]
    unedited_copies: tuple[str, ...]


def export(
    source: ModelSource,
    plan: Plan,
    out: Path,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the steered checkpoint.

    All files of the source are copied and only the edited tensors' bytes differ; the plan travels as
    ``broca/edit.safetensors`` and the model card says what was edited.

    Args:
        source: the unedited model.
        plan: made for it.
        out: directory to make.
        overwrite: replace a checkpoint that is there.
        progress: called with (bytes done, bytes in all).

    Raises:
        BrocaError: the plan was made for another model, the source was edited before, or what
            ``write_checkpoint`` refuses.
    """
    source.require_fingerprint(plan.metadata, "the plan")
    if (source.checkpoint / PLAN_IN_CHECKPOINT).exists():
        raise BrocaError(
            f"{source.name}: was edited by Broca already and holds one plan: edit its base model instead"
        )
    weights = Weights(source)
    sums: dict[str, torch.Tensor] = {}
    replacements = {}
    for edit in plan.edits:
        pieces = weights.pieces(edit.layer, edit.block)
        check_shape(edit, pieces, source.anatomy.residual)
        # The experts of a mixture may lie in one tensor or in one each.
        by_tensor: dict[str, list[StoredPiece]] = {}
        for piece, entry in pieces:
            if len(pieces) > 1 and piece.index is None and not edit.changes(piece.columns):
                continue
            by_tensor.setdefault(entry.name, []).append(piece)
        for name, own in by_tensor.items():
            sums[name] = torch.zeros(3, dtype=torch.float64)
            replacements[name] = _replacement(edit, own, sums[name])
    card = model_card(source, plan)
    write_checkpoint(
        source.checkpoint,
        out,
        replacements,
        {"README.md": card.encode(), PLAN_IN_CHECKPOINT.as_posix(): plan.to_bytes()},
        overwrite=overwrite,
        progress=progress,
    )
    return Exported(
        path=out,
        tensors=tuple(replacements),
        components=plan.components,
        relative_change=plan.relative_change(),
        survived={name: _survival(found) for name, found in sums.items()},
        unedited_copies=_other_weights(out),
    )


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


def _replacement(
    edit: ModuleEdit, pieces: Sequence[StoredPiece], sums: torch.Tensor
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The edit of a block of a stored tensor's rows.

    It adds <meant, meant>, <stored, stored>, <meant, stored> to ``sums``.
    """

    def replace(block: torch.Tensor, first: int) -> torch.Tensor:
        edited = _edited(edit, pieces, block, first)
        meant = edited - block.double()
        stored = round_once(edited, block.dtype).double() - block.double()
        sums.add_(torch.stack([(meant * meant).sum(), (stored * stored).sum(), (meant * stored).sum()]))
        return edited

    return replace


def _edited(edit: ModuleEdit, pieces: Sequence[StoredPiece], block: torch.Tensor, first: int) -> torch.Tensor:
    """W' for rows of a stored tensor: rows of W, columns of it where transposed, experts where fused."""
    if pieces[0].index is not None:
        edited = torch.empty(block.shape, dtype=torch.float64)
        for row, piece in enumerate(pieces[first : first + len(block)]):
            own = block[row].T if piece.transposed else block[row]
            new = edit.apply(own, 0, piece.columns.start)
            edited[row] = new.T if piece.transposed else new
        return edited
    (piece,) = pieces
    if piece.transposed:
        return edit.apply(block.T, 0, piece.columns.start + first).T
    return edit.apply(block, first, piece.columns.start)


def _survival(sums: torch.Tensor) -> tuple[float, float]:
    meant, stored, product = (float(value) for value in sums)
    if meant == 0:
        return 1.0, 1.0
    ratio = (stored / meant) ** 0.5
    return ratio, product / (meant * stored) ** 0.5 if stored else 0.0


def _other_weights(checkpoint: Path) -> tuple[str, ...]:
    """Files with weights that the edit did not reach, relative to the checkpoint."""
    known = {*weight_files(checkpoint), checkpoint / PLAN_IN_CHECKPOINT}
    return tuple(
        path.relative_to(checkpoint).as_posix()
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", *OTHER_WEIGHT_SUFFIXES) and path not in known
    )


def read_exported_plan(checkpoint: Path) -> Path | None:
    """The plan inside a checkpoint that Broca wrote, or None."""
    path = checkpoint / PLAN_IN_CHECKPOINT
    return path if path.is_file() else None
