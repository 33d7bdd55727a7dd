"""LAPE with a penalty for general neurons, against loops over the formula and a planted model."""

import math
import random

import pytest
import torch

from neurons.errors import UsageError
from neurons.scorers.lape_general import lape_general, largest
from neurons.scorers.selection import KINDS, Selection, select


def naive_scores(probability, penalty):
    """(layer, neuron) -> H / ln K - penalty * max P / c, a neuron that never fires as one that fires alike."""
    scores = {}
    for place, p in probability.items():
        total, languages = sum(p), len(p)
        q = [x / total for x in p] if total > 0 else [1 / languages] * languages
        spread = -sum(x * math.log(x) for x in q if x > 0) / math.log(languages)
        scores[place] = spread - penalty * max(p) / (sum(1 / j for j in range(1, languages + 1)) / languages)
    return scores


def naive_kept(probability, penalty, top_rate):
    scores = naive_scores(probability, penalty)
    return sorted(scores, key=lambda place: (scores[place], place))[: round(top_rate * len(scores))]


def by_place(counts, tokens):
    return {
        (layer, neuron): [n / t for n, t in zip(row, tokens, strict=True)]
        for layer, rows in enumerate(counts.tolist())
        for neuron, row in enumerate(rows)
    }


def chosen(scores, top_rate, **settings):
    found = select(scores, Selection(scope="global", top_rate=top_rate, **settings))
    return [[tuple(row) for row in of.rows.tolist()] for of in found]


def random_counts(seed, layers=3, width=40, languages=5):
    """Neurons of few languages fire seldom, general ones often: the penalty decides who is kept."""
    chooser = random.Random(seed)
    tokens = [chooser.randint(10**5, 10**6) for _ in range(languages)]
    counts = torch.zeros(layers, width, languages, dtype=torch.int64)
    for layer in range(layers):
        for neuron in range(width):
            loud = chooser.choice([0.05, 0.3, 0.95])
            for k, n in enumerate(tokens):
                counts[layer, neuron, k] = int(n * loud * chooser.random() ** (0.2 if loud > 0.9 else 3))
    return counts, tokens


@pytest.mark.parametrize(
    ("top_rate", "max_penalty", "found"),
    [(0.3, 0.8, "between"), (0.1, 0.8, "between"), (0.3, 0.05, "largest"), (0.95, 0.8, "none")],
)
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_formula(seed, top_rate, max_penalty, found):
    counts, tokens = random_counts(seed)
    counts[1, 3] = counts[2, 5] = 0
    activation_rate = 0.6
    probability = by_place(counts, tokens)
    everything = sorted(x for p in probability.values() for x in p)
    bar = everything[round(activation_rate * len(everything)) - 1]

    def keeps_no_general(penalty):
        kept = naive_kept(probability, penalty, top_rate)
        return not any(all(x > bar for x in probability[place]) for place in kept)

    result = lape_general(counts, torch.tensor(tokens), top_rate, activation_rate, max_penalty)
    assert result.notes["bar"] == bar
    penalty = result.notes["lambda"]
    assert keeps_no_general(penalty) == (found != "none")
    if found == "between":
        assert 0 < penalty < max_penalty
        assert not keeps_no_general(penalty + 1e-3)
    else:
        assert penalty == (max_penalty if found == "largest" else 0)
    for place, score in naive_scores(probability, penalty).items():
        assert result.values[place].tolist() == pytest.approx([-score] * len(tokens), abs=1e-12)
        assert result.member[place].tolist() == [x > bar for x in probability[place]]
    kept = naive_kept(probability, penalty, top_rate)
    expected = [[place for place in kept if probability[place][k] > bar] for k in range(len(tokens))]
    assert chosen(result, top_rate) == expected


def planted(specific_probability):
    """One layer, two languages: neuron 0 is specific, neuron 1 general and loud, the others quiet and alike."""
    counts = torch.full((1, 20, 2), 10)
    counts[0, 0] = torch.tensor([specific_probability, 0])
    counts[0, 1] = torch.tensor([1000, 500])
    return counts, torch.tensor([1000, 1000])


