"""Edit FP8 weights in their checkpoint: only the tiles that an edit changes are dequantised and requantised.

A changed tile W' (``editing.checkpoints.fp8_tiles``) keeps its scale s if its numbers fit, and gets

    s' = 2^k s,    k the smallest integer >= 0 with max |W'| <= 464 s',    Q' = W' / s' rounded to nearest even

otherwise: 448 is the largest FP8 number, and 464 is half a step above it.  The tile's unchanged numbers then keep
their bits (with k > 0 all but those near the smallest FP8 number), and scales that are powers of two, as most of
DeepSeek-V3.1's, stay powers of two.  For a tile that was 0, k may be negative, and s is 1 if it was 0.  All other
tiles keep their bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from editing.checkpoints.fp8_tiles import (
    STORED,
    Fp8Tiles,
    dequantised,
    expanded,
    read_rows,
    read_scales,
)
from editing.plans.rounding import round_once
from editing.plans.tensor_edits import TensorEdit
from neurons.architectures.quantisation import fp8_tile_size
from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry, tensor_entries
from neurons.models.source import ModelSource

LARGEST = 464.0  # rounds to 448


@dataclass(frozen=True)
class EditedTiles:
    """One row of tiles.

    Attributes:
        stored: Q', float8 [rows, n].
        scales: S', [ceil(n/b)] in its stored dtype.
        planned: float64 [rows, n], the change of the plan.
        written: float64 [rows, n], the change of the stored weight.
    """

    stored: torch.Tensor
    scales: torch.Tensor
    planned: torch.Tensor
    written: torch.Tensor


@dataclass(frozen=True)
class TileEdit:
    """The change of one FP8 weight.

    Attributes:
        edit: of the weight, a matrix [d, n].
        scales: the location of its scales.
        tile: (a, b).
    """

    edit: TensorEdit
    scales: TensorEntry
    tile: tuple[int, int]

    @property
    def entry(self) -> TensorEntry:
        return self.edit.entry

    def changed(self) -> torch.Tensor:
        """bool [ceil(d/a), ceil(n/b)]: the tiles in which the edit may change a number."""
        of, columns = self.edit.edit, self.edit.pieces[0].columns
        no_rows, no_columns = (torch.zeros(size, dtype=torch.bool) for size in self.entry.shape)
        in_rows = no_rows.clone() if of.row_scale is None else of.row_scale != 1
        in_columns = no_columns.clone() if of.column_scale is None else of.column_scale[columns] != 1
        if of.rows is not None:
            in_rows[of.rows] = True
        if of.columns is not None:
            in_columns |= torch.isin(torch.arange(columns.start, columns.stop), of.columns)
        left = no_rows if of.left is None else of.left.any(1)
        right = no_columns if of.right is None else of.right[columns].any(1)
        in_rows, left = (_any_in(part, self.tile[0])[:, None] for part in (in_rows, left))
        in_columns, right = (_any_in(part, self.tile[1]) for part in (in_columns, right))
        return in_rows | in_columns | (left & right)

    def edited(self, place: int, scales: torch.Tensor, changed: torch.Tensor) -> EditedTiles:
        """The new numbers of a row of tiles.

        Args:
            place: index of the row of tiles.
            scales: of the whole weight.
            changed: of the whole weight, as ``changed()``.

        Raises:
            BrocaError: numbers or a scale that are not finite.
        """
        first = place * self.tile[0]
        old = read_rows(self.entry, slice(first, first + self.tile[0]))
        weight = dequantised(old, scales[place : place + 1], self.tile)
        chunk = self.edit.rounded(weight, first)
        new, base = chunk.stored, scales[place].double()
        before, peaks = _peaks(weight, self.tile[1]), _peaks(new, self.tile[1])
        usable = torch.where(base > 0, base, 1.0)
        mantissa, power = torch.frexp(peaks / (LARGEST * usable))
        power = torch.where(mantissa == 0.5, power - 1, power)
        power = torch.where(before > 0, power.clamp(min=0), power)
        grown = torch.where(peaks > 0, torch.ldexp(usable, power), base)
        kept = torch.where(changed[place], grown, base).to(scales.dtype)
        if not bool(torch.isfinite(new).all()) or not bool(torch.isfinite(kept).all()):
            raise BrocaError(
                f"the new values of tensor {self.entry.name} are not all finite: use a weaker edit, or a checkpoint in "
                "a wider dtype."
            )
        size = old.shape
        divisors = torch.where(kept > 0, kept.double(), 1.0)
        quantised = round_once(new / expanded(divisors[None], self.tile, *size), torch.float8_e4m3fn)
        mask = expanded(changed[place : place + 1], self.tile, *size)
        stored = torch.where(mask, quantised.view(torch.uint8), old.view(torch.uint8))
        stored = stored.view(torch.float8_e4m3fn)
        return EditedTiles(
            stored, kept, chunk.change, dequantised(stored, kept[None], self.tile).sub_(weight)
        )

    def write(self, checkpoint: Path) -> torch.Tensor:
        """Write the changed rows of tiles into a copy of the checkpoint.

        Returns:
            float64 [3]: <planned, planned>, <written, written> and <planned, written> over all numbers.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        scales, changed = read_scales(self.scales), self.changed()
        weights_file, scales_file = (checkpoint / entry.file.name for entry in (self.entry, self.scales))
        with weights_file.open("r+b") as weights, scales_file.open("r+b") as of_scales:
            for place in changed.any(1).nonzero()[:, 0].tolist():
                tiles = self.edited(place, scales, changed)
                weights.seek(self.entry.begin + place * self.tile[0] * self.entry.shape[1])
                weights.write(_bytes(tiles.stored))
                of_scales.seek(self.scales.begin + place * tiles.scales.nbytes)
                of_scales.write(_bytes(tiles.scales))
                planned, written = tiles.planned.flatten(), tiles.written.flatten()
                sums += torch.stack([planned.dot(planned), written.dot(written), planned.dot(written)])
        return sums

    def fault(self, weights: TensorEntry, scales: TensorEntry) -> str | None:
        """The name of the tensor of a checkpoint that is not the result of the edit; None if both are."""
        before, after = read_scales(self.scales), read_scales(scales)
        changed = self.changed()
        for place in range(len(changed)):
            first = place * self.tile[0]
            rows = slice(first, first + self.tile[0])
            expected, of_tiles = read_rows(self.entry, rows), before[place]
            if bool(changed[place].any()):
                tiles = self.edited(place, before, changed)
                expected, of_tiles = tiles.stored, tiles.scales
            if _bytes(of_tiles) != _bytes(after[place]):
                return scales.name
            if _bytes(expected) != _bytes(read_rows(weights, rows)):
                return weights.name
        return None


