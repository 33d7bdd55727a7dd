"""The input of a direction method, texts at one site of one layer, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Texts:
    """Texts' means at one site of one layer.

    Attributes:
        source: float64 [n_source, d].
        target: float64 [n_target, d].
        differences: float64 [n, d], target minus source of each line that both have; None for methods
            without parallel text.
        diffmean: float64 [d], mean of target minus mean of source.
        means: float64 [K, d], the mean of each language of the corpus; source and target among them.
    """

    source: torch.Tensor
    target: torch.Tensor
    differences: torch.Tensor | None
    diffmean: torch.Tensor
    means: torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """A direction at one site of one layer.

    Attributes:
        vector: float64 [d], from source to target, in the method's length.
        basis: float64 [d, r], orthonormal columns, or None.
        measures: name -> a figure of the method.
    """

    vector: torch.Tensor
    basis: torch.Tensor | None = None
    measures: dict[str, float] = field(default_factory=dict)
