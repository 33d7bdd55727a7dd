"""AUSteer at inference time (arXiv 2602.04428): x_i <- x_i (1 + gamma_i) for the channels of largest momentum.

gamma_i = +alpha r+ or -alpha r-, whichever rate is larger (details in ``editing.methods.austeer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from editing.hooks.scaled_inputs import scaled_inputs
from editing.methods.austeer import ALPHA, CHANNELS, austeer, rates_of
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.models.source import LoadedModel
from neurons.scorers.momentum import MomentumRates
from neurons.setting import setting


@dataclass(frozen=True, kw_only=True)
class AusteerHook(Hook):
    """The registered method, with rates from the text of a study."""

    name = "austeer"
    title = "AUSteer hook"
    line = "scales the channels that separate translations"
    source = "arXiv 2602.04428"
    strength_setting = "alpha"

    alpha: float = setting(ALPHA, grid=(1.0, 2.0, 4.0))
    channels: int = setting(CHANNELS, grid=(CHANNELS,))

    def prepare(self, material: Material) -> tuple[LoadedModel, Mapping[str, MomentumRates]]:
        return material.loaded, rates_of(material)

    def hooks(self, prepared: tuple[LoadedModel, Mapping[str, MomentumRates]]) -> Steering:
        """
        Raises:
            BrocaError: fewer channels differ between the languages.
        """
        loaded, rates = prepared
        return partial(scaled_inputs, loaded, austeer(rates, self.channels, self.alpha))
