"""Gram matrices X^T X of rows that arrive in chunks: each product in float32, their sum in float64.

The product of two bfloat16 or float16 values is exact in float32, whose products cost a half (CPU) to a thirtieth
(consumer GPU) of those of float64.  On a CPU, BLAS's ``syrk`` computes only one triangle.
"""

from __future__ import annotations

import torch
from scipy.linalg.blas import ssyrk

from neurons.models.memory import WAITING

TILE = 128  # rows and columns at once: two tiles fit in the cache


class Workspace:
    """Memory for centred rows, shared by grams that are added to in turn: to get it anew takes ten times as long."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, 0)

    def centred(self, rows: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """rows [n, S] - centre [S] in float32, valid until the next call."""
        if len(self._memory) < len(rows) or self._memory.shape[1:] != rows.shape[1:]:
            self._memory = torch.empty(rows.shape, device=centre.device)
        return self._memory[: len(rows)].copy_(rows).sub_(centre)


class Gram:
    """X^T X of rows x - centre.

    The centre, the mean of the first rows, is subtracted to keep precision where the mean is large.

    Args:
        size: number of units S.
        device: of the sum.
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
            rows = torch.cat(self._waiting)
            self._waiting.clear()
            # A short last chunk would cost as much to add as a long one.
            for chunk in rows.tensor_split(max(1, round(len(rows) / WAITING))):
                self._add(_product(self._workspace.centred(chunk, self.centre)))

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


def _product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X, float32 [S, S]; on a CPU only its upper triangle."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    # BLAS is column-major, so the rows are passed as their transpose without a copy.
    return torch.from_numpy(ssyrk(1.0, rows.numpy().T, lower=1).T)
