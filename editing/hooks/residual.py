"""Residual DiffMean: h += strength * v after one layer, at all positions (arXiv 2601.08331).

CLaS-Bench adds alpha times the unit vector; here strength multiplies the difference of the means, so
alpha = strength * ||v||.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from editing.hooks.steering import residual_steering
from editing.methods.baked_vector import hook_grid
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.models.source import LoadedModel


@dataclass(frozen=True)
class ResidualDiffMean:
    """Adds a vector to the residual stream.

    Attributes:
        loaded: the model.
        vector: [d], v, not normalised.
        layer: the layer after which v is added.
        strength: multiplies v.
    """

    loaded: LoadedModel
    vector: torch.Tensor
    layer: int
    strength: float = 1.0

    def __call__(self) -> AbstractContextManager[None]:
        return residual_steering(self.loaded, self.vector, self.layer, self.strength)


@dataclass(frozen=True, kw_only=True)
class DiffMean(Hook):
    """The registered method, with the direction of a study."""

    name = "diffmean"
    title = "DiffMean hook"
    line = "adds strength * v to the residual stream after a layer"
    source = "arXiv 2601.08331"

    layer: int

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        return hook_grid(material.loaded.anatomy.layers)

    def prepare(self, material: Material) -> tuple[LoadedModel, torch.Tensor]:
        return material.loaded, material.direction.vectors["block_out"][self.layer]

    def hooks(self, prepared: tuple[LoadedModel, torch.Tensor]) -> Steering:
        return ResidualDiffMean(*prepared, self.layer, self.strength)
