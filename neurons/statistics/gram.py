"""Gram matrices X^T X of rows that arrive in chunks: each product in float32, their sum in float64.

The product of two bfloat16 or float16 values is exact in float32, whose products cost a half (CPU) to a thirtieth
(consumer GPU) of those of float64.  On a CPU, BLAS's ``syrk`` computes only one triangle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.linalg.blas import ssyrk

from neurons.models.memory import WAITING

TILE = 128  # rows and columns at once: two tiles fit in the cache


class Workspace:
    """Memory for centred rows and for their product, shared by grams that are added to in turn.

    To get it anew for each product takes a tenth of the product's time.
    """

    def __init__(self) -> None:
        self._rows = torch.empty(0, 0)
        self._product = torch.empty(0, 0)

    def centred(self, rows: Sequence[torch.Tensor], centre: torch.Tensor) -> torch.Tensor:
        """All rows [n, S] of the list - centre [S] in float32, valid until the next call."""
        count, width = sum(map(len, rows)), len(centre)
        if len(self._rows) < count or self._rows.shape[1] != width:
            self._rows = torch.empty(count, width, device=centre.device)
        found = self._rows[:count]
        for part, place in zip(rows, found.split([len(part) for part in rows]), strict=True):
            for some, centred in zip(part.split(TILE), place.split(TILE), strict=True):
                centred.copy_(some).sub_(centre)
        return found

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """X^T X of float32 rows [n, S], valid until the next call; on a CPU only its upper triangle."""
        if rows.device.type != "cpu":
            return rows.T @ rows
        width = rows.shape[1]
        if len(self._product) != width:
            self._product = torch.empty(width, width)
        # BLAS is column-major, so rows and product are passed as their transposes without a copy.
        ssyrk(1.0, rows.numpy().T, c=self._product.numpy().T, lower=1, overwrite_c=1)
        return self._product


class Gram:
    """X^T X of rows x - centre.

    The centre, the mean of the first rows, is subtracted to keep precision where the mean is large.

    Args:
        size: number of units S.
        workspace: shared with other grams of this device.

    Attributes:
        centre: float32 [S]; zeros before the first rows.
    """

    def __init__(self, size: int, device: torch.device, workspace: Workspace | None = None) -> None:
        self.centre = torch.zeros(size, device=device)
        # On a CPU only the upper triangle is valid.
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._begun = False
        self._workspace = workspace or Workspace()
        self._waiting: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Rows [n, S] of any floating-point type."""
        if not len(rows):
            return
        if not self._begun:
            self.centre, self._begun = rows.float().mean(0), True
        # Every product costs a pass over the sum, so rows of short chunks wait.
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= WAITING:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            rows = self._workspace.centred(self._waiting, self.centre)
            self._waiting.clear()
            # A short last chunk would cost as much to add as a long one.
            for chunk in rows.tensor_split(max(1, round(len(rows) / WAITING))):
                self._add(self._workspace.product(chunk))

    def _add(self, product: torch.Tensor) -> None:
        if product.device.type != "cpu":
            self._sum.add_(product)
            return
        for first in range(0, len(product), TILE):
            rows = slice(first, first + TILE)
            self._sum[rows, first:].add_(product[rows, first:])

    def total(self) -> torch.Tensor:
        """The full matrix, float64 [S, S]; this object is empty afterwards."""
        self._flush()
        matrix, self._sum = self._sum, self._sum.new_zeros(0, 0)
        if matrix.device.type == "cpu":
            for first in range(0, len(matrix), TILE):
                rows = slice(first, first + TILE)
                for before in range(0, first, TILE):
                    columns = slice(before, before + TILE)
                    matrix[rows, columns] = matrix[columns, rows].T
                corner = matrix[rows, rows]
                corner.copy_(corner.triu() + corner.triu(1).T)
        return matrix
