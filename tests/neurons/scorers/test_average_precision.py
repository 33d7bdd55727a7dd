"""Average precision against its formula in loops, by published values and by planted neurons."""

import math

import numpy
import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers import average_precision as module
from neurons.scorers.average_precision import average_precision
from neurons.scorers.selection import Selection, select


def naive_average_precision(responses, labels):
    """Sum over distinct thresholds, from the largest, of (R_n - R_{n-1}) P_n."""
    result, before = 0.0, 0.0
    for threshold in sorted(set(responses), reverse=True):
        above = [label for response, label in zip(responses, labels, strict=True) if response >= threshold]
        recall = sum(above) / sum(labels)
        result += (recall - before) * sum(above) / len(above)
        before = recall
    return result


def naive_values(responses, layer, neuron):
    column = [float(x) for texts in responses for x in texts[:, layer, neuron]]
    owners = [k for k, texts in enumerate(responses) for _ in texts]
    return [naive_average_precision(column, [owner == k for owner in owners]) for k in range(len(responses))]


def assert_equals_the_formula(responses):
    scores = average_precision(responses)
    _, layers, width = responses[0].shape
    assert scores.values.shape == (layers, width, len(responses))
    for layer in range(layers):
        for neuron in range(width):
            expected = naive_values(responses, layer, neuron)
            assert scores.values[layer, neuron].tolist() == pytest.approx(expected, abs=1e-13)
    return scores


def test_published_values():
    drawn = torch.from_numpy(numpy.random.RandomState(1234).rand(10, 6))
    labels = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    responses = [drawn[:, labels].T[:, None], drawn[:, ~labels].T[:, None]]
    expected = [0.7222222, 0.5555556, 1, 1, 1, 0.6333333, 0.9166667, 0.7, 0.8055556, 0.7222222]
    assert average_precision(responses).values[0, :, 0].tolist() == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    counts = [5, 1, 9, 4][: 2 + seed]
    responses = [torch.randn(n, 2, 7, generator=generator).to(dtype) for n in counts]
    scores = assert_equals_the_formula(responses)
    assert scores.values.dtype == torch.float64
    assert scores.member.dtype == torch.bool
    assert scores.member.shape == scores.values.shape
    assert bool(scores.member.all())
    assert scores.exclusivity is None
    assert scores.tie is None
    assert scores.notes == {"chance": [n / sum(counts) for n in counts]}


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formula_with_many_ties(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    responses = [torch.randint(levels, (n, 1, 9), generator=generator).float() for n in (6, 3, 8)]
    assert_equals_the_formula(responses)


def test_a_tie_is_one_threshold():
    # By hand: at 1.0 one positive of two texts, at 0.0 two positives of four.
    responses = [torch.tensor([1.0, 0.0])[:, None, None], torch.tensor([1.0, -0.0])[:, None, None]]
    assert average_precision(responses).values[0, 0].tolist() == [0.5, 0.5]


def test_the_order_of_tied_texts_does_not_matter():
    responses = torch.randint(3, (30, 1, 20), generator=torch.Generator().manual_seed(1)).float()
    forward = average_precision([responses[:10], responses[10:]])
    backward = average_precision([responses[:10].flip(0), responses[10:].flip(0)])
    assert torch.equal(forward.values, backward.values)


def test_equal_to_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(60, 1, 8, generator=generator).round(decimals=1)
    values = average_precision([drawn[:20], drawn[20:]]).values
    labels = numpy.array([1] * 20 + [0] * 40)
    for neuron in range(8):
        column = drawn[:, 0, neuron].numpy()
        expected = [
            metrics.average_precision_score(labels, column),
            metrics.average_precision_score(1 - labels, column),
        ]
        assert values[0, neuron].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
def test_chunks_do_not_show(monkeypatch, chunk):
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(5, (n, 2, 7), generator=generator).float() for n in (4, 6)]
    whole = average_precision(responses)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert torch.equal(average_precision(responses).values, whole.values)


def test_planted_neurons_are_both_ends():
    generator = torch.Generator().manual_seed(3)
    responses = [torch.randn(40, 3, 50, generator=generator) for _ in range(3)]
    responses[1][:, 0, 7] += 9
    responses[1][:, 2, 49] += 9
    responses[1][:, 1, 20] -= 9
    responses[1][:, 1, 21] -= 9
    scores = average_precision(responses)
    assert scores.values[0, 7, 1] == scores.values[2, 49, 1] == 1
    found = select(scores, Selection(top_rate=2 / 150, ends="both"))[1]
    assert found.rows.tolist() == [[0, 7], [2, 49], [1, 20], [1, 21]]


def test_a_neuron_that_knows_nothing_is_near_chance():
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randn(n, 1, 20, generator=generator) for n in (500, 1500)]
    scores = average_precision(responses)
    assert scores.values[0].mean(0).tolist() == pytest.approx(scores.notes["chance"], abs=0.02)
    constant = average_precision([torch.ones(n, 1, 1) for n in (500, 1500)])
    assert constant.values[0, 0].tolist() == [0.25, 0.75]


def test_one_language_is_refused():
    with pytest.raises(UsageError, match="at least two"):
        average_precision([torch.ones(3, 1, 2)])


def test_a_language_without_texts_is_refused():
    with pytest.raises(UsageError, match="number 2 has no texts"):
        average_precision([torch.ones(3, 1, 2), torch.ones(0, 1, 2)])


def test_responses_of_two_models_are_refused():
    with pytest.raises(UsageError, match="number 2 has responses of 2 x 5"):
        average_precision([torch.ones(3, 2, 4), torch.ones(3, 2, 5)])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_response_that_is_not_finite_is_named(wrong):
    responses = [torch.ones(3, 2, 200), torch.ones(3, 2, 200)]
    responses[1][2, 1, 163] = wrong
    with pytest.raises(BrocaError, match="neuron 163 in layer 1"):
        average_precision(responses)
