"""Selection of neurons from scores, by rate, threshold, exclusivity, layers and kind.

A neuron's *kind* follows from the number of languages that select it, or of those that its method counts (CLAS):
``specific`` (1), ``related`` (2 to K-1), ``general`` (all K), named as in the LAPE extension
NJUNLP/Language-Neurons-Alignment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.scorers.scores import Scores

SCOPES = ("language", "global")
ENDS = ("top", "bottom", "both")
KINDS = ("specific", "related", "general")


@dataclass(frozen=True)
class Selection:
    """How neurons are chosen from scores.

    Attributes:
        scope: "language": rank the members of each language separately; "global": rank all neurons
            together by their best score; each belongs to every language that it is a member of.
        top_rate: fraction of the neurons of the selected layers to keep, per language or in all.
        ends: keep the largest scores, the smallest, or the same number of both.
        threshold: minimum score.
        min_exclusivity: minimum exclusivity, 0 to 1.
        layers: only these layers; None allows all.
        kinds: only neurons of these kinds; None allows all.
    """

    scope: str = "language"
    top_rate: float = 0.01
    ends: str = "top"
    threshold: float | None = None
    min_exclusivity: float | None = None
    layers: tuple[int, ...] | None = None
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top_rate <= 1:
            raise UsageError(f"the top rate is {self.top_rate}, but it must lie in (0, 1]")
        for name, value, known in (("scope", self.scope, SCOPES), ("ends", self.ends, ENDS)):
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown: choose from {', '.join(known)}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise UsageError("the threshold is not a number")
        if self.min_exclusivity is not None and not 0 <= self.min_exclusivity <= 1:
            raise UsageError(f"the minimum exclusivity is {self.min_exclusivity}, but it must lie in [0, 1]")
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise UsageError(f"kind {kind!r} is unknown: choose from {', '.join(KINDS)}")

    def changed(self, **settings: Any) -> Selection:
        """A copy with the settings that are not None replaced."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Selected:
    """The neurons of one language.

    Attributes:
        rows: int64 [n, 2], (layer, neuron), best first; ties by (layer, neuron).
        scores: float64 [n].
        kinds: int64 [n], indices into ``KINDS``.
    """

    rows: torch.Tensor
    scores: torch.Tensor
    kinds: torch.Tensor


def eligible(scores: Scores, selection: Selection) -> torch.Tensor:
    """bool [L, I, K]: what passes all criteria except membership and the rate.

    Raises:
        UsageError: a minimum exclusivity for a method without it, or a layer that the model does not have.
    """
    layers = scores.values.shape[0]
    allowed = torch.isfinite(scores.values)
    if scores.places is not None:
        allowed = allowed & scores.places[..., None]
    if scores.kinds is not None and selection.kinds is not None:
        allowed = allowed & _of_kinds(scores.kinds, selection.kinds)[..., None]
    if selection.threshold is not None:
        allowed = allowed & (scores.values >= selection.threshold)
    if selection.min_exclusivity is not None:
        if scores.exclusivity is None:
            raise UsageError("this method does not compute an exclusivity: leave the minimum exclusivity out")
        allowed = allowed & (scores.exclusivity >= selection.min_exclusivity)
    if selection.layers is not None:
        missing = [layer for layer in selection.layers if not 0 <= layer < layers]
        if missing:
            raise UsageError(f"layer {missing[0]} does not exist: the model has layers 0-{layers - 1}")
        inside = torch.zeros(layers, dtype=torch.bool)
        inside[list(selection.layers)] = True
        allowed = allowed & inside[:, None, None]
    return allowed


def kind_of(languages: torch.Tensor, count: int) -> torch.Tensor:
    """Index into ``KINDS`` from the number of languages that neurons belong to, of ``count`` in all.

    With a single language its neurons are specific.
    """
    return torch.where(languages <= 1, 0, torch.where(languages < count, 1, 2))


def _of_kinds(kinds: torch.Tensor, wanted: Sequence[str]) -> torch.Tensor:
    return torch.isin(kinds, torch.tensor([KINDS.index(kind) for kind in wanted]))


