"""Momentum against its formula in loops, and by planted neurons."""

import math

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers import momentum as module
from neurons.scorers import momentum as momentum_module
from neurons.scorers.momentum import momentum, momentum_rates
from neurons.scorers.selection import Selection, select
from neurons.statistics.statistics import Statistics


def naive_rates(pairs):
    up = sum(a > b for a, b in pairs) / len(pairs)
    down = sum(b > a for a, b in pairs) / len(pairs)
    return up, down, sum(abs(a - b) for a, b in pairs) / len(pairs)


def drawn(seed, shape, levels=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [None, 2, 4])
@pytest.mark.parametrize("pairs", [1, 16, 37])
def test_rates_equal_the_formula(pairs, levels, dtype):
    positive, negative = drawn(pairs, (2, pairs, 2, 5), levels, dtype)
    rates = momentum_rates(positive, negative)
    for layer in range(2):
        for neuron in range(5):
            columns = [half[:, layer, neuron].tolist() for half in (positive, negative)]
            up, down, difference = naive_rates(list(zip(*columns, strict=True)))
            assert float(rates.rate_up[layer, neuron]) == up
            assert float(rates.rate_down[layer, neuron]) == down
            assert float(rates.difference[layer, neuron]) == pytest.approx(difference, rel=1e-13)
    assert {t.dtype for t in (rates.rate_up, rates.rate_down, rates.difference)} == {torch.float64}


@pytest.mark.parametrize("languages", [2, 3, 5])
@pytest.mark.parametrize("levels", [None, 3])
def test_every_text_is_paired_with_the_same_text_of_every_other_language(languages, levels):
    responses = drawn(languages, (languages, 9, 2, 4), levels)
    scores = momentum(responses)
    assert scores.values.shape == (2, 4, languages)
    for k in range(languages):
        for layer in range(2):
            for neuron in range(4):
                pairs = [
                    (float(responses[k, i, layer, neuron]), float(responses[j, i, layer, neuron]))
                    for j in range(languages)
                    if j != k
                    for i in range(9)
                ]
                up, down, difference = naive_rates(pairs)
                assert float(scores.values[layer, neuron, k]) == max(up, down)
                assert float(scores.tie[layer, neuron, k]) == pytest.approx(difference, rel=1e-13)
    assert scores.values.dtype == scores.tie.dtype == torch.float64
    assert scores.member.shape == scores.values.shape
    assert bool(scores.member.all())
    assert scores.exclusivity is None
    assert scores.notes == {"pairs": 9 * (languages - 1)}


def test_a_tensor_and_a_list_are_alike():
    responses = drawn(0, (3, 5, 2, 4))
    one, other = momentum(responses), momentum(list(responses))
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.tie, other.tie)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_do_not_show(monkeypatch, chunk):
    responses = drawn(0, (3, 33, 2, 4))
    whole = momentum(responses)
    monkeypatch.setattr(module, "CHUNK", chunk)
    again = momentum(responses)
    assert torch.equal(again.values, whole.values)
    assert torch.allclose(again.tie, whole.tie, rtol=1e-14, atol=0)


def test_planted_neurons_come_first_and_the_larger_difference_breaks_their_tie():
    responses = drawn(2, (3, 40, 3, 50))
    responses[1, :, 0, 3] += 20  # up
    responses[1, :, 2, 9] -= 60  # down, and further
    found = select(momentum(responses), Selection(top_rate=2 / 150))[1]
    assert found.scores.tolist() == [1, 1]
    assert found.rows.tolist() == [[2, 9], [0, 3]]


def test_the_score_has_no_scale():
    responses = drawn(3, (2, 20, 1, 6))
    scaled = responses * torch.tensor([1e-20, 1e-3, 1.0, 7.0, 1e3, 1e15])
    assert torch.equal(momentum(scaled).values, momentum(responses).values)


def test_equal_pairs_are_neither_up_nor_down():
    rates = momentum_rates(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2))
    assert not rates.rate_up.any()
    assert not rates.rate_down.any()
    assert not momentum(torch.zeros(2, 4, 1, 2)).values.any()


def test_the_smallest_difference_is_seen():
    tiny = torch.tensor([5e-324, 0.0], dtype=torch.float64)[:, None, None]
    assert momentum_rates(tiny, torch.zeros_like(tiny)).rate_up.tolist() == [[0.5]]


def test_unequal_texts_are_refused():
    with pytest.raises(UsageError, match="4, 4, 5"):
        momentum([torch.ones(4, 1, 2), torch.ones(4, 1, 2), torch.ones(5, 1, 2)])
    with pytest.raises(UsageError, match="parallel text"):
        momentum_rates(torch.ones(4, 1, 2), torch.ones(1, 1, 2))
    with pytest.raises(UsageError, match="parallel text"):
        momentum([torch.ones(4, 1, 2), torch.ones(4, 1, 3)])


def test_nothing_to_compare_is_refused():
    with pytest.raises(UsageError, match="no pairs"):
        momentum_rates(torch.ones(0, 1, 2), torch.ones(0, 1, 2))
    with pytest.raises(UsageError, match="no pairs"):
        momentum(torch.ones(2, 0, 1, 2))
    with pytest.raises(UsageError, match="at least two"):
        momentum(torch.ones(1, 4, 1, 2))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_response_that_is_not_finite_is_named(wrong):
    responses = drawn(0, (3, 20, 2, 4))
    responses[2, 17, 1, 3] = wrong
    with pytest.raises(BrocaError, match="neuron 3 in layer 1"):
        momentum(responses)
    with pytest.raises(BrocaError, match="neuron 3 in layer 1"):
        momentum_rates(responses[0], responses[2])


def test_responses_to_the_same_lines_are_not_copied():
    responses = {k: torch.zeros(3, 1, 2) for k in ("qaa", "qab")}
    lines = {"qaa": torch.tensor([0, 1, 4]), "qab": torch.tensor([0, 1, 4])}
    counts = torch.ones(2, dtype=torch.int64)
    held = Statistics(("qaa", "qab"), counts, counts, {}, "", responses=responses, lines=lines)
    assert momentum_module._parallel_responses(held)[0] is responses["qaa"]
