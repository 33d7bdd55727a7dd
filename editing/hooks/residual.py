"""Residual DiffMean: h += strength * v after one layer, at all positions (arXiv 2601.08331).

CLaS-Bench adds alpha times the unit vector; here strength multiplies the difference of the means, so
alpha = strength * ||v||.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.methods.baked_vector import hook_grid
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.architectures.sites import SiteHook, site_hooks
from neurons.models.source import LoadedModel


def residual_steering(
    loaded: LoadedModel, vector: torch.Tensor, layer: int, strength: float = 1.0
) -> AbstractContextManager[None]:
    """Context in which the residual stream is steered.

    Args:
        loaded: the model.
        vector: [d], v, not normalised.
        layer: the layer after which v is added.
        strength: multiplies v.
    """
    added = (vector * strength).to(loaded.device, loaded.model.dtype)
    hooks: dict[tuple[str, int], SiteHook] = {
        ("block_out", layer): lambda values, _: values + added.to(values.device)
    }
    return site_hooks(loaded.anatomy, hooks)


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
        return partial(residual_steering, *prepared, self.layer, self.strength)
