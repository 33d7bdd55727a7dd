"""The localizer against Welch's formula in loops, by scipy on the raw texts, and by planted neurons."""

import math
import random

import pytest
import torch
from scipy import stats

from neurons.errors import BrocaError, UsageError
from neurons.scorers.localizer import localizer


def sums(texts):
    """(sum |m|, sum m^2, n) of texts[k] = [n_k, L, I]."""
    return (
        torch.stack([m.double().abs().sum(0) for m in texts], dim=-1),
        torch.stack([m.double().square().sum(0) for m in texts], dim=-1),
        torch.tensor([len(m) for m in texts]),
    )


def sizes(texts, k, layer, neuron):
    """|m| of language k, and of all others."""
    own = [abs(float(m)) for m in texts[k][:, layer, neuron]]
    others = [abs(float(m)) for j, part in enumerate(texts) if j != k for m in part[:, layer, neuron]]
    return own, others


def naive_welch(one, other):
    """(t, degrees of freedom) from the raw values."""
    error = []
    for values in (one, other):
        mean = sum(values) / len(values)
        error.append(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
    t = (sum(one) / len(one) - sum(other) / len(other)) / math.sqrt(sum(error))
    freedom = sum(error) ** 2 / (error[0] ** 2 / (len(one) - 1) + error[1] ** 2 / (len(other) - 1))
    return t, freedom


def naive_adjusted(p):
    """Benjamini-Hochberg: the least over q >= p of q * count / (how many are at most q), at most 1."""
    return [min(1.0, *(q * len(p) / sum(r <= q for r in p) for q in p if q >= own)) for own in p]


def drawn(seed, counts=(5, 2, 9), layers=2, width=11):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(layers, width, generator=generator) * 10
    return [torch.randn(n, layers, width, generator=generator) * scale + k / 3 for k, n in enumerate(counts)]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formula(seed):
    texts = drawn(seed)
    scores = localizer(*sums(texts))
    assert scores.values.shape == (2, 11, 3)
    assert scores.values.dtype == torch.float64
    assert scores.exclusivity is None
    assert scores.tie is None
    assert scores.notes == {}
    for k in range(3):
        for layer in range(2):
            for neuron in range(11):
                expected, _ = naive_welch(*sizes(texts, k, layer, neuron))
                found = float(scores.values[layer, neuron, k])
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)
                assert bool(scores.member[layer, neuron, k]) is (expected > 0)


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_members_are_significant(seed, rate):
    texts = drawn(seed, counts=(6, 4, 12))
    for k in range(3):
        texts[k][:, 0, 3 * k : 3 * k + 3] += 60
    scores = localizer(*sums(texts), rate)
    assert scores.notes == {"false_discovery_rate": rate}
    some = 0
    for k in range(3):
        places = [(layer, neuron) for layer in range(2) for neuron in range(11)]
        t, p = [], []
        for place in places:
            own, others = sizes(texts, k, *place)
            statistic, freedom = naive_welch(own, others)
            t.append(statistic)
            p.append(2 * float(stats.t.sf(abs(statistic), freedom)))
            witness = stats.ttest_ind(own, others, equal_var=False)
            assert (statistic, p[-1]) == pytest.approx((witness.statistic, witness.pvalue), rel=1e-8)
        adjusted = naive_adjusted(p)
        assert adjusted == pytest.approx(stats.false_discovery_control(p).tolist(), rel=1e-12)
        for place, statistic, q in zip(places, t, adjusted, strict=True):
            expected = statistic > 0 and q <= rate
            assert bool(scores.member[(*place, k)]) is expected
            some += expected
    assert some >= 9
    assert torch.equal(scores.values, localizer(*sums(texts)).values)


def test_a_false_discovery_rate_keeps_chance_out():
    texts = drawn(0, counts=(30, 30, 30), layers=4, width=200)
    texts = [part - k / 3 for k, part in enumerate(texts)]  # no language differs
    texts[1][:, 2, 50] += 100
    plain, strict = localizer(*sums(texts)), localizer(*sums(texts), 0.01)
    assert int(plain.member.sum()) > 900
    assert strict.member[..., 1].nonzero().tolist() == [[2, 50]]
    assert not strict.member[..., [0, 2]].any()


def test_a_planted_neuron_is_first_whichever_its_sign():
    texts = drawn(7, counts=(20, 20), layers=3, width=60)
    texts[0][:, 1, 30] -= 80
    texts[1][:, 2, 5] += 80
    values = localizer(*sums(texts)).values
    assert int(values[..., 0].flatten().argmax()) == 1 * 60 + 30
    assert int(values[..., 1].flatten().argmax()) == 2 * 60 + 5
    # Two languages are each other's rest.
    assert torch.allclose(values[..., 0], -values[..., 1], rtol=1e-12, atol=0)


