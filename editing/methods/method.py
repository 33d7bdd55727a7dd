"""A method: a frozen dataclass of its settings that prepares what is slow once and then plans, or steers by hooks, fast.

``broca edit``, ``broca evaluate --methods``, ``broca tune``, ``broca run`` and the table in the documentation are made from
what a class declares here and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, ClassVar

from editing.methods.material import Material
from editing.plans.plan import Plan
from neurons.scorers.setting import WHOLE, Setting, declared

Settings = Mapping[str, Any]
Steering = Callable[[], AbstractContextManager[None]]
INPUTS = ("direction", "vector", "neurons", "statistics", "corpus")
# The published method of finding neurons, and Broca's.
NEURON_METHODS = ("lape", "gradient-contrast")


@dataclass(frozen=True)
class Knob:
    """One setting of a search.

    Attributes:
        low, high: of a number's range.
        whole: whether the number is whole.
        log: whether the range is searched by ratios.
        words: in place of a range, what to choose from.
        given: (another knob, words of it): searched only then; None: always.
    """

    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False
    words: tuple[str, ...] = ()
    given: tuple[str, tuple[str, ...]] | None = None

    def applies(self, chosen: Settings) -> bool:
        return self.given is None or chosen[self.given[0]] in self.given[1]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method declares; its settings are the fields made by ``setting`` (``--set``).

    A field without ``setting`` is for studies alone.  A class that is only compared or only searched has
    ``edited`` False; one without a title is not compared.

    Attributes:
        name: on the command line.
        line: what it does, in a line.
        source: where it was published.
        title: its row in the table of ``broca evaluate --methods``; empty: it is not compared.
        needs: options of ``broca edit`` that must be given.
        takes: further options that it uses.
        permanent: whether it is in the weights.
        edited: whether ``broca edit`` offers it.
        least_languages: how many a corpus must have.
        weakened_by: the setting that a part of the strength multiplies; None: it has no strength.
        strength: multiplies the edit.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    title: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    permanent: ClassVar[bool] = True
    edited: ClassVar[bool] = True
    least_languages: ClassVar[int] = 2
    weakened_by: ClassVar[str | None] = "strength"

    strength: float = 1.0

    @classmethod
    def declared(cls) -> dict[str, Setting]:
        """All fields, the strength last."""
        owner: Any = cls
        found = dict(declared(owner))
        strength = found.pop("strength")
        return {**found, "strength": strength}

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """What ``--set`` takes."""
        own = {one.name for one in fields(cls) if "setting" in one.metadata} - {"strength"}
        return {name: one for name, one in cls.declared().items() if name in own}

    @classmethod
    def inputs(cls) -> str:
        """Options of ``broca edit`` that must be given, and in brackets files that may."""
        may = [name for name in cls.takes if name in INPUTS]
        return " ".join([*(f"--{name}" for name in cls.needs), *(f"[--{name}]" for name in may)])

    @classmethod
    def of(cls, material: Material, settings: Settings) -> Method:
        """The method with the settings of a study."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        """The settings that a comparison tries: all combinations of the declared grids."""
        tried = {name: one.grid for name, one in cls.declared().items() if one.grid}
        return [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]

    @classmethod
    def searched(cls) -> bool:
        """Whether ``broca tune`` can search it."""
        return cls.permanent and any(one.search or one.search_words for one in cls.declared().values())

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        """What ``broca tune`` searches: the declared ranges and words; a knob comes after the one that gives it."""
        return {
            name: Knob(words=one.words)
            if one.search is None
            else Knob(one.search.low, one.search.high, one.kind == WHOLE, one.search.log)
            for name, one in cls.declared().items()
            if one.search or one.search_words
        }

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        """Settings that a search tries first: the defaults."""
        return ({name: cls.declared()[name].default for name in cls.knobs(material)},)

    def prepare(self, material: Material) -> Any:
        """What is slow: text is read, keys are solved, values are learned.  Once: ``material.once`` keeps it."""
        raise NotImplementedError

    def plan(self, prepared: Any) -> Plan:
        """The edit, without a pass over text: by default what was prepared is a plan, and is brought to the strength.

        Raises:
            NothingToChangeError: these settings change nothing.
        """
        plan: Plan = prepared
        return plan.scaled(self.strength / plan.metadata["settings"].get("strength", 1.0))

    def hooks(self, prepared: Any) -> Steering:
        """The context in which the model is steered, of a method that is not permanent."""
        raise NotImplementedError

    def made(self, material: Material) -> Plan:
        """``plan`` of ``prepare``."""
        return self.plan(self.prepare(material))


@dataclass(frozen=True, kw_only=True)
class Hook(Method):
    """A method that steers while the model runs: what edits are compared with."""

    permanent = False
    edited = False
