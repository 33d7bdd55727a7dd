"""The search for the best edit: trials in the loaded model, stored in a file, pruned if hopeless.

The objectives are a high target-language rate, a small fluency gap and a small KL on third languages.  The sampler is
Optuna's multi-objective tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011; Ozaki et al., GECCO 2020),
with the goals as constraints.  Every trial has its own seed, so a resumed search gives the same trials as one that was
never stopped.

A trial is measured in three steps, the cheapest first, and pruned at the first hopeless one:

1. continuations of a few prompts: pruned if so few hits in the target have a probability below ``UNLIKELY`` at the
   goal's rate or at the best trial's, whichever is lower;
2. text of third languages: pruned if an NLL rise is above ``HOPELESS_RISE`` times the goal's limit;
3. continuations of all prompts.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from editing.plans.plan import Plan
from editing.study.search_scoring import Scoring
from editing.study.search_space import Settings, Space, Value
from editing.study.trial import HOPELESS, MEASURED, NOTHING, NOTHING_WRITTEN, REFUSED, Goals, Trial
from neurons.errors import BrocaError, NotFiniteError, NothingToChangeError
from neurons.files.locked import locked

STUDY = "study.jsonl"
FEW_PROMPTS = 16
UNLIKELY = 0.01
HOPELESS_RISE = 5.0
RANDOM_TRIALS = 8  # before the sampler fits its model


class Search:
    """Tries edits one at a time and stores the trials in one file.

    Args:
        scorer: measures the model in its current state.
        spaces: method -> its search space.
        applied: plan -> a context in which the model has the plan applied.
        path: the file; None keeps the search in memory.
        identity: JSON values that must equal those of an earlier search in the same file: the model's
            fingerprint, the text, the seed, ...
        goals: of the edit.
        seed: of the sampled settings.

    Raises:
        BrocaError: the file belongs to another search, is not a search's file, or another search is running in it.
    """

    def __init__(
        self,
        scorer: Scoring,
        spaces: Mapping[str, Space],
        applied: Callable[[Plan], AbstractContextManager[None]],
        path: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        goals: Goals | None = None,
        seed: int = 0,
    ) -> None:
        self._scorer, self._spaces, self._applied = scorer, spaces, applied
        self.goals = goals or Goals()
        self._seed, self._stopping = seed, False
        self.identity = dict(identity or {})
        self._lock = partial(locked, path, f"{path}: a search is running in this file")
        with self._lock():
            self._study = _open_study(path, self.identity)
        self._known = _known_settings(spaces)

    @property
    def ceiling(self) -> float:
        return self._scorer.ceiling

    @property
    def trials(self) -> list[Trial]:
        """All finished trials, numbered from 0."""
        finished = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [Trial(**{**trial.user_attrs["trial"], "number": i}) for i, trial in enumerate(finished)]

    def run(self, trials: int, on_trial: Callable[[Trial], None] | None = None) -> bool:
        """Try until ``trials`` trials are finished, those of earlier runs included.

        An interrupt (Ctrl-C) ends the search after the current step; the model is restored and the current trial is
        not counted.  A second interrupt raises KeyboardInterrupt.

        Args:
            trials: total number of trials.
            on_trial: called with every trial of this run when it is finished.

        Returns:
            Whether all trials are finished.

        Raises:
            BrocaError: another search is running in the same file.
        """
        with self._lock(), _quiet(), self._interruptible():
            while len(finished := self.trials) < trials and not self._stopping:
                trial = self._next(finished)
                if trial is not None and on_trial is not None:
                    on_trial(trial)
        return not self._stopping

    def plan(self, trial: Trial) -> Plan:
        """The plan of a trial."""
        return self._spaces[trial.method].make(trial.settings)

    def remeasured(self, trial: Trial, seeds: Sequence[int]) -> Trial:
        """A measured trial with the continuations of further seeds added; its gap is the mean over the seeds."""
        if not seeds:
            return trial
        plan = self.plan(trial)
        hits, continuations, gaps = trial.found, trial.continuations, [trial.gap()]
        for seed in seeds:
            with self._applied(plan):
                written = self._scorer.written(seed)
            hits, continuations = hits + written.hits, continuations + written.continuations
            gap = self._scorer.fluency_gap(written)
            gaps.append(NOTHING_WRITTEN if math.isnan(gap) else gap)
        return replace(trial, found=hits, continuations=continuations, fluency_gap=sum(gaps) / len(gaps))

    def _next(self, finished: Sequence[Trial]) -> Trial | None:
        """One more trial; None if it was interrupted."""
        number = len(finished)
        self._study.sampler = TPESampler(
            seed=(self._seed * 1_000_003 + number) % 2**32,
            n_startup_trials=RANDOM_TRIALS,
            multivariate=True,
            group=True,
        )
        # An earlier run may have enqueued this trial before it was stopped.
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if number < len(self._known) and not waiting:
            self._study.enqueue_trial(dict(self._known[number]))
        sampled = self._study.ask()
        try:
            method, settings = _suggested(sampled, self._spaces)
            trial = self._measure(number, method, settings, finished)
        except BaseException:
            self._study.tell(sampled, state=TrialState.FAIL)
            raise
        if trial is None:
            self._study.tell(sampled, state=TrialState.FAIL)
            return None
        sampled.set_user_attr("trial", asdict(trial))
        for name, miss in trial.misses(self.goals, self.ceiling).items():
            sampled.set_constraint(name, miss)
        if trial.state == MEASURED:
            self._study.tell(sampled, [trial.share, trial.gap(), trial.harm])
        else:
            self._study.tell(sampled, state=TrialState.PRUNED)
        return trial

    def _measure(
        self, number: int, method: str, settings: Settings, finished: Sequence[Trial]
    ) -> Trial | None:
        trial = Trial(number, method, dict(settings), MEASURED)
        try:
            plan = self._spaces[method].make(settings)
        except BrocaError as error:
            state = NOTHING if isinstance(error, NothingToChangeError) else REFUSED
            return replace(trial, state=state, why=str(error))
        try:
            return self._scored(trial, plan, [other for other in finished if other.state == MEASURED])
        except NotFiniteError as error:
            # A repeated command would fail at the same trial.
            return replace(trial, state=HOPELESS, why=str(error))

    def _scored(self, trial: Trial, plan: Plan, measured: Sequence[Trial]) -> Trial | None:
        with self._applied(plan):
            hits, prompts = self._scorer.few(FEW_PROMPTS)
            trial = replace(trial, found=hits, continuations=prompts, prompts=prompts)
            if measured:
                rate = min(self.goals.share * self.ceiling, max(other.share for other in measured))
                if binomial_cdf(hits, prompts, rate) < UNLIKELY:
                    return replace(trial, state=HOPELESS, why=f"{hits} of {prompts} in the target")
            if self._stopping:
                return None
            harm = self._scorer.harm()
            if endless := [k for k in harm.kl if not math.isfinite(harm.kl[k] + harm.nll_rise[k])]:
                return replace(trial, state=HOPELESS, why=f"the likelihood of {endless[0]} is not finite")
            trial = replace(trial, nll_rise=dict(harm.nll_rise), kl=dict(harm.kl))
            if measured and harm.rise > HOPELESS_RISE * self.goals.rise:
                why = f"a third language's NLL rises by {harm.rise:.2f}"
                return replace(trial, state=HOPELESS, why=why)
            if self._stopping:
                return None
            written = self._scorer.written()
        if self._stopping:
            return None
        return replace(
            trial,
            found=written.hits,
            continuations=written.continuations,
            prompts=written.prompts,
            fluency_gap=self._scorer.fluency_gap(written),
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Record the first interrupt instead of raising it: an exception could leave weights partly restored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def binomial_cdf(hits: int, count: int, rate: float) -> float:
    """The probability of at most ``hits`` hits in ``count`` draws that each hit with probability ``rate``."""
    return sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(hits + 1))


def _known_settings(spaces: Mapping[str, Space]) -> list[dict[str, Value]]:
    """Each method's known settings, alternating between the methods."""
    longest = max(len(space.known) for space in spaces.values())
    return [
        {"method": name, **{f"{name}.{knob}": value for knob, value in space.known[at].items()}}
        for at in range(longest)
        for name, space in spaces.items()
        if at < len(space.known)
    ]


