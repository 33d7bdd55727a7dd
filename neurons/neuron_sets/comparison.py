"""Comparison of neuron sets of one model, by Jaccard index, overlap fraction and rank correlation of scores.

    Jaccard(A, B) = |A and B| / |A or B|;  fraction of A in B = |A and B| / |A|

Both are NaN where they would divide by 0, as for two empty sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from scipy.stats import spearmanr

from neurons.errors import BrocaError, UsageError
from neurons.neuron_sets.neuron_set import NeuronSet, flat_places

# Spearman's correlation of two neurons is 1 or -1 whatever the scores.
MIN_RANKED = 3


@dataclass(frozen=True)
class Pair:
    """Comparison of two neuron sets, by language.

    Attributes:
        first, second: indices into ``Comparison.names``.
        shared: int64 [K], neurons in both.
        either: int64 [K], neurons in at least one of them.
        jaccard: float64 [K].
        by_layer: float64 [L, K], Jaccard within each layer.
        first_in_second: float64 [K], fraction of the first's neurons that are also in the second.
        second_in_first: float64 [K].
        rank_correlation: Spearman's, of the scores of the shared neurons, for each language; None with fewer
            than 3 of them, or where all scores of one set are equal.
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
        """Jaccard index of all languages together; a neuron counts once for each of its languages.

        None where both sets are empty.
        """
        either = int(self.either.sum())
        return int(self.shared.sum()) / either if either else None

    @property
    def mean_rank_correlation(self) -> float | None:
        """Mean over the languages with a rank correlation; None without any."""
        correlations = [value for value in self.rank_correlation if value is not None]
        return sum(correlations) / len(correlations) if correlations else None


@dataclass(frozen=True)
class Comparison:
    """Comparison of S neuron sets over the K languages that all of them have.

    Attributes:
        languages: the common languages, in the first set's order.
        left_out: languages of each set that another set does not have.
        sizes: int64 [S, K], number of neurons.
        across: float64 [S, K, S, K], Jaccard index of every language of every set with every other.
        pairs: all pairs of sets, in order.
        methods: of the sets; None where unknown.
        model: "model" and "fingerprint" of the sets, as far as known.
        unit: what the sets hold, "neuron" or "head".
    """

    names: tuple[str, ...]
    languages: tuple[str, ...]
    left_out: tuple[tuple[str, ...], ...]
    sizes: torch.Tensor
    across: torch.Tensor
    pairs: tuple[Pair, ...]
    methods: tuple[str | None, ...]
    model: dict[str, str]
    unit: str = "neuron"


def compare(sets: Sequence[NeuronSet], names: Sequence[str]) -> Comparison:
    """Compare two or more neuron sets of one model.

    Args:
        sets: the sets; a set without a fingerprint (from a foreign file) is compatible with every other.

    Raises:
        UsageError: fewer than two sets.
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
            f"the neuron sets have no language in common ({held}): identify them with the same --languages"
        )
    places = [[flat_places(s.of(language), sets[0].neurons) for language in languages] for s in sets]
    flat = [neurons for of_set in places for neurons in of_set]
    count = len(languages)
    return Comparison(
        names=tuple(names),
        languages=languages,
        left_out=tuple(tuple(k for k in s.languages if k not in languages) for s in sets),
        sizes=torch.tensor([[len(neurons) for neurons in of_set] for of_set in places]),
        across=_every_jaccard(flat).reshape(len(sets), count, len(sets), count),
        pairs=tuple(_pair(sets, languages, i, j) for i, j in combinations(range(len(sets)), 2)),
        methods=tuple(s.metadata.get("method") for s in sets),
        model={
            name: s.metadata[name]
            for s in reversed(sets)
            for name in ("model", "fingerprint")
            if s.metadata.get(name)
        },
        unit=sets[0].unit,
    )


def language_overlap(neurons: NeuronSet) -> torch.Tensor:
    """Jaccard index of every pair of languages of a set, float64 [K, K]."""
    return _every_jaccard([flat_places(rows, neurons.neurons) for rows in neurons.members.values()])


def spearman(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's rank correlation of two float64 [n]; equal values get their mean rank.

    None with fewer than 3 values, or where all values of one are equal.
    """
    if len(first) < MIN_RANKED or any(bool((values == values[0]).all()) for values in (first, second)):
        return None
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def _require_one_model(sets: Sequence[NeuronSet], names: Sequence[str]) -> None:
    for (a, first), (b, second) in combinations(zip(names, sets, strict=True), 2):
        prints = [s.metadata.get("fingerprint") for s in (first, second)]
        if all(prints) and prints[0] != prints[1]:
            raise BrocaError(
                f"{a} and {b} are of two models, fingerprints {prints[0]} and {prints[1]}: compare neuron sets of "
                "the same model"
            )
        if first.unit != second.unit:
            raise BrocaError(f"{a} is of {first.unit}s, {b} of {second.unit}s: compare sets of the same")
        if (first.layers, first.neurons) != (second.layers, second.neurons):
            raise BrocaError(
                f"{a} is of {first.layers} layers x {first.neurons} {first.unit}s, {b} of {second.layers} x "
                f"{second.neurons}: compare neuron sets of the same model"
            )


def _every_jaccard(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 [n, n]."""
    shared = torch.zeros(len(places), len(places), dtype=torch.float64)
    for i, first in enumerate(places):
        for j, second in enumerate(places[: i + 1]):
            shared[i, j] = shared[j, i] = int(torch.isin(first, second).sum())
    size = shared.diagonal()
    return shared / (size[:, None] + size[None, :] - shared)


def _pair(sets: Sequence[NeuronSet], languages: Sequence[str], first: int, second: int) -> Pair:
    a, b = sets[first], sets[second]
    shared, by_layer, correlations = [], [], []
    for language in languages:
        in_a, in_b = flat_places(a.of(language), a.neurons), flat_places(b.of(language), b.neurons)
        also_b, also_a = torch.isin(in_a, in_b), torch.isin(in_b, in_a)
        common, of_a, of_b = (
            torch.bincount(places // a.neurons, minlength=a.layers) for places in (in_a[also_b], in_a, in_b)
        )
        shared.append(int(also_b.sum()))
        by_layer.append(common.double() / (of_a + of_b - common))
        # Both sets are in (layer, neuron) order, and so are the shared neurons of each.
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
