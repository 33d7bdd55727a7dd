"""The protocol: settings of each method are chosen on one part of the text and reported on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Outcome, Refused
from editing.methods.material import Material
from editing.methods.method import Method
from editing.study.candidates import Candidate, candidates_of
from editing.study.comparison import choose, measurable, measure_candidate
from editing.study.dose_response import weaker
from editing.study.results import Report
from neurons.errors import BrocaError


def compare_methods(
    methods: Mapping[str, type[Method]],
    material: Material,
    choosing: Evaluation,
    reporting: Evaluation,
    on_method: Callable[[str], None] | None = None,
    fractions: Sequence[float] = (),
) -> Iterator[Report]:
    """Choose the settings of each method, and report them.

    Args:
        methods: by name.
        material: what they are made from; its text is in neither evaluation.
        choosing: where settings are chosen (``editing.study.comparison.choose``).
        reporting: where they are reported, on other text, with KL and answers in the other languages.
        on_method: called with the title of a method before it is tried.
        fractions: of the chosen strength, at which each method is also reported (``editing.study.dose_response``).

    Yields:
        The report so far, after each method, so that the caller can save it.  A note gives the reason if a method
        could not be tried, or not at other fractions.

    Raises:
        BrocaError: no method could be tried.
    """
    outcomes = [reporting.measure("base", nullcontext, others=True)]
    tried: list[Outcome | Refused] = []
    notes: list[str] = []
    curves: dict[str, tuple[Outcome, ...]] = {}

    def report() -> Report:
        return Report(
            source=reporting.source,
            target=reporting.target,
            ceiling=reporting.ceiling,
            continuations=reporting.continuations,
            outcomes=tuple(outcomes),
            notes=tuple(notes),
            methods=tuple(methods),
            tried=tuple(tried),
            curves=dict(curves),
        )

    for method in methods.values():
        if on_method is not None:
            on_method(method.title)
        candidates, refused = candidates_of(method, material)
        measured, failed = measurable(candidates, partial(measure_candidate, choosing))
        refused += failed
        tried += [*refused, *(outcome for _, outcome in measured)]
        if not measured:
            reason = refused[0].refused if refused else "it has no setting for these languages"
            notes.append(f"{method.title}: not tried: {reason}")
            yield report()
            continue
        best, _ = choose(measured, choosing.ceiling, choosing.source)
        details = {**best.details(), "permanent": method.permanent, "tried": len(measured)}
        outcomes.append(
            reporting.measure(
                method.title, best.steering, details, kl=True, others=True, instruction=best.instruction
            )
        )
        if fractions:
            curve, reason = _curve(method, material, best, fractions, reporting)
            curves[method.title] = (*curve, replace(outcomes[-1], details={**details, "dose": 1.0}))
            notes += [f"{method.title}: not at other doses: {reason}"] if reason else []
        yield report()
    if len(outcomes) == 1:
        raise BrocaError(f"no method could be tried: {'; '.join(notes)}")


def _curve(
    method: type[Method],
    material: Material,
    best: Candidate,
    fractions: Sequence[float],
    reporting: Evaluation,
) -> tuple[list[Outcome], str]:
    """The outcomes at the fractions, ascending; or none, and the reason."""
    outcomes = []
    try:
        for fraction, candidate in weaker(method, material, best, sorted(fractions)):
            details = {**candidate.details(), "permanent": method.permanent, "dose": fraction}
            outcomes.append(reporting.measure(method.title, candidate.steering, details))
    except BrocaError as error:
        return [], str(error)
    return outcomes, "" if outcomes else "it has no strength"
