"""Symmetric positive definite systems: the answers of a general solver, and a refusal where there is none."""

import numpy as np
import pytest
import torch

from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite


def positive_definite(size, ridge=1e-2, seed=0):
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.logspace(-2, 2, size, dtype=torch.float64)
    matrix = rows.T @ rows / len(rows)
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(60,), (60, 1), (60, 7)])
def test_the_answer_is_that_of_a_general_solver(shape):
    matrix = positive_definite(60)
    right = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = np.linalg.solve(matrix.numpy(), right.numpy())
    found = solve_positive_definite(matrix, right)
    assert found.shape == right.shape
    assert np.linalg.norm(found.numpy() - expected) <= 1e-10 * np.linalg.norm(expected)


def test_half_precision_is_solved_in_float64():
    matrix = positive_definite(20).float()
    right = torch.ones(20)
    found = solve_positive_definite(matrix, right)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(matrix.double() @ found, right.double(), rtol=1e-9)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
        torch.zeros(2, 2),
        torch.tensor([[1.0, 0.0], [0.0, float("nan")]]),
        torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]),
    ],
    ids=["indefinite", "singular", "zero", "nan", "infinite"],
)
def test_another_matrix_is_refused(matrix):
    with pytest.raises(NotPositiveDefiniteError):
        solve_positive_definite(matrix, torch.ones(2))


def test_a_right_side_that_is_not_finite_is_refused():
    with pytest.raises(NotPositiveDefiniteError):
        solve_positive_definite(torch.eye(2), torch.tensor([1.0, float("nan")]))
