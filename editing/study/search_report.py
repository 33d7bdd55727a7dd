"""Outcome of a search: the Pareto front, the chosen edit, the table and the figure.

**The choice** is the least harmful trial (mean KL on third languages) among the measured trials that meet all goals
with a target-language rate two standard errors above the goal; if there are none, one standard error above; if there
are none, among all that meet the goals.  A goal that is only just met on one part of the text is missed on the next
about half of the time.

**The fallback**, if no trial meets all goals, is the trial that misses them least: the smallest sum over goals of the
fraction by which each is missed; of equals, the less harmful one.  If nothing was measured, it is the trial with the
highest rate on its first few prompts.

Before the choice the best few trials are measured with further seeds (``confirmed``), because the maximum of many
noisy rates is biased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from editing.evaluation.outcome import Outcome
from editing.study.search import Search
from editing.study.search_result import SearchResult
from editing.study.trial import HOPELESS, MEASURED, WITHOUT_PLAN, Goals, Trial
from neurons.errors import NothingToChangeError

CONFIRMED_TRIALS = 4
FURTHER_SEEDS = (1, 2)


@dataclass(frozen=True)
class Choice:
    """The chosen trial.

    Attributes:
        trial: the trial.
        met: whether it meets all goals on the choosing part.
        why: the reason, in words.
    """

    trial: Trial
    met: bool
    why: str


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front of the measured trials in target-language rate, fluency gap and harm.

    Of trials with the same three values it has the first.  Sorted by rate, the highest first.
    """
    measured = [trial for trial in trials if trial.state == MEASURED]
    figures = [(-trial.share, trial.gap(), trial.harm) for trial in measured]
    kept = [
        trial
        for i, (trial, values) in enumerate(zip(measured, figures, strict=True))
        if not any(
            all(a <= b for a, b in zip(other, values, strict=True)) and (other != values or j < i)
            for j, other in enumerate(figures)
        )
    ]
    return sorted(kept, key=lambda trial: (-trial.share, trial.harm, trial.number))


def choose(trials: Sequence[Trial], goals: Goals, ceiling: float) -> Choice:
    """The choice, or the fallback, of the module docstring.

    Raises:
        NothingToChangeError: no trial changes anything.
    """
    meeting = [trial for trial in trials if trial.meets(goals, ceiling)]
    for errors in (2, 1, 0):
        minimum = goals.share * ceiling
        safe = [trial for trial in meeting if trial.share - errors * trial.share_error >= minimum]
        if safe:
            spare = f"{errors or 'no'} standard error{'' if errors == 1 else 's'} of the share to spare"
            return Choice(
                min(safe, key=_harm),
                True,
                f"the least harmful of {len(safe)} that meet all goals with {spare}",
            )
    measured = [trial for trial in trials if trial.state == MEASURED]
    if measured:

        def missed(trial: Trial) -> tuple[float, float, int]:
            return total_miss(trial, goals, ceiling), *_harm(trial)

        best = min(measured, key=missed)
        failing = [name for name, miss in best.misses(goals, ceiling).items() if miss > 0]
        return Choice(
            best, False, f"no trial meets all goals; this one misses {' and '.join(failing)} by the least"
        )
    changing = [trial for trial in trials if trial.state not in WITHOUT_PLAN]
    if not changing:
        raise NothingToChangeError(
            f"no trial changes the model ({trials[0].why}): allow more layers, another method, or more --trials"
        )
    return Choice(
        max(changing, key=lambda trial: (trial.share, -trial.number)),
        False,
        "no trial was worth measuring in full; this one reached most",
    )


def total_miss(trial: Trial, goals: Goals, ceiling: float) -> float:
    """The sum over goals of the fraction by which each is missed."""
    return sum(max(0.0, miss) for miss in trial.misses(goals, ceiling).values())


