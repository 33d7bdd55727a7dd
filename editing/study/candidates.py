"""Candidates: a method with one choice of settings, prepared for one model."""

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
    """A method with one choice of settings.

    Attributes:
        title: of the method.
        settings: JSON values.
        plan: of a permanent edit; None for a hook or a prompt.
        steering: makes the context in which the loaded model is steered.
        instruction: added to every prompt; None except for prompting.
    """

    title: str
    settings: dict[str, Any]
    plan: Plan | None
    steering: Steering
    instruction: str | None = None

    def details(self) -> dict[str, Any]:
        """The details of the Outcome: settings, components edited, ||dW||/||W||."""
        if self.plan is None:
            return {"settings": self.settings, "components": 0, "relative_change": 0.0}
        return {
            "settings": self.settings,
            "components": self.plan.components,
            "relative_change": self.plan.relative_change(),
        }


def candidate(method: type[Method], material: Material, settings: Mapping[str, Any]) -> Candidate:
    """The candidate with these settings.

    Raises:
        BrocaError: the method refuses the settings for this model or text.
    """
    configured = method.of(material, settings)
    prepared = configured.prepare(material)
    if method.permanent:
        plan = configured.plan(prepared)
        return Candidate(method.title, dict(settings), plan, partial(applied, material.loaded, plan))
    hooks = configured.hooks(prepared)
    return Candidate(method.title, dict(settings), None, hooks, settings.get("instruction"))


def candidates_of(method: type[Method], material: Material) -> tuple[list[Candidate], list[Refused]]:
    """The candidates of a method's grid, and the settings that the method refuses, with the reason."""
    candidates, refused = [], []
    for settings in method.grid(material):
        try:
            candidates.append(candidate(method, material, settings))
        except BrocaError as error:
            refused.append(Refused(method.title, settings, str(error)))
    return candidates, refused
