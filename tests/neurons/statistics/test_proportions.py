"""Intervals of proportions against published values and simulated coverage."""

import random

import pytest

from neurons.errors import UsageError
from neurons.statistics.proportions import paired_change, proportion


def test_wilsons_interval():
    """81 of 263: Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I."""
    interval = proportion([True] * 81 + [False] * 182)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (81 / 263, 0.2553, 0.3662), abs=1e-4
    )
    assert proportion([False] * 29).low == 0 and proportion([False] * 29).high == pytest.approx(
        0.1170, abs=1e-4
    )


def test_the_change_is_of_the_same_items():
    """Three lost and one gained of 20, by hand: (1 - 3) / 22 -+ 1.96 sqrt(5 - 4 / 22) / 22."""
    before = [True] * 10 + [False] * 10
    after = [True] * 7 + [False] * 12 + [True]
    change = paired_change(before, after)
    half = 1.959964 * (5 - 4 / 22) ** 0.5 / 22
    assert change.value == pytest.approx(-2 / 20)
    assert (change.low, change.high) == pytest.approx((-2 / 22 - half, -2 / 22 + half), abs=1e-6)
    # Other items with the same two rates, of which more changed.
    assert paired_change(before, list(reversed(after))).high > change.high


def test_equal_answers_leave_some_uncertainty():
    change = paired_change([True] * 150 + [False] * 50, [True] * 150 + [False] * 50)
    assert change.value == 0 and 0 < change.high == -change.low < 0.02


def test_intervals_cover_the_true_change():
    chooser = random.Random(0)
    covered = 0
    for _ in range(400):
        before, after = [], []
        for _ in range(200):
            before.append(chooser.random() < 0.6)
            after.append(before[-1] if chooser.random() < 0.9 else chooser.random() < 0.3)
        change = paired_change(before, after)
        covered += change.low <= 0.1 * (0.3 - 0.6) <= change.high
    assert 0.92 < covered / 400 < 0.98


def test_no_items_are_refused():
    with pytest.raises(UsageError, match="0 items"):
        proportion([])
    with pytest.raises(UsageError, match="0 items"):
        paired_change([], [])
