"""The front and the choice of a search, on trials written down by hand and drawn at random."""

import random
from dataclasses import replace

import pytest

from editing.study.search_report import choose, confirmed, front, front_figure, rows, total_miss
from editing.study.search_result import SearchResult
from editing.study.trial import HOPELESS, MEASURED, NOTHING, Goals, Trial
from neurons.errors import NothingToChangeError
from neurons.neuron_sets.pictures import save_figure

GOALS = Goals()


def trial(number, found, gap, harm, rise=0.0, of=100, prompts=100):
    return Trial(
        number, "keyed", {"strength": 1.5}, MEASURED, found, of, prompts, gap, {"de": rise}, {"de": harm}
    )


def early(number, found=1, state=HOPELESS):
    return Trial(number, "keyed", {"strength": 0.5}, state, found, 16, 16, why="few")


def dominates(a, b):
    better = a.share > b.share or a.gap() < b.gap() or a.harm < b.harm
    return a.share >= b.share and a.gap() <= b.gap() and a.harm <= b.harm and better


@pytest.mark.parametrize("seed", range(10))
def test_front_is_what_nothing_dominates(seed):
    drawn = random.Random(seed)
    trials = [
        trial(i, drawn.randint(0, 9), drawn.randint(0, 5) / 10, drawn.randint(0, 5) / 10) for i in range(40)
    ]
    trials.insert(7, early(40, 16))
    expected, seen = [], set()
    for candidate in trials:
        figures = candidate.share, candidate.gap(), candidate.harm
        if candidate.state == MEASURED and not any(
            dominates(other, candidate) for other in trials if other.state == MEASURED
        ):
            if figures not in seen:
                expected.append(candidate.number)
            seen.add(figures)
    kept = front(trials)
    assert sorted(trial.number for trial in kept) == sorted(expected)
    assert [-trial.share for trial in kept] == sorted(-trial.share for trial in kept)


def test_the_least_harmful_with_most_to_spare():
    just, fair, safe, harmful = (
        trial(0, 95, 0.1, 0.01),
        trial(1, 98, 0.1, 0.02),
        trial(2, 100, 0.1, 0.03),
        trial(3, 100, 0.1, 0.04),
    )
    assert choose([just, fair, safe, harmful, early(4)], GOALS, 1.0).trial is safe
    assert choose([just, fair], GOALS, 1.0).trial is fair
    assert choose([just], GOALS, 1.0).trial is just
    assert choose([just], GOALS, 1.0).met
    # Against a lower ceiling all have something to spare.
    assert choose([just, fair, safe], GOALS, 0.9).trial is just
    assert "two" not in choose([just], GOALS, 1.0).why
    assert "no standard errors" in choose([just], GOALS, 1.0).why


def test_every_goal_counts():
    good = trial(0, 100, 0.3, 0.5, rise=0.05)
    others = [trial(1, 100, 0.31, 0.0), trial(2, 100, 0.0, 0.0, rise=0.051), trial(3, 94, 0.0, 0.0)]
    assert choose([*others, good], GOALS, 1.0).trial is good


def test_fallback_misses_least():
    by_gap, by_share, by_rise = (
        trial(0, 100, 0.45, 0.0),
        trial(1, 76, 0.1, 0.0),
        trial(2, 100, 0.1, 0.0, rise=0.1),
    )
    choice = choose([by_gap, by_share, by_rise], GOALS, 1.0)
    assert (choice.trial, choice.met) == (by_share, False)
    assert "misses share" in choice.why
    assert total_miss(by_gap, GOALS, 1.0) == pytest.approx(0.5)
    assert total_miss(by_share, GOALS, 1.0) == pytest.approx(0.2)
    assert total_miss(by_rise, GOALS, 1.0) == pytest.approx(1.0)
    equal = replace(by_gap, number=5, kl={"de": -0.1})
    assert choose([by_gap, equal], GOALS, 1.0).trial is equal


def test_fallback_without_a_measured_trial():
    choice = choose([early(0, 3), early(1, 5), early(2, 5), early(3, 0, NOTHING)], GOALS, 1.0)
    assert (choice.trial.number, choice.met) == (1, False)
    with pytest.raises(NothingToChangeError):
        choose([early(0, 0, NOTHING)], GOALS, 1.0)


class Remeasured:
    """A search with planned hits for the trials that are measured again."""

    goals, ceiling = GOALS, 1.0

    def __init__(self, trials, hits):
        self.trials, self.hits, self.measured = trials, hits, []

    def remeasured(self, trial, seeds):
        self.measured.append(trial.number)
        assert list(seeds) == [8, 9]
        return replace(trial, found=self.hits.get(trial.number, trial.found))


def test_the_chosen_one_has_been_confirmed():
    trials = [trial(i, 100, 0.1, i / 10) for i in range(6)]
    search = Remeasured(trials, {0: 90, 1: 91, 2: 92, 3: 93})
    remeasured = confirmed(search, 2, [8, 9])
    assert choose(remeasured, GOALS, 1.0).trial.number == 4
    assert search.measured == [0, 1, 2, 3, 4]
    assert [trial.found for trial in remeasured] == [90, 91, 92, 93, 100, 100]
    lucky = Remeasured(trials, {})
    confirmed(lucky, 3, [8, 9])
    assert lucky.measured == [0, 1, 2]


def test_confirming_ends_where_there_is_nothing_more():
    search = Remeasured([trial(0, 100, 0.1, 0.1), early(1)], {0: 10})
    assert [trial.found for trial in confirmed(search, 4, [8, 9])] == [10, 1]
    assert search.measured == [0]
    none = Remeasured([early(0)], {})
    assert confirmed(none, 4, [8, 9]) == none.trials


def result(trials, chosen):
    best = tuple(trial.number for trial in front(trials))
    return SearchResult("en", "fr", GOALS, 1.0, tuple(trials), best, chosen, True, "", None, False)


def test_rows():
    odd = replace(trial(7, 97, float("nan"), 0.25, rise=0.01), settings={"layers": "all", "strength": 2.0})
    assert rows(result([odd], 7)) == [
        ["7 *", "keyed", "layers all, strength 2", "0.97", "-", "+0.010", "0.2500", "no"]
    ]
    better, worse = trial(1, 97, 0.1, 0.25), trial(2, 96, 0.2, 0.5)
    assert [row[0] for row in rows(result([better, worse], 1))] == ["1 *"]
    # The chosen trial has a row even if another one is better in everything.
    assert [[row[0], row[-1]] for row in rows(result([better, worse], 2))] == [["2 *", "yes"], ["1", "yes"]]


def test_the_picture_is_the_same_bytes_for_the_same_trials(tmp_path):
    trials = [trial(i, 90 + i, i / 10, i / 20) for i in range(5)] + [early(9)]

    def drawn(name, trials, chosen):
        save_figure(front_figure(result(trials, chosen)), tmp_path / name)
        return (tmp_path / name).read_bytes()

    for kind, begin in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        first = drawn(f"a.{kind}", trials, 2)
        assert first.startswith(begin) and drawn(f"b.{kind}", trials, 2) == first
        assert drawn(f"c.{kind}", trials, 3) != first
        assert drawn(f"d.{kind}", [early(0)], 0)
