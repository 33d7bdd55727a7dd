"""Routing of a mixture's tokens by language (arXiv 2510.04694; github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs).

With f[l, e, k] the fraction of the tokens of language k that layer l routes to expert e,

    share[l, e, k] = f'[l, e, k] / sum_j f'[l, e, j]     f' = f of the ``top`` experts of k in the layer, else 0
    divergence[l]  = (H(mean_k p_k) - mean_k H(p_k)) / ln K     p_k = f[l, :, k] / sum_e f[l, e, k], H the entropy

share is each language's part of an expert (0/0 is 0), as in the released code; without the limit to ``top`` experts, one
that hardly any token reaches could be a language's own.  divergence is the Jensen-Shannon
divergence of the K languages: 0 if all are routed alike, 1 if no two share an expert.
"""

from __future__ import annotations

import math

import torch

from neurons.architectures.anatomy import ROUTER_OUT
from neurons.errors import UsageError
from neurons.statistics.statistics import Statistics

# The sum of the absolute scores that a router gives to each of its experts.
ROUTING = f"{ROUTER_OUT}:absolute"
# Experts of a language for each expert of a token: 15 for 8, in the released code.
TOP_RATIO = 15 / 8


def routed_fraction(statistics: Statistics) -> torch.Tensor:
    """f, float64 [L, E, K], of the E experts that routers choose from; 0 in layers without a router.

    Raises:
        UsageError: a model without experts, or statistics without the routers' scores.
    """
    fraction = statistics.routing_fraction()
    scores = statistics.moment(ROUTING)
    # Shared experts and the neurons of dense layers count as experts that every token reaches.
    has_router = scores.flatten(1).any(1)
    return fraction[:, : scores.shape[1]] * has_router[:, None, None]


def default_top(fraction: torch.Tensor) -> int:
    """``TOP_RATIO`` times the number of experts of a token, which f adds up to over the experts."""
    return max(1, round(TOP_RATIO * float(fraction.sum(1).max())))


def routing_shares(fraction: torch.Tensor, top: int | None = None) -> torch.Tensor:
    """share, float64 [L, E, K].

    Args:
        fraction: [L, E, K], f.
        top: experts kept in each layer of each language; of equal ones the first.  None: ``default_top``.

    Raises:
        UsageError: a top below 1.
    """
    top = default_top(fraction) if top is None else top
    if top < 1:
        raise UsageError(f"top {top}: keep at least one expert of each layer")
    ranked = fraction.argsort(dim=1, descending=True, stable=True)[:, :top]
    kept = torch.zeros_like(fraction).scatter(1, ranked, fraction.gather(1, ranked))
    return torch.nan_to_num(kept / kept.sum(-1, keepdim=True), nan=0.0)


def routing_divergence(fraction: torch.Tensor) -> torch.Tensor:
    """divergence, float64 [L]; 0 for one language and in layers without a router."""
    languages = fraction.shape[-1]
    routed = torch.nan_to_num(fraction / fraction.sum(1, keepdim=True), nan=0.0)
    apart = _entropy(routed.mean(-1)) - _entropy(routed).mean(-1)
    return apart.clamp(min=0) / math.log(max(languages, 2))


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, over dimension 1."""
    return -torch.xlogy(probabilities, probabilities).sum(1)
