"""CLAS at inference time (arXiv 2601.16390): scale shared neurons up and specific neurons down.

In the last layers, with h the input of ``down_proj``, a the strength, b the gain and g the loss,

    h2 = h (1 + b)  partial-shared        h2 = h (1 - g)  specific        h2 = h  all-shared, dead
    h' = (1 - a) h + a h2
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from editing.hooks.scaled_inputs import scaled_inputs
from editing.methods.clas import STRENGTH, ClasEdit, clas_factors, last_layers, text_means
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.models.source import LoadedModel
from neurons.scorers.clas import clas_classes
from neurons.setting import setting


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
        loaded, classes = prepared
        factors = clas_factors(classes, self.strength)
        factors[: last_layers(len(factors))[0]] = 1
        return partial(scaled_inputs, loaded, {"mlp": factors})
