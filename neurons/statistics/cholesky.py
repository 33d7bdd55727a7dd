"""Linear systems with a symmetric positive definite matrix, solved by Cholesky factorisation."""

from __future__ import annotations

import torch
from scipy.linalg.lapack import dpotrf, dpotrs

from neurons.errors import BrocaError


class NotPositiveDefiniteError(BrocaError):
    """A matrix is not positive definite, or holds NaN or infinity."""


def solve_positive_definite(
    matrix: torch.Tensor, right: torch.Tensor, overwrite: bool = False
) -> torch.Tensor:
    """matrix^-1 right by Cholesky factorisation, float64, of the shape of ``right``.

    Half the work of a general solver, and an error where a general solver returns noise.

    Args:
        matrix: [n, n], symmetric; its upper triangle is not read.
        right: [n] or [n, m], on the same device.
        overwrite: the factor may replace ``matrix``, which saves its memory.

    Raises:
        NotPositiveDefiniteError: ``matrix`` is not positive definite to rounding, or either holds a number that
            is not finite.
    """
    columns = right.double()[:, None] if right.ndim == 1 else right.double()
    solve = _solve_on_cpu if matrix.device.type == "cpu" else _solve
    solution, diagonal, failed = solve(matrix.double(), columns, overwrite and matrix.dtype == torch.float64)
    if failed:
        raise NotPositiveDefiniteError(
            f"a matrix of {len(matrix)} rows is not positive definite: its row {failed - 1} depends on "
            "earlier rows, or is not finite"
        )
    if not bool(torch.isfinite(diagonal).all() and torch.isfinite(solution).all()):
        raise NotPositiveDefiniteError(f"a system of {len(matrix)} rows holds a number that is not finite")
    return solution.reshape(right.shape)


def _solve(
    matrix: torch.Tensor, columns: torch.Tensor, _overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(solution, diagonal of the factor, number of the row that failed or 0)."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(columns, factor), factor.diagonal(), int(failed)


def _solve_on_cpu(
    matrix: torch.Tensor, columns: torch.Tensor, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """As ``_solve``, by LAPACK, which needs no copy of the factor: torch makes two."""
    # LAPACK is column-major: the transposed view's upper triangle is the lower triangle of the matrix.
    factor, failed = dpotrf(matrix.numpy().T, lower=0, clean=0, overwrite_a=overwrite)
    solution = dpotrs(factor, columns.numpy(), lower=0)[0] if not failed else columns.numpy()
    return torch.from_numpy(solution.copy(order="C")), torch.from_numpy(factor.diagonal().copy()), failed
