"""What a user may tell a method: a name, a kind, a default and a line, declared once and read in one place.

Scorers, directions and edits declare their settings with these, and a recipe its fields.  A text (``--set
name=value``) and a value (TOML, or a call from Python) are held to the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from neurons.errors import UsageError

NUMBER, WHOLE, COUNT, NUMBERS, YES_NO, WORD, WORDS = (
    "a finite number",
    "a whole number",
    "a whole number above 0",
    "a list of finite numbers other than 0",
    "yes or no",
    "a string",
    "words as a,b",
)
_IN_TOML = {WORDS: "a list of strings", YES_NO: "true or false"}
_YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True)
class Range:
    """Where ``broca tune`` looks for a number.

    Attributes:
        low, high: both included.
        log: whether it is searched by ratios.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Setting:
    """One thing that can be told.

    Attributes:
        kind: one of this module's.
        default: None where the method decides.
        line: what it does.
        words: the words that are allowed; empty allows any.
        search: of a number: where ``broca tune`` looks; None: it keeps the default.
        search_words: whether ``broca tune`` tries the words.
        grid: values that ``broca evaluate --methods`` tries; empty: the default alone.
    """

    kind: str
    default: Any
    line: str = ""
    words: tuple[str, ...] = ()
    search: Range | None = None
    search_words: bool = False
    grid: tuple[Any, ...] = ()

    def read(self, typed: str, text: str) -> Any:
        """The value in a text.

        Args:
            typed: the option as the user wrote it, for the refusal.
            text: the value's.

        Raises:
            UsageError: not of this kind.
        """
        value = self._parsed(text)
        if value is None or not self.takes(value):
            raise UsageError(f"{typed}: give {', '.join(self.words) or self.kind}")
        return self._whole(value)

    def require(self, name: str, value: Any) -> Any:
        """A value of TOML or Python; None stands for a default of None.

        Raises:
            UsageError: not of this kind.
        """
        if value is None and self.default is None:
            return None
        if self.takes(value):
            return self._whole(value)
        if self.words and isinstance(value, str):
            raise UsageError(f"{name} is {' or '.join(map(repr, self.words))}, not {value!r}")
        raise UsageError(f"{name} must be {_IN_TOML.get(self.kind, self.kind)}, not {value!r}")

    def takes(self, value: Any) -> bool:
        """Whether a value is of this kind and one of the words."""
        if self.kind == YES_NO:
            return isinstance(value, bool)
        if self.kind == WORD:
            return isinstance(value, str | Path) and (not self.words or value in self.words)
        if self.kind == WORDS:
            return isinstance(value, list | tuple) and all(isinstance(one, str) and one for one in value)
        if self.kind == NUMBERS:
            return (
                isinstance(value, list | tuple) and bool(value) and all(_finite(one) and one for one in value)
            )
        if not _finite(value) or (self.kind != NUMBER and value != int(value)):
            return False
        return bool(self.kind != COUNT or value > 0)

    def _parsed(self, text: str) -> Any:
        if self.kind == WORD:
            return text
        if self.kind == WORDS:
            return tuple(word.strip() for word in text.split(","))
        if self.kind == YES_NO:
            return _YES_NO.get(text.lower())
        try:
            numbers = tuple(map(float, text.split(",")))
        except ValueError:
            return None
        if self.kind == NUMBERS:
            return numbers
        return numbers[0] if len(numbers) == 1 else None

    def _whole(self, value: Any) -> Any:
        return int(value) if self.kind in (WHOLE, COUNT) else value


def setting(default: Any = MISSING, line: str = "", *, kind: str = "", **more: Any) -> Any:
    """A dataclass's field that is a setting.

    Args:
        default: none makes the field one that must be given.
        line: what it does.
        kind: in place of the one that the field's annotation says.
        more: of ``Setting``'s other attributes.
    """
    return field(default=default, metadata={"setting": {"line": line, "kind": kind, **more}})


@cache
def declared(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass, one a field, in their order."""
    hints = get_type_hints(owner)
    found = {}
    for one in fields(owner):
        told = dict(one.metadata.get("setting", {}))
        kind = told.pop("kind", "") or _kind(hints[one.name])
        found[one.name] = Setting(kind, None if one.default is MISSING else one.default, **told)
    return found


@dataclass(frozen=True)
class Configured:
    """A method whose fields are its settings."""

    @classmethod
    def settings(cls) -> Mapping[str, Setting]:
        """What ``--set`` takes."""
        owner: Any = cls
        return declared(owner)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The method with settings in place of its defaults.

        Raises:
            UsageError: a setting that the method does not have, or a value of the wrong kind.
        """
        return cls(**read_given(cls.settings(), given))


def assigned(assignments: Sequence[str], already: Sequence[str] = ()) -> dict[str, str]:
    """The texts of ``--set name=value``, by name.

    Args:
        assignments: as the user wrote them.
        already: names that were given by options of their own.

    Raises:
        UsageError: no name or no value, or a name twice.
    """
    found: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--set {assignment}: write a name and a value, as {name or 'name'}=value")
        if name in found or name in already:
            raise UsageError(f"--set {assignment}: {name} is given twice")
        found[name] = value.strip()
    return found


def read_given(
    declared: Mapping[str, Setting], given: Mapping[str, Any], typed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What was given, as values.

    Args:
        declared: all that the method has.
        given: texts, or values.
        typed: name -> how the user wrote it; by default as ``--set name=value``.

    Raises:
        UsageError: a setting that the method does not have, or a value of the wrong kind.
    """
    found = {}
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(f"setting {name!r} is not one of this method's: it has {known}")
        if isinstance(value, str):
            found[name] = declared[name].read((typed or {}).get(name, f"--set {name}={value}"), value)
        else:
            found[name] = declared[name].require(f"setting {name}", value)
    return found


def defaults(declared: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting's default, by name."""
    return {name: one.default for name, one in declared.items()}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(hint: Any) -> str:
    """What an annotation says, None left out."""
    options = [one for one in get_args(hint) if one is not type(None)]
    if hint is not None and type(None) in get_args(hint):
        return _kind(options[0])
    if getattr(hint, "__origin__", None) is tuple:
        return WORDS if options[0] is str else NUMBERS
    kinds: dict[Any, str] = {bool: YES_NO, int: WHOLE, float: NUMBER, str: WORD, Path: WORD}
    return kinds[hint]
