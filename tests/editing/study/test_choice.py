"""The choice of a setting: candidates that hardly steer are not measured, and harm only if it decides."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import studies

from editing.study.candidates import Candidate
from editing.study.comparison import best_of, promising
from neurons.errors import BrocaError, NotFiniteError

OVERFLOWS = -1.0


def evaluation_of(rates, ceiling=0.8):
    """An evaluation with planned rates on the few prompts, in the order of the candidates."""
    rates = iter(rates)
    return SimpleNamespace(
        ceiling=ceiling, target="fr", rate_on_few_prompts=lambda steering, instruction: next(rates)
    )


def candidates(count):
    return [Candidate("method", {"strength": i}, None, nullcontext) for i in range(count)]


@pytest.mark.parametrize(
    ("rates", "kept"),
    [
        ([0.0, 0.9, 0.37, 0.35], [1, 2]),  # 0.45 of the ceiling is 0.36
        ([0.1, 0.3, 0.3], [1, 2]),  # all are below it: those with the highest rate
        ([0.0, 0.0], [0]),  # none steers: the first, for a row in the table
        ([], []),
    ],
)
def test_what_is_worth_measuring(rates, kept):
    offered = candidates(len(rates))
    measured, refused = promising(evaluation_of(rates), offered)
    assert measured == [offered[i] for i in kept]
    assert [one.settings["strength"] for one in refused] == [i for i in range(len(rates)) if i not in kept]
    assert all(one.name == "method" and "fr" in one.refused for one in refused)


class Planned:
    """An evaluation with planned results: (rate, fluency gap, rise of a third language) for each strength."""

    ceiling, target, source = 1.0, "fr", "en"

    def __init__(self, figures):
        self.figures, self.harmed, self.measured = figures, [], []

    def rate_on_few_prompts(self, steering, instruction):
        rate = self.figures[steering.args[0]][0]
        if rate == OVERFLOWS:
            raise NotFiniteError("not finite")
        return rate

    def measure(self, name, steering, details, kl, *, instruction, harm):
        assert not kl and not harm
        at = steering.args[0]
        if self.figures[at][1] == OVERFLOWS:
            raise NotFiniteError("not finite")
        self.measured.append(at)
        rate, gap, _ = self.figures[at]
        return studies.outcome("method", rate, fluency_gap=gap, nll_rise={}, details=details)

    def with_harm(self, measured, steering):
        at = steering.args[0]
        self.harmed.append(at)
        return replace(measured, nll_rise={"en": 9.0, "fr": 0.0, "de": self.figures[at][2]})


@pytest.mark.parametrize(
    ("figures", "best", "measured", "harmed"),
    [
        ([(0.95, 0.1, 0.3), (0.92, 0.2, 0.1), (0.95, 0.9, 0.0), (0.2, 0.0, 0.0)], 1, [0, 1, 2], [0, 1]),
        ([(0.95, 0.1, 0.3), (0.92, 0.7, 0.1)], 0, [0, 1], []),  # one steers well: harm decides nothing
        ([(0.95, 0.8, 0.3), (0.92, 0.7, 0.1)], 1, [0, 1], []),  # none does: the more fluent
        ([(0.5, 0.1, 0.3), (0.6, 0.7, 0.1)], 1, [0, 1], []),  # none steers: the one that steers most
        (
            [(OVERFLOWS, 0, 0), (0.9, OVERFLOWS, 0), (0.95, 0.1, math.nan), (0.95, 0.1, 0.3)],
            3,
            [2, 3],
            [2, 3],
        ),
    ],
)
def test_harm_is_read_where_it_decides(figures, best, measured, harmed):
    evaluation, done = Planned(figures), []
    offered = [
        Candidate("method", {"strength": i}, None, partial(nullcontext, i)) for i in range(len(figures))
    ]
    chosen, results = best_of(evaluation, offered, done.append)
    assert chosen is offered[best]
    assert (evaluation.measured, evaluation.harmed) == (measured, harmed)
    assert sum(done) == len(results) == len(figures)


def test_of_no_candidates_none_is_best():
    assert best_of(Planned([]), [], lambda count: None) == (None, [])


@pytest.mark.parametrize("figures", [[(OVERFLOWS, 0, 0)] * 2, [(0.9, OVERFLOWS, 0)]])
def test_candidates_that_all_overflow_are_an_error(figures):
    offered = [Candidate("method", {}, None, partial(nullcontext, i)) for i in range(len(figures))]
    with pytest.raises(BrocaError, match="not finite"):
        best_of(Planned(figures), offered, lambda count: None)


def test_other_errors_are_not_taken_for_a_candidates_fault():
    class Full(Planned):
        def measure(self, *_, **__):
            raise BrocaError("a row does not fit")

    offered = [Candidate("method", {}, None, partial(nullcontext, i)) for i in range(2)]
    with pytest.raises(BrocaError, match="a row does not fit"):
        best_of(Full([(0.9, 0, 0)] * 2), offered, lambda count: None)
