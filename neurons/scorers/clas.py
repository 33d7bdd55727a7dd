"""CLAS classes: neurons that are active in all languages, several, one or none (arXiv 2601.16390).

With h the input of ``down_proj`` (its channels are the neurons), over parallel texts:

    m[l, j, k] = mean over the texts of language k of the text's mean of h_j          active in k: m > 0

    all-shared: active in all K languages     partial-shared: in 2 to K-1
    specific: in one                          dead: in none

Specific and partial-shared neurons belong to the languages that they are active in, ranked by m.  The paper
scales partial-shared channels up and specific ones down, in the last layers.
"""

from __future__ import annotations

import torch

from neurons.scorers.means import require_finite, require_several
from neurons.scorers.method import TEXTS, Scorer
from neurons.scorers.scores import Scores, fractions
from neurons.scorers.selection import Selection, kind_of
from neurons.statistics.statistics import Statistics

CLASSES = ("dead", "specific", "partial-shared", "all-shared")


def clas(mean: torch.Tensor) -> Scores:
    """Score every neuron for every language.

    Args:
        mean: float64 [L, I, K], m, over parallel texts.

    Returns:
        values m; member m > 0; kinds, the classes (specific, related = partial-shared, general = all-shared; a
        dead neuron belongs to no language), whatever is selected; exclusivity of the positive part of m.

    Raises:
        UsageError: fewer than two languages.
        BrocaError: a mean that is not finite.
    """
    member = _active(mean)
    return Scores(
        values=mean.double(),
        member=member,
        exclusivity=fractions(mean.clamp(min=0)),
        kinds=kind_of(member.sum(-1), member.shape[-1]),
    )


def clas_classes(mean: torch.Tensor) -> torch.Tensor:
    """The class of every neuron, int64 [L, I], indices into ``CLASSES``; argument and errors as ``clas``.

    With two languages there is no partial-shared neuron.
    """
    active = _active(mean)
    count = active.sum(-1)
    return torch.where(count == active.shape[-1], 3, count.clamp(max=2))


def _active(mean: torch.Tensor) -> torch.Tensor:
    require_several(mean.shape[-1], "CLAS")
    require_finite(mean)
    return mean > 0


class Clas(Scorer):
    """The registered scorer."""

    name = "clas"
    line = "neurons with a mean above 0 in only one language of parallel text"
    source = "arXiv 2601.16390"
    moments = ("mlp_in:text_mean",)
    reads = TEXTS
    selection = Selection(scope="language", top_rate=1.0, kinds=("specific",))
    parallel = True

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        return clas(statistics.text_mean("mlp_in"))
