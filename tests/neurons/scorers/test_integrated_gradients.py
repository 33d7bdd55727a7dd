"""Integrated gradients: sums whose value is known, and completeness in the limit."""

import math
import random

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.integrated_gradients import integrate, integrated_gradients
from neurons.scorers.selection import Selection, select


def gradients_along(function, activation, steps):
    """[m, rows, I]: the gradient of ``function`` (summed over rows) at (i/m) * a, i = 1..m."""
    found = []
    for i in range(1, steps + 1):
        at = (activation * i / steps).requires_grad_(True)
        found.append(torch.autograd.grad(function(at).sum(), at)[0])
    return torch.stack(found)


def rows(seed=0, count=3, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equals_the_formula():
    activation = rows()
    gradients = torch.stack([rows(seed) for seed in range(1, 21)])
    found = integrate(activation, gradients)
    assert found.dtype == torch.float64
    for row in range(3):
        for j in range(5):
            total = math.fsum(float(gradients[i, row, j]) for i in range(20))
            assert float(found[row, j]) == pytest.approx(float(activation[row, j]) / 20 * total, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_of_a_linear_function_it_is_the_function(steps):
    weights, activation = rows(9, count=1), rows()
    found = integrate(activation, gradients_along(lambda a: a * weights, activation, steps))
    torch.testing.assert_close(found, activation * weights)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_of_a_square_it_is_the_right_riemann_sum(steps):
    # The sum of (a/m) * 2 (i/m) a over i = 1..m is a^2 (1 + 1/m); a left sum would give a^2 (1 - 1/m).
    activation = rows()
    found = integrate(activation, gradients_along(lambda a: a**2, activation, steps))
    torch.testing.assert_close(found, activation**2 * (1 + 1 / steps))


def test_complete_in_the_limit():
    """Where each neuron moves the answer alone, the sum tends to P(a) - P(0), with an error like 1/m."""

    def answer(a):
        return torch.sigmoid(3 * a - 1)

    activation = rows()
    expected = answer(activation) - answer(torch.zeros_like(activation))
    errors = []
    for steps in (20, 200, 2000):
        found = integrate(activation, gradients_along(answer, activation, steps))
        errors.append(float((found - expected).abs().max()))
    assert errors[0] > 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[0] / 100, rel=0.2)


def test_together_the_neurons_of_a_path_are_complete():
    """Moved together, as one row, their parts sum to P(a) - P(0)."""
    activation = rows()
    mixing = rows(4, count=5)

    def answer(a):
        return torch.softmax(a @ mixing, -1)[:, 2]

    found = integrate(activation, gradients_along(answer, activation, 4000)).sum(-1)
    torch.testing.assert_close(
        found, answer(activation) - answer(torch.zeros_like(activation)), atol=1e-3, rtol=0
    )


def test_half_precision_is_summed_in_float64():
    activation = torch.ones(1, 2, dtype=torch.bfloat16)
    gradients = torch.full((1000, 1, 2), 1.0, dtype=torch.bfloat16)
    gradients[0, 0, 1] = 1001  # bfloat16 has it as 1000
    assert integrate(activation, gradients).tolist() == [[1.0, 1.999]]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_formula(seed):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 3), chooser.randint(10, 30), chooser.randint(1, 5)
    prompts = [chooser.randint(1, 50) for _ in range(languages)]
    sums = [
        [[chooser.choice([0.0, n * chooser.gauss(0, 1)]) for n in prompts] for _ in range(width)]
        for _ in range(layers)
    ]
    result = integrated_gradients(torch.tensor(sums, dtype=torch.float64), torch.tensor(prompts))
    mean = {}
    for layer in range(layers):
        for j in range(width):
            row = [s / n for s, n in zip(sums[layer][j], prompts, strict=True)]
            mean[layer, j] = row
            total = sum(max(x, 0) for x in row)
            parts = [max(x, 0) / total if total else 0.0 for x in row]
            assert result.values[layer, j].tolist() == pytest.approx(row, rel=1e-14)
            assert result.member[layer, j].tolist() == [x > 0 for x in row]
            assert result.exclusivity[layer, j].tolist() == pytest.approx(parts, rel=1e-12)
    for k, found in enumerate(select(result, Selection(top_rate=0.2))):
        order = sorted((p for p in mean if mean[p][k] > 0), key=lambda p: (-mean[p][k], p))
        assert [tuple(row) for row in found.rows.tolist()] == order[: round(0.2 * len(mean))]


def test_refusals():
    ones = torch.ones(2, 4, 2, dtype=torch.float64)
    with pytest.raises(UsageError, match="number 2 has no prompts"):
        integrated_gradients(ones, torch.tensor([3, 0]))
    ones[0, 1, 1] = torch.inf
    with pytest.raises(BrocaError, match="neuron 1 in layer 0"):
        integrated_gradients(ones, torch.tensor([3, 3]))
    with pytest.raises(BrocaError, match="do not fit"):
        integrate(rows(), torch.zeros(0, 3, 5))
    with pytest.raises(BrocaError, match="do not fit"):
        integrate(rows(), rows())
