"""The search space of each method, and the plan of a point in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from editing.methods.material import Material
from editing.methods.method import Knob, Method
from editing.plans.plan import Plan
from editing.study.registry import searched_named

Value = float | int | str
Settings = Mapping[str, Value]


@dataclass(frozen=True)
class Space:
    """The search space of one method.

    Attributes:
        knobs: name -> knob; a conditional knob follows the knob that it depends on.
        known: settings that are tried first.
        make: settings -> plan; raises NothingToChangeError if the settings change nothing.
    """

    knobs: Mapping[str, Knob]
    known: tuple[Settings, ...]
    make: Callable[[Settings], Plan]

    def as_json(self) -> dict[str, Any]:
        """The JSON values that decide the trials: a search resumes another one only if they are equal."""
        return {
            name: {"words": list(knob.words)} if knob.words else {"low": knob.low, "high": knob.high}
            for name, knob in self.knobs.items()
        }


def spaces(material: Material, methods: Sequence[str]) -> dict[str, Space]:
    """Method -> its search space; nothing slow is computed before the first plan.

    Args:
        material: of a study: source and target, the text of all languages, the layers that may change.
        methods: names from ``editing.study.registry.searched``.

    Raises:
        UsageError: no name, a name twice, or a method that cannot be searched.
    """
    return {
        name: Space(method.knobs(material), tuple(method.known(material)), partial(_plan, method, material))
        for name, method in searched_named(methods).items()
    }


def _plan(method: type[Method], material: Material, settings: Settings) -> Plan:
    return method.of(material, settings).plan_for(material)
