"""Shapley values of attention heads (Held & Yang, arXiv 2210.05709), estimated from permutations of the heads.

With v(S) minus the mean negative log-likelihood (nats a token) of a language's text when only the heads S are present,
and pi a uniformly random permutation of all N heads,

    phi_h = E_pi [v(heads not before h in pi) - v(heads after h in pi)]

is the mean rise of the language's loss when head h is removed, over all sets of heads that may be removed before it.
The values add up to v(all heads) - v(no head).  The estimate is the mean over P permutations, with the standard error

    sqrt(sum_p (x_p - phi)^2 / (P - 1) / P)

of the marginal values x_p.  ``neurons.ablation.shapley`` records them and truncates permutations.  A head with a
negative value harms the language (``--ends bottom``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import UsageError
from neurons.scorers.gradient import HEADS
from neurons.scorers.means import means
from neurons.scorers.method import ABLATIONS, Scorer, answers
from neurons.scorers.scores import Scores
from neurons.setting import setting
from neurons.statistics.statistics import Statistics

MOMENTS = ("attn_in:shapley", "attn_in:shapley_square")


def standard_errors(total: torch.Tensor, square: torch.Tensor, permutations: torch.Tensor) -> torch.Tensor:
    """Standard errors of the means, float64 [L, A, K]; NaN with a single permutation.

    Args:
        total: float64 [L, A, K], sum over permutations of the marginal values.
        square: float64 [L, A, K], of their squares.
        permutations: int64 [K].
    """
    mean = total / permutations
    # Rounding may put the difference below 0.
    deviation = (square - mean * mean * permutations).clamp(min=0)
    return torch.where(
        permutations > 1, (deviation / (permutations - 1).clamp(min=1) / permutations).sqrt(), torch.nan
    )


@dataclass(frozen=True)
class HeadShapley(Scorer):
    """The registered scorer."""

    name = "head-shapley"
    line = "heads by Shapley value: the mean rise of the language's loss without the head and random others"
    source = "arXiv 2210.05709"
    moments = MOMENTS
    reads = ABLATIONS
    unit = "head"
    selection = HEADS

    permutations: int = setting(20, "number of permutations of the heads")
    way: str = setting("zero", "what replaces a head's values", words=("zero", "mean"))
    tolerance: float = setting(
        0.01, "end a permutation when the remaining heads add up to less than this fraction of all; 0: never"
    )
    seed: int = setting(0, "of the permutations")

    def __post_init__(self) -> None:
        if self.permutations < 1 or not 0 <= self.tolerance < 1:
            raise UsageError(
                f"head-shapley needs at least 1 permutation and a tolerance in [0, 1), not {self.permutations} and "
                f"{self.tolerance}"
            )

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        total, permutations = answers(statistics, MOMENTS[0])
        errors = standard_errors(total, statistics.moment(MOMENTS[1]), permutations)
        values = means(total, permutations, "permutations")
        known = torch.isfinite(errors).all()
        notes = {
            "permutations": permutations.tolist(),
            # By language, layer and head.
            "standard_errors": errors.permute(2, 0, 1).tolist() if known else None,
        }
        there = statistics.places("head", values)[..., None].expand(values.shape)
        return Scores(values=values, member=there, notes=notes)
