"""Comparison of neuron sets against sets of pairs counted in python."""

import math
import random

import pytest
import torch
from scipy.stats import spearmanr

from neurons.errors import BrocaError, UsageError
from neurons.neuron_sets.comparison import compare, language_overlap, spearman
from neurons.neuron_sets.neuron_set import neuron_set

LAYERS, WIDTH = 3, 10


def made(members, scores=None, layers=LAYERS, neurons=WIDTH, **metadata):
    rows = {k: torch.tensor(sorted(v), dtype=torch.int64).reshape(-1, 2) for k, v in members.items()}
    if scores is None:
        scores = {k: torch.zeros(len(v)) for k, v in rows.items()}
    return neuron_set(rows, scores, layers, neurons, metadata)


def drawn(seed, languages=("en", "fr", "zh"), most=20):
    generator = random.Random(seed)
    every = [(layer, j) for layer in range(LAYERS) for j in range(WIDTH)]
    members = {k: generator.sample(every, generator.randint(0, most)) for k in languages}
    scores = {
        k: torch.tensor([generator.choice([0.1, 0.2, 0.5, 0.9]) for _ in v]) for k, v in members.items()
    }
    return made(members, scores)


def places(neurons, language):
    return {tuple(row) for row in neurons.of(language).tolist()}


def naive(a, b):
    return len(a & b) / len(a | b) if a | b else math.nan


def close(found, expected):
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-15)


@pytest.mark.parametrize("seed", range(8))
def test_against_python_sets(seed):
    sets = [drawn(3 * seed + i) for i in range(3)]
    found = compare(sets, ["a", "b", "c"])
    for i, one in enumerate(sets):
        for k, language in enumerate(found.languages):
            assert found.sizes[i, k] == len(places(one, language))
            for j, other in enumerate(sets):
                for m, second in enumerate(found.languages):
                    close(
                        float(found.across[i, k, j, m]), naive(places(one, language), places(other, second))
                    )
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in found.pairs:
        a, b = sets[pair.first], sets[pair.second]
        for k, language in enumerate(found.languages):
            x, y = places(a, language), places(b, language)
            assert pair.shared[k] == len(x & y)
            close(float(pair.jaccard[k]), naive(x, y))
            close(float(pair.first_in_second[k]), len(x & y) / len(x) if x else math.nan)
            close(float(pair.second_in_first[k]), len(x & y) / len(y) if y else math.nan)
            for layer in range(LAYERS):
                at = [{row for row in rows if row[0] == layer} for rows in (x, y)]
                close(float(pair.by_layer[layer, k]), naive(*at))
            of = [
                dict(zip(map(tuple, s.of(language).tolist()), s.scores[language].tolist(), strict=True))
                for s in (a, b)
            ]
            both = sorted(x & y)
            values = [[scores[row] for row in both] for scores in of]
            if len(both) < 3 or any(len(set(column)) == 1 for column in values):
                assert pair.rank_correlation[k] is None
            else:
                close(pair.rank_correlation[k], float(spearmanr(*values).statistic))


def test_the_drawn_sets_test_every_branch():
    pairs = [p for s in range(8) for p in compare([drawn(3 * s + i) for i in range(3)], "abc").pairs]
    correlations = [c for pair in pairs for c in pair.rank_correlation]
    assert None in correlations
    assert len([c for c in correlations if c is not None and abs(c) < 1]) > 10


def test_a_set_with_itself():
    one = drawn(1)
    pair = compare([one, one], ["a", "b"]).pairs[0]
    assert pair.jaccard.tolist() == [1.0] * 3
    assert pair.first_in_second.tolist() == [1.0] * 3
    close(pair.rank_correlation[0], 1.0)


def test_rank_correlation_by_hand():
    def of(*values):
        return torch.tensor(values, dtype=torch.float64)

    close(spearman(of(1, 2, 3), of(10, 100, 1000)), 1.0)
    close(spearman(of(1, 2, 3), of(3, 2, 1)), -1.0)
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: 1 - 6 * 0.5 / (4 * 15), corrected for the tie.
    close(spearman(of(1, 1, 2, 3), of(1, 2, 3, 4)), 4.5 / math.sqrt(4.5 * 5))
    assert spearman(of(1, 2), of(1, 2)) is None
    assert spearman(of(1, 1, 1), of(1, 2, 3)) is None
    assert spearman(of(1, 2, 3), of(2, 2, 2)) is None


def test_languages_of_one_set():
    one = made({"en": [(0, 1), (0, 2), (1, 0)], "fr": [(0, 2), (1, 0), (2, 9)], "zh": []})
    expected = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, math.nan]]
    for row, wanted in zip(language_overlap(one).tolist(), expected, strict=True):
        close(row, wanted)


def test_all_languages_of_a_pair_together():
    one = made({"en": [(0, 1), (0, 2), (1, 0), (1, 1)], "fr": [(0, 2)], "zh": []})
    other = made({"en": [(0, 1), (0, 2), (1, 0), (2, 2)], "fr": [(1, 0), (1, 1)], "zh": []})
    pair = compare([one, other], "ab").pairs[0]
    assert pair.either.tolist() == [5, 3, 0]
    # Not the mean of the languages' 3/5 and 0.
    close(pair.overall_jaccard, 3 / 8)
    own = [value for value in pair.rank_correlation if value is not None]
    assert len(own) <= 1 and pair.mean_rank_correlation == (own[0] if own else None)
    empty = compare([made({"en": []}), made({"en": []})], "ab").pairs[0]
    assert empty.overall_jaccard is None and empty.mean_rank_correlation is None


def test_the_neuron_of_one_layer_is_not_that_of_another():
    pair = compare([made({"en": [(0, 9)]}), made({"en": [(1, 0), (1, 9)]})], "ab").pairs[0]
    assert pair.shared.tolist() == [0]


def test_only_common_languages_are_compared():
    found = compare([drawn(1, ("en", "fr", "zh")), drawn(2, ("zh", "sw", "en"))], ["a", "b"])
    assert found.languages == ("en", "zh")
    assert found.left_out == (("fr",), ("sw",))
    with pytest.raises(BrocaError, match=r"no language in common \(a: en; b: fr\)"):
        compare([drawn(1, ("en",)), drawn(2, ("fr",))], ["a", "b"])


def test_sets_of_two_models_are_refused():
    one, other, unknown = (made({"en": []}, **m) for m in ({"fingerprint": "1"}, {"fingerprint": "2"}, {}))
    assert len(compare([one, unknown], "ab").pairs) == 1
    with pytest.raises(BrocaError, match="a and c are of two models, fingerprints 1 and 2"):
        compare([one, unknown, other], "abc")
    with pytest.raises(BrocaError, match="a is of 3 layers x 10 neurons, b of 3 x 11"):
        compare([made({"en": []}), made({"en": []}, neurons=11)], "ab")
    with pytest.raises(BrocaError, match="3 layers"):
        compare([made({"en": []}), made({"en": []}, layers=4)], "ab")
    with pytest.raises(UsageError, match="at least two"):
        compare([one], "a")
