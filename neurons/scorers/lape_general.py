"""LAPE with a penalty for neurons that belong to all languages (arXiv 2505.21505, AAAI 2026).

With P, Q and H as in ``neurons.scorers.lape`` and c the mean of 1, 1/2, ..., 1/K:

    score = H / ln K - lambda * max_k P / c

1. The round(top_rate * L*I) neurons of lowest score are kept, over all layers together; no filter.
2. bar = the round(activation_rate * L*I*K)-th smallest P; a neuron belongs to every language with P > bar.
3. lambda is the largest value in [0, max_penalty] for which no kept neuron belongs to all K languages, to
   within 0.001 by bisection.

The second term prefers neurons that fire often: for a general neuron H is large, and only a large lambda
would keep it.  A neuron that never fires has score 1, like one that fires equally for all, as in the released
code NJUNLP/Language-Neurons-Alignment (its H would be 0, the best).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neurons.errors import UsageError
from neurons.scorers.lape import ACTIVATION_RATE, entropy, smallest
from neurons.scorers.means import means, rate_count, require_rate, require_several
from neurons.scorers.method import Scorer
from neurons.scorers.scores import Scores, every_place, fractions
from neurons.scorers.selection import Selection
from neurons.setting import setting
from neurons.statistics.statistics import Statistics

TOP_RATE = 0.01  # the released code's sweep
MAX_PENALTY = 0.2  # the released code, as is PRECISION
PRECISION = 1e-3


def lape_general(
    positive: torch.Tensor,
    seen: torch.Tensor,
    top_rate: float = TOP_RATE,
    activation_rate: float = ACTIVATION_RATE,
    max_penalty: float = MAX_PENALTY,
    places: torch.Tensor | None = None,
) -> Scores:
    """Score every neuron.

    Where a kept neuron belongs to all languages even without a penalty, lambda is 0: exclude general neurons
    by ``Selection(kinds=("specific", "related"))``.

    Args:
        positive: int64 [L, I, K], tokens with activation > 0.
        seen: int64 [K], tokens; or [L, I, K], tokens routed to each neuron's expert.
        top_rate: fraction of all neurons for which lambda is searched; select the same fraction, globally.
        activation_rate: fraction of all P at or below bar.
        max_penalty: maximum lambda.
        places: bool [L, I], where a layer has a neuron; None: everywhere.

    Returns:
        values -score, the same for all languages; member P > bar; exclusivity Q; notes "lambda" and "bar".

    Raises:
        UsageError: fewer than two languages, a language without tokens, a rate outside (0, 1] or too
            small to keep a neuron, or a penalty that is negative or not finite.
        BrocaError: a count that is not finite.
    """
    languages = positive.shape[-1]
    require_several(languages, "LAPE")
    places = every_place(positive) if places is None else places
    kept = rate_count("top rate", top_rate, int(places.sum()))
    require_rate("activation rate", activation_rate)
    if not 0 <= max_penalty < math.inf:
        raise UsageError(f"the maximum penalty is {max_penalty}, but it must be finite and at least 0")
    probability = means(positive, seen)
    peak = probability.amax(-1)
    evenness = torch.where(peak > 0, entropy(probability) / math.log(languages), 1.0)
    relative_peak = peak / (sum(1 / j for j in range(1, languages + 1)) / languages)
    bar = smallest(probability[places], activation_rate)
    member = probability > bar
    general = member.all(-1)[places]

    def keeps_no_general(penalty: float) -> bool:
        score = (evenness - penalty * relative_peak)[places]
        return not bool(general[torch.argsort(score, stable=True)[:kept]].any())

    penalty = largest(keeps_no_general, max_penalty)
    values = penalty * relative_peak - evenness
    return Scores(
        values=values[..., None].expand_as(probability),
        member=member,
        exclusivity=fractions(probability),
        notes={"lambda": penalty, "bar": bar},
    )


def largest(holds: Callable[[float], bool], high: float) -> float:
    """The largest x in [0, high] for which ``holds``, within ``PRECISION``; 0 if it fails at 0."""
    if not holds(0.0):
        return 0.0
    if holds(high):
        return high
    low = 0.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class LapeGeneral(Scorer):
    """The registered scorer."""

    name = "lape-general"
    line = "LAPE with a penalty that excludes general neurons"
    source = "NJUNLP/Language-Neurons-Alignment, AAAI 2026"
    moments = ("mlp_act:positive",)
    selection = Selection(scope="global", top_rate=0.01)

    activation_rate: float = setting(
        ACTIVATION_RATE, "quantile of all firing rates above which a neuron belongs to a language"
    )
    most_penalty: float = setting(MAX_PENALTY, "maximum penalty")

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        fires = statistics.moment("mlp_act:positive")
        return lape_general(
            fires,
            statistics.seen(),
            top_rate,
            self.activation_rate,
            self.most_penalty,
            statistics.places(self.unit, fires),
        )
