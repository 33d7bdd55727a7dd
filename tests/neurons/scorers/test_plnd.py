"""PLND: sets of neurons that are important in every document, by sets of plain Python."""

import math

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.plnd import TOP_RATE, document_importance_ranks, plnd
from neurons.scorers.selection import Selection, select

LAYERS, WIDTH, LANGUAGES, DOCUMENTS = 2, 50, 3, 4


def importances(seed):
    """[language][document] -> [L, I]; some neurons matter to all languages, some to one, some to no document."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(LANGUAGES):
        documents = torch.rand(DOCUMENTS, LAYERS, WIDTH, generator=generator, dtype=torch.float64)
        documents[:, :, [3, 30]] += 2
        documents[:, :, 10 + k] += 2
        documents[:, 1, 20] += 2 * (k < 2)
        documents[0, :, 40] += 2  # in one document only
        found.append(documents)
    return found


def worst_ranks(found):
    """As a recording makes them: the largest rank over documents."""
    columns = []
    for documents in found:
        ranks = torch.stack([document_importance_ranks(document) for document in documents])
        columns.append(ranks.amax(0))
    return torch.stack(columns, dim=-1)


def naive_sets(found, top):
    """The (layer, neuron) that are among the ``top`` of their layer in every document, a set a language."""
    sets = []
    for documents in found:
        own = None
        for document in documents.tolist():
            best = {
                (layer, j)
                for layer, row in enumerate(document)
                for j in sorted(range(WIDTH), key=lambda j: (-row[j], j))[:top]
            }
            own = best if own is None else own & best
        sets.append(own)
    return sets


def chosen(scores, **settings):
    return [
        {tuple(row) for row in of.rows.tolist()} for of in select(scores, Selection(top_rate=1.0, **settings))
    ]


@pytest.mark.parametrize(("seed", "rate"), [(0, 0.1), (1, 0.2), (2, 0.02), (3, 0.5), (4, 1.0)])
def test_equals_the_intersection_over_documents(seed, rate):
    found = importances(seed)
    scores = plnd(worst_ranks(found), rate)
    sets = naive_sets(found, round(rate * WIDTH))
    assert chosen(scores) == sets
    common = set.intersection(*sets)
    specific = chosen(scores, kinds=("specific", "related"))
    assert specific == [own - common for own in sets]
    assert scores.exclusivity is None


def test_finds_the_planted_neurons():
    scores = plnd(worst_ranks(importances(0)), 0.1)
    specific = chosen(scores, kinds=("specific", "related"))
    for k, own in enumerate(specific):
        assert {(0, 10 + k), (1, 10 + k)} <= own
        assert ((1, 20) in own) == (k < 2)
        assert not own & {(layer, j) for layer in (0, 1) for j in (3, 30)}
    assert {(0, 3), (0, 30), (1, 3), (1, 30)} <= set.intersection(*chosen(scores))
    assert not any((layer, 40) in own for own in chosen(scores) for layer in (0, 1))


def test_values_are_one_less_the_part_of_the_layer_before_it():
    worst = torch.arange(50)[None, :, None].expand(1, 50, 2)
    scores = plnd(worst, 0.1)
    assert scores.values[0, :, 1].tolist() == pytest.approx([1 - rank / 50 for rank in range(50)])
    assert scores.member[0, :, 0].tolist() == [True] * 5 + [False] * 45
    assert select(scores, Selection(top_rate=1.0))[0].rows[:, 1].tolist() == [0, 1, 2, 3, 4]


def test_ranks_start_at_the_largest_and_ties_go_by_neuron():
    importance = torch.tensor([[0.5, 3.0, 0.0, 3.0, 1.0], [0, 0, 0, 0, 0], [-1, -2, 5, 4, 3]])
    ranks = document_importance_ranks(importance)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [[3, 0, 4, 1, 2], [0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]
    many = torch.arange(300)[None].repeat(2, 1) // 100
    expected = list(range(200, 300)) + list(range(100, 200)) + list(range(100))
    assert document_importance_ranks(many.double()).tolist() == [expected] * 2


def test_refusals():
    worst = worst_ranks(importances(0))
    assert TOP_RATE == 0.01
    for rate in (0.0, 1.1, math.nan):
        with pytest.raises(UsageError, match="top rate"):
            plnd(worst, rate)
    with pytest.raises(UsageError, match=r"0.005 of 50 neurons is none: raise it to 0.02"):
        plnd(worst, 0.005)
    nothing = worst.clone()
    nothing[..., 1] = 0  # what a recording without a document leaves
    with pytest.raises(UsageError, match="number 2 has no documents"):
        plnd(nothing, 0.1)
    for outside in (-1, WIDTH):
        wrong = worst.clone()
        wrong[1, 4, 2] = outside
        with pytest.raises(UsageError, match="outside 0 to 49"):
            plnd(wrong, 0.1)
    with pytest.raises(BrocaError, match="not finite"):
        document_importance_ranks(torch.tensor([[1.0, torch.nan]]))
