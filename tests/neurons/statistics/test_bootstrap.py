"""Bootstrap intervals against scipy's, and by cases whose answer is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from neurons.errors import UsageError
from neurons.statistics.bootstrap import bca_interval, percentile_interval, ratio, replicates, without_each


def texts(count, seed=0, columns=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (count,), generator=generator)
    sums = torch.randn(count, columns, generator=generator, dtype=torch.float64).exp() * tokens[:, None]
    return sums, tokens


def scipys(sums, tokens, method, confidence, draws, seed):
    return scipy.stats.bootstrap(
        (sums[:, 0].numpy(), tokens.double().numpy()),
        lambda a, n, axis=-1: a.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=draws,
        confidence_level=confidence,
        method=method,
        rng=np.random.default_rng(seed),
    )


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("count", [12, 23])
def test_equals_scipy(count, confidence):
    sums, tokens = texts(count, seed=count)
    drawn = replicates(sums, tokens, 999, seed=7)
    for method in ("percentile", "BCa"):
        expected = scipys(sums, tokens, method, confidence, 999, seed=7)
        np.testing.assert_allclose(
            np.sort(expected.bootstrap_distribution), drawn[:, 0].sort().values.numpy(), rtol=1e-12
        )
        found = (
            percentile_interval(drawn, confidence)
            if method == "percentile"
            else bca_interval(drawn, ratio(sums, tokens), without_each(sums, tokens), confidence)
        )
        np.testing.assert_allclose(found[:, 0].numpy(), expected.confidence_interval, rtol=1e-10)


def test_replicates_are_ratios_of_texts_drawn():
    sums, tokens = texts(9, columns=3)
    drawn = replicates(sums, tokens, 50, seed=3)
    chosen = np.random.default_rng(3).integers(0, 9, (50, 9))
    for b in range(50):
        for c in range(3):
            top = sum(float(sums[d, c]) for d in chosen[b])
            bottom = sum(int(tokens[d]) for d in chosen[b])
            assert float(drawn[b, c]) == pytest.approx(top / bottom, rel=1e-12)


def test_draws_in_pieces_are_the_same(monkeypatch):
    sums, tokens = texts(11)
    whole = replicates(sums, tokens, 40, seed=1)
    monkeypatch.setattr("neurons.statistics.bootstrap._DRAWN_AT_ONCE", 11 * 7)
    torch.testing.assert_close(replicates(sums, tokens, 40, seed=1), whole, rtol=1e-14, atol=0)


def test_without_each_text():
    sums, tokens = texts(6, columns=2)
    found = without_each(sums, tokens)
    for d in range(6):
        for c in range(2):
            left = [e for e in range(6) if e != d]
            expected = sum(float(sums[e, c]) for e in left) / sum(int(tokens[e]) for e in left)
            assert float(found[d, c]) == pytest.approx(expected, rel=1e-12)


def test_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(5, 30, (40,), generator=generator)
        noise = torch.randn(40, 1, generator=generator, dtype=torch.float64)
        sums = tokens[:, None] * (0.3 + noise)
        drawn = replicates(sums, tokens, 400, seed)
        low, high = bca_interval(drawn, ratio(sums, tokens), without_each(sums, tokens), 0.9)[:, 0].tolist()
        hits += low <= 0.3 <= high
    assert 165 <= hits <= 195


def test_what_never_changes_has_no_spread_and_one_text_no_interval():
    tokens = torch.tensor([3, 5, 7])
    sums = torch.zeros(3, 1, dtype=torch.float64)
    drawn = replicates(sums, tokens, 20, seed=0)
    found = bca_interval(drawn, ratio(sums, tokens), without_each(sums, tokens))
    assert found.flatten().tolist() == [0, 0]
    one, single = sums[:1] + 2, tokens[:1]
    drawn = replicates(one, single, 20, seed=0)
    assert torch.isnan(bca_interval(drawn, ratio(one, single), without_each(one, single))).all()


def test_samples_equal_to_the_estimate_count_half():
    tokens = torch.tensor([3, 5])
    sums = torch.tensor([[0.3], [1.1]], dtype=torch.float64)
    estimate, without = ratio(sums, tokens), without_each(sums, tokens)
    exact = torch.tensor([[0.1], [0.22], [float(estimate)], [float(estimate)]], dtype=torch.float64)
    rounded = exact.clone()
    rounded[2:] *= torch.tensor([[1 + 1e-15], [1 - 1e-15]], dtype=torch.float64)
    torch.testing.assert_close(
        bca_interval(rounded, estimate, without), bca_interval(exact, estimate, without)
    )


def test_infinite_replicates_are_in_order():
    drawn = torch.tensor([1.0, math.inf, 2.0, math.inf, 0.0], dtype=torch.float64)
    low, high = percentile_interval(drawn, 0.5).tolist()
    assert (low, high) == (1, math.inf)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(UsageError, match="confidence"):
        percentile_interval(torch.zeros(3, 1), confidence)


def test_no_draw_is_refused():
    sums, tokens = texts(3)
    with pytest.raises(UsageError, match="at least one"):
        replicates(sums, tokens, 0, seed=0)
