"""LDA: the line that best separates two languages relative to their within-language covariance (Fisher).

    u ~ S_w^-1 (mean_target - mean_source)

S_w is the covariance of the texts' means about their own language's mean, over both languages, shrunk to a
multiple of the identity by Ledoit and Wolf's rule (J. Multivariate Analysis 88, 2004; scikit-learn), which
also makes it invertible with fewer texts than coordinates:

    S_w = (1 - shrinkage) C + shrinkage * tr(C)/d * I

Only a line is estimated: v = (u . delta) u with delta DiffMean (``editing.directions.length``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.length import along
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite


def lda(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Fisher's discriminant of texts' means [n_source, d] and [n_target, d].

    Returns:
        The line's unit vector, float64 [d], towards the target, and the shrinkage: the weight of the identity in S_w.

    Raises:
        BrocaError: equal means of the languages, or texts that hardly differ from their language's mean.
    """
    from sklearn.covariance import ledoit_wolf

    source, target = source.double(), target.double()
    means = source.mean(0), target.mean(0)
    if torch.equal(means[0], means[1]):
        raise BrocaError("source and target do not differ: their means are the same")
    within = torch.cat([source - means[0], target - means[1]])
    too_few = BrocaError(
        "the texts hardly differ from their language's mean: LDA needs more texts a language"
    )
    if not within.any():
        raise too_few
    covariance, shrinkage = ledoit_wolf(within.numpy(), assume_centered=True)
    try:
        vector = solve_positive_definite(torch.from_numpy(covariance), means[1] - means[0])
    except NotPositiveDefiniteError as error:
        raise too_few from error
    return vector / vector.norm(), float(shrinkage)


@dataclass(frozen=True)
class Lda(DirectionMethod):
    """The registered method."""

    name = "lda"
    line = "Fisher's discriminant: the difference of the means relative to the covariance within languages"
    source = "Ledoit and Wolf 2004"

    def estimate(self, texts: Texts) -> Estimate:
        unit, shrinkage = lda(texts.source, texts.target)
        return Estimate(along(unit, texts.diffmean), measures={"shrinkage": shrinkage})
