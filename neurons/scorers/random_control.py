"""Random controls: randomly drawn neurons to compare every result with.

``random_like`` draws as many neurons in each layer as a set has there, none of them from the set: the control
of LAPE (Tang et al., arXiv 2402.16438) and of the localizer (AlKhamissi et al., arXiv 2411.02280).
``random_matched`` draws neurons that are also about as active as the set's, since language neurons fire
more, or less, than the average.  ``random_scores`` is an uninformative scorer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.method import NOTHING, Scorer
from neurons.scorers.scores import Scores

NEAREST = 10  # our choice


def random_like(
    rows: torch.Tensor, layers: int, width: int, seed: int, places: torch.Tensor | None = None
) -> torch.Tensor:
    """As many random neurons in each layer as ``rows`` has there, none of them among ``rows``.

    Args:
        rows: int64 [n, 2], (layer, neuron).
        layers: L of the model.
        width: I of the model.
        seed: equal seeds give equal neurons.
        places: bool [L, I], neurons that may be drawn; None: all.

    Returns:
        int64 [n, 2], in (layer, neuron) order.

    Raises:
        UsageError: a layer with too few other neurons.
        BrocaError: a neuron that the model does not have, or one named twice.
    """
    excluded = _mask(rows, layers, width)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    places = torch.ones_like(excluded) if places is None else places
    for layer in range(layers):
        candidates = (places[layer] & ~excluded[layer]).nonzero()[:, 0]
        wanted = int(excluded[layer].sum())
        _require_room(layer, wanted, int(places[layer].sum()))
        picked = candidates[torch.randperm(len(candidates), generator=generator)[:wanted]].sort().values
        drawn.append(torch.stack([torch.full_like(picked, layer), picked], dim=1))
    return torch.cat(drawn)


def random_matched(
    rows: torch.Tensor, activity: torch.Tensor, seed: int, nearest: int = NEAREST
) -> torch.Tensor:
    """Random neurons of the same layers that are about as active as ``rows``, none of them among ``rows``.

    In each layer the rows draw in random order, each one of the ``nearest`` remaining neurons closest to it
    in rank of activity (of two equally close, the less active first).

    Args:
        rows: int64 [n, 2], (layer, neuron).
        activity: float64 [L, I], the quantity to match, such as the fraction of tokens that fire; -inf where there
            is no neuron.
        seed: equal seeds give equal neurons.
        nearest: number of neurons that each is drawn from; fewer where fewer remain.

    Returns:
        int64 [n, 2]; row i is the control of row i of ``rows``.

    Raises:
        UsageError: a layer with too few other neurons, or a ``nearest`` below 1.
        BrocaError: a neuron that the model does not have or one named twice, or an activity that is not
            a number.
    """
    layers, width = activity.shape
    if nearest < 1:
        raise UsageError(f"a matched control needs at least 1 nearest neuron, not {nearest}")
    if bool(torch.isnan(activity).any()):
        layer, neuron = torch.isnan(activity).nonzero()[0].tolist()
        raise BrocaError(f"the activity of neuron {neuron} in layer {layer} is not a number")
    excluded = _mask(rows, layers, width) | (activity == -torch.inf)
    generator = torch.Generator().manual_seed(seed)
    matched = rows.to(torch.int64).clone()
    for layer in rows[:, 0].unique().tolist():
        at = (rows[:, 0] == layer).nonzero()[:, 0]
        _require_room(layer, len(at), int((activity[layer] > -torch.inf).sum()))
        order = torch.argsort(activity[layer], stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(width)
        at = at[torch.randperm(len(at), generator=generator)]
        chances = torch.rand(len(at), generator=generator, dtype=torch.float64)
        free = (~excluded[layer])[order].nonzero()[:, 0].tolist()
        taken = _take_nearest(rank[rows[at, 1]].tolist(), free, chances.tolist(), nearest)
        matched[at, 1] = order[torch.tensor(taken)]
    return matched


def random_scores(
    layers: int, width: int, languages: int, seed: int, counts: Sequence[int] | None = None
) -> Scores:
    """Scores uniform in [0, 1), independent for each neuron and language.

    Args:
        layers: L of the model.
        width: I of the model.
        languages: K.
        seed: equal seeds give equal scores.
        counts: number of neurons of each layer; None: I.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, width, languages, generator=generator, dtype=torch.float64)
    return Scores(
        values=values,
        member=torch.ones_like(values, dtype=torch.bool),
        places=torch.arange(width) < torch.tensor(counts or [width] * layers)[:, None],
        notes={"seed": seed},
    )


def _take_nearest(wanted: list[int], free: list[int], chances: list[float], nearest: int) -> list[int]:
    """Draw for each wanted rank one of the ``nearest`` free ranks and remove it from ``free``."""
    taken = []
    # Sequential: each draw depends on all draws before.  ``free`` is sorted, so the nearest lie within
    # ``nearest`` places to either side.
    for rank, chance in zip(wanted, chances, strict=True):
        place = bisect_left(free, rank)
        window = range(max(0, place - nearest), min(len(free), place + nearest))
        closest = sorted(window, key=lambda i: (abs(free[i] - rank), i))[:nearest]
        taken.append(free.pop(closest[int(chance * len(closest))]))
    return taken


def _mask(rows: torch.Tensor, layers: int, width: int) -> torch.Tensor:
    """bool [L, I]: the neurons of ``rows``."""
    if len(rows) and not (
        bool((rows >= 0).all()) and int(rows[:, 0].max()) < layers and int(rows[:, 1].max()) < width
    ):
        raise BrocaError(f"the neuron set has a neuron outside {layers} x {width}")
    mask = torch.zeros(layers, width, dtype=torch.bool)
    mask[rows[:, 0], rows[:, 1]] = True
    if int(mask.sum()) != len(rows):
        raise BrocaError("the neuron set names a neuron twice")
    return mask


def _require_room(layer: int, wanted: int, count: int) -> None:
    if 2 * wanted > count:
        raise UsageError(f"the neurons are more than half of layer {layer}: too few are left for a control")


class Random(Scorer):
    """The registered scorer."""

    name = "random"
    line = "a control: as many random neurons in the same layers"
    source = "-"
    reads = NOTHING
    control = True


class RandomMatched(Scorer):
    """The registered scorer."""

    name = "random-matched"
    line = "a control: random neurons of the same layers with similar activity"
    source = "-"
    moments = ("mlp_in:absolute",)
    control = True
