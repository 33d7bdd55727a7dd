"""Contrastive gradient x activation: neurons that one language's likelihood depends on more than any other's.

First-order attribution (arXiv 1611.06440), made contrastive; the contrast is Broca's own.  With h the
input of ``down_proj`` and Loss the negative log-likelihood of the text:

    R[l, j, k] = mean over the tokens of language k of |h_j * dLoss/dh_j|
    S_k        = R_k / sum_{l, j} R_k
    score_k    = S_k - max_{i != k} S_i

and language k has the neurons of largest score_k among those above 0; R of heads is that of ``gradient``.  The normalisation makes languages
with different losses comparable; the difference to the best other language removes neurons that matter
to every language.  Unlike activation counts, the score does not depend on how often a neuron fires: in
small SiLU models neurons fire on most tokens of all languages.
"""

from __future__ import annotations

import torch

from neurons.errors import UsageError
from neurons.scorers.gradient import HEADS, mean_attribution
from neurons.scorers.means import require_several
from neurons.scorers.method import Scorer
from neurons.scorers.scores import Scores, fractions
from neurons.statistics.statistics import Statistics


def gradient_contrast(attribution: torch.Tensor, tokens: torch.Tensor) -> Scores:
    """Score every neuron for every language.

    Args:
        attribution: float64 [L, I, K], sum over tokens of |h * dLoss/dh|.
        tokens: int64 [K], number of tokens.

    Returns:
        values score_k; member score_k > 0; exclusivity S_k / sum_k S_k.

    Raises:
        UsageError: fewer than two languages, or a language without tokens or attribution.
        BrocaError: an attribution that is not finite or is negative.
    """
    languages = attribution.shape[-1]
    require_several(languages, "gradient-contrast")
    mean = mean_attribution(attribution, tokens)
    total = mean.sum((0, 1))
    if not bool((total > 0).all()):
        raise UsageError(
            f"language number {int((total <= 0).nonzero()[0]) + 1} has no attribution: the loss of its "
            "text depends on no neuron, so leave it out"
        )
    of_language = mean / total
    best, where = of_language.topk(2, dim=-1)
    is_best = torch.arange(languages, device=mean.device) == where[..., :1]
    score = of_language - torch.where(is_best, best[..., 1:], best[..., :1])
    return Scores(values=score, member=score > 0, exclusivity=fractions(of_language))


class GradientContrast(Scorer):
    """The registered scorer."""

    name = "gradient-contrast"
    line = "gradient x activation minus the largest of any other language"
    source = "Broca"
    moments = ("mlp_in:attribution",)

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        return gradient_contrast(statistics.moment(self.moments[0]), statistics.tokens)


class HeadGradientContrast(GradientContrast):
    """The registered scorer."""

    name = "head-gradient-contrast"
    line = "heads by gradient x activation minus the largest of any other language"
    moments = ("attn_in:attribution",)
    unit = "head"
    selection = HEADS
