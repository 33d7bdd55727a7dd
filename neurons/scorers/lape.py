"""LAPE, language activation probability entropy (Tang et al., ACL 2024, arXiv 2402.16438).

With c[l, j, k] the tokens of language k on which neuron (l, j) is active and n_k the tokens of k:

    P = c / n_k          Q = P / sum_k P  (0/0 -> 0)          H = -sum_k Q ln Q  (nats, 0 ln 0 = 0)

1. tau = the round(filter_rate * L*I*K)-th smallest P; a neuron with no P > tau is out (H = +inf).
2. The round(top_rate * L*I) neurons of smallest H are kept, over all layers together.
3. bar = the round(activation_rate * L*I*K)-th smallest P; a kept neuron belongs to every language
   with P > bar: to several, or to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import UsageError

TOP_RATE = 0.01  # arXiv 2402.16438, section 4.1
FILTER_RATE = 0.95  # the released code, as is the next
ACTIVATION_RATE = 0.95


@dataclass(frozen=True)
class LapeScores:
    """LAPE of every neuron, and the neurons kept.

    Attributes:
        probability: float64 [L, I, K], P.
        entropy: float64 [L, I], H in nats, +inf for a neuron that the filter removed.
        kept: int64 [n, 2], (layer, neuron) by entropy; ties by (layer, neuron).
        member: bool [n, K], whether a kept neuron belongs to a language.
        tau: the filter's threshold on P.
        bar: the membership's threshold on P.
    """

    probability: torch.Tensor
    entropy: torch.Tensor
    kept: torch.Tensor
    member: torch.Tensor
    tau: float
    bar: float


def lape(
    positive: torch.Tensor,
    tokens: torch.Tensor,
    top_rate: float = TOP_RATE,
    filter_rate: float = FILTER_RATE,
    activation_rate: float = ACTIVATION_RATE,
) -> LapeScores:
    """Score every neuron.

    Args:
        positive: int64 [L, I, K], tokens with activation > 0.
        tokens: int64 [K], tokens counted.
        top_rate: share of all neurons that is kept.
        filter_rate: share of all P at or below ``tau``.
        activation_rate: share of all P at or below ``bar``.

    Raises:
        UsageError: fewer than two languages, a language without tokens, or a rate outside (0, 1].
    """
    layers, width, languages = positive.shape
    if languages < 2:
        raise UsageError("LAPE compares languages: it needs at least two")
    if bool((tokens <= 0).any()):
        raise UsageError("LAPE: a language without tokens has no activation probability")
    for name, value in (
        ("top rate", top_rate),
        ("filter rate", filter_rate),
        ("activation rate", activation_rate),
    ):
        if not 0 < value <= 1:
            raise UsageError(f"LAPE: the {name} is {value}, but a rate lies in (0, 1]")
    probability = positive.double() / tokens.double()
    total = probability.sum(-1, keepdim=True)
    share = torch.where(total > 0, probability / total, 0.0)
    entropy = -torch.xlogy(share, share).sum(-1)

    tau = _smallest(probability, filter_rate)
    entropy = torch.where((probability > tau).any(-1), entropy, torch.inf)

    order = torch.argsort(entropy.flatten(), stable=True)
    best = order[: round(top_rate * layers * width)]
    best = best[torch.isfinite(entropy.flatten()[best])]
    bar = _smallest(probability, activation_rate)
    return LapeScores(
        probability=probability,
        entropy=entropy,
        kept=torch.stack([best // width, best % width], dim=1),
        member=probability.flatten(0, 1)[best] > bar,
        tau=tau,
        bar=bar,
    )


def _smallest(probability: torch.Tensor, rate: float) -> float:
    """The round(rate * count)-th smallest value, counted from 1."""
    rank = max(1, round(rate * probability.numel()))
    return float(torch.kthvalue(probability.flatten(), rank).values)
