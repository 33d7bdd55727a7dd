"""Momentum: neurons that change in the same direction in nearly every contrastive pair (AUSteer, ICLR 2026).

Over N pairs of a neuron's responses x+ and x-:

    r+ = fraction of pairs with x+ > x-       r- = fraction with x- > x+       score = max(r+, r-)

A fraction has no scale, so layers are comparable; N pairs give only N + 1 values, so ties are common and
the larger mean |x+ - x-| ranks first.  For language k each of its texts is paired with the same text in
every other language: N * (K - 1) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.average_precision import responses_of
from neurons.scorers.means import require_several
from neurons.scorers.method import RESPONSES, TEXTS, Scorer
from neurons.scorers.scores import Scores
from neurons.statistics.statistics import Statistics

CHUNK = 16  # pairs compared at a time, as float64 of all neurons


@dataclass(frozen=True)
class MomentumRates:
    """Comparison of the pairs for every neuron.

    Attributes:
        rate_up: float64 [L, I], r+.
        rate_down: float64 [L, I], r-; the two sum to less than 1 where pairs are equal.
        difference: float64 [L, I], mean over pairs of |x+ - x-|.
    """

    rate_up: torch.Tensor
    rate_down: torch.Tensor
    difference: torch.Tensor


@dataclass(frozen=True)
class _Sums:
    """Over pairs, [L, I]: int64 counts of increases and decreases; float64 sum of |x+ - x-|."""

    up: torch.Tensor
    down: torch.Tensor
    difference: torch.Tensor


def momentum_rates(positive: torch.Tensor, negative: torch.Tensor) -> MomentumRates:
    """Compare pairs of responses.

    Args:
        positive: [N, L, I].
        negative: [N, L, I], the second response of each pair.

    Raises:
        UsageError: no pairs, or responses of different shapes.
        BrocaError: a response that is not finite.
    """
    pairs = len(positive)
    sums = _sums(positive, negative)
    return MomentumRates(
        rate_up=sums.up.double() / pairs,
        rate_down=sums.down.double() / pairs,
        difference=sums.difference / pairs,
    )


def momentum(responses: torch.Tensor | Sequence[torch.Tensor]) -> Scores:
    """Score every neuron for every language.

    Args:
        responses: [K, N, L, I], or K tensors [N, L, I]; text i of each language is a translation of text i
            of every other.

    Returns:
        Scores with max(r+, r-) as values, mean |x+ - x-| as tie; every neuron may belong to every language.

    Raises:
        UsageError: fewer than two languages, no texts, or different numbers of texts.
        BrocaError: a response that is not finite.
    """
    halves = list(responses)
    languages = len(halves)
    require_several(languages, "momentum")
    counts = [len(texts) for texts in halves]
    if len(set(counts)) > 1:
        raise UsageError(
            f"momentum needs parallel text, but the languages have {', '.join(map(str, counts))} texts"
        )
    up = [torch.zeros(halves[0].shape[1:], dtype=torch.int64, device=halves[0].device) for _ in halves]
    down = [torch.zeros_like(zeros) for zeros in up]
    difference = [torch.zeros_like(zeros, dtype=torch.float64) for zeros in up]
    for k in range(languages):
        for other in range(k + 1, languages):
            sums = _sums(halves[k], halves[other])
            up[k] += sums.up
            down[k] += sums.down
            up[other] += sums.down
            down[other] += sums.up
            difference[k] += sums.difference
            difference[other] += sums.difference
    pairs = counts[0] * (languages - 1)
    larger = torch.maximum(torch.stack(up, dim=-1), torch.stack(down, dim=-1))
    values = (larger.double() / pairs).cpu()
    return Scores(
        values=values,
        member=torch.ones_like(values, dtype=torch.bool),
        tie=(torch.stack(difference, dim=-1) / pairs).cpu(),
        notes={"pairs": pairs},
    )


def _sums(positive: torch.Tensor, negative: torch.Tensor) -> _Sums:
    if len(positive) == 0:
        raise UsageError("momentum: there are no pairs")
    if positive.shape != negative.shape:
        raise UsageError(
            f"momentum needs parallel text, but the responses have shapes {list(positive.shape)} and "
            f"{list(negative.shape)} (texts, layers, neurons)"
        )
    up = torch.zeros(positive.shape[1:], dtype=torch.int64, device=positive.device)
    down, difference = torch.zeros_like(up), torch.zeros_like(up, dtype=torch.float64)
    for start in range(0, len(positive), CHUNK):
        step = positive[start : start + CHUNK].double() - negative[start : start + CHUNK].double()
        # The sign is exact: in IEEE arithmetic two different numbers never have the difference 0.
        up += (step > 0).sum(0)
        down += (step < 0).sum(0)
        difference += step.abs().sum(0)
    if not bool(torch.isfinite(difference).all()):
        layer, neuron = (~torch.isfinite(difference)).nonzero()[0].tolist()
        raise BrocaError(f"a response of neuron {neuron} in layer {layer} is not finite")
    return _Sums(up, down, difference)


class Momentum(Scorer):
    """The registered scorer."""

    name = "momentum"
    line = "how often a neuron changes in the same direction between a text and its translations"
    source = "AUSteer, ICLR 2026"
    moments = (RESPONSES,)
    reads = TEXTS
    parallel = True

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        return momentum(_parallel_responses(statistics))


def _parallel_responses(statistics: Statistics) -> list[torch.Tensor]:
    """Responses to the lines that all languages have in common."""
    responses = responses_of(statistics)
    lines = [statistics.lines[language] for language in statistics.languages]
    common = lines[0]
    for other in lines[1:]:
        common = common[torch.isin(common, other)]
    if not len(common):
        raise UsageError(
            "no line has a text in every language: parallel text is needed, with line i the same text in each"
        )
    return [
        # A choice of rows is a copy, and responses are large.
        values if len(common) == len(numbers) else values[torch.isin(numbers, common)]
        for values, numbers in zip(responses, lines, strict=True)
    ]
