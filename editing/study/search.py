"""The search for the best edit: trials in the loaded model, remembered on disk, pruned where hopeless.

Objectives: target share up, fluency gap down, KL on third languages down; by multi-objective tree-structured
Parzen estimators (Optuna's; Bergstra et al., NeurIPS 2011; Ozaki et al., GECCO 2020), with the goals as constraints.
Every trial has a seed of its own, so that a search that was stopped goes on as if it had not been.

A trial is measured in three steps, the cheapest first, and given up as soon as it is hopeless:

1. continuations of a few prompts: given up if so few in the target would be seen less than once in a hundred
   times, were the share the goal's or the best trial's, whichever is lower;
2. text of third languages: given up if a rise is above ``HOPELESS_RISE`` times the goal's limit;
3. continuations of all prompts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from editing.plans.plan import Plan
from editing.study.search_scoring import Harm, Written
from editing.study.search_space import Settings, Space, Value
from editing.study.trial import HOPELESS, MEASURED, NOTHING, NOTHING_WRITTEN, Goals, Trial
from neurons.errors import BrocaError, NothingToChangeError

STUDY = "study.jsonl"
FEW_PROMPTS = 16
UNLIKELY = 0.01
HOPELESS_RISE = 5.0
DRAWN_AT_RANDOM = 8


class Scorer(Protocol):
    """What a trial asks of ``editing.study.search_scoring.Scoring``."""

    ceiling: float

    def few(self, prompts: int) -> tuple[int, int]: ...

    def harm(self) -> Harm: ...

    def written(self, seed: int | None = None) -> Written: ...

    def fluency_gap(self, written: Written) -> float: ...


class Search:
    """Tries edits one after the other; all that it knows is in one file.

    Args:
        scorer: measures the model as it is.
        spaces: method -> what it can be told.
        applied: a plan -> a context in which the model computes with it.
        path: the file; None keeps the search in memory.
        identity: JSON values that an earlier search in the same file must share: the model's fingerprint, the
            text, seed, ...
        goals: what an edit is to reach.
        seed: of the settings that are drawn.
        few_prompts: of a trial's first step.

    Raises:
        BrocaError: the file is of another search, or is none, or a search is running in it.
    """

    def __init__(
        self,
        scorer: Scorer,
        spaces: Mapping[str, Space],
        applied: Callable[[Plan], AbstractContextManager[None]],
        path: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        goals: Goals | None = None,
        seed: int = 0,
        few_prompts: int = FEW_PROMPTS,
    ) -> None:
        self._scorer, self._spaces, self._applied = scorer, spaces, applied
        self.goals = goals or Goals()
        self._seed, self._few_prompts = seed, few_prompts
        self._stopping = False
        self.identity = dict(identity or {})
        self._path = path
        with _alone(path):
            self._study = _open_study(path, self.identity)
        self._known = _known(spaces)

    @property
    def ceiling(self) -> float:
        return self._scorer.ceiling

    @property
    def trials(self) -> list[Trial]:
        """All that were finished, numbered from 0."""
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [Trial(**{**one.user_attrs["trial"], "number": i}) for i, one in enumerate(done)]

    def run(self, trials: int, tell: Callable[[Trial], None] | None = None) -> bool:
        """Try until so many trials are finished, those of earlier runs included.

        An interrupt (Ctrl-C) ends the search after the step that is being measured, with the model as it was
        and the trial not counted; a second one raises KeyboardInterrupt.

        Args:
            trials: in all.
            tell: called with every trial of this run once it is finished.

        Returns:
            Whether it came to the end.

        Raises:
            BrocaError: another search is running in the same file.
        """
        with _alone(self._path), _quiet(), self._interruptible():
            while len(before := self.trials) < trials and not self._stopping:
                found = self._next(before)
                if found is not None and tell is not None:
                    tell(found)
        return not self._stopping

    def plan(self, trial: Trial) -> Plan:
        """The plan of a trial, made again."""
        return self._spaces[trial.method].make(trial.settings)

    def again(self, trial: Trial, seeds: Sequence[int]) -> Trial:
        """A measured trial with further continuations added to its own; its gap is the mean of all."""
        plan = self.plan(trial)
        found, continuations, gaps = trial.found, trial.continuations, [trial.gap()]
        for seed in seeds:
            with self._applied(plan):
                written = self._scorer.written(seed)
            found, continuations = found + written.found, continuations + written.continuations
            gap = self._scorer.fluency_gap(written)
            gaps.append(NOTHING_WRITTEN if math.isnan(gap) else gap)
        return Trial(
            **{
                **asdict(trial),
                "found": found,
                "continuations": continuations,
                "fluency_gap": sum(gaps) / len(gaps),
            }
        )

    def _next(self, before: Sequence[Trial]) -> Trial | None:
        """One more trial; None where it was interrupted."""
        number = len(before)
        self._study.sampler = TPESampler(
            seed=self._seed * 1_000_003 + number,
            n_startup_trials=DRAWN_AT_RANDOM,
            multivariate=True,
            group=True,
        )
        # A trial that an earlier run enqueued and was stopped before is this one.
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if number < len(self._known) and not waiting:
            self._study.enqueue_trial(dict(self._known[number]))
        asked = self._study.ask()
        try:
            method, settings = _suggested(asked, self._spaces)
            trial = self._measure(number, method, settings, before)
        except BaseException:
            self._study.tell(asked, state=TrialState.FAIL)
            raise
        if trial is None:
            self._study.tell(asked, state=TrialState.FAIL)
            return None
        asked.set_user_attr("trial", asdict(trial))
        for name, miss in trial.misses(self.goals, self.ceiling).items():
            asked.set_constraint(name, miss)
        if trial.state == MEASURED:
            self._study.tell(asked, [trial.share, trial.gap(), trial.harm])
        else:
            self._study.tell(asked, state=TrialState.PRUNED)
        return trial

    def _measure(self, number: int, method: str, settings: Settings, before: Sequence[Trial]) -> Trial | None:
        known: dict[str, Any] = {"number": number, "method": method, "settings": dict(settings)}
        try:
            plan = self._spaces[method].make(settings)
        except NothingToChangeError as error:
            return Trial(**known, state=NOTHING, why=str(error))
        measured = [trial for trial in before if trial.state == MEASURED]
        with self._applied(plan):
            found, of = self._scorer.few(self._few_prompts)
            if measured:
                wanted = min(self.goals.share * self.ceiling, max(trial.share for trial in measured))
                if at_most(found, of, wanted) < UNLIKELY:
                    why = f"{found} of {of} in the target"
                    return Trial(**known, state=HOPELESS, found=found, continuations=of, prompts=of, why=why)
            if self._stopping:
                return None
            harm = self._scorer.harm()
            reads: dict[str, Any] = {"nll_rise": dict(harm.nll_rise), "kl": dict(harm.kl)}
            if measured and harm.rise > HOPELESS_RISE * self.goals.rise:
                why = f"a third language's NLL rises by {harm.rise:.2f}"
                return Trial(
                    **known, state=HOPELESS, found=found, continuations=of, prompts=of, why=why, **reads
                )
            if self._stopping:
                return None
            written = self._scorer.written()
        if self._stopping:
            return None
        return Trial(
            **known,
            state=MEASURED,
            found=written.found,
            continuations=written.continuations,
            prompts=written.prompts,
            fluency_gap=self._scorer.fluency_gap(written),
            **reads,
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first interrupt is noted and not raised: raised anywhere, it could leave weights half put back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        own = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, own)


def at_most(found: int, of: int, share: float) -> float:
    """The chance of at most ``found`` of ``of`` where each has the chance ``share``."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(found + 1))


