"""Sums of activations over tokens and over texts: exact counts, float64 sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from neurons.statistics.fused_sums import add_fused

EXACT = (torch.float32, torch.float64)  # dtypes of the fused sums; half precision fits in float32
CHUNK = 2**18  # values: smaller chunks cost calls, larger ones memory

# Moments over tokens, and moments over the means of texts (``neurons.statistics.statistics.MOMENTS``).
OF_TOKENS = ("positive", "sum", "square", "absolute")
OF_TEXTS = ("text_mean", "text_square", "text_absolute")


def add_tokens(values: torch.Tensor, positions: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """Add the values of the counted tokens to the totals.

    Args:
        values: [..., units], any floating-point type.
        positions: int64 [n], indices of tokens in the flattened leading dimensions.
        totals: moment (``OF_TOKENS``) -> [units]; ``positive`` is int64, the others float64.
    """
    values = values.detach().flatten(0, -2)
    if values.device.type != "cpu":
        add_chunked(values, positions, totals)
    else:
        add_fused(values if values.dtype in EXACT else values.float(), positions, totals)


def add_chunked(values: torch.Tensor, positions: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """``neurons.statistics.fused_sums.add_fused`` by tensor operations, on any device."""
    for chunk in positions.split(max(1, CHUNK // values.shape[-1])):
        selected = values[chunk]
        exact = selected.double()
        if "sum" in totals:
            totals["sum"].add_(exact.sum(0))
        if "positive" in totals:
            totals["positive"].add_((selected > 0).sum(0))
        if "absolute" in totals:
            totals["absolute"].add_(exact.abs().sum(0))
        if "square" in totals:
            totals["square"].add_((exact * exact).sum(0))


def column_sums(rows: torch.Tensor) -> torch.Tensor:
    """The sum of rows [n, units] of any floating-point type, float64 [units].

    A float64 copy of all rows at once leaves the cache, and takes ten times as long.
    """
    total = torch.zeros(rows.shape[-1], dtype=torch.float64, device=rows.device)
    for chunk in rows.split(max(1, CHUNK // rows.shape[-1])):
        total += chunk.sum(0, dtype=torch.float64)
    return total


def text_sums(values: torch.Tensor, counted: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """Sum over each row's counted positions.

    Args:
        values: [rows, length, units].
        counted: bool [rows, length].

    Returns:
        float64 [rows, units].
    """
    sums = torch.empty(len(values), values.shape[-1], dtype=torch.float64, device=values.device)
    rows = max(1, CHUNK // max(1, values[0].numel()))
    for first in range(0, len(values), rows):
        chunk = slice(first, first + rows)
        # Values at padding may be anything, also NaN.
        inside = values[chunk].double().masked_fill_(~counted[chunk, :, None], 0.0)
        sums[chunk] = (inside.abs_() if absolute else inside).sum(1)
    return sums


def add_texts(means: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """Add the means of texts, float64 [rows, units], to the totals [units]."""
    if "text_mean" in totals:
        totals["text_mean"].add_(means.sum(0))
    if "text_square" in totals:
        totals["text_square"].add_((means * means).sum(0))
    if "text_absolute" in totals:
        totals["text_absolute"].add_(means.abs().sum(0))
