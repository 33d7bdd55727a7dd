"""The figures of a language lock, as a plan records them (``editing.pipeline.lock_measures.LockFigures``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from editing.report.templating import rendered


def lock_content(figures: Mapping[str, Any]) -> Markup:
    """The tables of source and kept languages, and answers before and after the edit.

    Args:
        figures: ``LockFigures.as_json``.
    """
    tables = {"Answers": figures} | ({"Thoughts": figures["thoughts"]} if "thoughts" in figures else {})
    return rendered(
        "lock",
        target=figures["target"],
        tables=[
            {
                "what": what,
                "rows": [
                    (language, model, fractions, of_language)
                    for language, of_language in of_what["sources"].items()
                    for model, fractions in of_language["language"].items()
                ],
                "judged": any(of_language.get("relevance") for of_language in of_what["sources"].values()),
                "kept": of_what["kept"],
            }
            for what, of_what in tables.items()
        ],
        source=next(iter(figures["sources"])),
        examples=figures["examples"],
    )
