"""What a search can tell each method, and the plan that it gets for it."""

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
    """What one method can be told.

    Attributes:
        knobs: name -> knob; a knob comes after the one that it is given by.
        known: settings that are tried first.
        make: the plan of some settings.

    ``make`` raises NothingToChangeError where the settings change nothing.
    """

    knobs: Mapping[str, Knob]
    known: tuple[Settings, ...]
    make: Callable[[Settings], Plan]

    def as_json(self) -> dict[str, Any]:
        """What decides the trials: two searches may be joined only if they agree in it."""
        return {
            name: {"words": list(knob.words)} if knob.words else {"low": knob.low, "high": knob.high}
            for name, knob in self.knobs.items()
        }


def spaces(material: Material, methods: Sequence[str]) -> dict[str, Space]:
    """Each method's space; nothing is computed before a plan is asked for.

    Args:
        material: a study's: its pair of languages, the text of all of them, the layers that may change.
        methods: names of ``editing.study.registry.searched``.

    Raises:
        UsageError: no method, one that cannot be searched or that is named twice.
    """
    return {
        name: Space(method.knobs(material), tuple(method.known(material)), partial(_plan, method, material))
        for name, method in searched_named(methods).items()
    }


def _plan(method: type[Method], material: Material, settings: Settings) -> Plan:
    return method.of(material, settings).plan_for(material)
