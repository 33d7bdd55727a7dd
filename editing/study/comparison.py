"""The choice among candidates: which are measured in full, and which setting is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Outcome, Refused
from editing.study.candidates import Candidate
from neurons.errors import NotFiniteError

MIN_CEILING_FRACTION = 0.9
MAX_FLUENCY_GAP = 0.5
MIN_ON_FEW_PROMPTS = 0.45  # of the ceiling: half of the fraction above, as a rate on sixteen prompts is noisy

Measured = tuple[Candidate, Outcome]
Figures = TypeVar("Figures")


def measure_candidate(evaluation: Evaluation, one: Candidate, kl: bool = False, harm: bool = True) -> Outcome:
    """The outcome of a candidate; ``kl`` and ``harm`` as in ``Evaluation.measure``."""
    return evaluation.measure(
        one.title, one.steering, one.details(), kl, instruction=one.instruction, harm=harm
    )


def measurable(
    candidates: Sequence[Candidate], measure: Callable[[Candidate], Figures]
) -> tuple[list[tuple[Candidate, Figures]], list[Refused]]:
    """The figures of each candidate; and the candidates without, whose activations are not finite, refused."""
    measured, refused = [], []
    for one in candidates:
        try:
            measured.append((one, measure(one)))
        except NotFiniteError as error:
            refused.append(Refused(one.title, one.settings, str(error)))
    return measured, refused


def promising(
    evaluation: Evaluation, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Refused]]:
    """The candidates that steer on a few prompts, and the others, refused with their rate.

    Kept are candidates whose target-language rate on a few prompts is above 0 and at least ``MIN_ON_FEW_PROMPTS`` of
    the ceiling, and always the best one; if none steers that well, those with the highest rate.  A single candidate is
    kept untested.
    """
    if len(candidates) < 2:
        return list(candidates), []
    rated, refused = measurable(
        candidates, lambda one: evaluation.rate_on_few_prompts(one.steering, one.instruction)
    )
    if len(rated) < 2:
        return [one for one, _ in rated], refused
    rates = [rate for _, rate in rated]
    minimum = min(MIN_ON_FEW_PROMPTS * evaluation.ceiling, max(rates))
    best = rates.index(max(rates))
    kept = []
    for index, (candidate, rate) in enumerate(rated):
        if (rate >= minimum and rate > 0) or index == best:
            kept.append(candidate)
        else:
            reason = f"{rate:.0%} of the answers to a few prompts in {evaluation.target}, so not measured"
            refused.append(Refused(candidate.title, candidate.settings, reason))
    return kept, refused


def best_of(
    evaluation: Evaluation, candidates: Sequence[Candidate], progress: Callable[[int], None]
) -> tuple[Candidate | None, list[Outcome | Refused]]:
    """The choice of ``choose`` among the promising candidates, with likelihoods measured only if they decide.

    Args:
        evaluation: on the part that settings are chosen on.
        candidates: of one method.
        progress: called with the number of candidates done since the last call.

    Returns:
        The best candidate, None without candidates; and for each candidate its outcome or the reason of its refusal.

    Raises:
        NotFiniteError: no candidate has activations that are all finite.
    """
    kept, refused = promising(evaluation, candidates)
    progress(len(refused))

    def measure(one: Candidate) -> Outcome:
        outcome = measure_candidate(evaluation, one, harm=False)
        progress(1)
        return outcome

    measured, failed = measurable(kept, measure)
    progress(len(failed))
    refused += failed
    if refused and not measured:
        raise NotFiniteError(refused[-1].refused)
    well = _steering_well(measured, evaluation.ceiling)
    if len(well) > 1:
        measured = [
            (pair[0], evaluation.with_harm(pair[1], pair[0].steering)) if pair in well else pair
            for pair in measured
        ]
    best = choose(measured, evaluation.ceiling, evaluation.source)[0] if measured else None
    return best, [*refused, *(outcome for _, outcome in measured)]


def choose(measured: Sequence[Measured], ceiling: float, source: str) -> Measured:
    """The least harmful of the settings that steer well; else the most fluent that steers; else the strongest.

    A setting steers if its target-language rate is above 0 and at least 0.9 x the ceiling; it steers well if its
    fluency gap is also at most 0.5.  Harm is the largest NLL rise of a language other than the source.  Of equals the
    first is chosen.
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
    rises = [rise for language, rise in outcome.nll_rise.items() if language != source]
    return max(rises) if all(map(math.isfinite, rises)) else math.inf


def _steering(measured: Sequence[Measured], ceiling: float) -> list[Measured]:
    minimum = MIN_CEILING_FRACTION * ceiling
    return [pair for pair in measured if pair[1].target_share > 0 and pair[1].target_share >= minimum]


def _steering_well(measured: Sequence[Measured], ceiling: float) -> list[Measured]:
    return [pair for pair in _steering(measured, ceiling) if pair[1].fluency_gap <= MAX_FLUENCY_GAP]
