"""Comparison: how far neuron sets of one model agree, by Jaccard index, share and rank of their scores.

    Jaccard(A, B) = |A and B| / |A or B|;  share of A in B = |A and B| / |A|

Neither is a number where it would divide by 0 (NaN): two empty sets agree in nothing that could be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from scipy.stats import spearmanr

from neurons.errors import BrocaError, UsageError
from neurons.neuron_sets.neuron_set import NeuronSet

# Spearman's correlation of two neurons is 1 or -1 whatever the scores.
FEWEST_RANKED = 3


@dataclass(frozen=True)
class Pair:
    """Two neuron sets, language by language.

    Attributes:
        first, second: places in ``Comparison.names``.
        shared: int64 [K], neurons that both have.
        either: int64 [K], neurons that one of them has, or both.
        jaccard: float64 [K].
        by_layer: float64 [L, K], Jaccard within each layer.
        first_in_second: float64 [K], share of the first's neurons that the second has too.
        second_in_first: float64 [K].
        rank_correlation: Spearman's, of the scores of the shared neurons, a language each; None with
            fewer than 3, or where all scores of one set are equal.
    """

    first: int
    second: int
    shared: torch.Tensor
    either: torch.Tensor
    jaccard: torch.Tensor
    by_layer: torch.Tensor
    first_in_second: torch.Tensor
    second_in_first: torch.Tensor
    rank_correlation: tuple[float | None, ...]

    @property
    def overall_jaccard(self) -> float | None:
        """Jaccard of all languages together, a neuron counted once for each language that it is in.

        None where neither set has a neuron.
        """
        either = int(self.either.sum())
        return int(self.shared.sum()) / either if either else None

    @property
    def mean_rank_correlation(self) -> float | None:
        """Over the languages that have one; None where none has."""
        found = [value for value in self.rank_correlation if value is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """S neuron sets side by side, over the K languages that all have.

    Attributes:
        names: of the sets.
        languages: the common ones, in the first set's order.
        left_out: languages of each set that another lacks.
        sizes: int64 [S, K], neurons.
        across: float64 [S, K, S, K], Jaccard of every language of every set with every other.
        pairs: every two sets, in order.
        methods: of the sets; None where a set does not say.
        model: "model" and "fingerprint" of all sets, as far as one of them says.
    """

    names: tuple[str, ...]
    languages: tuple[str, ...]
    left_out: tuple[tuple[str, ...], ...]
    sizes: torch.Tensor
    across: torch.Tensor
    pairs: tuple[Pair, ...]
    methods: tuple[str | None, ...]
    model: dict[str, str]


def compare(sets: Sequence[NeuronSet], names: Sequence[str]) -> Comparison:
    """Compare two or more neuron sets of one model.

    Args:
        sets: the sets; one that names no model (read from a foreign file) goes with every other.
        names: what to call them.

    Raises:
        UsageError: fewer than two.
        BrocaError: sets of different models or shapes, or no language in common.
    """
    if len(sets) < 2:
        raise UsageError("a comparison needs at least two neuron sets")
    if len(sets) != len(names):
        raise ValueError(f"{len(sets)} neuron sets, but {len(names)} names")
    _require_one_model(sets, names)
    languages = tuple(k for k in sets[0].languages if all(k in other.members for other in sets))
    if not languages:
        held = "; ".join(f"{name}: {', '.join(s.languages)}" for name, s in zip(names, sets, strict=True))
        raise BrocaError(
            f"the neuron sets have no language in common ({held}): identify them with one --languages"
        )
    rows = [[s.of(language) for language in languages] for s in sets]
    places = [[_places(of, sets[0].neurons) for of in languages_] for languages_ in rows]
    flat = [of for languages_ in places for of in languages_]
    count = len(languages)
    return Comparison(
        names=tuple(names),
        languages=languages,
        left_out=tuple(tuple(k for k in s.languages if k not in languages) for s in sets),
        sizes=torch.tensor([[len(of) for of in languages_] for languages_ in places]),
        across=_every_jaccard(flat).reshape(len(sets), count, len(sets), count),
        pairs=tuple(_pair(sets, languages, i, j) for i, j in combinations(range(len(sets)), 2)),
        methods=tuple(s.metadata.get("method") for s in sets),
        model={
            name: s.metadata[name]
            for s in reversed(sets)
            for name in ("model", "fingerprint")
            if s.metadata.get(name)
        },
    )


def language_overlap(neurons: NeuronSet) -> torch.Tensor:
    """Jaccard of every two languages of a set, float64 [K, K]."""
    return _every_jaccard([_places(rows, neurons.neurons) for rows in neurons.members.values()])


def spearman(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's rank correlation of two float64 [n]; equal values share their mean rank.

    None with fewer than 3, or where all values of one are equal.
    """
    if len(first) < FEWEST_RANKED or any(bool((values == values[0]).all()) for values in (first, second)):
        return None
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def _require_one_model(sets: Sequence[NeuronSet], names: Sequence[str]) -> None:
    for (name, one), (other_name, other) in combinations(zip(names, sets, strict=True), 2):
        marks = [s.metadata.get("fingerprint") for s in (one, other)]
        if all(marks) and marks[0] != marks[1]:
            raise BrocaError(
                f"{name} and {other_name} are of two models, fingerprints {marks[0]} and {marks[1]}: "
                "a neuron's number means nothing in another model, so compare sets of one"
            )
        if (one.layers, one.neurons) != (other.layers, other.neurons):
            raise BrocaError(
                f"{name} is of {one.layers} layers x {one.neurons} neurons, {other_name} of "
                f"{other.layers} x {other.neurons}: these are two models, so compare sets of one"
            )


def _places(rows: torch.Tensor, width: int) -> torch.Tensor:
    """One number a neuron, int64 [n], ascending as the rows are."""
    return rows[:, 0] * width + rows[:, 1]


def _every_jaccard(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 [n, n]."""
    shared = torch.zeros(len(places), len(places), dtype=torch.float64)
    for i, one in enumerate(places):
        for j, other in enumerate(places[: i + 1]):
            shared[i, j] = shared[j, i] = int(torch.isin(one, other).sum())
    size = shared.diagonal()
    return shared / (size[:, None] + size[None, :] - shared)


def _pair(sets: Sequence[NeuronSet], languages: Sequence[str], first: int, second: int) -> Pair:
    a, b = sets[first], sets[second]
    shared, by_layer, correlations = [], [], []
    for language in languages:
        in_a, in_b = _places(a.of(language), a.neurons), _places(b.of(language), b.neurons)
        also_b, also_a = torch.isin(in_a, in_b), torch.isin(in_b, in_a)
        common, of_a, of_b = (
            torch.bincount(places // a.neurons, minlength=a.layers) for places in (in_a[also_b], in_a, in_b)
        )
        shared.append(int(also_b.sum()))
        by_layer.append(common.double() / (of_a + of_b - common))
        # Both sets are in (layer, neuron) order, so what they share stands in the same order.
        correlations.append(spearman(a.scores[language][also_b], b.scores[language][also_a]))
    both = torch.tensor(shared)
    sizes = [torch.tensor([len(s.of(language)) for language in languages]) for s in (a, b)]
    either = sizes[0] + sizes[1] - both
    return Pair(
        first=first,
        second=second,
        shared=both,
        either=either,
        jaccard=both.double() / either,
        by_layer=torch.stack(by_layer, dim=1),
        first_in_second=both.double() / sizes[0],
        second_in_first=both.double() / sizes[1],
        rank_correlation=tuple(correlations),
    )
