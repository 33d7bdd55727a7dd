"""Settings of methods: kind, default and help line of each, declared once as dataclass fields.

Scorers, directions and edits declare their settings with these, and a recipe its fields.  Text (``--set
name=value``) and values (TOML, or a call from Python) go through the same check.
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
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of ``load_model``
_IN_TOML = {WORDS: "a list of strings", YES_NO: "true or false"}
_YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True)
class Range:
    """The interval of numbers that ``broca tune`` searches.

    Attributes:
        low, high: both included.
        log: whether to search on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Setting:
    """A setting of a method.

    Attributes:
        kind: one of this module's constants.
        default: None where the method computes it.
        line: help in one line.
        words: the allowed words; empty allows any.
        search: of a number: the interval that ``broca tune`` searches; None keeps the default.
        search_words: whether ``broca tune`` tries the words.
        grid: values that ``broca evaluate --methods`` tries; empty: only the default.
    """

    kind: str
    default: Any
    line: str = ""
    words: tuple[str, ...] = ()
    search: Range | None = None
    search_words: bool = False
    grid: tuple[Any, ...] = ()

    def read(self, typed: str, text: str) -> Any:
        """Parse a value from text.

        Args:
            typed: the option as the user wrote it, for the error message.

        Raises:
            UsageError: the text is not of this kind.
        """
        value = self._parsed(text)
        if value is None or not self.accepts(value):
            raise UsageError(f"{typed}: give {', '.join(self.words) or self.kind}")
        return self._as_integer(value)

    def require(self, name: str, value: Any) -> Any:
        """Check a value from TOML or Python; None is valid where the default is None.

        Raises:
            UsageError: the value is not of this kind.
        """
        if value is None and self.default is None:
            return None
        if self.accepts(value):
            return self._as_integer(value)
        if self.words and isinstance(value, str):
            raise UsageError(f"{name} must be {' or '.join(map(repr, self.words))}, not {value!r}")
        raise UsageError(f"{name} must be {_IN_TOML.get(self.kind, self.kind)}, not {value!r}")

    def accepts(self, value: Any) -> bool:
        """Whether a value is of this kind and one of the words."""
        if self.kind == YES_NO:
            return isinstance(value, bool)
        if self.kind == WORD:
            return isinstance(value, str | Path) and (not self.words or value in self.words)
        if self.kind == WORDS:
            return isinstance(value, list | tuple) and all(isinstance(word, str) and word for word in value)
        if self.kind == NUMBERS:
            return (
                isinstance(value, list | tuple)
                and bool(value)
                and all(_finite(number) and number for number in value)
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

    def _as_integer(self, value: Any) -> Any:
        return int(value) if self.kind in (WHOLE, COUNT) else value


def setting(default: Any = MISSING, line: str = "", *, kind: str = "", **more: Any) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: without one the field is required.
        line: help in one line.
        kind: overrides the kind that the field's annotation implies.
        more: other attributes of ``Setting``.
    """
    return field(default=default, metadata={"setting": {"line": line, "kind": kind, **more}})


@cache
def declared(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass, one for each field, in order."""
    hints = get_type_hints(owner)
    settings = {}
    for item in fields(owner):
        options = dict(item.metadata.get("setting", {}))
        kind = options.pop("kind", "") or _kind(hints[item.name])
        settings[item.name] = Setting(kind, None if item.default is MISSING else item.default, **options)
    return settings


@dataclass(frozen=True)
class Configured:
    """A method whose fields are its settings."""

    @classmethod
    def settings(cls) -> Mapping[str, Setting]:
        """The settings that ``--set`` accepts."""
        owner: Any = cls
        return declared(owner)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The method with the given settings; the others keep their defaults.

        Raises:
            UsageError: a setting that the method does not have, or a value of the wrong kind.
        """
        return cls(**read_settings(cls.settings(), given))


def assigned(assignments: Sequence[str], already: Sequence[str] = ()) -> dict[str, str]:
    """Split each ``--set name=value`` into name and text.

    Args:
        already: names that were set by other options.

    Raises:
        UsageError: a missing name or value, or a repeated name.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--set {assignment}: write a name and a value, as {name or 'name'}=value")
        if name in texts or name in already:
            raise UsageError(f"--set {assignment}: {name} is given twice")
        texts[name] = value.strip()
    return texts


def read_settings(
    declared: Mapping[str, Setting], given: Mapping[str, Any], typed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Parse and check the given settings.

    Args:
        given: name -> text or value.
        typed: name -> how the user wrote it; by default as ``--set name=value``.

    Raises:
        UsageError: a setting that the method does not have, or a value of the wrong kind.
    """
    values = {}
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(f"this method has no setting {name!r}: it has {known}")
        if isinstance(value, str):
            values[name] = declared[name].read((typed or {}).get(name, f"--set {name}={value}"), value)
        else:
            values[name] = declared[name].require(f"setting {name}", value)
    return values


def defaults(declared: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting's default, by name."""
    return {name: setting.default for name, setting in declared.items()}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(hint: Any) -> str:
    """The kind that an annotation implies, ``None`` in a union left out."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if hint is not None and type(None) in get_args(hint):
        return _kind(options[0])
    if getattr(hint, "__origin__", None) is tuple:
        return WORDS if options[0] is str else NUMBERS
    kinds: dict[Any, str] = {bool: YES_NO, int: WHOLE, float: NUMBER, str: WORD, Path: WORD}
    return kinds[hint]
