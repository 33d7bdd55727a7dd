"""The probe against gradient descent in plain loops on the same loss, and a planted separation."""

import math

import pytest
import torch

from editing.directions.probe import probe
from neurons.errors import BrocaError


def naive(source, target, penalty, steps=20_000, rate=0.02):
    """Unit weights by gradient descent on the penalised logistic loss."""
    width = len(source[0])
    middle = [
        (sum(r[i] for r in source) / len(source) + sum(r[i] for r in target) / len(target)) / 2
        for i in range(width)
    ]
    rows = [[row[i] - middle[i] for i in range(width)] for row in (*source, *target)]
    signs = [-1.0] * len(source) + [1.0] * len(target)
    n = len(rows)
    shares = [n / (2 * len(source))] * len(source) + [n / (2 * len(target))] * len(target)
    scale = math.sqrt(sum(x * x for row in rows for x in row) / (n * width))
    rows = [[x / scale for x in row] for row in rows]
    weights, bias = [0.0] * width, 0.0
    for _ in range(steps):
        gradient, shift = list(weights), 0.0
        for row, sign, share in zip(rows, signs, shares, strict=True):
            margin = sign * (sum(a * b for a, b in zip(row, weights, strict=True)) + bias)
            pull = -penalty * share * sign / (1 + math.exp(margin))
            gradient = [g + pull * x for g, x in zip(gradient, row, strict=True)]
            shift += pull
        weights = [w - rate * g for w, g in zip(weights, gradient, strict=True)]
        bias -= rate * shift
    length = math.sqrt(sum(w * w for w in weights))
    return [w / length for w in weights]


@pytest.mark.parametrize("penalty", [1.0, 0.1])
def test_equals_gradient_descent(penalty):
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(13, 3, generator=generator).double()
    source, target = values[:8], values[8:] + torch.tensor([2.0, 0.0, 1.0])
    expected = naive(source.tolist(), target.tolist(), penalty, steps=1500)
    found = probe(source, target, penalty)
    torch.testing.assert_close(found.unit, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_finds_the_coordinate_that_tells():
    values = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).double()
    target = values[100:].clone()
    target[:, 2] += 6
    found = probe(values[:100], target)
    assert float(found.unit[2]) > 0.95
    assert float(found.unit.norm()) == pytest.approx(1)
    assert found.accuracy > 0.98


def test_does_not_depend_on_the_unit_of_measurement():
    values = torch.randn(30, 3, generator=torch.Generator().manual_seed(2)).double()
    source, target = values[:15], values[15:] + 1
    torch.testing.assert_close(
        probe(source, target).unit, probe(1000 * source + 7, 1000 * target + 7).unit, rtol=1e-4, atol=1e-5
    )


def test_accuracy_is_chance_where_nothing_tells():
    values = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    shifted = values + torch.tensor([1e-3, 0.0])
    assert probe(values, shifted).accuracy <= 0.75


def test_refuses_texts_that_are_all_the_same():
    with pytest.raises(BrocaError, match="the same"):
        probe(torch.ones(4, 3), torch.ones(5, 3))


def test_the_accuracy_weighs_both_languages_alike():
    source, target = torch.tensor([[-1.0]] * 9 + [[1.0]]), torch.tensor([[-1.0], [1.0], [1.0]])
    assert probe(source, target).accuracy == pytest.approx((9 / 10 + 2 / 3) / 2)