def confirmed(
    search: Search, count: int = CONFIRMED_TRIALS, seeds: Sequence[int] = FURTHER_SEEDS
) -> list[Trial]:
    """All trials, with the best ``count`` measured again with further seeds.

    This can change which trial is chosen: more trials are measured until the chosen one is among them.
    """
    trials = {trial.number: trial for trial in search.trials}
    done: set[int] = set()
    while any(trial.state == MEASURED and trial.number not in done for trial in trials.values()):
        chosen = choose(list(trials.values()), search.goals, search.ceiling).trial.number
        if chosen in done:
            if len(done) >= count:
                break
            others = [trial for trial in trials.values() if trial.number not in done]
            chosen = choose(others, search.goals, search.ceiling).trial.number
        trials[chosen] = search.remeasured(trials[chosen], seeds)
        done.add(chosen)
    return list(trials.values())


def _harm(trial: Trial) -> tuple[float, int]:
    return trial.harm, trial.number


def rows(search: SearchResult) -> list[list[str]]:
    """The rows of the table (``COLUMNS``): the front, preceded by the chosen trial if it is not on the front."""
    by_number = {trial.number: trial for trial in search.trials}
    numbers = search.front if search.chosen in search.front else (search.chosen, *search.front)
    return [
        [
            f"{trial.number}{' *' if trial.number == search.chosen else ''}",
            trial.method,
            ", ".join(f"{name} {_formatted(value)}" for name, value in trial.settings.items()),
            f"{trial.share:.2f}",
            "-" if trial.fluency_gap is None or math.isnan(trial.fluency_gap) else f"{trial.gap():+.2f}",
            f"{trial.rise:+.3f}",
            f"{trial.harm:.4f}",
            "yes" if trial.meets(search.goals, search.ceiling) else "no",
        ]
        for trial in map(by_number.__getitem__, numbers)
    ]


COLUMNS = ("trial", "method", "settings", "share", "fluency gap", "third NLL", "third KL", "all goals")


def _formatted(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def goals_met(outcome: Outcome, ceiling: float, source: str, target: str, goals: Goals) -> dict[str, bool]:
    """Goal -> whether an edit's outcome meets it."""
    rises = [rise for name, rise in outcome.nll_rise.items() if name not in (source, target)]
    return {
        "share": outcome.target_share >= goals.share * ceiling,
        "fluency gap": outcome.fluency_gap <= goals.fluency_gap,
        "rise": max(rises) <= goals.rise,
    }


def front_figure(search: SearchResult) -> Figure:
    """Target-language rate against harm, and against the fluency gap."""
    trials, goals = search.trials, search.goals
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: tuple[tuple[str, Callable[[Trial], float], float | None], ...] = (
        ("mean KL on third languages, nats", lambda trial: trial.harm, None),
        ("fluency gap, nats a token", lambda trial: trial.gap(), goals.fluency_gap),
    )
    for axis, (label, figure_of, limit) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        groups: Mapping[str, list[Trial]] = {
            "given up early": [
                trial
                for trial in trials
                if trial.state == HOPELESS and (trial.kl if limit is None else trial.fluency_gap is not None)
            ],
            "measured": [
                trial for trial in trials if trial.state == MEASURED and trial.number not in search.front
            ],
            "front": [trial for trial in trials if trial.number in search.front],
        }
        colours = {"given up early": "0.8", "measured": "0.55", "front": "C0"}
        for name, group in groups.items():
            if group:
                axis.scatter(
                    [figure_of(trial) for trial in group],
                    [trial.share for trial in group],
                    color=colours[name],
                    label=name,
                    s=28,
                )
        chosen = search.choice
        if chosen.state == MEASURED:
            axis.scatter(
                [figure_of(chosen)],
                [chosen.share],
                facecolors="none",
                edgecolors="C3",
                s=140,
                linewidths=2,
                label="chosen",
            )
        axis.axhline(goals.share * search.ceiling, color="black", linestyle="--", linewidth=1)
        if limit is not None:
            axis.axvline(limit, color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=label, ylim=(-0.02, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="share of the target")
    if figure.axes[-1].collections:
        figure.axes[-1].legend(fontsize=8, loc="lower right")
    title = f"{search.source} to {search.target}, {len(trials)} edits on the choosing part (dashed: goals)"
    figure.suptitle(title, fontsize=11)
    return figure
