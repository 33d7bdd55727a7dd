"""Shapley values from their sums: means, standard errors by the standard library, places without a head."""

import math
import random
import statistics as stdlib

import pytest
import torch

from neurons.errors import UsageError
from neurons.scorers.head_shapley import MOMENTS, HeadShapley
from neurons.scorers.selection import Selection, select
from neurons.statistics.statistics import Statistics


def recorded(marginals, heads):
    """Statistics of marginal values [P][L][A][K]."""
    values = torch.tensor(marginals, dtype=torch.float64)
    count, languages = len(values), values.shape[-1]
    counts = torch.full((languages,), count)
    return Statistics(
        languages=tuple("abc"[:languages]),
        tokens=torch.ones(languages, dtype=torch.int64),
        texts=torch.ones(languages, dtype=torch.int64),
        moments=dict(zip(MOMENTS, (values.sum(0), values.square().sum(0)), strict=True)),
        fingerprint="",
        prompts={"shapley": counts, "shapley_square": counts},
        metadata={"heads": heads},
    )


def test_equals_mean_and_standard_error_of_the_permutations():
    draw = random.Random(1)
    marginals = [
        [[[draw.gauss(0.1 * a, 1) for _ in range(2)] for a in range(3)] for _ in range(2)] for _ in range(7)
    ]
    scores = HeadShapley().scores(recorded(marginals, [3, 3]), 0.5)
    for layer in range(2):
        for head in range(3):
            for k in range(2):
                of = [permutation[layer][head][k] for permutation in marginals]
                assert float(scores.values[layer, head, k]) == pytest.approx(stdlib.fmean(of), abs=1e-14)
                error = scores.notes["standard_errors"][k][layer][head]
                assert error == pytest.approx(stdlib.stdev(of) / math.sqrt(7), rel=1e-9)
    assert scores.notes["permutations"] == [7, 7]


def test_a_single_permutation_has_no_standard_error():
    assert HeadShapley().scores(recorded([[[[1.0]]]], [1]), 0.5).notes["standard_errors"] is None


def test_the_smallest_are_harmful_heads_and_a_place_without_a_head_is_none():
    marginals = [[[[0.5], [-0.2], [0.1]], [[0.3], [0.0], [0.0]]]]
    scores = HeadShapley().scores(recorded(marginals, [3, 1]), 0.5)
    best = [of.rows.tolist() for of in select(scores, Selection(top_rate=1.0))]
    assert best == [[[0, 0], [1, 0], [0, 2], [0, 1]]]
    worst = [of.rows.tolist() for of in select(scores, Selection(top_rate=1 / 6, ends="bottom"))]
    assert worst == [[[0, 1]]]


@pytest.mark.parametrize("settings", [{"permutations": 0}, {"tolerance": -0.1}, {"tolerance": 1.0}])
def test_refused_settings(settings):
    with pytest.raises(UsageError, match="permutation"):
        HeadShapley(**settings)
