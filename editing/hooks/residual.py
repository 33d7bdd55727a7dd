"""Residual DiffMean: h += strength * v after one layer, at all positions (arXiv 2601.08331).

CLaS-Bench adds alpha times the unit vector; here strength is in multiples of the difference of the means, so
alpha = strength * ||v||.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from editing.hooks.steering import residual_steering
from neurons.models.source import LoadedModel


@dataclass(frozen=True)
class ResidualDiffMean:
    """Adds a vector to the residual stream.

    Attributes:
        loaded: the model.
        vector: [d], v, not normalised.
        layer: after which layer.
        strength: multiplies v.
    """

    loaded: LoadedModel
    vector: torch.Tensor
    layer: int
    strength: float = 1.0

    def __call__(self) -> AbstractContextManager[None]:
        return residual_steering(self.loaded, self.vector, self.layer, self.strength)
