"""LAPE of gradient x activation: LAPE's entropy with another quantity, by loops."""

import math
import random

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.lape_gradient import lape_gradient
from neurons.scorers.selection import Selection, select


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_formula(seed):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 3), chooser.randint(20, 40), chooser.randint(2, 6)
    tokens = [chooser.randint(10, 10**6) for _ in range(languages)]
    sums = [
        [[7 * n * chooser.random() ** 4 for n in tokens] for _ in range(width)] for _ in range(layers)
    ]  # R above 1 is no probability, but has an entropy all the same
    sums[0][3] = [0.0] * languages
    top_rate, filter_rate, activation_rate = (chooser.uniform(0.3, 0.9) for _ in range(3))
    result = lape_gradient(
        torch.tensor(sums, dtype=torch.float64), torch.tensor(tokens), filter_rate, activation_rate
    )
    mean = {
        (layer, j): [s / n for s, n in zip(sums[layer][j], tokens, strict=True)]
        for layer in range(layers)
        for j in range(width)
    }
    everything = sorted(r for row in mean.values() for r in row)
    tau = everything[round(filter_rate * len(everything)) - 1]
    bar = everything[round(activation_rate * len(everything)) - 1]
    assert result.notes == {"tau": tau, "bar": bar}
    entropies = {}
    for place, row in mean.items():
        total = sum(row)
        fractions = [r / total if total else 0.0 for r in row]
        assert result.exclusivity[place].tolist() == pytest.approx(fractions, rel=1e-12)
        assert result.member[place].tolist() == [r > bar for r in row]
        entropies[place] = math.inf
        if max(row) > tau:
            entropies[place] = -sum(q * math.log(q) for q in fractions if q > 0)
        assert result.values[place].tolist() == pytest.approx([-entropies[place]] * languages, abs=1e-12)
    order = sorted((p for p in mean if entropies[p] < math.inf), key=lambda p: (entropies[p], p))
    kept = order[: round(top_rate * layers * width)]
    for k, found in enumerate(select(result, Selection(scope="global", top_rate=top_rate))):
        assert [tuple(row) for row in found.rows.tolist()] == [p for p in kept if mean[p][k] > bar]


def test_the_defaults_are_lapes_and_an_expert_is_judged_by_its_own_tokens():
    sums = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums[0, 7] = torch.tensor([90.0, 0, 0])
    seen = torch.full((2, 50, 3), 100)
    sums[1, 9], seen[1, 9] = torch.tensor([9.0, 0, 0]), torch.tensor([10, 10, 0])
    result = lape_gradient(sums, seen)
    assert result.notes == lape_gradient(sums, seen, 0.95, 0.95).notes
    assert result.values[0, 7].tolist() == result.values[1, 9].tolist() == [0, 0, 0]
    found = select(result, Selection(scope="global", top_rate=0.02))
    assert [of.rows.tolist() for of in found] == [[[0, 7], [1, 9]], [], []]


def test_refusals():
    ones, tokens = torch.ones(1, 5, 2, dtype=torch.float64), torch.tensor([3, 3])
    with pytest.raises(UsageError, match="at least two"):
        lape_gradient(ones[..., :1], tokens[:1])
    with pytest.raises(UsageError, match="number 1 has no tokens"):
        lape_gradient(ones, torch.tensor([0, 3]))
    with pytest.raises(UsageError, match="filter rate"):
        lape_gradient(ones, tokens, filter_rate=0)
    with pytest.raises(UsageError, match="activation rate"):
        lape_gradient(ones, tokens, activation_rate=1.5)
    with pytest.raises(BrocaError, match="not finite"):
        lape_gradient(ones / torch.tensor([1, 0]), tokens)
    with pytest.raises(BrocaError, match="negative"):
        lape_gradient(-ones, tokens)
