"""A method: a frozen dataclass of its settings with a slow ``prepare``, called once, and a fast ``plan`` or ``hooks``.

``broca edit``, ``broca evaluate --methods``, ``broca tune``, ``broca run`` and the table in the documentation follow
from what a class declares here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar

from editing.methods.material import Material
from editing.plans.plan import Plan
from neurons.architectures.anatomy import COMMON_SITES, Anatomy
from neurons.setting import COUNT, WHOLE, Setting, declared

Settings = Mapping[str, Any]
Steering = Callable[[], AbstractContextManager[None]]
INPUTS = ("direction", "vector", "neurons", "statistics", "corpus")
# Scorers that find neurons: the published one, and Broca's.
NEURON_METHODS = ("lape", "gradient-contrast")


@dataclass(frozen=True)
class Knob:
    """A setting that a search varies.

    Attributes:
        low, high: range of a number.
        whole: whether the number is an integer.
        log: whether the range is searched on a logarithmic scale.
        words: the choices, instead of a range.
        given: (another knob, some of its words): searched only with these words; None: always.
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
    """The base class of methods; fields made by ``setting`` are the settings of ``--set``.

    A field without ``setting`` is only for studies.  A class that is only compared or only searched has ``edited``
    False; a class without a title is not compared.

    Attributes:
        name: name on the command line.
        line: one line of description.
        source: publication.
        title: row in the table of ``broca evaluate --methods``; empty: it is not compared.
        needs: required options of ``broca edit``.
        takes: further options that it uses.
        permanent: whether it changes weights.
        edited: whether ``broca edit`` offers it.
        solves_keys: whether it solves keys on text, for estimates of memory.
        key_modules: modules whose keys it solves without ``--blocks``.
        min_languages: minimum number of languages of a corpus.
        strength_setting: the setting that a strength fraction multiplies; None: it has no strength.
        strength: factor of the edit.
    """

    name: ClassVar[str]
    line: ClassVar[str]
    source: ClassVar[str]
    title: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    permanent: ClassVar[bool] = True
    edited: ClassVar[bool] = True
    solves_keys: ClassVar[bool] = False
    key_modules: ClassVar[tuple[str, ...]] = ("mlp",)
    min_languages: ClassVar[int] = 2
    strength_setting: ClassVar[str | None] = "strength"

    strength: float = 1.0

    @classmethod
    def declared(cls) -> dict[str, Setting]:
        """All fields, with the strength last."""
        owner: Any = cls
        settings = dict(declared(owner))
        strength = settings.pop("strength")
        return {**settings, "strength": strength}

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """The settings of ``--set``."""
        names = {field.name for field in fields(cls) if "setting" in field.metadata} - {"strength"}
        return {name: setting for name, setting in cls.declared().items() if name in names}

    @classmethod
    def inputs(cls) -> str:
        """The required options of ``broca edit``, and in brackets the optional files."""
        optional = [name for name in cls.takes if name in INPUTS]
        return " ".join([*(f"--{name}" for name in cls.needs), *(f"[--{name}]" for name in optional)])

    @classmethod
    def of(cls, material: Material, settings: Settings) -> Method:
        """The method with the settings of a study."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        """The settings that a comparison tries: all combinations of the declared grids."""
        grids = {name: setting.grid for name, setting in cls.declared().items() if setting.grid}
        return [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]

    @classmethod
    def largest(cls, anatomy: Anatomy) -> Method:
        """The method with the settings of a study that need the most memory, for estimates of memory."""
        return cls()

    @classmethod
    def searched(cls) -> bool:
        """Whether ``broca tune`` can search it."""
        return cls.permanent and any(s.search or s.search_words for s in cls.declared().values())

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        """The declared ranges and words that ``broca tune`` searches; a knob follows the one it depends on."""
        return {
            name: Knob(words=setting.words)
            if setting.search is None
            else Knob(
                setting.search.low, setting.search.high, setting.kind in (WHOLE, COUNT), setting.search.log
            )
            for name, setting in cls.declared().items()
            if setting.search or setting.search_words
        }

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        """Settings that a search tries first: the defaults."""
        return ({name: cls.declared()[name].default for name in cls.knobs(material)},)

    def prepare(self, material: Material) -> Any:
        """The slow part: reads text, solves keys, learns values.  ``material.once`` keeps the result."""
        raise NotImplementedError

    def plan(self, prepared: Any) -> Plan:
        """The edit, without a pass over text; by default the prepared plan, scaled to the strength.

        Raises:
            NothingToChangeError: the settings change nothing.
        """
        plan: Plan = prepared
        return plan.scaled(self.strength / plan.metadata["settings"].get("strength", 1.0))

    def hooks(self, prepared: Any) -> Steering:
        """A context that steers the model, for a method that is not permanent."""
        raise NotImplementedError

    def key_widths(self, anatomy: Anatomy, modules: Sequence[str]) -> list[int]:
        """Widths of the covariances of one layer that the method keeps at once, for estimates of memory.

        Args:
            anatomy: of the model.
            modules: of "attn" and "mlp".
        """
        return [anatomy.width(COMMON_SITES[module]) for module in modules]

    def kept_bytes(self, anatomy: Anatomy, layers: int, modules: Sequence[str]) -> int:
        """Bytes that the method keeps of all layers beside covariances, for estimates of memory.

        Args:
            anatomy: of the model.
            layers: number of edited layers.
            modules: of "attn" and "mlp".
        """
        return 0

    def plan_for(self, material: Material) -> Plan:
        """``plan`` of ``prepare``."""
        return self.plan(self.prepare(material))


@dataclass(frozen=True, kw_only=True)
class SolvedOnce(Method):
    """A method whose plan is proportional to its strength: one solution on text serves all strengths of a study."""

    solves_keys = True

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength, or in a study at 1, from which ``plan`` scales to all others."""
        method = replace(self, strength=1.0) if material.studied else self
        plan: Plan = material.once(method, lambda: method.solved(material))
        return plan

    def solved(self, material: Material) -> Plan:
        """The plan at this strength."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Hook(Method):
    """A method that steers the model at inference time: a baseline of the edits."""

    permanent = False
    edited = False
