"""CLAS: classes by the number of languages with a positive mean."""

import random

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.clas import CLASSES, clas, clas_classes
from neurons.scorers.selection import KINDS, SCOPES, Selection, select


@pytest.mark.parametrize("languages", [2, 3, 6])
def test_equals_the_definition(languages):
    chooser = random.Random(languages)
    layers, width = 3, 60
    mean = torch.zeros(layers, width, languages, dtype=torch.float64)
    expected, met = {}, set()
    for layer in range(layers):
        for neuron in range(width):
            few = chooser.random()
            row = [chooser.choice([0.0, chooser.random() - few]) for _ in range(languages)]
            if chooser.random() < 0.2:
                row = [abs(x) + 0.1 for x in row]
            mean[layer, neuron] = torch.tensor(row, dtype=torch.float64)
            active = sum(x > 0 for x in row)
            if active == languages:
                name = "all-shared"
            else:
                name = {0: "dead", 1: "specific"}.get(active, "partial-shared")
            expected[layer, neuron] = name
            met.add(name)
    assert met == set(CLASSES) - ({"partial-shared"} if languages == 2 else set())
    classes, scores = clas_classes(mean), clas(mean)
    assert classes.dtype == torch.int64
    assert classes.shape == (layers, width)
    for (layer, neuron), name in expected.items():
        assert CLASSES[int(classes[layer, neuron])] == name
        row = mean[layer, neuron].tolist()
        assert scores.values[layer, neuron].tolist() == row
        assert scores.member[layer, neuron].tolist() == [x > 0 for x in row]
        total = sum(max(x, 0) for x in row)
        parts = [max(x, 0) / total if total else 0.0 for x in row]
        assert scores.exclusivity[layer, neuron].tolist() == pytest.approx(parts, rel=1e-14)


def test_the_kinds_of_a_selection_are_the_classes():
    mean = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = clas_classes(mean)
    kinds_of = dict(zip(("specific", "partial-shared", "all-shared"), KINDS, strict=True))
    for name, kind in kinds_of.items():
        found = set()
        for of in select(clas(mean), Selection(top_rate=1.0, kinds=(kind,))):
            found |= {tuple(row) for row in of.rows.tolist()}
        expected = {tuple(row) for row in (classes == CLASSES.index(name)).nonzero().tolist()}
        assert expected
        assert found == expected
        for scope in SCOPES:
            for narrower in ({"top_rate": 0.1}, {"top_rate": 1.0, "threshold": 0.8, "min_exclusivity": 0.3}):
                some = select(clas(mean), Selection(scope, kinds=(kind,), **narrower))
                assert any(len(of.rows) for of in some)
                assert {tuple(row) for of in some for row in of.rows.tolist()} <= expected
                assert {KINDS[at] for of in some for at in of.kinds.tolist()} == {kind}
    # The rate is of all neurons, and is filled by those of the kind.
    specific = select(clas(mean), Selection(top_rate=0.02, kinds=("specific",)))
    assert [len(of.rows) for of in specific] == [round(0.02 * 180)] * 4


def test_a_language_has_its_largest_means_first():
    mean = torch.tensor([[[0.2, 0.5], [0.9, -1.0], [-0.1, 0.7], [0.0, 0.0]]], dtype=torch.float64)
    found = [of.rows.tolist() for of in select(clas(mean), Selection(top_rate=1.0))]
    assert found == [[[0, 1], [0, 0]], [[0, 2], [0, 0]]]


@pytest.mark.parametrize("function", [clas, clas_classes])
def test_refusals(function):
    mean = torch.ones(2, 4, 2, dtype=torch.float64)
    with pytest.raises(UsageError, match="at least two"):
        function(mean[..., :1])
    mean[1, 2, 0] = torch.nan
    with pytest.raises(BrocaError, match="neuron 2 in layer 1"):
        function(mean)
