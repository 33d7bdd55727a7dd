"""Effectiveness and entanglement against their formulas."""

import math

import pytest

from editing.evaluation.entanglement import effectiveness, entanglement


@pytest.mark.parametrize(
    ("steered", "base", "expected"), [(0.8, 0.2, 0.75), (1.0, 0.0, 1.0), (0.1, 0.2, -0.125), (1.0, 1.0, None)]
)
def test_effectiveness(steered, base, expected):
    value = effectiveness(steered, base)
    assert value is None if expected is None else value == pytest.approx(expected)


def test_entanglement_is_a_root_mean_square():
    value = entanglement({"de": 0.5, "es": 1.0, "fr": 0.9}, {"de": 0.9, "es": 1.0, "fr": 0.6})
    assert value == pytest.approx(math.sqrt((0.4**2 + 0 + 0.3**2) / 3))
    assert entanglement({"de": 0.5}, {"de": 0.5}) == 0
    assert entanglement({}, {}) is None