def test_lambda_where_a_general_neuron_would_come_in():
    # With c = 3/4: the specific neuron scores 0 - .4/c * lambda, the general one H(2/3, 1/3)/ln 2 - lambda/c,
    # so the general one is the lower when lambda * .6/c > .9183.
    counts, tokens = planted(400)
    crossing = (math.log(3) / math.log(2) - 2 / 3) * 0.75 / 0.6
    result = lape_general(counts, tokens, 1 / 20, 0.9, max_penalty=5.0)
    assert crossing - 1e-3 <= result.notes["lambda"] <= crossing
    assert chosen(result, 1 / 20) == [[(0, 0)], []]
    # The published range ends below that.
    assert lape_general(counts, tokens, 1 / 20, 0.9).notes["lambda"] == 0.2


def test_a_general_neuron_that_no_penalty_keeps_out_is_noted_by_lambda_0():
    result = lape_general(*planted(400), top_rate=2 / 20, activation_rate=0.9)
    assert result.notes == {"lambda": 0.0, "bar": 0.01}
    assert chosen(result, 2 / 20) == [[(0, 0), (0, 1)], [(0, 1)]]
    assert chosen(result, 2 / 20, kinds=("specific", "related")) == [[(0, 0)], []]
    assert [KINDS[kind] for kind in select(result, Selection("global", 2 / 20))[0].kinds] == [
        "specific",
        "general",
    ]


def test_a_neuron_that_never_fires_is_not_the_best():
    counts, tokens = planted(400)
    counts[0, 7] = 0
    result = lape_general(counts, tokens, 1 / 20, 0.9)
    assert result.values[0, 7].tolist() == [-1, -1]
    assert result.exclusivity[0, 7].tolist() == [0, 0]
    assert chosen(result, 1 / 20) == [[(0, 0)], []]


def test_an_expert_is_judged_by_the_tokens_that_it_sees():
    counts, tokens = planted(400)
    seen = tokens.expand(1, 20, 2).clone()
    counts[0, 5], seen[0, 5] = torch.tensor([4, 0]), torch.tensor([10, 0])
    result = lape_general(counts, seen, 2 / 20, 0.9)
    assert torch.equal(result.values[0, 5], result.values[0, 0])
    assert chosen(result, 2 / 20) == [[(0, 0), (0, 5)], []]


@pytest.mark.parametrize(("edge", "least"), [(0.0137, 0.0127), (0.1999, 0.1989)])
def test_bisection_ends_within_a_thousandth_below_the_edge(edge, least):
    assert least <= largest(lambda penalty: penalty <= edge, 0.2) <= edge


def test_bisection_at_the_ends():
    assert largest(lambda penalty: True, 0.2) == 0.2
    assert largest(lambda penalty: False, 0.2) == 0.0
    assert largest(lambda penalty: penalty == 0, 0.2) == 0.0
    assert largest(lambda penalty: penalty > 0.1, 0.2) == 0.0  # what fails at 0 is left at 0


def test_refusals():
    counts, tokens = planted(400)
    with pytest.raises(UsageError, match="at least two"):
        lape_general(counts[..., :1], tokens[:1])
    with pytest.raises(UsageError, match="number 2 has no tokens"):
        lape_general(counts, torch.tensor([1000, 0]), 0.5)
    with pytest.raises(UsageError, match=r"top rate 0.01 of 20 neurons is none: raise it to 0.05"):
        lape_general(counts, tokens)
    for rate in (0.0, 1.1, math.nan):
        with pytest.raises(UsageError, match="top rate"):
            lape_general(counts, tokens, top_rate=rate)
        with pytest.raises(UsageError, match="activation rate"):
            lape_general(counts, tokens, 0.5, activation_rate=rate)
    for penalty in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="penalty"):
            lape_general(counts, tokens, 0.5, max_penalty=penalty)
