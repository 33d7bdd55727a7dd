"""Methods side by side: settings are chosen on one part of the text and reported on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Outcome, Refused
from editing.study.candidates import Candidate

ENOUGH_OF_CEILING = 0.9
MOST_FLUENCY_GAP = 0.5
LEAST_OF_FEW = 0.45  # half of ENOUGH_OF_CEILING: sixteen prompts are few


def measure_candidates(
    evaluation: Evaluation, candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Outcome]]:
    """Measure one after the other."""
    for candidate in candidates:
        yield (
            candidate,
            evaluation.measure(
                candidate.way, candidate.steering, candidate.details(), instruction=candidate.instruction
            ),
        )


def promising(
    evaluation: Evaluation, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Refused]]:
    """Candidates that are worth measuring, and the others, refused, with what they reached on a few prompts.

    One alone is measured.  Worth it is a target share of at least ``LEAST_OF_FEW`` of the ceiling on a few prompts; where none reaches it,
    the one that reaches most.  What is chosen must reach far more on all.
    """
    if len(candidates) < 2:
        return list(candidates), []
    shares = [evaluation.few(one.steering, one.instruction) for one in candidates]
    least = min(LEAST_OF_FEW * evaluation.ceiling, max(shares))
    first = shares.index(max(shares))
    kept, left = [], []
    for place, (one, share) in enumerate(zip(candidates, shares, strict=True)):
        if (share >= least and share > 0) or place == first:
            kept.append(one)
        else:
            reached = f"{share:.0%} of the answers to a few prompts in {evaluation.target}, so not measured"
            left.append(Refused(one.way, one.settings, reached))
    return kept, left


def best_of(
    evaluation: Evaluation, candidates: Sequence[Candidate], tell: Callable[[int], None]
) -> tuple[Candidate | None, list[Outcome | Refused]]:
    """What ``choose`` takes of the promising candidates, with no more reading than that needs.

    Harm is read only where several steer well: between others it decides nothing.

    Args:
        evaluation: on the part that is chosen on.
        candidates: of one way.
        tell: called with the number of candidates that are done.

    Returns:
        The best, None of none; and for each candidate its outcome or why it was refused.
    """
    kept, left = promising(evaluation, candidates)
    tell(len(left))
    measured = []
    for one in kept:
        found = evaluation.measure(
            one.way, one.steering, one.details(), instruction=one.instruction, harm=False
        )
        measured.append((one, found))
        tell(1)
    well = _steering_well(measured, evaluation.ceiling)
    if len(well) > 1:
        measured = [
            (one, evaluation.with_harm(outcome, one.steering) if (one, outcome) in well else outcome)
            for one, outcome in measured
        ]
    best = choose(measured, evaluation.ceiling, evaluation.source)[0] if measured else None
    return best, [*left, *(outcome for _, outcome in measured)]


def choose(
    measured: Sequence[tuple[Candidate, Outcome]], ceiling: float, source: str
) -> tuple[Candidate, Outcome]:
    """The least harmful setting among those that steer well, the most fluent of those that steer at all,
    else the one that steers most.

    To steer is a target share above 0 and of at least 0.9 x the ceiling; to steer well, a fluency gap of at
    most 0.5 besides; harm is the largest NLL rise of a language other than the source.  Ties fall to the first.
    """
    well = _steering_well(measured, ceiling)
    if len(well) == 1:
        return well[0]
    if well:
        return min(well, key=lambda pair: largest_rise(pair[1], source))
    steering = _steering(measured, ceiling)
    if steering:
        return min(steering, key=lambda pair: pair[1].fluency_gap)
    return max(measured, key=lambda pair: pair[1].target_share)


def largest_rise(outcome: Outcome, source: str) -> float:
    """The largest NLL rise of a language other than the source."""
    return max(rise for language, rise in outcome.nll_rise.items() if language != source)


def _steering(
    measured: Sequence[tuple[Candidate, Outcome]], ceiling: float
) -> list[tuple[Candidate, Outcome]]:
    least = ENOUGH_OF_CEILING * ceiling
    return [pair for pair in measured if pair[1].target_share > 0 and pair[1].target_share >= least]


def _steering_well(
    measured: Sequence[tuple[Candidate, Outcome]], ceiling: float
) -> list[tuple[Candidate, Outcome]]:
    return [pair for pair in _steering(measured, ceiling) if pair[1].fluency_gap <= MOST_FLUENCY_GAP]
