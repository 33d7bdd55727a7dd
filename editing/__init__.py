"""Edit weights: the only package that writes checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editing.checkpoints.export import export as export
    from editing.directions.diffmean import diffmean_direction as diffmean_direction
    from editing.directions.direction import Direction as Direction
    from editing.directions.direction import load_direction as load_direction
    from editing.directions.estimation import direction_of as direction_of
    from editing.evaluation.classifier import load_classifier as load_classifier
    from editing.evaluation.evaluation import Evaluation as Evaluation
    from editing.evaluation.questions import read_questions as read_questions
    from editing.methods.bake import bake_plan as bake_plan
    from editing.methods.directional_ablation import directional_ablation_plan as directional_ablation_plan
    from editing.methods.keyed import keyed_plan as keyed_plan
    from editing.methods.scale import scale_plan as scale_plan
    from editing.methods.steer2edit import steer2edit_plan as steer2edit_plan
    from editing.methods.subnetwork import subnetwork_plan as subnetwork_plan
    from editing.pipeline.lock import language_lock as language_lock
    from editing.pipeline.lock_kinds import lock_of as lock_of
    from editing.pipeline.lock_measures import lock_figures as lock_figures
    from editing.plans.algebra import compose as compose
    from editing.plans.applied import applied as applied
    from editing.plans.plan import Plan as Plan
    from editing.plans.plan import load_plan as load_plan

# Name -> its module, imported on first access, because torch takes seconds to import.
_PUBLIC = {
    "diffmean_direction": "editing.directions.diffmean",
    "direction_of": "editing.directions.estimation",
    "Direction": "editing.directions.direction",
    "load_direction": "editing.directions.direction",
    "keyed_plan": "editing.methods.keyed",
    "steer2edit_plan": "editing.methods.steer2edit",
    "directional_ablation_plan": "editing.methods.directional_ablation",
    "bake_plan": "editing.methods.bake",
    "scale_plan": "editing.methods.scale",
    "subnetwork_plan": "editing.methods.subnetwork",
    "Plan": "editing.plans.plan",
    "load_plan": "editing.plans.plan",
    "compose": "editing.plans.algebra",
    "applied": "editing.plans.applied",
    "export": "editing.checkpoints.export",
    "read_questions": "editing.evaluation.questions",
    "lock_of": "editing.pipeline.lock_kinds",
    "language_lock": "editing.pipeline.lock",
    "lock_figures": "editing.pipeline.lock_measures",
    "load_classifier": "editing.evaluation.classifier",
    "Evaluation": "editing.evaluation.evaluation",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
