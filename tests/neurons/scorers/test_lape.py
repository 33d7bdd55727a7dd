"""LAPE against the formula in plain Python, and by cases whose answer is known."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.errors import BrocaError, UsageError
from neurons.scorers.lape import ACTIVATION_RATE, FILTER_RATE, entropy, lape
from neurons.scorers.selection import Selection, select


def naive_lape(counts, tokens, top_rate, filter_rate, activation_rate):
    """(P, H, kept, tau, bar) by loops; kept as [(layer, neuron)]."""
    layers, width, languages = len(counts), len(counts[0]), len(tokens)
    everything = []
    probability, entropies = {}, {}
    for layer in range(layers):
        for neuron in range(width):
            p = [counts[layer][neuron][k] / tokens[k] for k in range(languages)]
            everything += p
            total = sum(p)
            q = [x / total if total > 0 else 0.0 for x in p]
            probability[layer, neuron] = p
            entropies[layer, neuron] = -sum(x * math.log(x) for x in q if x > 0)
    everything.sort()
    tau = everything[round(filter_rate * len(everything)) - 1]
    bar = everything[round(activation_rate * len(everything)) - 1]
    for place, p in probability.items():
        if not any(x > tau for x in p):
            entropies[place] = math.inf
    order = sorted(entropies, key=lambda place: (round(entropies[place], 10), place))
    kept = [p for p in order[: round(top_rate * layers * width)] if entropies[p] < math.inf]
    return probability, entropies, kept, tau, bar


def places(rows):
    return [tuple(row) for row in rows.tolist()]


def chosen(scores, top_rate):
    """Each language's neurons, the best first."""
    return [places(of.rows) for of in select(scores, Selection(scope="global", top_rate=top_rate))]


def kept_neurons(scores, top_rate):
    """The neurons kept, also those of no language."""
    return chosen(replace(scores, member=torch.ones_like(scores.member)), top_rate)[0]


def assert_same_scores(result, probability, entropies, tau, bar):
    for (layer, neuron), p in probability.items():
        total = sum(p)
        for k, x in enumerate(p):
            value, expected = float(result.values[layer, neuron, k]), -entropies[layer, neuron]
            assert value == pytest.approx(expected, abs=1e-12)
            assert bool(result.member[layer, neuron, k]) == (x > bar)
            expected = x / total if total > 0 else 0.0
            assert float(result.exclusivity[layer, neuron, k]) == pytest.approx(expected, rel=1e-14)
    assert result.notes == {"tau": tau, "bar": bar}
    assert result.tie is None


def test_published_thresholds():
    assert (FILTER_RATE, ACTIVATION_RATE) == (0.95, 0.95)
    counts = torch.randint(0, 1000, (2, 50, 3), generator=torch.Generator().manual_seed(0))
    tokens = torch.full((3,), 1000)
    assert lape(counts, tokens).notes == lape(counts, tokens, 0.95, 0.95).notes
    expected = sorted((counts.double() / 1000).flatten().tolist())[285 - 1]
    assert lape(counts, tokens).notes == {"tau": expected, "bar": expected}


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 4), chooser.randint(20, 40), chooser.randint(2, 7)
    tokens = [chooser.randint(10**5, 10**6) for _ in range(languages)]
    counts = [[[int(n * chooser.random() ** 3) for n in tokens] for _ in range(width)] for _ in range(layers)]
    for _ in range(width // 4):
        counts[chooser.randrange(layers)][chooser.randrange(width)] = [0] * languages  # dead
        alike = [*chooser.choices(tokens, k=1), *[chooser.randint(0, 10**5) for _ in range(languages - 1)]]
        for _ in range(2):
            counts[chooser.randrange(layers)][chooser.randrange(width)] = [*map(min, alike, tokens)]
    top_rate, *rates = chooser.uniform(0.05, 1), chooser.uniform(0.3, 1), chooser.uniform(0.3, 1)
    result = lape(torch.tensor(counts), torch.tensor(tokens), *rates)
    probability, entropies, kept, tau, bar = naive_lape(counts, tokens, top_rate, *rates)
    assert_same_scores(result, probability, entropies, tau, bar)
    assert kept_neurons(result, top_rate) == kept
    expected = [[place for place in kept if probability[place][k] > bar] for k in range(languages)]
    assert chosen(result, top_rate) == expected


@st.composite
def small_counts(draw):
    """Few tokens, so that ties, dead neurons and silent languages are common."""
    layers, width, languages = draw(st.integers(1, 3)), draw(st.integers(4, 9)), draw(st.integers(2, 4))
    tokens = draw(st.lists(st.integers(1, 4), min_size=languages, max_size=languages))
    row = st.tuples(*[st.integers(0, n) for n in tokens])
    flat = draw(st.lists(row, min_size=layers * width, max_size=layers * width))
    counts = [[list(flat[layer * width + j]) for j in range(width)] for layer in range(layers)]
    rate = st.sampled_from([0.25, 0.5, 0.8, 0.95, 1.0])
    return counts, tokens, draw(rate), draw(rate), draw(rate)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_counts())
def test_equals_the_formula_with_many_ties(case):
    counts, tokens, top_rate, *rates = case
    result = lape(torch.tensor(counts), torch.tensor(tokens), *rates)
    probability, entropies, kept, tau, bar = naive_lape(counts, tokens, top_rate, *rates)
    assert_same_scores(result, probability, entropies, tau, bar)
    found = kept_neurons(result, top_rate)
    assert [entropies[place] for place in found] == pytest.approx([entropies[p] for p in kept], abs=1e-12)
    for k, own in enumerate(chosen(result, top_rate)):
        assert own == [place for place in found if probability[place][k] > bar]
    # Two neurons with the very same counts: the earlier one comes first, and never only the later one.
    for i, later in enumerate(found):
        for earlier in probability:
            if earlier < later and probability[earlier] == probability[later]:
                assert earlier in found[:i]


