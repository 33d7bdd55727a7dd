"""Casts with a single rounding, and edited weights computed in float32 and cast once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Smaller nonzero scales need float64: the error of W (c - 1) + W is relative to W.
_MIN_SCALE = 2.0**-6


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` (float32 or float64) in ``dtype``, rounded once to nearest even."""
    if values.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    # torch converts float64 to 16-bit types through float32 and so rounds twice.  Rounding inexact values to
    # odd in the middle step makes the second rounding correct (Boldo and Melquiond).
    middle = values.to(torch.float32)
    back = middle.to(torch.float64)
    even = (middle.view(torch.int32) & 1) == 0
    towards = torch.where(values > back, torch.inf, -torch.inf).to(torch.float32)
    return torch.where((back != values) & even, torch.nextafter(middle, towards), middle).to(dtype)


def all_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite."""
    # A finite sum implies finite terms; the converse fails only on overflow.
    if math.isfinite(float(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)))):
        return True
    return bool(torch.isfinite(values).all())


@dataclass(frozen=True)
class EditedChunk:
    """A chunk of an edited weight.

    Attributes:
        stored: [rows, columns] in the stored dtype, to be written.
        change: [rows, columns] in float32 or float64, the change before rounding to the stored dtype, to the
            precision of float32 even if it is far below that of the weight.
    """

    stored: torch.Tensor
    change: torch.Tensor


def float32_is_enough(row_scale: torch.Tensor | None, column_scale: torch.Tensor | None) -> bool:
    """Whether ``edited_and_rounded`` may compute in float32: no scale is tiny but nonzero.

    Call it for a whole edit, so that all its chunks use the same dtype.

    Args:
        row_scale: r [d] or None.
        column_scale: c [n] or None.
    """
    smallest = 1.0
    for scale in (row_scale, column_scale):
        if scale is not None and scale.numel():
            smallest *= float(torch.where(scale == 0, 1, scale.abs()).min().clamp(max=1))
    return smallest >= _MIN_SCALE


def edited_and_rounded(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    deltas: torch.Tensor | None = None,
    in_float32: bool = True,
) -> EditedChunk:
    """diag(r) W diag(c) + U K^T + D, computed in float32 as W + (W (r c - 1) + U K^T) and cast once.

    With e = 2^-24 (|W| + |W (r c - 1)| + sum over ranks of |U K^T|), a number before the cast is within
    (4 + 2 rank) e of the float64 result.  Products and sums are rounded one by one in the order of the rank,
    so that the bits are the same on every machine.  With deltas D, if float32 overflows, and for weights stored as
    float32 or float64, everything is computed in float64.

    Args:
        weight: W [rows, columns] in its stored dtype.
        row_scale: r, float32 [rows] or None.
        column_scale: c, float32 [columns] or None.
        left: U, float32 [rows, rank] or None.
        right: K, float32 [columns, rank] or None, together with ``left``.
        deltas: D, float64 [rows, columns] or None.
        in_float32: False to compute in float64 (see ``float32_is_enough``).
    """
    factors = row_scale, column_scale, left, right, deltas
    if deltas is None and in_float32 and weight.dtype in (torch.bfloat16, torch.float16):
        edited, change = _edited(weight, torch.float32, *factors)
        if all_finite(edited):
            return EditedChunk(edited.to(weight.dtype), change)
    edited, change = _edited(weight, torch.float64, *factors)
    return EditedChunk(round_once(edited, weight.dtype), change)


def _edited(
    weight: torch.Tensor,
    dtype: torch.dtype,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    deltas: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The edited numbers before rounding, and their change."""
    # Changed in place below: new memory costs as much as the arithmetic.
    base = weight.to(dtype, copy=True)
    scale = None if column_scale is None else column_scale.to(dtype)
    if row_scale is not None:
        rows = row_scale.to(dtype)[:, None]
        scale = rows if scale is None else rows * scale
    # Unedited numbers keep their bits, also -0.
    change = torch.full_like(base, -0.0) if scale is None else base * (scale - 1)
    if left is not None and right is not None:
        # Not a matrix product, whose precision and order depend on settings and machine.
        for column, key in zip(left.to(dtype).T, right.to(dtype).T, strict=True):
            change += column[:, None] * key
    if deltas is not None:
        change += deltas
    return base.add_(change), change
