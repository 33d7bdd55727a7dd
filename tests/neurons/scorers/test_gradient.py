"""Gradient x activation: means over tokens, by loops and by cases whose answer is known."""

import random

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.gradient import gradient
from neurons.scorers.selection import Selection, select


def chosen(scores, **settings):
    return [[tuple(row) for row in of.rows.tolist()] for of in select(scores, Selection(**settings))]


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula(seed, experts):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 4), chooser.randint(10, 40), chooser.randint(1, 6)
    tokens = [chooser.randint(10, 10**6) for _ in range(languages)]
    seen = [
        [[chooser.randint(0, n) if experts else n for n in tokens] for _ in range(width)]
        for _ in range(layers)
    ]
    sums = [
        [[n * chooser.random() ** 4 if n and chooser.random() < 0.9 else 0.0 for n in row] for row in rows]
        for rows in seen
    ]
    result = gradient(
        torch.tensor(sums, dtype=torch.float64), torch.tensor(seen) if experts else torch.tensor(tokens)
    )
    mean = {}
    for layer in range(layers):
        for neuron in range(width):
            row = [s / n if n else 0.0 for s, n in zip(sums[layer][neuron], seen[layer][neuron], strict=True)]
            mean[layer, neuron] = row
            total = sum(row)
            assert result.values[layer, neuron].tolist() == pytest.approx(row, rel=1e-14)
            assert result.member[layer, neuron].tolist() == [r > 0 for r in row]
            parts = [r / total if total else 0.0 for r in row]
            assert result.exclusivity[layer, neuron].tolist() == pytest.approx(parts, rel=1e-12)
    for k, found in enumerate(chosen(result, top_rate=0.2)):
        order = sorted(
            (place for place in mean if mean[place][k] > 0), key=lambda place: (-mean[place][k], place)
        )
        assert found == order[: round(0.2 * layers * width)]


def test_a_shared_neuron_is_first_for_all_and_exclusivity_takes_it_away():
    sums = torch.tensor([[[90.0, 900.0], [30.0, 10.0], [1.0, 400.0], [0.0, 0.0]]], dtype=torch.float64)
    result = gradient(sums, torch.tensor([10, 100]))
    assert chosen(result, top_rate=0.5) == [[(0, 0), (0, 1)], [(0, 0), (0, 2)]]
    assert chosen(result, top_rate=0.5, min_exclusivity=0.6) == [[(0, 1)], [(0, 2)]]
    assert chosen(result, top_rate=1.0)[0] == [(0, 0), (0, 1), (0, 2)]  # a neuron that does nothing is out


def test_refusals():
    ones, tokens = torch.ones(2, 5, 3, dtype=torch.float64), torch.tensor([3, 3, 3])
    with pytest.raises(UsageError, match="number 3 has no tokens"):
        gradient(ones, torch.tensor([3, 3, 0]))
    with pytest.raises(UsageError, match="number 1 has no tokens"):
        gradient(ones, torch.ones(2, 5, 3, dtype=torch.int64) * torch.tensor([0, 1, 1]))
    ones[1, 4, 2] = torch.nan
    with pytest.raises(BrocaError, match="neuron 4 in layer 1"):
        gradient(ones, tokens)
    ones[1, 4, 2] = -1
    with pytest.raises(BrocaError, match="negative"):
        gradient(ones, tokens)