def tile_size(source: ModelSource) -> tuple[int, int] | None:
    """(a, b) of a checkpoint of FP8 tiles; None for another checkpoint."""
    return fp8_tile_size(json.loads((source.checkpoint / "config.json").read_bytes()))


def tile_edits(source: ModelSource, edits: Iterable[TensorEdit]) -> dict[str, TileEdit]:
    """Name -> the edit of each FP8 weight of a checkpoint of FP8 tiles; {} for another checkpoint.

    Raises:
        BrocaError: an FP8 weight in another form.
    """
    tile = tile_size(source)
    if tile is None:
        return {}
    form, entries = Fp8Tiles(tile), tensor_entries(source.checkpoint)
    found = {}
    for edit in edits:
        name = form.scales_of(edit.entry)
        if name is None:
            continue
        scales = entries.get(name)
        plain = len(edit.pieces) == 1 and edit.pieces[0].index is None and not edit.pieces[0].transposed
        if scales is None or not form.fits(edit.entry, scales) or not plain:
            raise BrocaError(
                f"{source.name}: tensor {edit.entry.name} is {STORED} in another form than a matrix with scales of "
                "its tiles: dequantise the checkpoint first, with `broca export MODEL --dequantise bf16`"
            )
        found[edit.entry.name] = TileEdit(edit, scales, tile)
    return found


def write_tiles(
    edits: Collection[TileEdit], checkpoint: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Write edits into a copy of their checkpoint, and sync its files.

    Args:
        edits: of different tensors.
        checkpoint: the copy.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
        Name of the weight -> the sums of ``TileEdit.write``.
    """
    sums = {}
    done, total = 0, sum(edit.entry.end - edit.entry.begin for edit in edits)
    for edit in edits:
        sums[edit.entry.name] = edit.write(checkpoint)
        done += edit.entry.end - edit.entry.begin
        if progress is not None:
            progress(done, total)
    for name in {entry.file.name for edit in edits for entry in (edit.entry, edit.scales)}:
        with (checkpoint / name).open("rb") as stream:
            os.fsync(stream.fileno())
    return sums


def _any_in(flags: torch.Tensor, size: int) -> torch.Tensor:
    """Whether any flag is set, for each tile of one dimension."""
    return torch.stack([part.any() for part in flags.split(size)])


def _peaks(rows: torch.Tensor, width: int) -> torch.Tensor:
    """The largest absolute value of each tile in a row of tiles."""
    return torch.stack([part.abs().amax() for part in rows.split(width, dim=1)])


def _bytes(tensor: torch.Tensor) -> bytes:
    content: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return content
