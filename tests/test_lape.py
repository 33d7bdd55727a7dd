"""LAPE against the formula in plain Python, and by cases whose answer is known."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.errors import UsageError
from neurons.scorers.lape import ACTIVATION_RATE, FILTER_RATE, TOP_RATE, lape


def naive_lape(counts, tokens, top_rate, filter_rate, activation_rate):
    """(P, H, kept, member, tau, bar) by loops; kept as [(layer, neuron)]."""
    layers, width, languages = len(counts), len(counts[0]), len(tokens)
    everything = []
    probability, entropy = {}, {}
    for layer in range(layers):
        for neuron in range(width):
            p = [counts[layer][neuron][k] / tokens[k] for k in range(languages)]
            everything += p
            total = sum(p)
            q = [x / total if total > 0 else 0.0 for x in p]
            probability[layer, neuron] = p
            entropy[layer, neuron] = -sum(x * math.log(x) for x in q if x > 0)
    everything.sort()
    tau = everything[round(filter_rate * len(everything)) - 1]
    bar = everything[round(activation_rate * len(everything)) - 1]
    for place, p in probability.items():
        if not any(x > tau for x in p):
            entropy[place] = math.inf
    order = sorted(entropy, key=lambda place: (round(entropy[place], 10), place))
    kept = [p for p in order[: round(top_rate * layers * width)] if entropy[p] < math.inf]
    member = [[x > bar for x in probability[place]] for place in kept]
    return probability, entropy, kept, member, tau, bar


def places(kept):
    return [tuple(row) for row in kept.tolist()]


def assert_same_scores(result, probability, entropy, tau, bar):
    for (layer, neuron), p in probability.items():
        assert result.probability[layer, neuron].tolist() == pytest.approx(p, rel=1e-14)
        assert float(result.entropy[layer, neuron]) == pytest.approx(entropy[layer, neuron], abs=1e-12)
    assert (result.tau, result.bar) == (tau, bar)


def test_published_thresholds():
    assert (TOP_RATE, FILTER_RATE, ACTIVATION_RATE) == (0.01, 0.95, 0.95)


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
    rates = chooser.uniform(0.05, 1), chooser.uniform(0.3, 1), chooser.uniform(0.3, 1)
    result = lape(torch.tensor(counts), torch.tensor(tokens), *rates)
    probability, entropy, kept, member, tau, bar = naive_lape(counts, tokens, *rates)
    assert_same_scores(result, probability, entropy, tau, bar)
    assert places(result.kept) == kept
    assert result.member.tolist() == member


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
    counts, tokens, *rates = case
    result = lape(torch.tensor(counts), torch.tensor(tokens), *rates)
    probability, entropy, kept, _, tau, bar = naive_lape(counts, tokens, *rates)
    assert_same_scores(result, probability, entropy, tau, bar)
    found = places(result.kept)
    assert [entropy[place] for place in found] == pytest.approx([entropy[p] for p in kept], abs=1e-12)
    for place, row in zip(found, result.member.tolist(), strict=True):
        assert row == [x > bar for x in probability[place]]
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
    result = lape(counts, tokens, top_rate=50 / 144, filter_rate=0.1)
    special = [(0, 7), (1, 47), (2, 40)]
    others = [(layer, neuron) for layer in range(3) for neuron in range(48)]
    others = [place for place in others if place not in special]
    assert places(result.kept) == special + others[:47]


def test_a_dead_neuron_is_out_though_its_entropy_would_be_least():
    counts = torch.tensor([[[0, 0], [9, 1], [5, 5], [0, 0], [1, 2]]])
    result = lape(counts, torch.tensor([10, 10]), top_rate=1.0, filter_rate=0.1, activation_rate=0.1)
    assert result.tau == 0
    assert result.entropy[0, 0] == torch.inf
    assert result.entropy[0, 3] == torch.inf
    assert places(result.kept) == [(0, 1), (0, 4), (0, 2)]


def test_the_filter_is_strict():
    counts = torch.tensor([[[8, 0], [8, 0], [9, 0], [1, 1]]])
    result = lape(counts, torch.tensor([10, 10]), top_rate=1.0, filter_rate=7 / 8, activation_rate=0.5)
    assert result.tau == 0.8
    assert places(result.kept) == [(0, 2)]


def test_membership_in_several_languages_and_in_none():
    counts = torch.full((1, 20, 4), 10)
    counts[0, 3] = torch.tensor([90, 1, 80, 1])
    counts[0, 11] = torch.tensor([1, 95, 2, 3])
    result = lape(counts, torch.full((4,), 100), top_rate=0.1)
    assert places(result.kept) == [(0, 11), (0, 3)]
    assert result.member.tolist() == [[False, True, False, False], [True, False, True, False]]
    assert not result.member[:, 3].any()


def test_probabilities_not_counts_are_compared():
    # Neuron 0 has more positive tokens in the second language, but that language is 100 times as long.
    counts = torch.tensor([[[9, 50], [1, 100], [1, 100], [1, 100]]])
    result = lape(counts, torch.tensor([10, 1000]), top_rate=0.25, filter_rate=0.5, activation_rate=0.875)
    assert places(result.kept) == [(0, 0)]
    assert result.member.tolist() == [[True, False]]


def test_keeps_the_rounded_number_over_all_layers_together():
    counts = torch.randint(1, 10**6, (4, 50, 3), generator=torch.Generator().manual_seed(0))
    counts[2, :10, 1:] = 1
    result = lape(counts, torch.full((3,), 10**6), top_rate=0.048, filter_rate=0.01)
    assert len(result.kept) == 10
    assert {layer for layer, _ in places(result.kept)} == {2}


def test_one_language_is_refused():
    with pytest.raises(UsageError, match="at least two"):
        lape(torch.ones(1, 4, 1, dtype=torch.int64), torch.tensor([5]))


def test_a_language_without_tokens_is_refused():
    with pytest.raises(UsageError, match="without tokens"):
        lape(torch.ones(1, 4, 2, dtype=torch.int64), torch.tensor([5, 0]))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("name", ["top_rate", "filter_rate", "activation_rate"])
def test_a_rate_out_of_range_is_refused_by_name(name, rate):
    with pytest.raises(UsageError, match=name.replace("_", " ")):
        lape(torch.ones(1, 4, 2, dtype=torch.int64), torch.tensor([5, 5]), **{name: rate})
