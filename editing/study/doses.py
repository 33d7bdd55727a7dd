"""Steering at part of its strength, and what each way costs at the share of answers that it reaches.

One setting of each way says what it costs to steer all the way.  At less of the same strength it steers less
and costs less, and two ways can be set side by side at the same share:

    cost(way, s) = least harm among the way's doses whose target share is at least s,
    harm         = largest NLL rise (nats a token) of a language that is neither source nor target
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from editing.evaluation.outcome import Outcome
from editing.methods.material import Material
from editing.methods.method import Method
from editing.plans.applied import applied
from editing.study.candidates import Candidate, candidate


@dataclass(frozen=True)
class Cost:
    """A dose of one way beside the cheapest dose of another that steers as far.

    Attributes:
        way: title.
        dose: of the strength that was chosen for it.
        share: of the answers in the target language.
        harm: nats a token.
        other: ``cost(other way, share)``; None where no dose of it reaches the share.
    """

    way: str
    dose: float
    share: float
    harm: float
    other: float | None


def weaker(
    method: type[Method], material: Material, chosen: Candidate, doses: Sequence[float]
) -> Iterator[tuple[float, Candidate]]:
    """The chosen candidate at parts of its strength: a permanent edit's plan scaled, a hook's strength multiplied.

    A plan that was solved through norms is solved again, as no multiple of it does what its strength says.

    Args:
        method: that the candidate is of.
        material: what it was made of.
        chosen: at dose 1.
        doses: parts of it, none of them 1.

    Yields:
        (dose, candidate); nothing for ways that have no strength, as prompting.

    Raises:
        BrocaError: an edit that cannot be scaled (``editing.plans.plan.ModuleEdit.scaled``).
    """
    for dose in doses:
        if chosen.plan is not None and not chosen.plan.through_norm:
            plan = chosen.plan.scaled(dose)
            yield dose, Candidate(chosen.way, chosen.settings, plan, partial(applied, material.loaded, plan))
        elif method.strength_setting is not None:
            strength = dose * chosen.settings[method.strength_setting]
            yield dose, candidate(method, material, {**chosen.settings, method.strength_setting: strength})


def harm(outcome: Outcome, source: str, target: str) -> float:
    """The largest NLL rise of a language that is neither source nor target, nats a token; 0 without any."""
    return max((rise for k, rise in outcome.nll_rise.items() if k not in (source, target)), default=0.0)


def costs(
    curves: Mapping[str, Sequence[Outcome]], own: str, source: str, target: str, least_share: float = 0.0
) -> tuple[Cost, ...]:
    """Every dose of every other way beside what one way costs where it steers at least as far.

    Args:
        curves: title -> outcomes of its doses, each with ``details["dose"]``.
        own: title of the way that the others are set beside.
        source: language that is steered from.
        target: language that is steered to.
        least_share: doses that reach no larger share than this, as the unedited model does, are left out.
    """
    mine = [(one.target_share, harm(one, source, target)) for one in curves[own]]
    return tuple(
        Cost(
            way=way,
            dose=one.details["dose"],
            share=one.target_share,
            harm=harm(one, source, target),
            other=min((cost for share, cost in mine if share >= one.target_share), default=None),
        )
        for way, outcomes in curves.items()
        if way != own
        for one in outcomes
        if one.target_share > least_share
    )