def test_without_any_variance():
    own = torch.tensor([0.0, 2.0, 3.0, 0.1, 2.0])
    other = torch.tensor([0.0, 2.0, 2.0, 0.1, 3.0])
    texts = [own.expand(7, 1, 5), other.expand(4, 1, 5)]
    scores = localizer(*sums(texts), 1.0)
    assert scores.values[0, :, 0].tolist() == [0, 0, -math.inf, 0, -math.inf]
    assert scores.values[0, :, 1].tolist() == [0, 0, -math.inf, 0, -math.inf]
    assert not scores.member.any()


def test_variance_on_one_side_is_enough():
    varied = [1.0, 2.0, 3.0, 4.0]
    texts = [torch.tensor(varied)[:, None, None], torch.full((5, 1, 1), 2.0)]
    expected, _ = naive_welch(varied, [2.0] * 5)
    assert localizer(*sums(texts)).values[0, 0].tolist() == pytest.approx([expected, -expected], rel=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_what_rounding_leaves_is_no_variance(seed):
    """Sums of a constant may give a variance just above 0 or below it; neither may make a t."""
    chooser = random.Random(seed)
    constants = torch.tensor([chooser.uniform(0.01, 1000) for _ in range(200)], dtype=torch.float64)
    counts = torch.tensor([997, 31])
    absolute = torch.stack([sum([constants] * int(n)) for n in counts], dim=-1)[None]
    square = torch.stack([sum([constants**2] * int(n)) for n in counts], dim=-1)[None]
    raw = square - absolute**2 / counts
    assert bool((raw < 0).any())
    assert bool((raw > 0).any())
    assert bool((localizer(absolute, square, counts, 0.5).values == 0).all())


def test_a_small_but_true_variance_counts():
    generator = torch.Generator().manual_seed(0)
    texts = [100 + torch.randn(50, 1, 1, generator=generator, dtype=torch.float64) * 0.01 for _ in range(2)]
    texts[0] += 0.1
    expected, _ = naive_welch(*sizes(texts, 0, 0, 0))
    assert float(localizer(*sums(texts)).values[0, 0, 0]) == pytest.approx(expected, rel=1e-5)


def test_a_rare_language_is_not_drowned():
    # The small languages' own sums must not be lost in a difference from the total.
    texts = [torch.tensor([1e9, 3e9])[:, None, None], torch.tensor([1.0, 2.0])[:, None, None]]
    texts.append(torch.tensor([5.0, 7.0])[:, None, None])
    values = localizer(*sums(texts)).values
    expected, _ = naive_welch([1e9, 3e9], [1.0, 2.0, 5.0, 7.0])
    assert float(values[0, 0, 0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e-90, 1e90])
def test_t_has_no_scale(scale):
    texts = [part.double() for part in drawn(1)]
    plain = localizer(*sums(texts), 0.4)
    scaled = localizer(*sums([part * scale for part in texts]), 0.4)
    assert torch.allclose(scaled.values, plain.values, rtol=1e-9)
    assert torch.equal(scaled.member, plain.member)


def test_bad_input_is_refused():
    absolute, square, texts = sums(drawn(0))
    with pytest.raises(UsageError, match="at least two"):
        localizer(absolute[..., :1], square[..., :1], texts[:1])
    with pytest.raises(UsageError, match="number 3 has 1"):
        localizer(absolute, square, torch.tensor([5, 2, 1]))
    for rate in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match="false discovery rate"):
            localizer(absolute, square, texts, rate)
    absolute[1, 4, 2] = math.nan
    with pytest.raises(BrocaError, match="neuron 4 in layer 1"):
        localizer(absolute, square, texts)


@pytest.mark.parametrize("seed", range(3))
def test_the_rate_is_compared_with_the_p_of_the_units_own_freedom(seed):
    """A single unit's p needs no adjustment."""
    texts = drawn(seed, counts=(2, 3, 2), layers=1, width=1)
    for k in range(3):
        witness = stats.ttest_ind(*sizes(texts, k, 0, 0), equal_var=False)
        for factor in (1 - 1e-6, 1 + 1e-6):
            rate = float(witness.pvalue) * factor
            member = localizer(*sums(texts), rate).member[0, 0, k]
            assert bool(member) is bool(witness.statistic > 0 and factor > 1)
