"""Sums of activations over tokens and over texts: exact counts, float64 sums.

Done piece by piece, so that a piece stays in the processor's cache and the sums cost little beside the
forward pass that makes the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

PIECE = 2**18  # values: smaller pieces cost calls, larger ones the cache

# The moments of single tokens, and those of a text's mean (``neurons.statistics.MOMENTS``).
OF_TOKENS = ("positive", "sum", "square", "absolute")
OF_TEXTS = ("text_mean", "text_square", "text_absolute")


@dataclass
class Scratch:
    """Memory that is used again for every piece: fresh memory costs more time than the sums themselves."""

    _held: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def like(self, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of a piece's shape with anything in it."""
        key = (piece.device, dtype)
        if key not in self._held or self._held[key].numel() < piece.numel():
            self._held[key] = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        return self._held[key][: piece.numel()].view(piece.shape)


def counted_pieces(values: torch.Tensor, counted: torch.Tensor, padded: bool) -> Iterator[torch.Tensor]:
    """The values of the counted positions, [n, units] at a time.

    Args:
        values: [rows, length, units].
        counted: bool [rows, length]; without padding, the same positions in every row.
        padded: whether rows differ in length.
    """
    units = values.shape[-1]
    if padded:
        yield from values[counted].split(max(1, PIECE // units))
        return
    # Views: the start tokens are the only ones that do not count.
    inside = values[:, int((~counted[0]).sum()) :]
    rows = max(1, PIECE // max(1, inside.shape[1] * units))
    for several in inside.split(rows):
        yield from several.flatten(0, 1).split(max(1, PIECE // units))


def add_tokens(piece: torch.Tensor, totals: Mapping[str, torch.Tensor], scratch: Scratch) -> None:
    """Add a piece [n, units] to the totals [units] that are there, by name of the moment.

    ``positive`` is int64, the others float64.  A value that is not a number makes ``sum`` not a number.
    """
    if "positive" in totals:
        # Whole numbers below 2^24 are exact in float32, and the sum of floats is the fast one.
        positive = scratch.like(piece, torch.float32)
        totals["positive"].add_(torch.gt(piece, 0, out=positive).sum(0).long())
    if not totals.keys() & {"sum", "square", "absolute"}:
        return
    exact = scratch.like(piece, torch.float64).copy_(piece)
    if "sum" in totals:
        totals["sum"].add_(exact.sum(0))
    if "absolute" in totals:
        totals["absolute"].add_(exact.abs_().sum(0))
    if "square" in totals:
        totals["square"].add_(exact.mul_(exact).sum(0))


def text_sums(values: torch.Tensor, counted: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """Sum over each row's counted positions.

    Args:
        values: [rows, length, units].
        counted: bool [rows, length].
        absolute: of the values' sizes.

    Returns:
        float64 [rows, units].
    """
    found = torch.empty(len(values), values.shape[-1], dtype=torch.float64, device=values.device)
    rows = max(1, PIECE // max(1, values[0].numel()))
    for first in range(0, len(values), rows):
        some = slice(first, first + rows)
        # What stands on padding may be anything, also not a number.
        inside = values[some].double().masked_fill_(~counted[some, :, None], 0.0)
        found[some] = (inside.abs_() if absolute else inside).sum(1)
    return found


def add_texts(means: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """Add the means of texts, float64 [rows, units], to the totals [units] that are there."""
    if "text_mean" in totals:
        totals["text_mean"].add_(means.sum(0))
    if "text_square" in totals:
        totals["text_square"].add_((means * means).sum(0))
    if "text_absolute" in totals:
        totals["text_absolute"].add_(means.abs().sum(0))
