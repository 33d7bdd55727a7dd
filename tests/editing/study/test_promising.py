"""Settings that hardly steer on a few prompts are not measured, and harm only where it decides."""

from contextlib import nullcontext
from dataclasses import MISSING, fields, replace
from functools import partial
from types import SimpleNamespace

import pytest

from editing.evaluation.outcome import Outcome
from editing.study.candidates import Candidate
from editing.study.comparison import best_of, promising


def evaluation_of(shares, ceiling=0.8):
    """Candidates' shares on the few prompts come in their order."""
    left = iter(shares)
    return SimpleNamespace(ceiling=ceiling, target="fr", few=lambda steering, instruction: next(left))


def candidates(count):
    return [Candidate("way", {"strength": i}, None, nullcontext) for i in range(count)]


@pytest.mark.parametrize(
    ("shares", "kept"),
    [
        ([0.0, 0.9, 0.37, 0.35], [1, 2]),  # 0.45 of the ceiling is 0.36
        ([0.1, 0.3, 0.3], [1, 2]),  # none reaches it: those that reach most
        ([0.0, 0.0], [0]),  # none reaches anything: the first, for a row in the table
        ([], []),
    ],
)
def test_what_is_worth_measuring(shares, kept):
    some = candidates(len(shares))
    found, left = promising(evaluation_of(shares), some)
    assert found == [some[i] for i in kept]
    assert [one.settings["strength"] for one in left] == [i for i in range(len(shares)) if i not in kept]
    assert all(one.name == "way" and "fr" in one.refused for one in left)


class Told:
    """An evaluation whose figures are given: (share, gap, rise of a third language) a strength."""

    ceiling, target, source = 1.0, "fr", "en"

    def __init__(self, figures):
        self.figures, self.harmed, self.measured = figures, [], []

    def few(self, steering, instruction):
        return self.figures[steering.args[0]][0]

    def measure(self, name, steering, details, instruction, harm):
        assert not harm
        at = steering.args[0]
        self.measured.append(at)
        share, gap, _ = self.figures[at]
        return outcome(target_share=share, fluency_gap=gap, nll_rise={}, details=details)

    def with_harm(self, found, steering):
        at = steering.args[0]
        self.harmed.append(at)
        return replace(found, nll_rise={"en": 9.0, "fr": 0.0, "de": self.figures[at][2]})


def outcome(**given):
    empty = {field.name: {} for field in fields(Outcome) if field.default is MISSING}
    return Outcome(**{**empty, "samples": (), "name": "way", **given})


@pytest.mark.parametrize(
    ("figures", "best", "measured", "harmed"),
    [
        ([(0.95, 0.1, 0.3), (0.92, 0.2, 0.1), (0.95, 0.9, 0.0), (0.2, 0.0, 0.0)], 1, [0, 1, 2], [0, 1]),
        ([(0.95, 0.1, 0.3), (0.92, 0.7, 0.1)], 0, [0, 1], []),  # one steers well: harm decides nothing
        ([(0.95, 0.8, 0.3), (0.92, 0.7, 0.1)], 1, [0, 1], []),  # none does: the more fluent
        ([(0.5, 0.1, 0.3), (0.6, 0.7, 0.1)], 1, [0, 1], []),  # none steers: the one that steers most
    ],
)
def test_harm_is_read_where_it_decides(figures, best, measured, harmed):
    evaluation, done = Told(figures), []
    some = [Candidate("way", {"strength": i}, None, partial(nullcontext, i)) for i in range(len(figures))]
    found, known = best_of(evaluation, some, done.append)
    assert found is some[best]
    assert (evaluation.measured, evaluation.harmed) == (measured, harmed)
    assert sum(done) == len(known) == len(figures)


def test_of_no_candidates_none_is_best():
    assert best_of(Told([]), [], lambda count: None) == (None, [])
