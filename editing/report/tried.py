"""The settings that were tried on the choosing part of the text, read from the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.evaluation.evaluation import Outcome, measured


@dataclass(frozen=True)
class Choice:
    """The settings that were tried to choose from.

    Attributes:
        target: language.
        ceiling: on the text that settings were chosen on; NaN where it is not known.
        chosen: way -> its settings.
        tried: every setting; of one that was refused nothing was measured, and ``details["refused"]`` says why.
        source: language; empty where the file does not say.
    """

    target: str
    ceiling: float
    chosen: Mapping[str, Any]
    tried: tuple[Outcome, ...]
    source: str = ""

    def is_chosen(self, way: Outcome) -> bool:
        settings = way.details.get("settings")
        return not way.details.get("refused") and self.chosen.get(way.name) == settings


def read_choice(value: Mapping[str, Any], target: str) -> Choice:
    """From a choice-*.json.

    Args:
        target: where the file does not say.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    return Choice(
        target=str(value.get("target") or target),
        ceiling=measured(value["ceiling"]),
        chosen=dict(value["chosen"]),
        tried=tuple(map(_setting, value["tried"])),
        source=str(value.get("source") or ""),
    )


def read_tried(value: Mapping[str, Any]) -> Choice | None:
    """The settings that ``broca evaluate --methods`` tried; None where it compared nothing.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    if not value.get("tried"):
        return None
    chosen = {way.name: way.details.get("settings") for way in map(Outcome.from_json, value["outcomes"])}
    tried = tuple(map(_setting, value["tried"]))
    return Choice(str(value["target"]), math.nan, chosen, tried, str(value["source"]))


def _setting(value: Mapping[str, Any]) -> Outcome:
    own = {key: value[key] for key in ("settings", "refused") if value.get(key)}
    missing = {"target_share": None} if "refused" in own else {}
    return Outcome.from_json({**missing, **value, "details": {**own, **(value.get("details") or {})}})
