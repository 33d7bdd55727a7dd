"""Scores: what they refuse, and fractions."""

import math
import random

import pytest
import torch

from neurons.errors import BrocaError
from neurons.scorers.scores import Scores, fractions


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 4, 2), (2, 3, 1)])
def test_a_score_that_is_not_a_number_is_named(place):
    values = torch.zeros(3, 5, 3, dtype=torch.float64)
    values[place] = math.nan
    with pytest.raises(BrocaError, match=f"neuron {place[1]} in layer {place[0]}"):
        Scores(values=values, member=torch.ones_like(values, dtype=torch.bool))


def test_infinite_scores_are_scores():
    values = torch.tensor([[[math.inf, -math.inf, 0.0]]], dtype=torch.float64)
    scores = Scores(values=values, member=torch.ones_like(values, dtype=torch.bool))
    assert (scores.exclusivity, scores.tie, scores.notes) == (None, None, {})
    assert torch.equal(scores.values, values)


def test_notes_are_not_shared_between_scores():
    values = torch.zeros(1, 1, 2, dtype=torch.float64)
    first, second = (Scores(values=values, member=values == 0) for _ in range(2))
    first.notes["tau"] = 1
    assert second.notes == {}


@pytest.mark.parametrize("seed", range(5))
def test_shares_equal_the_formula(seed):
    chooser = random.Random(seed)
    drawn = [[[chooser.random() ** 4 for _ in range(4)] for _ in range(6)] for _ in range(2)]
    drawn[1][2] = [0.0] * 4
    drawn[0][5] = [0.0, 0.0, 1e-300, 0.0]
    found = fractions(torch.tensor(drawn, dtype=torch.float64))
    for layer in range(2):
        for neuron in range(6):
            total = sum(drawn[layer][neuron])
            expected = [x / total if total else 0.0 for x in drawn[layer][neuron]]
            assert found[layer, neuron].tolist() == pytest.approx(expected, abs=1e-15)
            assert sum(found[layer, neuron].tolist()) == pytest.approx(1 if total else 0, abs=1e-15)


def test_shares_of_counts_are_exact():
    found = fractions(torch.tensor([[[1, 3, 0], [0, 0, 0], [2**60, 0, 2**60]]]))
    assert found.dtype == torch.float64
    assert found.tolist() == [[[0.25, 0.75, 0], [0, 0, 0], [0.5, 0, 0.5]]]


def test_shares_of_float32_are_float64():
    values = torch.tensor([[[0.1, 0.2, 0.4]]])
    total = sum(values.double().flatten().tolist())
    expected = [x / total for x in values.double().flatten().tolist()]
    assert fractions(values).flatten().tolist() == pytest.approx(expected, rel=1e-15)
