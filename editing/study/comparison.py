"""Ways of steering side by side: settings are chosen on one part of the text and reported on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from editing.directions.direction import Direction
from editing.evaluation.evaluation import Evaluation, Outcome
from editing.hooks.steering import residual_steering
from editing.methods.keyed import keyed_plans
from editing.methods.steer2edit import steer2edit_plan
from editing.plans.live import applied
from editing.plans.plan import Plan
from neurons.errors import NothingToChangeError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.text.corpus import Corpus

ENOUGH_OF_CEILING = 0.9
MOST_FLUENCY_GAP = 0.5
LEAST_OF_FEW = 0.45  # half of ENOUGH_OF_CEILING: sixteen prompts are few

# (rho of heads, rho of neurons, alpha), the best settings that arXiv 2602.09870 reports for its models;
# None is off.  lambda is absolute, so which of them suits a model has to be tried.
STEER2EDIT_SETTINGS = (
    (0.18, 0.55, 0.8),
    (0.42, 0.55, 0.75),
    (0.3, None, 0.9),
    (0.1, 0.3, 0.4),
    (None, 0.8, 0.05),
    (0.3, 0.9, 0.2),
)
HOOK_STRENGTHS = (1.0, 2.0)
HOOK, STEER2EDIT, KEYED = "DiffMean hook", "Steer2Edit", "keyed edit"


@dataclass(frozen=True)
class Candidate:
    """One setting of one way of steering.

    Attributes:
        way: HOOK, STEER2EDIT, KEYED or another of ``editing.study.ways``.
        settings: that make it, JSON values.
        plan: of a permanent edit; None for a hook or a prompt.
        steering: enters it on the loaded model.
        instruction: what is put to every prompt; None but for prompting.
    """

    way: str
    settings: dict[str, Any]
    plan: Plan | None
    steering: Callable[[], AbstractContextManager[None]]
    instruction: str | None = None

    def details(self) -> dict[str, Any]:
        """For the Outcome: settings, components edited, ||dW||/||W||."""
        if self.plan is None:
            return {"settings": self.settings, "components": 0, "relative_change": 0.0}
        return {
            "settings": self.settings,
            "components": self.plan.components,
            "relative_change": self.plan.relative_change(),
        }


def hook_candidate(loaded: LoadedModel, direction: Direction, layer: int, strength: float) -> Candidate:
    """Residual DiffMean after one layer."""
    return Candidate(
        HOOK,
        {"layer": layer, "strength": strength},
        None,
        partial(residual_steering, loaded, direction.vectors["block_out"][layer], layer, strength),
    )


def hook_layers(depth: int) -> list[int]:
    """Layers at a quarter, three eighths and half of the depth, each once."""
    return sorted({min(round(depth * share), depth - 1) for share in (1 / 4, 3 / 8, 1 / 2)})


def hook_candidates(loaded: LoadedModel, direction: Direction) -> list[Candidate]:
    """Residual DiffMean after each of ``hook_layers``, once or twice."""
    return [
        hook_candidate(loaded, direction, layer, strength)
        for layer in hook_layers(loaded.anatomy.layers)
        for strength in HOOK_STRENGTHS
    ]


def steer2edit_candidate(
    loaded: LoadedModel,
    direction: Direction,
    heads_rho: float | None,
    neurons_rho: float | None,
    alpha: float,
) -> Candidate:
    """Steer2Edit on all layers.

    Raises:
        NothingToChangeError: no component passes the threshold.
    """
    layers = range(loaded.anatomy.layers)
    plan = steer2edit_plan(loaded, direction, layers, heads_rho, neurons_rho, alpha)
    settings = {"heads_rho": heads_rho, "neurons_rho": neurons_rho, "alpha": alpha}
    return Candidate(STEER2EDIT, settings, plan, partial(applied, loaded, plan))


def steer2edit_candidates(
    loaded: LoadedModel, direction: Direction
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """The published settings on all layers, and those that change nothing here with the reason."""
    found, refused = [], []
    for heads, neurons, alpha in STEER2EDIT_SETTINGS:
        try:
            found.append(steer2edit_candidate(loaded, direction, heads, neurons, alpha))
        except NothingToChangeError as error:
            settings = {"heads_rho": heads, "neurons_rho": neurons, "alpha": alpha}
            refused.append({"name": STEER2EDIT, "settings": settings, "refused": str(error)})
    return found, refused


def keyed_candidates(
    loaded: LoadedModel,
    direction: Direction,
    corpus: Corpus,
    strengths: Sequence[float],
    layers: Sequence[int] | None = None,
    neurons: NeuronSet | None = None,
    learned: bool = False,
) -> list[Candidate]:
    """The keyed edit at some strengths, with the direction as value or with learned ones."""
    return [
        Candidate(KEYED, plan.metadata["settings"], plan, partial(applied, loaded, plan))
        for plan in keyed_plans(loaded, corpus, direction, strengths, layers, neurons, learned)
    ]


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
) -> tuple[list[Candidate], list[dict[str, Any]]]:
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
            left.append({"name": one.way, "settings": one.settings, "refused": reached})
    return kept, left


def best_of(
    evaluation: Evaluation, candidates: Sequence[Candidate], tell: Callable[[int], None]
) -> tuple[Candidate | None, list[dict[str, Any]]]:
    """What ``choose`` takes of the promising candidates, with no more reading than that needs.

    Harm is read only where several steer well: between others it decides nothing.

    Args:
        evaluation: on the part that is chosen on.
        candidates: of one way.
        tell: called with the number of candidates that are done.

    Returns:
        The best, None of none; and for each candidate its outcome or why it was refused, as JSON values.
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
    return best, left + [outcome.as_json() for _, outcome in measured]


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