def select(scores: Scores, selection: Selection) -> list[Selected]:
    """The neurons of each language.

    Raises:
        UsageError: as ``eligible``.
    """
    layers, width, languages = scores.values.shape
    allowed = eligible(scores, selection)
    kept_count = round(selection.top_rate * scores.neurons_in(selection.layers))
    member = (allowed & scores.member).flatten(0, 1)
    if selection.scope == "global":
        # As in LAPE: a kept neuron that is a member of no language belongs to none.
        kept = _ends(*_of_best_language(scores, allowed), kept_count, selection.ends)
        places = [kept[member[kept, k]] for k in range(languages)]
    else:
        places = []
        for k in range(languages):
            values = scores.values[..., k].flatten()
            tie = None if scores.tie is None else scores.tie[..., k].flatten()
            places.append(_ends((values, tie), (values, tie), member[:, k], kept_count, selection.ends))
    owners = torch.bincount(torch.cat(places), minlength=layers * width)
    kinds = kind_of(owners, languages) if scores.kinds is None else scores.kinds.flatten()
    selected = []
    for k, at in enumerate(places):
        if selection.kinds is not None:
            at = at[_of_kinds(kinds[at], selection.kinds)]
        selected.append(
            Selected(
                rows=torch.stack([at // width, at % width], dim=1),
                scores=scores.values[..., k].flatten()[at],
                kinds=kinds[at],
            )
        )
    return selected


# Values to rank by, and tie breakers.
_Order = tuple[torch.Tensor, torch.Tensor | None]


def _of_best_language(scores: Scores, allowed: torch.Tensor) -> tuple[_Order, _Order, torch.Tensor]:
    """The largest and the smallest allowed score of each neuron, and whether it has any; [L*I] each."""
    values = scores.values
    orders: list[_Order] = []
    for extreme in (
        torch.where(allowed, values, -torch.inf).amax(-1),
        torch.where(allowed, values, torch.inf).amin(-1),
    ):
        tie = None
        if scores.tie is not None:
            equal = allowed & (values == extreme[..., None])
            tie = torch.where(equal, scores.tie, -torch.inf).amax(-1).flatten()
        orders.append((extreme.flatten(), tie))
    return orders[0], orders[1], allowed.any(-1).flatten()


def _ends(best: _Order, worst: _Order, allowed: torch.Tensor, count: int, ends: str) -> torch.Tensor:
    """Indices of the ``count`` largest, smallest or both, without duplicates."""
    top = _first(best, allowed, count, descending=True)
    bottom = _first(worst, allowed, count, descending=False)
    if ends == "top":
        return top
    if ends == "bottom":
        return bottom
    return torch.cat([top, bottom[~torch.isin(bottom, top)]])


def _first(order: _Order, allowed: torch.Tensor, count: int, descending: bool) -> torch.Tensor:
    values, tie = order
    candidates = allowed.nonzero()[:, 0]
    if tie is not None:
        candidates = candidates[torch.argsort(tie[candidates], descending=True, stable=True)]
    ranked = torch.argsort(values[candidates], descending=descending, stable=True)
    return candidates[ranked[:count]]


def parse_layers(text: str, layers: int | None = None, kind: str = "layers") -> tuple[int, ...]:
    """Layers named as ``1-3``, ``4`` or ``1-3,6``.

    Args:
        layers: number of layers of the model; None skips this check.
        kind: the noun in messages, such as "heads".

    Raises:
        UsageError: another form, or a layer that the model does not have.
    """
    chosen: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", piece.strip())
        if match is None:
            raise UsageError(f"{kind} {text!r}: write them as 1-3 or 1,2,5")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise UsageError(f"{kind} {text!r}: {piece.strip()} runs backwards")
        chosen.update(range(low, high + 1))
    if layers is not None and max(chosen) >= layers:
        raise UsageError(f"{kind} {text!r}: the model has {kind} 0-{layers - 1}")
    return tuple(sorted(chosen))
