"""Sums of products X^T X of rows that come in pieces: each product in float32, their sum in float64.

The product of two bfloat16 or float16 values is exact in float32, whose products cost a half (CPU) to a thirtieth
(consumer GPU) of those of float64.  What is symmetric is computed once: BLAS's ``syrk`` on a CPU.
"""

from __future__ import annotations

import torch
from scipy.linalg.blas import ssyrk

from neurons.models.memory import WAITING

TILE = 128  # rows and columns of a triangle at once: two tiles stay in the processor's cache


class Gram:
    """X^T X of rows x - centre.

    The centre, the mean of the first rows, is taken off so that what is common to all of them does not drown
    what differs.

    Args:
        size: units S.
        device: of the sum.

    Attributes:
        centre: float32 [S]; zeros before the first rows.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.centre = torch.zeros(size, device=device)
        # Of a symmetric sum the upper triangle, on a CPU.
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._begun = False
        self._waiting: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Rows [n, S] of any floating-point type."""
        if not len(rows):
            return
        if not self._begun:
            self.centre, self._begun = rows.float().mean(0), True
        # Every product costs a pass over the sum: rows of short pieces wait, as they are.
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= WAITING:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self._waiting.clear()
            for some in rows.split(WAITING):
                self._add(_product(some.float() - self.centre))

    def _add(self, product: torch.Tensor) -> None:
        if product.device.type != "cpu":
            self._sum.add_(product)
            return
        for first in range(0, len(product), TILE):
            rows = slice(first, first + TILE)
            self._sum[rows, first:].add_(product[rows, first:])

    def total(self) -> torch.Tensor:
        """Float64 [S, S], whole; this object holds nothing afterwards."""
        self._flush()
        found, self._sum = self._sum, self._sum.new_zeros(0, 0)
        if found.device.type == "cpu":
            for first in range(0, len(found), TILE):
                rows = slice(first, first + TILE)
                for before in range(0, first, TILE):
                    columns = slice(before, before + TILE)
                    found[rows, columns] = found[columns, rows].T
                corner = found[rows, rows]
                corner.copy_(corner.triu() + corner.triu(1).T)
        return found


def _product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X, float32 [S, S]; on a CPU the upper triangle of it."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    # Column by column, as BLAS reads, the rows are their own transpose: nothing is copied.
    return torch.from_numpy(ssyrk(1.0, rows.numpy().T, lower=1).T)
