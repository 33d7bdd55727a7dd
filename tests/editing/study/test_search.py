"""The search on planted objectives: its optimum, pruning, resuming and interrupts."""

import json
import math
import os
import signal
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.stats import binom

from editing.study.search import Search, binomial_cdf
from editing.study.search_report import choose
from editing.study.search_scoring import Harm, Written
from editing.study.search_space import Knob, Space
from editing.study.trial import HOPELESS, MEASURED, NOTHING, NOTHING_WRITTEN, REFUSED, Goals, Trial
from neurons.errors import BrocaError, NotFiniteError, NothingToChangeError, UsageError

CEILING = 0.9


class Planted:
    """A model whose rate grows with the strength; its harm grows with the square and is least at width 0.3."""

    ceiling = CEILING

    def __init__(self, stop_at=None, fail_at=None):
        self.now = None
        self.calls = []
        self.entered = 0
        self.stop_at, self.fail_at = stop_at, fail_at

    @contextmanager
    def applied(self, plan):
        assert self.now is None
        self.now = plan
        self.entered += 1
        try:
            yield
        finally:
            self.now = None

    def rate(self):
        return min(1.0, self.now.strength / 2)

    def few(self, prompts):
        self.calls.append("few")
        if self.entered == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        if self.entered == self.fail_at:
            raise RuntimeError("the device is gone")
        return round(self.rate() * prompts), prompts

    def harm(self):
        self.calls.append("harm")
        harm = 0.005 * self.now.strength**2 + (self.now.width - 0.3) ** 2
        return Harm({"de": harm, "es": harm / 2}, {"de": harm, "es": harm})

    def written(self, seed=None):
        self.calls.append("written")
        hits = round(self.rate() * 100) - (2 if seed else 0)
        return Written(hits, 100, 50, (self.now.gap if seed is None else self.now.gap + seed,))

    def fluency_gap(self, written):
        assert self.now is None, "read by the unedited model"
        return written.answers[0]


def make(settings):
    if settings["strength"] < 0.05:
        raise NothingToChangeError("too weak")
    gap = math.nan if settings["kind"] == "silent" else 0.1
    return SimpleNamespace(strength=settings["strength"], width=settings.get("width", 0.3), gap=gap)


SPACE = Space(
    {
        "kind": Knob(words=("wide", "narrow")),
        "width": Knob(0.0, 1.0, given=("kind", ("wide",))),
        "strength": Knob(0.01, 4.0),
    },
    ({"kind": "wide", "width": 0.9, "strength": 3.0}, {"kind": "narrow", "strength": 3.9}),
    make,
)


def searched(planted, path=None, spaces=None, **options):
    return Search(planted, spaces or {"one": SPACE}, planted.applied, path, {"model": "x"}, **options)


def test_finds_the_planted_optimum():
    """The rate meets the goal from strength 1.71 on; the harm is then least at width 0.3 (or narrow)."""
    search = searched(Planted(), seed=1)
    assert search.run(60)
    choice = choose(search.trials, search.goals, CEILING)
    assert choice.met
    assert 0.95 * CEILING * 2 - 0.01 <= choice.trial.settings["strength"] < 2.2
    assert abs(choice.trial.settings.get("width", 0.3) - 0.3) < 0.1
    drawn = [trial for trial in search.trials if trial.number >= 20]
    early = [trial for trial in search.trials if 2 <= trial.number < 10]
    meeting = [
        sum(trial.meets(search.goals, CEILING) for trial in part) / len(part) for part in (early, drawn)
    ]
    assert meeting[1] > meeting[0]


def test_known_settings_come_first_the_methods_in_turn():
    other = Space(
        {"strength": Knob(1.0, 2.0), "kind": Knob(words=("a",))}, ({"kind": "a", "strength": 1.5},), make
    )
    search = searched(Planted(), spaces={"one": SPACE, "two": other})
    search.run(3)
    assert [(trial.method, trial.settings) for trial in search.trials] == [
        ("one", SPACE.known[0]),
        ("two", other.known[0]),
        ("one", SPACE.known[1]),
    ]
    search.run(16)
    assert {trial.method for trial in search.trials[3:]} == {"one", "two"}
    for trial in search.trials:
        if trial.method == "one":
            assert ("width" in trial.settings) == (trial.settings["kind"] == "wide")


@pytest.mark.parametrize("seed", [0, 12345, -1])
def test_what_a_trial_holds(seed):
    search = searched(Planted(), seed=seed)
    search.run(1)
    [trial] = search.trials
    assert trial == Trial(
        0, "one", dict(SPACE.known[0]), MEASURED, 100, 100, 50, 0.1,
        {"de": pytest.approx(0.405), "es": pytest.approx(0.2025)},
        {"de": pytest.approx(0.405), "es": pytest.approx(0.405)},
    )  # fmt: skip
    assert (trial.share, trial.rise, trial.harm) == (1.0, *map(pytest.approx, (0.405, 0.405)))
    assert not trial.meets(search.goals, CEILING)
    assert trial.misses(search.goals, CEILING) == {
        "share": pytest.approx((0.855 - 1) / 0.855),
        "fluency gap": pytest.approx(-2 / 3),
        "rise": pytest.approx((0.405 - 0.05) / 0.05),
    }
    assert json.loads(json.dumps(asdict(trial)))["settings"] == dict(SPACE.known[0])


