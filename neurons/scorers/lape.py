"""LAPE, language activation probability entropy (Tang et al., ACL 2024, arXiv 2402.16438).

With c[l, j, k] the number of tokens of language k on which neuron (l, j) is active and n_k the tokens of k:

    P = c / n_k          Q = P / sum_k P  (0/0 -> 0)          H = -sum_k Q ln Q  (nats, 0 ln 0 = 0)

1. tau = the round(filter_rate * L*I*K)-th smallest P; a neuron with no P > tau is excluded (H = +inf).
2. The round(top_rate * L*I) neurons of smallest H are kept, over all layers together: that is
   ``select(scores, Selection(scope="global", top_rate=...))``, with 0.01 in section 4.1 of the paper.
3. bar = the round(activation_rate * L*I*K)-th smallest P; a kept neuron belongs to every language
   with P > bar: several, one or none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.scorers.means import means, require_rate, require_several
from neurons.scorers.method import Scorer
from neurons.scorers.scores import Scores, fractions
from neurons.scorers.selection import Selection
from neurons.setting import setting
from neurons.statistics.statistics import Statistics

FILTER_RATE = 0.95  # the released code, as is ACTIVATION_RATE
ACTIVATION_RATE = 0.95


def lape(
    positive: torch.Tensor,
    seen: torch.Tensor,
    filter_rate: float = FILTER_RATE,
    activation_rate: float = ACTIVATION_RATE,
    places: torch.Tensor | None = None,
) -> Scores:
    """Score every neuron.

    Args:
        positive: int64 [L, I, K], tokens with activation > 0.
        seen: int64 [K], tokens; or [L, I, K], tokens routed to each neuron's expert.
        filter_rate: fraction of all P at or below tau.
        activation_rate: fraction of all P at or below bar.
        places: bool [L, I], where a layer has a neuron; None: everywhere.

    Returns:
        values -H, the same for all languages, -inf for a neuron that the filter removed; member P > bar;
        exclusivity Q; notes "tau" and "bar".

    Raises:
        UsageError: fewer than two languages, a language without tokens, or a rate outside (0, 1].
        BrocaError: a count that is not finite.
    """
    require_several(positive.shape[-1], "LAPE")
    return entropy_scores(means(positive, seen), filter_rate, activation_rate, places)


def entropy_scores(
    probability: torch.Tensor, filter_rate: float, activation_rate: float, places: torch.Tensor | None
) -> Scores:
    """Steps 1 to 3 without the selection, for any non-negative P [L, I, K].

    Raises:
        UsageError: a rate outside (0, 1].
    """
    require_rate("filter rate", filter_rate)
    require_rate("activation rate", activation_rate)
    existing = probability if places is None else probability[places]
    tau = smallest(existing, filter_rate)
    bar = smallest(existing, activation_rate)
    values = torch.where((probability > tau).any(-1), -entropy(probability), -torch.inf)
    return Scores(
        values=values[..., None].expand_as(probability),
        member=probability > bar,
        exclusivity=fractions(probability),
        notes={"tau": tau, "bar": bar},
    )


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """H of a non-negative quantity normalised over languages, nats, float64 [L, I]; 0 where the sum is 0."""
    normalised = fractions(probability)
    return -torch.xlogy(normalised, normalised).sum(-1)


def smallest(values: torch.Tensor, rate: float) -> float:
    """The round(rate * count)-th smallest value, counted from 1."""
    rank = max(1, round(rate * values.numel()))
    return float(torch.kthvalue(values.flatten(), rank).values)


@dataclass(frozen=True)
class Lape(Scorer):
    """The registered scorer."""

    name = "lape"
    line = "entropy over languages of the probability that a neuron is active"
    source = "arXiv 2402.16438"
    moments = ("mlp_act:positive",)
    selection = Selection(scope="global", top_rate=0.01)

    filter_rate: float = setting(
        FILTER_RATE, "quantile of all firing rates that a neuron must exceed in some language"
    )
    activation_rate: float = setting(
        ACTIVATION_RATE, "quantile of all firing rates above which a neuron belongs to a language"
    )

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        fires = statistics.moment("mlp_act:positive")
        places = statistics.places(self.unit, fires)
        return lape(fires, statistics.seen(), self.filter_rate, self.activation_rate, places)
