"""The protocol: every way's settings chosen on one part of the text, reported on another, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from editing.comparison import choose, measure_candidates
from editing.evaluation import Evaluation, Outcome
from editing.ways import Material, Way, candidates_of
from neurons.errors import BrocaError


@dataclass(frozen=True)
class Compared:
    """What came out so far.

    Attributes:
        outcomes: the base first, then each way's chosen setting, on the part that is reported.
        tried: every setting on the part that is chosen on, or the reason why it was refused.
        notes: ways that could not be tried at all, with the reason.
    """

    outcomes: tuple[Outcome, ...]
    tried: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def compare_ways(
    ways: Mapping[str, Way],
    material: Material,
    choosing: Evaluation,
    reporting: Evaluation,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Compared]:
    """Choose and report, way by way.

    Args:
        ways: by name.
        material: what they are made of: text in neither evaluation.
        choosing: where a setting is chosen (``editing.comparison.choose``).
        reporting: what is reported, other text, with KL and side effects on the other languages.
        tell: called with a way's title before it is tried.

    Yields:
        All that is known after each way, so that what was measured can be kept when the rest is not awaited.

    Raises:
        BrocaError: no way could be tried.
    """
    outcomes = [reporting.measure("base", nullcontext, others=True)]
    tried: list[dict[str, Any]] = []
    notes = []
    for way in ways.values():
        if tell is not None:
            tell(way.title)
        candidates, refused = candidates_of(way, material)
        tried += refused
        if not candidates:
            reason = refused[0]["refused"] if refused else "it has no setting for these languages"
            notes.append(f"{way.title}: not tried: {reason}")
            yield Compared(tuple(outcomes), tuple(tried), tuple(notes))
            continue
        measured = list(measure_candidates(choosing, candidates))
        tried += [outcome.as_json() for _, outcome in measured]
        best, _ = choose(measured, choosing.ceiling, choosing.source)
        details = {**best.details(), "permanent": way.permanent, "tried": len(measured)}
        outcomes.append(
            reporting.measure(
                way.title, best.steering, details, kl=True, others=True, instruction=best.instruction
            )
        )
        yield Compared(tuple(outcomes), tuple(tried), tuple(notes))
    if len(outcomes) == 1:
        raise BrocaError(f"no way could be tried: {'; '.join(notes)}")
