"""Numbers cast to a stored dtype with one rounding, and edited weights at the speed of float32 with the same bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Numbers beyond this are left to float64, in which nothing on the way to the result overflows.
_NO_OVERFLOW = 2.0**120
# Float64 for single numbers costs about this many times what it costs for whole blocks.
_FEW = 4


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` (float32 or float64) in ``dtype``, rounded once to nearest even."""
    if values.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    # torch goes from float64 to the 16-bit types through float32 and so rounds twice.  A middle step that
    # rounds inexact values to the odd neighbour keeps the second rounding right (Boldo and Melquiond).
    middle = values.to(torch.float32)
    back = middle.to(torch.float64)
    even = (middle.view(torch.int32) & 1) == 0
    towards = torch.where(values > back, torch.inf, -torch.inf).to(torch.float32)
    return torch.where((back != values) & even, torch.nextafter(middle, towards), middle).to(dtype)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no number is infinite or none; of 16-bit numbers by their bits, several times as fast."""
    if values.dtype in (torch.bfloat16, torch.float16) and values.numel():
        return math.isfinite(_largest_stored(values))
    return bool(torch.isfinite(values).all())


@dataclass(frozen=True)
class EditedBlock:
    """A block of an edited weight.

    Attributes:
        stored: [rows, columns] in the stored dtype, what is to be written.
        change: [rows, columns] in float32 or float64, what the edit adds before anything is rounded to the
            stored dtype, to the precision of float32: also where it is far below the weight's.
    """

    stored: torch.Tensor
    change: torch.Tensor


def edited_and_rounded(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
) -> EditedBlock:
    """``round_once(diag(r) W diag(c) + U K^T)`` of the float64 values, computed in float32 wherever that is enough.

    With |x - x64| <= e for the float32 value x, the stored numbers of x - e and x + e are the same nearly
    everywhere, and are then that of x64, because rounding is monotone.  The rest, some per mille, is computed
    in float64.  A plain cast of x would round twice: it gives the other neighbour wherever a tie lies between
    x and x64, and more where U K^T all but cancels W.

    Args:
        weight: W [rows, columns] in its stored dtype; for float32 and float64 all is computed in float64.
        row_scale: r, float32 [rows] or None.
        column_scale: c, float32 [columns] or None.
        left: U, float32 [rows, rank] or None.
        right: K, float32 [columns, rank] or None, together with ``left``.
    """
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.numel():
        base = weight.to(torch.float32)
        most = _largest_stored(weight)
        rows_most, columns_most = _largest(row_scale), _largest(column_scale)
        # r w c - w = w (c - 1) + w (r - 1) c.
        change = torch.zeros_like(base) if column_scale is None else base * (column_scale - 1)
        size = most * (2 + columns_most)
        if row_scale is not None:
            turned = base * (row_scale - 1)[:, None]
            change += turned if column_scale is None else turned.mul_(column_scale)
            size += most * (1 + rows_most) * columns_most
        rank = 0
        if left is not None and right is not None:
            rank = left.shape[1]
            # One after another, not a matrix product: its precision is a setting of the process.
            for column, key in zip(left.T, right.T, strict=True):
                change.addcmul_(column[:, None], key)
                size += _largest(column) * _largest(key)
        # More than all roundings together (six of scales and sums, two for each rank, two for the shifts), and
        # than what is lost below the smallest numbers.
        slack = size * (2 * rank + 9) * 2.0**-24 + 2.0**-140 * (1 + columns_most)
        if size < _NO_OVERFLOW:
            near = base.add_(change).sub_(slack)
            stored, above = near.to(weight.dtype), near.add_(2 * slack).to(weight.dtype)
            rows, columns = _different(stored, above)
            if len(rows) * _FEW < weight.numel():
                single = weight[rows, columns].double()
                if row_scale is not None:
                    single *= row_scale[rows].double()
                if column_scale is not None:
                    single *= column_scale[columns].double()
                if left is not None and right is not None:
                    single += (left[rows].double() * right[columns].double()).sum(dim=1)
                stored[rows, columns] = round_once(single, weight.dtype)
                return EditedBlock(stored, change)
    exact = weight.double()
    whole = exact
    if row_scale is not None:
        whole = whole * row_scale.double()[:, None]
    if column_scale is not None:
        whole = whole * column_scale.double()
    if left is not None and right is not None:
        whole = torch.addmm(whole, left.double(), right.double().T)
    return EditedBlock(round_once(whole, weight.dtype), whole - exact)


def _different(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns at which two blocks of 16-bit numbers differ by a bit, 0 and -0 too; in order.

    Four numbers are looked at in one: most fours are the same.
    """
    columns = first.shape[1]
    bits = (first.view(torch.int16) ^ second.view(torch.int16)).reshape(-1)
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 4))
    fours = padded.view(torch.int64).nonzero()[:, 0]
    group, place = padded.view(-1, 4)[fours].nonzero().unbind(1)
    where = fours[group] * 4 + place
    return where // columns, where % columns


def _largest_stored(weight: torch.Tensor) -> float:
    """The largest magnitude of 16-bit numbers, by their bits without the sign; not finite where one is not."""
    bits = int((weight.view(torch.int16) & 0x7FFF).max())
    return float(torch.tensor(bits, dtype=torch.int16).view(weight.dtype))


def _largest(values: torch.Tensor | None) -> float:
    """The largest magnitude, 1 of a scale that is absent; not a number where one of them is none."""
    if values is None:
        return 1.0
    if not values.numel():
        return 0.0
    low, high = (float(value) for value in values.aminmax())
    return math.nan if math.isnan(low) or math.isnan(high) else max(abs(low), abs(high))
