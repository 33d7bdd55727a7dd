"""AUSteer while the model runs (arXiv 2602.04428): x_i <- x_i (1 + gamma_i) for the channels of most momentum.

gamma_i = +alpha r+ or -alpha r-, whichever rate is larger (``editing.methods.austeer`` has the whole of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from editing.hooks.scaled_inputs import scaled_inputs
from editing.methods.austeer import ALPHA, CHANNELS, austeer
from neurons.models.source import LoadedModel
from neurons.scorers.momentum import MomentumRates


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
