"""From texts' losses to the ablation matrix: changes of loss with intervals, and specificity as one figure.

D[i, j] is the rise of language j's mean negative log-likelihood (nats a token) when language i's neurons are
ablated.  Specificity is the mean of D's diagonal over the mean of what lies off it: how many times more the
own language is hurt than another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.ablation.conditions import TextLosses
from neurons.files.json_file import Figure, Quotient
from neurons.statistics.bootstrap import (
    CONFIDENCE,
    DRAWS,
    bca_interval,
    percentile_interval,
    ratio,
    replicates,
    without_each,
)


@dataclass(frozen=True)
class Changes:
    """What conditions do to languages; [C, K] each, float64, nats a token.

    Attributes:
        nll: mean negative log-likelihood under the condition.
        change: the same less that of the untouched model.
        low: lower end of the change's interval.
        high: its upper end.
    """

    nll: torch.Tensor
    change: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def of(self, conditions: Sequence[int]) -> Changes:
        """Some of the conditions, in this order."""
        own = list(conditions)
        return Changes(self.nll[own], self.change[own], self.low[own], self.high[own])


@dataclass(frozen=True)
class Specificity:
    """A matrix as one figure.

    Attributes:
        value: mean of the diagonal / mean of the rest; inf where the rest does not rise and the diagonal
            does, 0 where the diagonal does not rise.
        interval: its lower and upper end.
        own: mean of the diagonal, nats a token.
        other: mean of the rest, nats a token.
    """

    value: Quotient
    interval: tuple[Quotient, Quotient]
    own: Figure
    other: Figure


def bootstrapped(
    losses: TextLosses,
    kept: Sequence[int] = (),
    draws: int = DRAWS,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> tuple[Changes, dict[int, torch.Tensor]]:
    """Changes of loss with BCa intervals over texts.

    Texts are drawn apart in each language; a text is drawn with its losses under all conditions, so
    differences between conditions are those on the same text.

    Args:
        losses: condition 0 is the model as it is.
        kept: conditions whose replicates are wanted, for ``specificity``.
        draws: bootstrap samples.

    Returns:
        The changes of all conditions, and condition of ``kept`` -> replicates of its changes, float64 [draws, K].
    """
    columns, drawn = [], []
    for place, (language, sums) in enumerate(losses.sums.items()):
        tokens = losses.tokens[language]
        rises = sums - sums[:, [0]]
        estimate = ratio(rises, tokens)
        some = replicates(rises, tokens, draws, seed * len(losses.sums) + place)
        ends = bca_interval(some, estimate, without_each(rises, tokens), confidence)
        columns.append(torch.stack([ratio(sums, tokens), estimate, *ends]))
        drawn.append(some[:, list(kept)])
    changes = Changes(*torch.stack(columns, dim=-1))
    by_condition = torch.stack(drawn, dim=-1)
    return changes, {c: by_condition[:, i] for i, c in enumerate(kept)}


def specificity(matrix: torch.Tensor, drawn: torch.Tensor, confidence: float = CONFIDENCE) -> Specificity:
    """Diagonal over off-diagonal, with a percentile interval.

    Args:
        matrix: D, float64 [K, K], K at least 2.
        drawn: its replicates, float64 [draws, K, K].
    """
    own, other = _parts(matrix[None])
    low, high = percentile_interval(_quotient(*_parts(drawn)), confidence).tolist()
    value = float(_quotient(own, other)[0])
    return Specificity(value, (low, high), float(own[0]), float(other[0]))


def clear_of(own: Changes, controls: Sequence[Changes]) -> list[bool]:
    """For each language, whether its own change's interval lies above that of every control (diagonals)."""
    highest = [control.high.diagonal() for control in controls]
    return [
        all(low > float(high[i]) for high in highest) for i, low in enumerate(own.low.diagonal().tolist())
    ]


def largest_is_own(own: Changes) -> list[bool]:
    """For each language, whether ablating its neurons hurts it, and no other language more."""
    diagonal = own.change.diagonal()
    return ((diagonal > 0) & (diagonal >= own.change.amax(1))).tolist()


def by_language(values: torch.Tensor, languages: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """[K, K, ...] as ablated language -> measured language -> value, a list where there are more dimensions."""
    return {
        ablated: dict(zip(languages, row, strict=True))
        for ablated, row in zip(languages, values.tolist(), strict=True)
    }


def perplexity(nll: float) -> float:
    """e to the mean negative log-likelihood; inf where that is beyond numbers."""
    return math.exp(nll) if nll < 700 else math.inf


def _parts(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the diagonals and of the rest, [n] each, of matrices [n, K, K]."""
    count = matrices.shape[-1]
    diagonal = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    rest = matrices.sum((-2, -1)) - diagonal
    return diagonal / count, rest / (count * (count - 1))


def _quotient(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    quotient = torch.where(other > 0, own / other, torch.inf)
    return torch.where(own > 0, quotient, 0.0)