def space_of(*known):
    return {"one": replace(SPACE, known=tuple(known))}


GOOD = {"kind": "narrow", "strength": 2.0}


def test_hopeless_trials_are_given_up_at_their_first_bad_step():
    weak, harmful = {"kind": "narrow", "strength": 0.8}, {"kind": "wide", "width": 0.9, "strength": 2.0}
    planted = Planted()
    search = searched(planted, spaces=space_of(GOOD, weak, harmful, {"kind": "narrow", "strength": 0.02}))
    search.run(4)
    states = [trial.state for trial in search.trials]
    assert states == [MEASURED, HOPELESS, HOPELESS, NOTHING]
    assert planted.calls == ["few", "harm", "written", "few", "few", "harm"]
    assert (search.trials[1].found, search.trials[1].continuations) == (6, 16)
    assert "6 of 16" in search.trials[1].why
    assert "0.38" in search.trials[2].why
    assert "too weak" in search.trials[3].why
    assert not any(trial.meets(search.goals, CEILING) for trial in search.trials[1:])


@pytest.mark.parametrize("where", ["few", "harm", "written"])
def test_figures_that_are_not_finite_do_not_stop_the_search(tmp_path, where):
    class Overflowing(Planted):
        def harm(self):
            harm = super().harm()
            return replace(harm, kl={**harm.kl, "es": math.nan}) if where == "harm" else harm

        def few(self, prompts):
            assert self.entered <= 3, "a trial is tried again"
            self.require_numbers("few")
            return super().few(prompts)

        def written(self, seed=None):
            self.require_numbers("written")
            return super().written(seed)

        def require_numbers(self, at):
            if where == at:
                raise NotFiniteError("the likelihood of the next token is not finite")

    search = searched(Overflowing(), tmp_path / "study.jsonl", spaces=space_of(GOOD, GOOD, GOOD))
    assert search.run(3)
    for trial in search.trials:
        assert (trial.state, trial.nll_rise, trial.kl) == (HOPELESS, {}, {})
        assert "not finite" in trial.why
    assert len(search.trials) == 3


def test_a_fault_that_is_not_of_the_edit_ends_the_search():
    class Full(Planted):
        def harm(self):
            raise BrocaError("a row does not fit")

    with pytest.raises(BrocaError, match="a row does not fit"):
        searched(Full(), spaces=space_of(GOOD)).run(1)


def test_a_method_that_refuses_the_model_does_not_stop_the_search():
    def make(settings):
        if settings == GOOD:
            raise UsageError("experts have no common inputs")
        return SPACE.make(settings)

    weak = {"kind": "narrow", "strength": 0.8}
    search = searched(Planted(), spaces={"one": replace(SPACE, known=(GOOD, weak), make=make)})
    search.run(2)
    assert [trial.state for trial in search.trials] == [REFUSED, MEASURED]
    assert "experts" in search.trials[0].why
    assert choose(search.trials, search.goals, CEILING).trial == search.trials[1]


def test_the_first_trial_is_measured_in_full_and_the_best_is_the_bar():
    weak, weaker = {"kind": "narrow", "strength": 0.8}, {"kind": "narrow", "strength": 0.7}
    search = searched(Planted(), spaces=space_of(weak, weaker))
    search.run(2)
    assert [trial.state for trial in search.trials] == [MEASURED, MEASURED]


def test_chance_of_so_few():
    for count in (1, 5, 16):
        for hits in range(count + 1):
            for rate in (0.0, 0.2, 0.95, 1.0):
                expected = pytest.approx(binom.cdf(hits, count, rate), abs=1e-12)
                assert binomial_cdf(hits, count, rate) == expected


def test_an_edit_that_writes_nothing_is_no_fluent_one():
    silent = {"kind": "silent", "strength": 2.0}
    space = replace(SPACE, knobs={"kind": Knob(words=("silent",)), "strength": Knob(1, 3)}, known=(silent,))
    search = searched(Planted(), spaces={"one": space})
    search.run(1)
    [trial] = search.trials
    assert trial.gap() == NOTHING_WRITTEN
    assert not trial.meets(search.goals, CEILING)


def test_resumed_it_is_as_if_it_had_not_been_stopped(tmp_path):
    whole = searched(Planted(), tmp_path / "whole" / "study.jsonl", seed=3)
    whole.run(24)
    for stops in ((1, 24), (7, 15, 24)):
        path = tmp_path / str(stops) / "study.jsonl"
        for stop in stops:
            searched(Planted(), path, seed=3).run(stop)
        assert searched(Planted(), path, seed=3).trials == whole.trials
    other = searched(Planted(), seed=4)
    other.run(24)
    assert other.trials[2:] != whole.trials[2:]