def test_ties_are_ordered_by_layer_then_neuron():
    counts = torch.zeros(3, 48, 7, dtype=torch.int64)
    counts[..., 0], counts[..., 1:] = 70, torch.arange(3, 9)
    counts[2, 40] = counts[0, 7] = counts[1, 47] = torch.tensor([90, 0, 0, 0, 0, 0, 1])
    tokens = torch.full((7,), 100)
    result = lape(counts, tokens, filter_rate=0.1)
    special = [(0, 7), (1, 47), (2, 40)]
    others = [(layer, neuron) for layer in range(3) for neuron in range(48)]
    others = [place for place in others if place not in special]
    assert kept_neurons(result, 50 / 144) == special + others[:47]


def test_a_dead_neuron_is_out_though_its_entropy_would_be_least():
    counts = torch.tensor([[[0, 0], [9, 1], [5, 5], [0, 0], [1, 2]]])
    result = lape(counts, torch.tensor([10, 10]), filter_rate=0.1, activation_rate=0.1)
    assert result.notes["tau"] == 0
    assert entropy(counts)[0, 0] == 0
    assert result.values[0, 0].tolist() == result.values[0, 3].tolist() == [-torch.inf] * 2
    assert kept_neurons(result, 1.0) == [(0, 1), (0, 4), (0, 2)]


def test_the_filter_is_strict():
    counts = torch.tensor([[[8, 0], [8, 0], [9, 0], [1, 1]]])
    result = lape(counts, torch.tensor([10, 10]), filter_rate=7 / 8, activation_rate=0.5)
    assert result.notes["tau"] == 0.8
    assert kept_neurons(result, 1.0) == [(0, 2)]


def test_membership_in_several_languages_and_in_none():
    counts = torch.full((1, 20, 4), 10)
    counts[0, 3] = torch.tensor([90, 1, 80, 1])
    counts[0, 11] = torch.tensor([1, 95, 2, 3])
    counts[0, 12] = torch.tensor([3, 0, 0, 0])
    result = lape(counts, torch.full((4,), 100), filter_rate=0.01)
    assert kept_neurons(result, 3 / 20) == [(0, 12), (0, 11), (0, 3)]
    assert result.member[0, 12].sum() == 0
    assert chosen(result, 3 / 20) == [[(0, 3)], [(0, 11)], [(0, 3)], []]


def test_probabilities_not_counts_are_compared():
    # Neuron 0 has more positive tokens in the second language, but that language is 100 times as long.
    counts = torch.tensor([[[9, 50], [1, 100], [1, 100], [1, 100]]])
    result = lape(counts, torch.tensor([10, 1000]), filter_rate=0.5, activation_rate=0.875)
    assert chosen(result, 0.25) == [[(0, 0)], []]


def test_an_expert_is_judged_by_the_tokens_that_it_sees():
    # Neuron 1's expert sees a tenth of the text, and never the third language; its P is that of neuron 0.
    counts = torch.tensor([[[80, 20, 0], [8, 2, 0], [50, 50, 50], [50, 50, 50]]])
    seen = torch.tensor([[[100, 100, 100], [10, 10, 0], [100, 100, 100], [100, 100, 100]]])
    result = lape(counts, seen, filter_rate=0.5, activation_rate=0.75)
    torch.testing.assert_close(result.values[0, 1], result.values[0, 0], rtol=0, atol=0)
    assert result.exclusivity[0, 1].tolist() == pytest.approx([0.8, 0.2, 0])
    assert chosen(result, 0.5)[0] == [(0, 0), (0, 1)]
    dense = lape(counts, torch.tensor([100, 100, 100]), filter_rate=0.5, activation_rate=0.75)
    assert (0, 1) not in chosen(dense, 0.5)[0]


def test_keeps_the_rounded_number_over_all_layers_together():
    counts = torch.randint(1, 10**6, (4, 50, 3), generator=torch.Generator().manual_seed(0))
    counts[2, :10, 1:] = 1
    kept = kept_neurons(lape(counts, torch.full((3,), 10**6), filter_rate=0.01), 0.048)
    assert len(kept) == 10
    assert {layer for layer, _ in kept} == {2}


def test_entropy_of_known_shares():
    found = entropy(torch.tensor([[[1, 1, 1, 1], [7, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 0]]]))
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([math.log(4), 0, 0, 1.5 * math.log(2)], abs=1e-15)


def test_one_language_is_refused():
    with pytest.raises(UsageError, match="at least two"):
        lape(torch.ones(1, 4, 1, dtype=torch.int64), torch.tensor([5]))


def test_a_language_without_tokens_is_refused():
    ones = torch.ones(1, 4, 2, dtype=torch.int64)
    with pytest.raises(UsageError, match="number 2 has no tokens"):
        lape(ones, torch.tensor([5, 0]))
    with pytest.raises(UsageError, match="number 1 has no tokens"):
        lape(ones, ones * torch.tensor([0, 3]))


def test_a_count_that_is_not_finite_is_refused():
    counts = torch.ones(2, 4, 2, dtype=torch.float64)
    counts[1, 3, 0] = torch.nan
    with pytest.raises(BrocaError, match="neuron 3 in layer 1"):
        lape(counts, torch.tensor([5, 5]))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("name", ["filter_rate", "activation_rate"])
def test_a_rate_out_of_range_is_refused_by_name(name, rate):
    with pytest.raises(UsageError, match=name.replace("_", " ")):
        lape(torch.ones(1, 4, 2, dtype=torch.int64), torch.tensor([5, 5]), **{name: rate})
