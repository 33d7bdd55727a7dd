"""JSON results read back into the dataclasses that they were written from, or refused by file and field.

``neurons.files.artifact.json_bytes`` writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from neurons.errors import UsageError

Kind = TypeVar("Kind")
# JSON has null where a figure was not measured, or is not finite.
Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
# A figure that is always measured, and may be infinite.
Quotient = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


def read_json(path: Path | str) -> Any:
    """The values of a JSON document.

    Raises:
        UsageError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from error


def document(result: Any) -> dict[str, Any]:
    """The JSON values of a dataclass, for ``neurons.files.artifact.json_bytes``; ``checked`` reads them.

    What its field ``about`` holds stands beside the fields; fields that are None are left out.
    """
    values = {one.name: getattr(result, one.name) for one in fields(result) if one.name != "about"}
    return {**result.about, **{name: value for name, value in values.items() if value is not None}}


def checked(kind: type[Kind], value: Any, file: Path | str) -> Kind:
    """A dataclass, and those nested in it, from JSON values.

    Args:
        kind: the dataclass; its field ``about``, if it has one, takes the keys that are no fields.
        value: an object of a document.
        file: for the refusal.

    Raises:
        UsageError: a field that is missing or of another kind, by its place in the document.
    """
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if "about" in known and isinstance(value, Mapping):
        value = {**value, "about": {key: one for key, one in value.items() if key not in known}}
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        what = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        told = "is missing" if first["type"] == "missing" else what
        raise UsageError(f"{file}: not a result of Broca's, or a damaged one: {place} {told}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
