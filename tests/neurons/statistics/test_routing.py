"""Routing of a mixture by language: shares and divergence against loops, and a planted routing."""

import math

import pytest
import torch

from neurons.errors import UsageError
from neurons.statistics.routing import (
    ROUTING,
    default_top,
    routed_fraction,
    routing_divergence,
    routing_shares,
)
from neurons.statistics.statistics import Statistics, merge, subtract

LANGUAGES = ("qaa", "qab", "qac")


def drawn_statistics(seed, layers=3, experts=6, groups=7, dense=1):
    """Random counts of ``experts`` and one shared expert; a layer without a router."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(500, 900, (3,), generator=generator)
    routed = torch.randint(0, 400, (layers, groups, 3), generator=generator)
    routed[0, :2, 1] = 17  # a tie
    routed[2, 3] = 0  # an expert without tokens
    scores = torch.rand(layers, experts, 3, generator=generator, dtype=torch.float64)
    scores[dense] = 0
    return Statistics(LANGUAGES, tokens, tokens, {ROUTING: scores}, "f" * 16, routed)


@pytest.mark.parametrize("top", [1, 2, 4, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_are_those_of_loops(seed, top):
    statistics = drawn_statistics(seed)
    fraction = routed_fraction(statistics)
    assert fraction.shape == (3, 6, 3) and fraction.dtype == torch.float64
    shares = routing_shares(fraction, top)
    for layer in range(3):
        kept = [[0.0] * 3 for _ in range(6)]
        for k in range(3):
            counts = [int(statistics.routed[layer, e, k]) * (layer != 1) for e in range(6)]
            for expert in sorted(range(6), key=lambda e: (-counts[e], e))[:top]:
                kept[expert][k] = counts[expert] / int(statistics.tokens[k])
        for expert in range(6):
            total = sum(kept[expert])
            expected = [value / total if total else 0.0 for value in kept[expert]]
            assert shares[layer, expert].tolist() == pytest.approx(expected, abs=1e-15)


def test_divergence_is_that_of_loops():
    fraction = routed_fraction(drawn_statistics(2))
    for layer, found in enumerate(routing_divergence(fraction).tolist()):
        if layer == 1:
            assert found == 0
            continue
        p = [[float(fraction[layer, e, k] / fraction[layer, :, k].sum()) for e in range(6)] for k in range(3)]
        mixed = [sum(column) / 3 for column in zip(*p, strict=True)]
        terms = [x * math.log(x / m) for row in p for x, m in zip(row, mixed, strict=True) if x]
        assert found == pytest.approx(sum(terms) / 3 / math.log(3), abs=1e-14)


def test_languages_with_experts_of_their_own():
    """Disjoint experts have divergence 1 and share 1, common ones 0 and 1/K."""
    apart = torch.eye(3, dtype=torch.float64)[None]
    assert routing_divergence(apart).tolist() == pytest.approx([1.0])
    assert torch.equal(routing_shares(apart), apart)
    alike = torch.full((1, 3, 3), 1 / 3, dtype=torch.float64)
    assert routing_divergence(alike).tolist() == pytest.approx([0.0], abs=1e-15)
    assert routing_shares(alike, 3).flatten().tolist() == pytest.approx([1 / 3] * 9)


def test_an_expert_that_no_language_uses_is_no_languages_own():
    """15 experts of a language for 8 a token: 2 for 1, 4 for 2."""
    fraction = torch.tensor([[0.7, 0.6], [0.2, 0.38], [0.1, 0.01], [0.0, 0.01]], dtype=torch.float64)[None]
    assert default_top(fraction) == 2 and default_top(2 * fraction) == 4 and default_top(8 * fraction) == 15
    assert routing_shares(fraction)[0, 2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert routing_shares(fraction, 4)[0, 3].tolist() == [0.0, 1.0]


def test_what_is_refused():
    dense = Statistics(LANGUAGES, torch.ones(3), torch.ones(3), {}, "f" * 16)
    with pytest.raises(UsageError, match="no experts"):
        routed_fraction(dense)
    with pytest.raises(UsageError, match=ROUTING):
        routed_fraction(
            Statistics(LANGUAGES, torch.ones(3), torch.ones(3), {}, "f" * 16, torch.ones(2, 4, 3))
        )
    with pytest.raises(UsageError, match="top 0"):
        routing_shares(torch.ones(1, 2, 2), 0)


def test_scores_merge_and_subtract():
    first, second = drawn_statistics(3), drawn_statistics(4)
    both = merge(first, second)
    assert torch.equal(both.moments[ROUTING], first.moments[ROUTING] + second.moments[ROUTING])
    assert torch.equal(
        subtract(both, first).moments[ROUTING], (both.moments[ROUTING] - first.moments[ROUTING]).clamp(min=0)
    )