@pytest.mark.parametrize("stop_at", [1, 2, 5, 14])
def test_ctrl_c_ends_the_search_and_counts_nothing_half_done(tmp_path, stop_at):
    before = signal.getsignal(signal.SIGINT)
    whole = searched(Planted(), seed=3)
    whole.run(16)
    planted = Planted(stop_at=stop_at)
    stopped = searched(planted, tmp_path / "study.jsonl", seed=3)
    assert not stopped.run(16)
    assert planted.now is None
    assert signal.getsignal(signal.SIGINT) is before
    trials = stopped.trials
    assert 0 <= stop_at - len(trials) <= 1
    assert trials == whole.trials[: len(trials)]
    resumed = searched(Planted(), tmp_path / "study.jsonl", seed=3)
    assert resumed.run(16)
    assert resumed.trials == whole.trials


def test_a_second_ctrl_c_is_an_interrupt(tmp_path):
    class Twice(Planted):
        def few(self, prompts):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    planted = Twice()
    with pytest.raises(KeyboardInterrupt):
        searched(planted, tmp_path / "study.jsonl").run(3)
    assert planted.now is None
    assert searched(Planted(), tmp_path / "study.jsonl").trials == []


def test_an_error_in_a_trial_is_told_and_leaves_no_trace(tmp_path):
    whole = searched(Planted(), seed=3)
    whole.run(12)
    planted = Planted(fail_at=2)
    with pytest.raises(RuntimeError, match="the device is gone"):
        searched(planted, tmp_path / "study.jsonl", seed=3).run(12)
    assert planted.now is None
    resumed = searched(Planted(), tmp_path / "study.jsonl", seed=3)
    resumed.run(12)
    assert resumed.trials[2:] == whole.trials[2:]


def test_a_crash_in_the_middle_of_a_line_loses_that_line_alone(tmp_path):
    path = tmp_path / "study.jsonl"
    whole = searched(Planted(), seed=3)
    whole.run(6)
    searched(Planted(), path, seed=3).run(5)
    # The study's two lines, and of each trial all that comes before its end.
    content = path.read_bytes()
    for cut in (10, 30):
        path.write_bytes(content[:-cut])
        resumed = searched(Planted(), path, seed=3)
        assert len(resumed.trials) == 4
        resumed.run(6)
        assert resumed.trials == whole.trials


def test_a_search_is_alone_in_its_file(tmp_path):
    path = tmp_path / "study.jsonl"
    whole = searched(Planted(), seed=3)
    whole.run(5)
    idle = searched(Planted(), path, seed=3)

    class Crowded(Planted):
        def few(self, prompts):
            with pytest.raises(BrocaError, match="a search is running"):
                searched(Planted(), path, seed=3)
            with pytest.raises(BrocaError, match="a search is running"):
                idle.run(5)
            return super().few(prompts)

    search = searched(Crowded(), path, seed=3)
    search.run(3)
    idle.run(5)
    assert idle.trials == searched(Planted(), path, seed=3).trials == whole.trials


def test_optunas_lock_of_a_killed_search_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, symlink = Path("tuned", "study.jsonl"), os.symlink
    searched(Planted(), path)
    symlink(path, f"{path}.lock")  # as Optuna makes it, of a path relative to the working directory

    def at_once(*link):
        try:
            symlink(*link)
        except FileExistsError as error:
            raise AssertionError("waits for the lock") from error

    monkeypatch.setattr(os, "symlink", at_once)
    assert searched(Planted(), path).run(1)


def test_refuses_another_searchs_file(tmp_path):
    path = tmp_path / "study.jsonl"
    searched(Planted(), path).run(1)
    planted = Planted()
    with pytest.raises(BrocaError, match="an earlier search with another model, text"):
        Search(planted, {"one": SPACE}, planted.applied, path, {"model": "y", "text": 1})
    foreign = tmp_path / "foreign.jsonl"
    for text in ('{"text": "hello"}\n', '{"text": "hello"}\n{"te', "hello"):
        foreign.write_text(text)
        with pytest.raises(BrocaError, match="not the file of a search"):
            searched(Planted(), foreign)
        assert foreign.read_text() == text


def test_again_pools_continuations_and_averages_gaps():
    planted = Planted()
    search = searched(planted, spaces=space_of(GOOD))
    search.run(1)
    pooled = search.remeasured(search.trials[0], [1, 2])
    assert (pooled.found, pooled.continuations, pooled.prompts) == (100 + 98 + 98, 300, 50)
    assert pooled.fluency_gap == pytest.approx((0.1 + 1.1 + 2.1) / 3)
    assert replace(pooled, found=100, continuations=100, fluency_gap=0.1) == search.trials[0]


def test_goals_are_as_asked():
    trial = Trial(0, "one", {}, MEASURED, 90, 100, 50, 0.4, {"de": 0.06}, {"de": 0.1})
    assert not trial.meets(Goals(), 1.0)
    assert not trial.meets(Goals(share=0.9, fluency_gap=0.4), 1.0)
    assert trial.meets(Goals(share=0.9, fluency_gap=0.4, rise=0.06), 1.0)
    assert not trial.meets(Goals(share=0.91, fluency_gap=0.4, rise=0.06), 1.0)
    assert trial.share_error == pytest.approx(math.sqrt((45 / 51) * (6 / 51) / 50))
