"""Dose-response: steering at fractions of a strength, and the harm of each method at the same target-language rate.

One setting of a method shows its harm at full strength.  At a fraction of that strength the method steers less and
does less harm.  Two methods compare at the same rate r of answers in the target language:

    cost(method, r) = the least harm among the method's fractions whose rate is at least r
    harm            = the largest NLL rise (nats a token) of a language that is neither source nor target
"""

from __future__ import annotations

import math
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
    """One method at one strength fraction, beside the cost of a reference method.

    Attributes:
        method: title.
        fraction: of the strength that was chosen for the method.
        rate: of answers in the target language.
        harm: nats a token.
        reference: ``cost(reference method, rate)``; None if it has no fraction with this rate.
    """

    method: str
    fraction: float
    rate: float
    harm: float
    reference: float | None


def weaker(
    method: type[Method], material: Material, chosen: Candidate, fractions: Sequence[float]
) -> Iterator[tuple[float, Candidate]]:
    """The chosen candidate at fractions of its strength.

    The plan of a permanent edit is scaled; the strength of a hook is multiplied.  A plan solved through norms is not
    linear in the strength, nor is one whose strength is a setting of another name, as an angle: these are made again.

    Args:
        method: of the candidate.
        material: what the candidate was made from.
        chosen: the candidate at full strength.
        fractions: of its strength, other than 1.

    Yields:
        (fraction, candidate); nothing for a method without a strength, such as prompting.

    Raises:
        BrocaError: an edit that cannot be scaled (``editing.plans.plan.ModuleEdit.scaled``).
    """
    for fraction in fractions:
        linear = method.strength_setting == "strength"
        if chosen.plan is not None and linear and not chosen.plan.through_norm:
            plan = chosen.plan.scaled(fraction)
            steering = partial(applied, material.loaded, plan)
            settings = dict(chosen.settings)
            if "strength" in settings:
                settings["strength"] *= fraction
            yield fraction, Candidate(chosen.title, settings, plan, steering)
        elif method.strength_setting is not None:
            strength = fraction * chosen.settings[method.strength_setting]
            yield (
                fraction,
                candidate(method, material, {**chosen.settings, method.strength_setting: strength}),
            )


def harm(outcome: Outcome, source: str, target: str) -> float:
    """The largest NLL rise of a language that is neither source nor target, nats a token; NaN without one."""
    return max((rise for k, rise in outcome.nll_rise.items() if k not in (source, target)), default=math.nan)


def costs(
    curves: Mapping[str, Sequence[Outcome]], reference: str, source: str, target: str, min_rate: float = 0.0
) -> tuple[Cost, ...]:
    """Every strength fraction of every other method beside the cost of the reference method at the same rate.

    Args:
        curves: title -> outcomes of its fractions, each with ``details["dose"]``.
        reference: title of the reference method.
        source: language that is steered from.
        target: language that is steered to.
        min_rate: outcomes are left out unless their rate is above this, such as the unedited model's.
    """
    known = [(outcome.target_share, harm(outcome, source, target)) for outcome in curves[reference]]
    return tuple(
        Cost(
            method=title,
            fraction=outcome.details["dose"],
            rate=outcome.target_share,
            harm=harm(outcome, source, target),
            reference=min((cost for rate, cost in known if rate >= outcome.target_share), default=None),
        )
        for title, outcomes in curves.items()
        if title != reference
        for outcome in outcomes
        if outcome.target_share > min_rate
    )
