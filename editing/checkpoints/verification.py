"""Verify that a checkpoint on disk is exactly the result of its source and plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from editing.checkpoints.checkpoint import chunks
from editing.checkpoints.fp8_edit import tile_edits
from editing.plans.plan import Plan
from editing.plans.tensor_edits import added_biases, tensor_edits
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries
from neurons.models.source import ModelSource


@dataclass(frozen=True)
class Verified:
    """The result of a verification.

    Attributes:
        edited: names of the verified tensors that the plan changes or adds.
        unchanged: number of tensors equal to the source's.
        bytes: read from the checkpoint.
    """

    edited: tuple[str, ...]
    unchanged: int
    bytes: int


def verify(source: ModelSource, plan: Plan, checkpoint: Path) -> Verified:
    """Read an exported checkpoint back and compare every tensor with source and plan.

    Args:
        source: the unedited model.
        plan: the exported plan.
        checkpoint: the exported checkpoint.

    Raises:
        BrocaError: names a tensor that is missing, unexpected or wrong.
    """
    before, after = tensor_entries(source.checkpoint), tensor_entries(checkpoint)
    edits = {edit.entry.name: edit for edit in tensor_edits(source, plan)}
    tiles = tile_edits(source, edits.values())
    scales = {tile.scales.name for tile in tiles.values()}
    added = added_biases(source, plan).tensors
    for name in sorted(after.keys() ^ (before.keys() | added.keys())):
        fault = "is unexpected in" if name in after else "is missing from"
        raise _wrong(checkpoint, f"tensor {name} {fault} the output")
    for name, entry in after.items():
        if name not in added:
            _same_place(before[name], entry, checkpoint)
        if name in added:
            stored = added[name]
            correct = entry.shape == tuple(stored.shape) and READABLE_DTYPES[entry.dtype] == stored.dtype
            if not correct or not _same_bits(read_tensor(entry), stored):
                raise _wrong(checkpoint, f"the new tensor {name} is not the plan's")
        elif name in tiles:
            if wrong := tiles[name].fault(entry, after[tiles[name].scales.name]):
                raise _wrong(checkpoint, f"tensor {wrong} is not what source and plan give")
        elif name in edits:
            for first, rows in chunks(entry):
                base = read_tensor(before[name], rows)
                expected = edits[name].rounded(base, first).stored
                if not _same_bits(read_tensor(entry, rows), expected):
                    raise _wrong(
                        checkpoint, f"tensor {name} is not what source and plan give (from row {first} on)"
                    )
        elif name not in scales and not _same_bytes(before[name], entry):
            raise _wrong(checkpoint, f"tensor {name}, which the plan does not edit, is not the source's")
    edited = (*edits, *sorted(scales), *added)
    read = sum(entry.end - entry.begin for entry in after.values())
    return Verified(edited=edited, unchanged=len(after) - len(edited), bytes=read)


def _wrong(checkpoint: Path, fault: str) -> BrocaError:
    return BrocaError(f"{checkpoint}: {fault}: do not use it; export again, to another disk if it repeats")


def _same_place(before: TensorEntry, after: TensorEntry, checkpoint: Path) -> None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        raise _wrong(
            checkpoint,
            f"tensor {after.name} is {after.dtype} {list(after.shape)}, not {before.dtype} {list(before.shape)}",
        )


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def _same_bytes(before: TensorEntry, after: TensorEntry) -> bool:
    """Whether two tensors, of any dtype, have the same bytes."""
    left = before.end - before.begin
    with before.file.open("rb") as old, after.file.open("rb") as new:
        old.seek(before.begin)
        new.seek(after.begin)
        while left:
            size = min(left, 1 << 22)
            content = old.read(size)
            if len(content) != size or content != new.read(size):
                return False
            left -= size
    return True
