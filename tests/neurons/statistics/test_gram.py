"""Sums of products in float64, against loops."""

import numpy as np
import pytest
import torch

from neurons.models.memory import WAITING
from neurons.statistics.gram import TILE, Gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_products_about_the_centre(dtype):
    rows = (torch.randn(90, 7, generator=torch.Generator().manual_seed(0)) * 3 + 2).to(dtype)
    gram = Gram(7, torch.device("cpu"))
    for piece in rows.split([20, 0, 1, 69]):
        gram.add(piece)
    centre = gram.centre.double()
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for row in rows.double() - centre:
        for i in range(7):
            for j in range(7):
                expected[i, j] += row[i] * row[j]
    found = gram.total()
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centre, rows[:20].double().mean(0), rtol=1e-6, atol=1e-6)


def test_what_all_rows_share_does_not_drown_what_differs():
    """A thousand times as large a mean as a deviation: float32 products about zero would keep two digits."""
    rows = 1000 + torch.randn(10_000, 3, generator=torch.Generator().manual_seed(1))
    gram = Gram(3, torch.device("cpu"))
    gram.add(rows)
    exact = rows.double()
    about = exact.mean(0) - gram.centre.double()
    covariance = gram.total() / len(rows) - about[:, None] * about
    expected = torch.from_numpy(np.cov(exact.numpy().T, bias=True))
    torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-6)
    assert len(rows) > WAITING


def test_the_whole_is_symmetric_beyond_what_is_copied_at_once():
    rows = torch.randn(20, 2 * TILE + 5, generator=torch.Generator().manual_seed(2))
    gram = Gram(rows.shape[1], torch.device("cpu"))
    gram.add(rows)
    about = (rows - gram.centre).double()
    found = gram.total()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, about.T @ about, rtol=1e-5, atol=1e-4)
