"""PLND, parallel language-specific neuron detection (Zhao et al., NeurIPS 2024, arXiv 2402.18815).

The importance of a neuron for a document is the change of the MLP's output without it, the sum over
tokens t of |h_tj| * ||column j of down_proj||, in a mixture times the factor of the expert's output (of the router, or of
a shared expert).  With rank 0 the most important neuron of its layer
and k = round(top_rate * I), I the number of neurons of that layer:

    worst_rank[l, j, c] = max over the documents of language c of the rank of neuron (l, j)
    set of c            = {(l, j): worst_rank < k}, the neurons among the k most important in EVERY document

Language-specific neurons are those that are not in the sets of all languages: ``select(scores,
Selection(top_rate=1.0, kinds=("specific", "related")))``, where 1.0 because the ranks already set the rate.
"""

from __future__ import annotations

import torch

from neurons.errors import UsageError
from neurons.scorers.means import rate_count, require_finite
from neurons.scorers.method import TEXTS, Scorer
from neurons.scorers.scores import Scores, every_place
from neurons.scorers.selection import Selection
from neurons.statistics.statistics import Statistics

TOP_RATE = 0.01  # of a layer; our choice, as in LAPE: the paper sets k by hand


def plnd(worst_rank: torch.Tensor, top_rate: float = TOP_RATE, places: torch.Tensor | None = None) -> Scores:
    """Score every neuron for every language, one language or more.

    Args:
        worst_rank: int64 [L, I, K], the largest 0-based rank of the neuron within its layer over all
            documents of the language.
        top_rate: fraction of a layer's neurons that count as most important in a document.
        places: bool [L, I], where a layer has a neuron; None: everywhere.

    Returns:
        values 1 - worst_rank / n and member worst_rank < round(top_rate * n), with n the number of neurons of the
        layer; no exclusivity.

    Raises:
        UsageError: a rate outside (0, 1] or too small to keep a neuron of the widest layer, a language without
            documents, or values that are not ranks.
    """
    width = worst_rank.shape[1]
    rate_count("top rate", top_rate, width)
    if bool(((worst_rank < 0) | (worst_rank >= width)).any()):
        raise UsageError(f"a rank lies outside 0 to {width - 1}: PLND takes ranks within a layer")
    counts = (every_place(worst_rank) if places is None else places).sum(1)
    # One document gives every rank of a layer with neurons once, and more documents only raise them.
    empty = (worst_rank[counts > 0].sum(1) < width * (width - 1) // 2).any(0)
    if bool(empty.any()):
        raise UsageError(f"language number {int(empty.nonzero()[0]) + 1} has no documents: give it some")
    of_layer = counts.double()[:, None, None]
    return Scores(
        values=1 - worst_rank.double() / of_layer.clamp(min=1),
        member=worst_rank < (top_rate * of_layer).round(),
    )


def document_importance_ranks(importance: torch.Tensor) -> torch.Tensor:
    """The rank of each neuron in each document, int64 [rows, I]: 0 is the most important; ties by neuron.

    Args:
        importance: [rows, I], one document a row.

    Raises:
        BrocaError: an importance that is not finite.
    """
    require_finite(importance[None])
    order = torch.argsort(importance, dim=-1, descending=True, stable=True)
    places = torch.arange(importance.shape[-1], device=importance.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class Plnd(Scorer):
    """The registered scorer."""

    name = "plnd"
    line = "neurons that, when removed, change every text of a language the most (exact)"
    source = "arXiv 2402.18815"
    moments = ("mlp_in:worst_rank",)
    reads = TEXTS
    selection = Selection(scope="language", top_rate=0.01, kinds=("specific", "related"))
    rate_in_score = True

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        ranks = statistics.moment(self.moments[0])
        return plnd(ranks, top_rate, statistics.places(self.unit, ranks))


class PlndReleased(Plnd):
    """The registered scorer."""

    name = "plnd-released"
    line = "PLND as in the released code: the absolute value of up_proj's output"
    source = "arXiv 2402.18815, released code"
    moments = ("mlp_up:worst_rank",)
