"""Contrastive gradient x activation: which neurons a language's likelihood leans on more than any other's.

First-order attribution (as in gradient x activation), made contrastive; Broca's own.  With h the input
of ``down_proj`` and Loss the negative log-likelihood of the text:

    R[l, j, k] = mean over the tokens of language k of |h_j * dLoss/dh_j|
    S_k        = R_k / sum_{l, j} R_k
    score_k    = S_k - max_{i != k} S_i

and language k has the round(top_rate * L*I) neurons of largest score_k that are above 0.  Shares make
languages comparable whose losses differ; the difference to the runner-up removes neurons that matter
to every language.  Unlike activation counts it does not depend on how often a neuron fires, which
small SiLU models do for most tokens of all languages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import UsageError

TOP_RATE = 0.01  # of all neurons, per language: the share that LAPE keeps


@dataclass(frozen=True)
class GradientContrastScores:
    """Contrastive attribution of every neuron.

    Attributes:
        share: float64 [L, I, K], S; sums to 1 over (L, I).
        score: float64 [L, I, K].
        kept: per language int64 [n_k, 2], (layer, neuron) by falling score; ties by (layer, neuron).
    """

    share: torch.Tensor
    score: torch.Tensor
    kept: tuple[torch.Tensor, ...]


def gradient_contrast(
    attribution: torch.Tensor, tokens: torch.Tensor, top_rate: float = TOP_RATE
) -> GradientContrastScores:
    """Score every neuron for every language.

    Args:
        attribution: float64 [L, I, K], sum over tokens of |h * dLoss/dh|.
        tokens: int64 [K], tokens summed over.
        top_rate: share of all neurons that each language keeps.

    Raises:
        UsageError: fewer than two languages, a language without tokens or attribution, or a rate
            outside (0, 1].
    """
    layers, width, languages = attribution.shape
    if languages < 2:
        raise UsageError("gradient-contrast compares languages: it needs at least two")
    if not 0 < top_rate <= 1:
        raise UsageError(f"gradient-contrast: the top rate is {top_rate}, but a rate lies in (0, 1]")
    mean = attribution.double() / tokens.double()
    total = mean.sum((0, 1))
    if not bool((total > 0).all()):
        raise UsageError("gradient-contrast: a language has no tokens or no attribution at all")
    share = mean / total
    best, where = share.topk(2, dim=-1)
    own_is_best = torch.arange(languages, device=share.device) == where[..., :1]
    score = share - torch.where(own_is_best, best[..., 1:], best[..., :1])
    kept = []
    for k in range(languages):
        flat = score[..., k].flatten()
        top = torch.argsort(flat, descending=True, stable=True)[: round(top_rate * layers * width)]
        top = top[flat[top] > 0]
        kept.append(torch.stack([top // width, top % width], dim=1))
    return GradientContrastScores(share=share, score=score, kept=tuple(kept))
