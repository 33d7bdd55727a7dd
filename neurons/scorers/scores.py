"""Scores: what a scorer says of every neuron and language, before any is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from neurons.errors import BrocaError


@dataclass(frozen=True)
class Scores:
    """What every scorer ends in; ``neurons.scorers.selection`` turns it into neurons.

    Attributes:
        values: float64 [L, I, K]; the larger, the more the neuron is that language's.  A score that is
            the same for all languages (LAPE's entropy) is repeated K times.
        member: bool [L, I, K], the languages that a neuron may belong to at all.
        share: float64 [L, I, K] or None: the language's part of what the neuron does, 0 to 1, summing to
            1 over languages (0 for a neuron that does nothing).
        tie: float64 [L, I, K] or None: which of two equal values goes first, the larger.
        notes: JSON values that the scorer wants remembered: thresholds, lambda, ...
    """

    values: torch.Tensor
    member: torch.Tensor
    share: torch.Tensor | None = None
    tie: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(torch.isnan(self.values).any()):
            layer, neuron, _ = torch.isnan(self.values).nonzero()[0].tolist()
            raise BrocaError(f"the score of neuron {neuron} in layer {layer} is not a number")


def shares(values: torch.Tensor) -> torch.Tensor:
    """Each language's part of a non-negative quantity [L, I, K]; 0 where there is nothing to share."""
    total = values.double().sum(-1, keepdim=True)
    return torch.where(total > 0, values.double() / total, 0.0)
