"""What a search found: its front, the one edit that is chosen, the table and the picture.

**The choice.**  Of the measured trials that meet all goals, the least harmful (mean KL on third languages): of those
whose share has two standard errors to spare; where none has, of those that have one; where none has that, of all.
Other prompts are other luck, and what is only just met on one part of the text is missed on the next every second time.

**The fallback**, where no trial meets all goals: the one that misses them least, the sum over goals of the share of
itself by which each is missed; equals fall to the less harmful one.  Where nothing was measured, the one
with the largest share of its first few prompts.

Before the choice the few best are measured with further seeds (``confirmed``): the best of many shares of a few
continuations is partly luck.
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
from editing.study.trial import HOPELESS, MEASURED, NOTHING, Goals, Trial
from neurons.errors import NothingToChangeError

CONFIRMED = 4
FURTHER_SEEDS = (1, 2)


@dataclass(frozen=True)
class Choice:
    """The trial that was chosen, and why, in words.

    Attributes:
        trial: the chosen one.
        met: whether it meets all goals on the choosing part.
        why: in words.
    """

    trial: Trial
    met: bool
    why: str


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The measured trials than which none is as good in share, fluency gap and harm and better in one.

    Of several with the same three figures the first; the largest share first.
    """
    measured = [trial for trial in trials if trial.state == MEASURED]
    figures = [(-trial.share, trial.gap(), trial.harm) for trial in measured]
    kept = [
        trial
        for i, (trial, own) in enumerate(zip(measured, figures, strict=True))
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (other != own or j < i)
            for j, other in enumerate(figures)
        )
    ]
    return sorted(kept, key=lambda trial: (-trial.share, trial.harm, trial.number))


def choose(trials: Sequence[Trial], goals: Goals, ceiling: float) -> Choice:
    """The module docstring's choice.

    Raises:
        NothingToChangeError: no trial changes anything.
    """
    meeting = [trial for trial in trials if trial.meets(goals, ceiling)]
    for errors in (2, 1, 0):
        wanted = goals.share * ceiling
        left = [trial for trial in meeting if trial.share - errors * trial.share_error >= wanted]
        if left:
            spare = f"{errors or 'no'} standard error{'' if errors == 1 else 's'} of the share to spare"
            return Choice(
                min(left, key=_harm),
                True,
                f"the least harmful of {len(left)} that meet all goals with {spare}",
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
    changing = [trial for trial in trials if trial.state != NOTHING]
    if not changing:
        raise NothingToChangeError(
            "no trial changes anything: allow more layers, another method, or more --trials"
        )
    return Choice(
        max(changing, key=lambda trial: (trial.share, -trial.number)),
        False,
        "no trial was worth measuring in full; this one reached most",
    )


def total_miss(trial: Trial, goals: Goals, ceiling: float) -> float:
    """By how much of itself each goal is missed, added up."""
    return sum(max(0.0, miss) for miss in trial.misses(goals, ceiling).values())


def confirmed(search: Search, count: int = CONFIRMED, seeds: Sequence[int] = FURTHER_SEEDS) -> list[Trial]:
    """All trials, the ``count`` that would be chosen first measured with further seeds.

    Once those are, others may come first: they are measured too, until the chosen one has been.
    """
    trials = {trial.number: trial for trial in search.trials}
    if not any(trial.state == MEASURED for trial in trials.values()):
        return list(trials.values())
    done: set[int] = set()
    while True:
        left = [trial for trial in trials.values() if trial.number not in done]
        chosen = choose(list(trials.values()), search.goals, search.ceiling).trial.number
        if len(done) >= count and chosen in done:
            return list(trials.values())
        if not any(trial.state == MEASURED for trial in left):
            return list(trials.values())
        following = chosen if chosen not in done else choose(left, search.goals, search.ceiling).trial.number
        trials[following] = search.again(trials[following], seeds)
        done.add(following)


def _harm(trial: Trial) -> tuple[float, int]:
    return trial.harm, trial.number


def rows(search: SearchResult) -> list[list[str]]:
    """The table's rows, as ``COLUMNS``: the front, before it the chosen trial where that is not on it."""
    by_number = {trial.number: trial for trial in search.trials}
    shown = search.front if search.chosen in search.front else (search.chosen, *search.front)
    found = []
    for trial in map(by_number.__getitem__, shown):
        found.append(
            [
                f"{trial.number}{' *' if trial.number == search.chosen else ''}",
                trial.method,
                ", ".join(f"{name} {_shown(value)}" for name, value in trial.settings.items()),
                f"{trial.share:.2f}",
                "-" if trial.fluency_gap is None or math.isnan(trial.fluency_gap) else f"{trial.gap():+.2f}",
                f"{trial.rise:+.3f}",
                f"{trial.harm:.4f}",
                "yes" if trial.meets(search.goals, search.ceiling) else "no",
            ]
        )
    return found


COLUMNS = ("trial", "method", "settings", "share", "fluency gap", "third NLL", "third KL", "all goals")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def goals_met(outcome: Outcome, ceiling: float, source: str, target: str, goals: Goals) -> dict[str, bool]:
    """Which goals an edit meets as it was reported."""
    rises = [rise for name, rise in outcome.nll_rise.items() if name not in (source, target)]
    return {
        "share": outcome.target_share >= goals.share * ceiling,
        "fluency gap": outcome.fluency_gap <= goals.fluency_gap,
        "rise": max(rises) <= goals.rise,
    }


def front_figure(search: SearchResult) -> Figure:
    """Share against harm and against the fluency gap."""
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
        for chosen in (one for one in trials if one.number == search.chosen and one.state == MEASURED):
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
