"""LAPE of gradient x activation: the entropy of how much a language's likelihood depends on a neuron.

As LAPE (arXiv 2402.16438), with the first-order attribution R (the Taylor criterion of arXiv 1611.06440)
in place of the probability of firing, so that the score does not depend on how often a neuron fires:

    R = mean over the tokens of language k of |h_j * dLoss/dh_j|
    Q = R / sum_k R          H = -sum_k Q ln Q

with tau, bar and the selection as in ``neurons.scorers.lape``.  R is in nats a token and is not
normalised: a language with harder tokens has larger R everywhere (``gradient_contrast`` normalises it).
"""

from __future__ import annotations

import torch

from neurons.scorers.gradient import mean_attribution
from neurons.scorers.lape import ACTIVATION_RATE, FILTER_RATE, Lape, entropy_scores
from neurons.scorers.means import require_several
from neurons.scorers.scores import Scores
from neurons.statistics.statistics import Statistics


def lape_gradient(
    attribution: torch.Tensor,
    seen: torch.Tensor,
    filter_rate: float = FILTER_RATE,
    activation_rate: float = ACTIVATION_RATE,
    places: torch.Tensor | None = None,
) -> Scores:
    """Score every neuron.

    Args:
        attribution: float64 [L, I, K], sum over tokens of |h * dLoss/dh|.
        seen: int64 [K], tokens; or [L, I, K], tokens routed to each neuron's expert.
        filter_rate: fraction of all R at or below tau.
        activation_rate: fraction of all R at or below bar.
        places: bool [L, I], where a layer has a neuron; None: everywhere.

    Returns:
        values -H, the same for all languages, -inf for a neuron that the filter removed; member R > bar;
        exclusivity Q; notes "tau" and "bar".

    Raises:
        UsageError: fewer than two languages, a language without tokens, or a rate outside (0, 1].
        BrocaError: an attribution that is not finite or is negative.
    """
    require_several(attribution.shape[-1], "LAPE of gradients")
    return entropy_scores(mean_attribution(attribution, seen), filter_rate, activation_rate, places)


class LapeGradient(Lape):
    """The registered scorer, with LAPE's settings."""

    name = "lape-gradient"
    line = "LAPE's entropy of gradient x activation instead of firing rates"
    source = "Broca, after arXiv 2402.16438"
    moments = ("mlp_in:attribution",)

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        attribution = statistics.moment("mlp_in:attribution")
        places = statistics.places(self.unit, attribution)
        return lape_gradient(attribution, statistics.seen(), self.filter_rate, self.activation_rate, places)