def _suggested(sampled: optuna.Trial, spaces: Mapping[str, Space]) -> tuple[str, Settings]:
    """The sampler's suggestion; Optuna knows a knob as "method.knob"."""
    method: str = sampled.suggest_categorical("method", list(spaces))
    settings: dict[str, Value] = {}
    for name, knob in spaces[method].knobs.items():
        if not knob.applies(settings):
            continue
        full = f"{method}.{name}"
        if knob.words:
            settings[name] = sampled.suggest_categorical(full, list(knob.words))
        elif knob.whole:
            settings[name] = sampled.suggest_int(full, int(knob.low), int(knob.high), log=knob.log)
        else:
            settings[name] = sampled.suggest_float(full, knob.low, knob.high, log=knob.log)
    return method, settings


def _open_study(path: Path | None, identity: dict[str, Any]) -> optuna.Study:
    storage = None
    with _quiet():
        if path is not None:
            _drop_partial_line(path)
            # A killed search leaves Optuna's lock: a link, which waits for ever if it points to no file.
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
            storage = JournalStorage(JournalFileBackend(str(path.absolute())))
        study = optuna.create_study(
            storage=storage,
            study_name="broca",
            directions=["maximize", "minimize", "minimize"],
            load_if_exists=True,
        )
    # In the form that the file returns.
    stored = json.loads(json.dumps(identity))
    earlier = study.user_attrs.get("identity")
    if earlier is None:
        study.set_user_attr("identity", stored)
    elif earlier != stored:
        differing = sorted(key for key in {*earlier, *stored} if earlier.get(key) != stored.get(key))
        raise BrocaError(
            f"{path}: an earlier search with another {', '.join(differing)}: choose another --out, or repeat the "
            "command in its tune.json"
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _drop_partial_line(path: Path) -> None:
    """Cut a partial last line after a crash, which would make the file unreadable.

    Raises:
        BrocaError: not the file of a search.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        # A file without a whole line is checked and never cut.
        for line in (whole or content).splitlines():
            json.loads(line)["op_code"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrocaError(f"{path}: not the file of a search: choose another --out") from error
    if len(whole) < len(content):
        os.truncate(path, len(whole))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's log and its warnings about experimental features."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
