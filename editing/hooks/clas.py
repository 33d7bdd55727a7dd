"""CLAS at inference time (arXiv 2601.16390): scale shared neurons up and specific neurons down.

In the last layers, with h the input of ``down_proj``, a the strength, b the gain and g the loss,

    h2 = h (1 + b)  partial-shared        h2 = h (1 - g)  specific        h2 = h  all-shared, dead
    h' = (1 - a) h + a h2
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from editing.hooks.scaled_inputs import scaled_inputs
from editing.methods.clas import (
    SHARED_GAIN,
    SPECIFIC_LOSS,
    STRENGTH,
    ClasEdit,
    clas_factors,
    last_layers,
    text_means,
)
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.models.source import LoadedModel
from neurons.scorers.clas import clas_classes
from neurons.setting import setting


@dataclass(frozen=True)
class Clas:
    """CLAS with given classes of neurons.

    Attributes:
        loaded: the model.
        classes: int64 [L, I], indices into ``neurons.scorers.clas.CLASSES``.
        strength: a; below 0 shared neurons are scaled down and specific ones up.
        layers: to scale; None takes the last quarter.
        shared_gain: b.
        specific_loss: g.
    """

    loaded: LoadedModel
    classes: torch.Tensor
    strength: float = STRENGTH
    layers: tuple[int, ...] | None = None
    shared_gain: float = SHARED_GAIN
    specific_loss: float = SPECIFIC_LOSS

    def __call__(self) -> AbstractContextManager[None]:
        chosen = last_layers(self.loaded.anatomy.layers) if self.layers is None else self.layers
        factors = clas_factors(self.classes, self.strength, self.shared_gain, self.specific_loss)
        kept = torch.ones_like(factors)
        kept[list(chosen)] = factors[list(chosen)]
        return scaled_inputs(self.loaded, {"mlp": kept})


@dataclass(frozen=True, kw_only=True)
class ClasHook(Hook):
    """The registered method, with classes from the text of a study."""

    name = "clas"
    title = "CLAS hook"
    line = "scales shared neurons up and specific ones down in the last layers"
    source = ClasEdit.source

    strength: float = setting(STRENGTH, grid=(-5.0, -2.0, 2.0, 5.0))

    def prepare(self, material: Material) -> tuple[LoadedModel, torch.Tensor]:
        return material.loaded, clas_classes(text_means(material).text_mean("mlp_in"))

    def hooks(self, prepared: tuple[LoadedModel, torch.Tensor]) -> Steering:
        return Clas(*prepared, self.strength)
