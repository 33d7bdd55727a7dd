"""AUSteer while the model runs (arXiv 2602.04428): x_i <- x_i (1 + gamma_i) for the channels of most momentum.

gamma_i = +alpha r+ or -alpha r-, whichever rate is larger (``editing.methods.austeer`` has the whole of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from editing.hooks.scaled_inputs import scaled_inputs
from editing.methods.austeer import ALPHA, CHANNELS, austeer, rates_of
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.models.source import LoadedModel
from neurons.scorers.momentum import MomentumRates
from neurons.scorers.setting import setting


@dataclass(frozen=True)
class Austeer:
    """AUSteer by rates.

    Attributes:
        loaded: the model.
        rates: block -> its rates, of target against source.
        channels: how many, over all layers and blocks together.
        alpha: below 0 steers from target to source.
    """

    loaded: LoadedModel
    rates: Mapping[str, MomentumRates]
    channels: int = CHANNELS
    alpha: float = ALPHA

    def __call__(self) -> AbstractContextManager[None]:
        factors = {}
        for block, found in austeer(self.rates, self.channels, self.alpha).items():
            factors[block] = torch.ones(self.rates[block].rate_up.shape, dtype=torch.float64)
            factors[block][found.places[:, 0], found.places[:, 1]] = 1 + found.gamma
        return scaled_inputs(self.loaded, factors)


@dataclass(frozen=True, kw_only=True)
class AusteerHook(Hook):
    """The method, with the rates of a study's text."""

    name = "austeer"
    title = "AUSteer hook"
    line = "the channels that tell translations apart, scaled"
    source = "arXiv 2602.04428"
    weakened_by = "alpha"

    alpha: float = setting(ALPHA, grid=(1.0, 2.0, 4.0))
    channels: int = setting(CHANNELS, grid=(CHANNELS,))

    def prepare(self, material: Material) -> tuple[LoadedModel, Mapping[str, MomentumRates]]:
        return material.loaded, rates_of(material)

    def hooks(self, prepared: tuple[LoadedModel, Mapping[str, MomentumRates]]) -> Steering:
        """
        Raises:
            BrocaError: fewer channels than that differ between the languages.
        """
        steering = Austeer(*prepared, self.channels, self.alpha)
        with steering():  # refuses here what it would refuse while it is measured
            pass
        return steering
