"""Linear systems with a symmetric positive definite matrix, solved by Cholesky factorisation."""

from __future__ import annotations

import torch

from neurons.errors import BrocaError


class NotPositiveDefiniteError(BrocaError):
    """A matrix is not positive definite, or holds NaN or infinity."""


def solve_positive_definite(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """matrix^-1 right by Cholesky factorisation, float64, of the shape of ``right``.

    Half the work of a general solver, and an error where a general solver returns noise.

    Args:
        matrix: [n, n], symmetric; its upper triangle is not read.
        right: [n] or [n, m], on the same device.

    Raises:
        NotPositiveDefiniteError: ``matrix`` is not positive definite to rounding, or either holds a number that
            is not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if int(failed):
        raise NotPositiveDefiniteError(
            f"a matrix of {len(matrix)} rows is not positive definite: its row {int(failed) - 1} depends on "
            "earlier rows, or is not finite"
        )
    columns = right.double()[:, None] if right.ndim == 1 else right.double()
    solution = torch.cholesky_solve(columns, factor).reshape(right.shape)
    if not bool(torch.isfinite(factor.diagonal()).all() and torch.isfinite(solution).all()):
        raise NotPositiveDefiniteError(f"a system of {len(matrix)} rows holds a number that is not finite")
    return solution
