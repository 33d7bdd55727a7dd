"""LDA against Ledoit and Wolf's rule in plain loops, and a planted separation."""

import math

import pytest
import torch

from editing.directions.lda import lda
from neurons.errors import BrocaError


def solve(matrix, wanted):
    """Gaussian elimination with pivots, number by number."""
    rows = [[*row, value] for row, value in zip(matrix, wanted, strict=True)]
    size = len(rows)
    for i in range(size):
        best = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def naive(source, target):
    """(unit, shrinkage) from the formulas."""
    width, within, means = len(source[0]), [], []
    for rows in (source, target):
        mean = [sum(row[i] for row in rows) / len(rows) for i in range(width)]
        within += [[row[i] - mean[i] for i in range(width)] for row in rows]
        means.append(mean)
    n = len(within)
    covariance = [[sum(x[i] * x[j] for x in within) / n for j in range(width)] for i in range(width)]
    trace = sum(covariance[i][i] for i in range(width)) / width
    # Ledoit and Wolf: b^2 the mean squared distance of x x^T from C over n, d^2 of C from the identity's.
    spread = sum((c - trace * (i == j)) ** 2 for i, row in enumerate(covariance) for j, c in enumerate(row))
    noise = sum(
        (x[i] * x[j] - covariance[i][j]) ** 2 for x in within for i in range(width) for j in range(width)
    )
    shrinkage = min(noise / n**2, spread) / spread
    shrunk = [
        [(1 - shrinkage) * c + shrinkage * trace * (i == j) for j, c in enumerate(row)]
        for i, row in enumerate(covariance)
    ]
    vector = solve(shrunk, [b - a for a, b in zip(*means, strict=True)])
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector], shrinkage


@pytest.mark.parametrize(("texts", "width"), [(12, 4), (3, 8)])
def test_equals_the_formula(texts, width):
    generator = torch.Generator().manual_seed(texts)
    draw = torch.randn(2 * texts + 2, width, generator=generator).double()
    draw = draw * torch.arange(1, width + 1)
    source, target = draw[:texts], draw[texts:] + 0.5
    unit, shrinkage = naive(source.tolist(), target.tolist())
    line, weight = lda(source, target)
    assert 0 < shrinkage < 1
    assert weight == pytest.approx(shrinkage, rel=1e-9)
    torch.testing.assert_close(line, torch.tensor(unit, dtype=torch.float64))


def test_turns_away_from_what_wavers():
    # The means differ as much in both coordinates; the first wavers a hundred times as far.
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)).double()
    noise = noise * torch.tensor([10.0, 0.1])
    unit, _ = lda(noise[:200], noise[200:] + 1)
    assert abs(float(unit[0])) < 0.05
    assert float(unit[1]) > 0.99


def test_points_to_the_target():
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(2)).double()
    (there, _), (back, _) = lda(values[:10], values[10:] + 1), lda(values[10:] + 1, values[:10])
    torch.testing.assert_close(there, -back)
    assert float(there @ (values[10:] + 1 - values[:10]).mean(0)) > 0


def test_refuses_what_has_no_spread_or_no_difference():
    with pytest.raises(BrocaError, match="more texts"):
        lda(torch.ones(1, 3), torch.zeros(1, 3))
    same = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(BrocaError, match="do not differ"):
        lda(same, same)
