"""The protocol: every way's settings chosen on one part of the text, reported on another, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Outcome, Refused
from editing.methods.material import Material
from editing.methods.method import Method
from editing.study.candidates import Candidate, candidates_of
from editing.study.comparison import choose, measure_candidates
from editing.study.doses import weaker
from editing.study.results import Report
from neurons.errors import BrocaError


def compare_ways(
    ways: Mapping[str, type[Method]],
    material: Material,
    choosing: Evaluation,
    reporting: Evaluation,
    tell: Callable[[str], None] | None = None,
    doses: Sequence[float] = (),
) -> Iterator[Report]:
    """Choose and report, way by way.

    Args:
        ways: by name.
        material: what they are made of: text in neither evaluation.
        choosing: where a setting is chosen (``editing.study.comparison.choose``).
        reporting: what is reported, other text, with KL and side effects on the other languages.
        tell: called with a way's title before it is tried.
        doses: parts of the chosen strength at which each way is reported besides (``editing.study.doses``).

    Yields:
        All that is known after each way, so that what was measured can be kept when the rest is not awaited; of
        ways that could not be tried at all, or at other doses, a note says the reason.

    Raises:
        BrocaError: no way could be tried.
    """
    outcomes = [reporting.measure("base", nullcontext, others=True)]
    tried: list[Outcome | Refused] = []
    notes: list[str] = []
    curves: dict[str, tuple[Outcome, ...]] = {}

    def found() -> Report:
        return Report(
            source=reporting.source,
            target=reporting.target,
            ceiling=reporting.ceiling,
            continuations=reporting.continuations,
            outcomes=tuple(outcomes),
            notes=tuple(notes),
            methods=tuple(ways),
            tried=tuple(tried),
            curves=dict(curves),
        )

    for way in ways.values():
        if tell is not None:
            tell(way.title)
        candidates, refused = candidates_of(way, material)
        tried += refused
        if not candidates:
            reason = refused[0].refused if refused else "it has no setting for these languages"
            notes.append(f"{way.title}: not tried: {reason}")
            yield found()
            continue
        measured = list(measure_candidates(choosing, candidates))
        tried += [outcome for _, outcome in measured]
        best, _ = choose(measured, choosing.ceiling, choosing.source)
        details = {**best.details(), "permanent": way.permanent, "tried": len(measured)}
        outcomes.append(
            reporting.measure(
                way.title, best.steering, details, kl=True, others=True, instruction=best.instruction
            )
        )
        if doses:
            curve, reason = _curve(way, material, best, doses, reporting)
            curves[way.title] = (*curve, replace(outcomes[-1], details={**details, "dose": 1.0}))
            notes += [f"{way.title}: not at other doses: {reason}"] if reason else []
        yield found()
    if len(outcomes) == 1:
        raise BrocaError(f"no way could be tried: {'; '.join(notes)}")


def _curve(
    way: type[Method], material: Material, best: Candidate, doses: Sequence[float], reporting: Evaluation
) -> tuple[list[Outcome], str]:
    """The outcomes of the doses, and why there are none where the way cannot be made weaker."""
    found = []
    try:
        for dose, candidate in weaker(way, material, best, sorted(doses)):
            details = {**candidate.details(), "permanent": way.permanent, "dose": dose}
            found.append(reporting.measure(way.title, candidate.steering, details))
    except BrocaError as error:
        return [], str(error)
    return found, "" if found else "it has no strength"
