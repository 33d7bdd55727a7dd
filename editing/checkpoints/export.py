"""Export an edited checkpoint from a plan and a source checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from editing.checkpoints.checkpoint import additions, preferred_by_vllm, write_checkpoint
from editing.checkpoints.fp8_edit import tile_edits, tile_size, write_tiles
from editing.checkpoints.model_card import RECIPE_IN_CHECKPOINT, model_card
from editing.checkpoints.undo import REMAINDER_IN_CHECKPOINT, FileChanges, write_remainder
from editing.checkpoints.verification import Verified, verify
from editing.plans.plan import Plan
from editing.plans.rounding import EditedChunk
from editing.plans.tensor_edits import AddedBiases, TensorEdit, added_biases, tensor_edits
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import text_bytes
from neurons.files.tensor_files import OTHER_WEIGHT_SUFFIXES, weight_files
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
from neurons.models.source import ModelSource

# The state of a training, without weights of the model.
_OF_TRAINING = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: of the checkpoint.
        tensors: names of the edited tensors.
        components: number of edited heads and neurons.
        relative_change: ||dW||_F / ||W||_F over these tensors; None if the plan does not have it.
        survived: tensor name -> (norm ratio, cosine) of the change on disk to the planned change: a small edit
            can vanish in the rounding to the stored dtype.
        unedited_copies: files of the output with other copies of the source's weights; a loader that prefers
            them would run the unedited model.
        left_out: files of the source that are not in the output: weights that vLLM prefers.
        added: names of added tensors: biases.
        verified: result of the verification, if requested.
        remainder_bytes: size of the file for undo, if requested.
    """

    path: Path
    tensors: tuple[str, ...]
    components: int
    relative_change: float | None
    survived: dict[str, tuple[float, float]]
    unedited_copies: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    verified: Verified | None = None
    remainder_bytes: int | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about unedited weights."""
        return (
            *(f"{name} is left out: vLLM would serve these unedited weights" for name in self.left_out),
            *(
                f"{self.path / name} still contains the unedited weights: remove it"
                for name in self.unedited_copies
            ),
        )


def require_unedited(source: ModelSource) -> None:
    """Reject a checkpoint that was edited before.

    Raises:
        BrocaError: it was.
    """
    if (source.checkpoint / PLAN_IN_CHECKPOINT).exists():
        raise BrocaError(f"{source.name}: was already edited by Broca: edit its base model instead")


def export(
    source: ModelSource,
    plan: Plan,
    out: Path | str,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    verified: bool = False,
    undoable: bool = False,
    recipe: str | None = None,
) -> Exported:
    """Write the edited checkpoint.

    All files of the source are copied and only the edited tensors differ; ``broca/edit.safetensors`` holds the
    plan, and the model card describes the edit.  Biases that the source does not have are in a new shard, and
    the config enables them.  Weights in Mistral's own format (``consolidated*.safetensors``), which vLLM would serve
    in place of the edited ones, are left out.

    Of a checkpoint of FP8 tiles, opened by ``editing.checkpoints.dequantise.open_for_export``, only the tiles that
    the plan changes are requantised (``editing.checkpoints.fp8_edit``).

    Args:
        source: the unedited model.
        plan: made for it; for FP8 tiles, for its dequantised copy.
        out: directory to create.
        overwrite: replace an existing checkpoint.
        progress: called with (bytes done, bytes in all).
        verified: read all tensors back before the final rename (``editing.checkpoints.verification``).
        undoable: add ``broca/remainder.safetensors``, from which ``editing.checkpoints.undo`` restores the source.
        recipe: of ``broca run``, which makes the plan again; written as ``broca/recipe.toml``.

    Raises:
        BrocaError: the plan was made for another model, the source was edited before, an error of
            ``write_checkpoint``, or a tensor that fails the verification.
        UsageError: biases or ``undoable`` for FP8 tiles.
    """
    out = Path(out)
    source.require_fingerprint(plan.metadata, "the plan")
    require_unedited(source)
    edits = tensor_edits(source, plan)
    in_tiles = tile_size(source) is not None
    if in_tiles and (undoable or any(edit.bias is not None for edit in plan.edits)):
        raise UsageError(
            f"{source.name}: {'an export that can be undone' if undoable else 'a bias'} is not supported for FP8 "
            "tiles: dequantise the checkpoint first, with `broca export MODEL --dequantise bf16`"
        )
    tiles = tile_edits(source, edits)
    biases = added_biases(source, plan)
    sums = {edit.entry.name: torch.zeros(3, dtype=torch.float64) for edit in edits}
    files = {
        "README.md": text_bytes(
            model_card(source, plan, tuple(biases.tensors), undoable, recipe is not None)
        ),
        PLAN_IN_CHECKPOINT.as_posix(): plan.to_bytes(),
    }
    if recipe is not None:
        files[RECIPE_IN_CHECKPOINT.as_posix()] = text_bytes(recipe)
    if biases.settings:
        files["config.json"] = _config_with(source, biases)
    left_out = preferred_by_vllm(source.checkpoint)
    checks: list[Verified] = []
    sizes: list[int] = []

    def complete(staged: Path) -> None:
        sums.update(write_tiles(tiles.values(), staged, progress))
        if verified:
            checks.append(verify(source, plan, staged))
        if undoable:
            sizes.append(write_remainder(source, edits, _changes(source, files, biases), staged))

    write_checkpoint(
        source.checkpoint,
        out,
        {
            edit.entry.name: _replacement(edit, sums[edit.entry.name])
            for edit in edits
            if edit.entry.name not in tiles
        },
        files,
        added=biases.tensors,
        left_out=left_out,
        quantised=in_tiles,
        complete=complete,
        overwrite=overwrite,
        progress=progress,
    )
    return Exported(
        path=out,
        tensors=tuple(sums),
        components=plan.components,
        relative_change=plan.relative_change(),
        survived={name: _survival(of_tensor) for name, of_tensor in sums.items()},
        unedited_copies=_other_weights(out),
        left_out=left_out,
        added=tuple(biases.tensors),
        verified=checks[0] if checks else None,
        remainder_bytes=sizes[0] if sizes else None,
    )


def _replacement(edit: TensorEdit, sums: torch.Tensor) -> Callable[[torch.Tensor, int], EditedChunk]:
    """The edit of a chunk of a stored tensor's rows.

    It adds <planned, planned>, <stored, stored>, <planned, stored> to ``sums``.
    """

    def replace(chunk: torch.Tensor, first: int) -> EditedChunk:
        edited = edit.rounded(chunk, first)
        planned = edited.change.flatten()
        stored = edited.stored.to(planned.dtype, copy=True).sub_(chunk.to(planned.dtype)).flatten()
        # Within a chunk in the precision of the change, over chunks in float64.
        sums.add_(torch.stack([planned.dot(planned), stored.dot(stored), planned.dot(stored)]).double())
        return edited

    return replace


def _survival(sums: torch.Tensor) -> tuple[float, float]:
    planned, stored, product = (float(value) for value in sums)
    if planned == 0:
        return 1.0, 1.0
    ratio = (stored / planned) ** 0.5
    return ratio, product / (planned * stored) ** 0.5 if stored else 0.0


def _config_with(source: ModelSource, biases: AddedBiases) -> bytes:
    """The source's config.json with the settings that enable the biases."""
    settings = json.loads((source.checkpoint / "config.json").read_bytes())
    return (json.dumps({**settings, **biases.settings}, indent=2, ensure_ascii=False) + "\n").encode()


def _changes(source: ModelSource, files: dict[str, bytes], biases: AddedBiases) -> FileChanges:
    extra_shard = additions(source.checkpoint, biases.tensors)
    written = [*files, *extra_shard.files]
    return FileChanges(
        replaced=tuple(name for name in written if (source.checkpoint / name).is_file()),
        made=tuple(name for name in written if not (source.checkpoint / name).is_file()),
        renamed=extra_shard.renamed,
    )


def _other_weights(checkpoint: Path) -> tuple[str, ...]:
    """Files with unedited weights, relative to the checkpoint."""
    known = {*weight_files(checkpoint), checkpoint / PLAN_IN_CHECKPOINT, checkpoint / REMAINDER_IN_CHECKPOINT}
    return tuple(
        path.relative_to(checkpoint).as_posix()
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", *OTHER_WEIGHT_SUFFIXES)
        and path not in known
        and not any(path.match(pattern) for pattern in _OF_TRAINING)
    )


def read_exported_plan(checkpoint: Path) -> Path | None:
    """The path of the plan in an edited checkpoint, or None."""
    path = checkpoint / PLAN_IN_CHECKPOINT
    return path if path.is_file() else None
