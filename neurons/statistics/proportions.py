"""Intervals of a proportion, and of the change of a proportion between two measurements of the same items.

proportion    Wilson's score interval
change        Wald's interval after half an item is added to each cell of the 2 x 2 table of both measurements
              (Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from neurons.errors import UsageError

CONFIDENCE = 0.95
_ADDED = 0.5  # to each of the four cells


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of ``CONFIDENCE``."""

    value: float
    low: float
    high: float


def proportion(hits: Sequence[bool]) -> Interval:
    """The fraction of true items, with Wilson's interval.

    Raises:
        UsageError: no items.
    """
    from scipy.stats import binomtest

    _require_items(len(hits))
    interval = binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(sum(hits) / len(hits), float(interval.low), float(interval.high))


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """The fraction of true items after, minus that before, with the interval of Agresti and Min.

    Args:
        before: whether each item is true before.
        after: the same items in the same order.

    Raises:
        UsageError: no items.
    """
    from scipy.stats import norm

    _require_items(len(before))
    pairs = list(zip(before, after, strict=True))
    gained = sum(now and not then for then, now in pairs)
    lost = sum(then and not now for then, now in pairs)
    items = len(pairs) + 4 * _ADDED
    middle = (gained - lost) / items
    variance = (gained + lost + 2 * _ADDED - (gained - lost) ** 2 / items) / items**2
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * sqrt(variance)
    return Interval((gained - lost) / len(pairs), max(-1.0, middle - half), min(1.0, middle + half))


def _require_items(count: int) -> None:
    if not count:
        raise UsageError("a proportion of 0 items: give at least one")