def _known(spaces: Mapping[str, Space]) -> list[dict[str, Value]]:
    """The settings known to be good, the methods in turn."""
    longest = max(len(space.known) for space in spaces.values())
    return [
        {"method": name, **{f"{name}.{knob}": value for knob, value in space.known[at].items()}}
        for at in range(longest)
        for name, space in spaces.items()
        if at < len(space.known)
    ]


def _suggested(asked: optuna.Trial, spaces: Mapping[str, Space]) -> tuple[str, Settings]:
    """What the sampler would try; a knob's name there has its method's before it."""
    method: str = asked.suggest_categorical("method", list(spaces))
    settings: dict[str, Value] = {}
    for name, knob in spaces[method].knobs.items():
        if not knob.applies(settings):
            continue
        full = f"{method}.{name}"
        if knob.words:
            settings[name] = asked.suggest_categorical(full, list(knob.words))
        elif knob.whole:
            settings[name] = asked.suggest_int(full, int(knob.low), int(knob.high), log=knob.log)
        else:
            settings[name] = asked.suggest_float(full, knob.low, knob.high, log=knob.log)
    return method, settings


def _open_study(path: Path | None, identity: dict[str, Any]) -> optuna.Study:
    storage = None
    with _quiet():
        if path is not None:
            _drop_torn_line(path)
            storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage,
            study_name="broca",
            directions=["maximize", "minimize", "minimize"],
            load_if_exists=True,
        )
    # As the file would give it back.
    wanted = json.loads(json.dumps(identity))
    earlier = study.user_attrs.get("identity")
    if earlier is None:
        study.set_user_attr("identity", wanted)
    elif earlier != wanted:
        differing = sorted(key for key in {*earlier, *wanted} if earlier.get(key) != wanted.get(key))
        raise BrocaError(
            f"{path}: an earlier search with another {', '.join(differing)}: choose another --out, or repeat it as "
            "its tune.json says"
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Inside, no other search opens the file or adds to it: it would take this one's trial for a dead one's.

    The system gives the lock back when the process ends, however it ends.

    Raises:
        BrocaError: another one is at it.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BrocaError(
                f"{path}: a search is running in it: wait for its end, or choose another --out"
            ) from error
        except OSError:
            pass  # a network disk without locks
        yield


def _drop_torn_line(path: Path) -> None:
    """What a crash left half written would make the whole file unreadable.

    Raises:
        BrocaError: the file is not a search's.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        # What has no whole line is nobody's to cut.
        for line in (whole or content).splitlines():
            json.loads(line)["op_code"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrocaError(f"{path}: not the file of a search: choose another --out") from error
    if len(whole) < len(content):
        os.truncate(path, len(whole))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log lines and its warnings of what is experimental are not for our users."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
