"""PCA of paired differences against power iteration in plain loops, and a planted line."""

import math

import pytest
import torch

from editing.directions.pca import pca
from neurons.errors import BrocaError


def naive(differences):
    """(unit, share) of the strongest line, by power iteration over numbers."""
    rows = differences.tolist()
    width = len(rows[0])
    vector = [1.0 + 0.1 * i for i in range(width)]
    for _ in range(2000):
        following = [0.0] * width
        for row in rows:
            along = sum(a * b for a, b in zip(row, vector, strict=True))
            for i in range(width):
                following[i] += along * row[i]
        length = math.sqrt(sum(x * x for x in following))
        vector = [x / length for x in following]
    held = sum(sum(a * b for a, b in zip(row, vector, strict=True)) ** 2 for row in rows)
    return vector, held / sum(x * x for row in rows for x in row)


@pytest.mark.parametrize(("texts", "width"), [(9, 5), (4, 7), (1, 3)])
def test_equals_power_iteration(texts, width):
    generator = torch.Generator().manual_seed(texts)
    differences = torch.randn(texts, width, generator=generator).double() + 0.4
    expected, explained = naive(differences)
    unit, fraction = pca(differences)
    expected = torch.tensor(expected, dtype=torch.float64)
    expected = expected * expected[expected.abs().argmax()].sign()
    torch.testing.assert_close(unit, expected, rtol=1e-6, atol=1e-6)
    assert fraction == pytest.approx(explained, rel=1e-9)


def test_finds_the_line_that_means_cancel():
    # Half of the texts go one way and half the other: their mean is 0, and PCA still sees the line.
    line = torch.tensor([3.0, 0.0, -4.0]).double()
    differences = torch.stack([line, -line, 2 * line, -2 * line])
    unit, explained = pca(differences)
    torch.testing.assert_close(unit, torch.tensor([-0.6, 0.0, 0.8]).double())
    assert explained == pytest.approx(1.0)


def test_is_the_same_for_either_order_of_the_languages():
    differences = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(pca(differences)[0], pca(-differences)[0])


def test_refuses_languages_that_do_not_differ():
    with pytest.raises(BrocaError, match="do not differ"):
        pca(torch.zeros(5, 3))
