"""Scores: the result of a scorer for every neuron and language, before selection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from neurons.errors import BrocaError


@dataclass(frozen=True)
class Scores:
    """The result of every scorer; ``neurons.scorers.selection`` selects neurons from it.

    Attributes:
        values: float64 [L, I, K]; larger values mean that the neuron is more specific to the language.  A
            score that is the same for all languages (LAPE's entropy) is repeated K times.
        member: bool [L, I, K], the languages that a neuron may belong to.
        exclusivity: float64 [L, I, K] or None: the language's fraction of the neuron's activity, 0 to 1,
            summing to 1 over languages (0 for an inactive neuron).
        tie: float64 [L, I, K] or None: of two equal values the one with the larger ``tie`` ranks first.
        kinds: int64 [L, I] or None: the kind of each neuron (``neurons.scorers.selection.kind_of``), if the method
            defines it; None: by the number of languages that select the neuron.
        places: bool [L, I] or None: where a layer has a neuron (``Statistics.places``); None: everywhere.
        notes: JSON values to be saved with the neuron set: thresholds, lambda, ...
    """

    values: torch.Tensor
    member: torch.Tensor
    exclusivity: torch.Tensor | None = None
    tie: torch.Tensor | None = None
    kinds: torch.Tensor | None = None
    places: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(torch.isnan(self.values).any()):
            layer, neuron, _ = torch.isnan(self.values).nonzero()[0].tolist()
            raise BrocaError(f"the score of neuron {neuron} in layer {layer} is not a number")

    def neurons_in(self, layers: Collection[int] | None) -> int:
        """Number of neurons in some layers; None: in all."""
        places = every_place(self.values) if self.places is None else self.places
        return int((places if layers is None else places[list(set(layers))]).sum())


def every_place(values: torch.Tensor) -> torch.Tensor:
    """bool [L, I], all true, for values [L, I, K]."""
    return torch.ones(values.shape[:2], dtype=torch.bool)


def fractions(values: torch.Tensor) -> torch.Tensor:
    """Each language's fraction of a non-negative quantity [L, I, K]; 0 where the sum is 0."""
    total = values.double().sum(-1, keepdim=True)
    return torch.where(total > 0, values.double() / total, 0.0)
