"""LAPE with a penalty for neurons of all languages (arXiv 2505.21505, AAAI 2026).

With P, Q and H as in ``neurons.scorers.lape`` and c the mean of 1, 1/2, ..., 1/K:

    score = H / ln K - lambda * max_k P / c

1. The round(top_rate * L*I) neurons of lowest score are kept, over all layers together; no filter.
2. bar = the round(activation_rate * L*I*K)-th smallest P; a neuron belongs to every language with P > bar.
3. lambda is the largest in [0, most_penalty] with which no kept neuron belongs to all K languages, found
   by halving the interval down to 0.001.

The second term prefers neurons that fire often: with P spread over languages, as with a general neuron,
H is large, and only a large lambda would let it in.  A neuron that never fires has the score 1 of one that
fires alike for all, as in the released code NJUNLP/Language-Neurons-Alignment (its H would be 0, the best).
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
from neurons.scorers.scores import Scores, shares
from neurons.scorers.selection import Selection
from neurons.scorers.setting import setting
from neurons.statistics.statistics import Statistics

TOP_RATE = 0.01  # the released code's sweep
MOST_PENALTY = 0.2  # the released code, as is the next
PRECISION = 1e-3


def lape_general(
    positive: torch.Tensor,
    seen: torch.Tensor,
    top_rate: float = TOP_RATE,
    activation_rate: float = ACTIVATION_RATE,
    most_penalty: float = MOST_PENALTY,
) -> Scores:
    """Score every neuron.

    Where a kept neuron belongs to all languages even without a penalty, lambda is 0 and is noted as such:
    leave general neurons out by ``Selection(kinds=("specific", "related"))``.

    Args:
        positive: int64 [L, I, K], tokens with activation > 0.
        seen: int64 [K], tokens; or [L, I, K], tokens that each neuron's expert was asked for.
        top_rate: share of all neurons that lambda is found for; select the same share, globally.
        activation_rate: share of all P at or below bar.
        most_penalty: largest lambda.

    Returns:
        values -score, the same for all languages; member P > bar; share Q; notes "lambda" and "bar".

    Raises:
        UsageError: fewer than two languages, a language without tokens, a rate outside (0, 1] or too
            small to keep a neuron, or a penalty that is negative or not finite.
        BrocaError: a count that is not finite.
    """
    layers, width, languages = positive.shape
    require_several(languages, "LAPE")
    kept = rate_count("top rate", top_rate, layers * width)
    require_rate("activation rate", activation_rate)
    if not 0 <= most_penalty < math.inf:
        raise UsageError(f"the largest penalty is {most_penalty}, but it is a number of at least 0")
    probability = means(positive, seen)
    most = probability.amax(-1)
    spread = torch.where(most > 0, entropy(probability) / math.log(languages), 1.0)
    loudness = most / (sum(1 / j for j in range(1, languages + 1)) / languages)
    bar = smallest(probability, activation_rate)
    member = probability > bar
    general = member.all(-1).flatten()

    def keeps_no_general(penalty: float) -> bool:
        score = (spread - penalty * loudness).flatten()
        return not bool(general[torch.argsort(score, stable=True)[:kept]].any())

    penalty = largest(keeps_no_general, most_penalty)
    values = penalty * loudness - spread
    return Scores(
        values=values[..., None].expand_as(probability),
        member=member,
        share=shares(probability),
        notes={"lambda": penalty, "bar": bar},
    )


def largest(holds: Callable[[float], bool], most: float) -> float:
    """The largest number in [0, most] for which ``holds``, within ``PRECISION``; 0 where 0 does not hold."""
    if not holds(0.0):
        return 0.0
    if holds(most):
        return most
    low, high = 0.0, most
    while high - low > PRECISION:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class LapeGeneral(Scorer):
    """The method."""

    name = "lape-general"
    line = "LAPE with a penalty that drives general neurons out"
    source = "NJUNLP/Language-Neurons-Alignment, AAAI 2026"
    moments = ("mlp_act:positive",)
    selection = Selection(scope="global", top_rate=0.01)

    activation_rate: float = setting(
        ACTIVATION_RATE, "quantile of all rates from which on a neuron counts as firing"
    )
    most_penalty: float = setting(MOST_PENALTY, "the largest penalty")

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        fires = statistics.moment("mlp_act:positive")
        return lape_general(fires, statistics.seen(), top_rate, self.activation_rate, self.most_penalty)
