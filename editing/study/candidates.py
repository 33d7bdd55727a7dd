"""Candidates: one method with one choice of settings each, made from one model's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from editing.evaluation.outcome import Refused
from editing.methods.material import Material
from editing.methods.method import Method, Steering
from editing.plans.applied import applied
from editing.plans.plan import Plan
from neurons.errors import BrocaError


@dataclass(frozen=True)
class Candidate:
    """One setting of one method.

    Attributes:
        way: the method's title.
        settings: that make it, JSON values.
        plan: of a permanent edit; None for a hook or a prompt.
        steering: enters it on the loaded model.
        instruction: what is put to every prompt; None but for prompting.
    """

    way: str
    settings: dict[str, Any]
    plan: Plan | None
    steering: Steering
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


def candidate(method: type[Method], material: Material, settings: Mapping[str, Any]) -> Candidate:
    """The candidate of some settings.

    Raises:
        BrocaError: the method refuses them for this model or text.
    """
    one = method.of(material, settings)
    prepared, told = one.prepare(material), dict(settings)
    if method.permanent:
        plan = one.plan(prepared)
        return Candidate(method.title, told, plan, partial(applied, material.loaded, plan))
    return Candidate(method.title, told, None, one.hooks(prepared), told.get("instruction"))


def candidates_of(method: type[Method], material: Material) -> tuple[list[Candidate], list[Refused]]:
    """The candidates of a method's grid, and the settings that it refuses here with the reason."""
    found, refused = [], []
    for settings in method.grid(material):
        try:
            found.append(candidate(method, material, settings))
        except BrocaError as error:
            refused.append(Refused(method.title, settings, str(error)))
    return found, refused
