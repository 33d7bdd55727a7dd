"""Which part of the text figures are of, in words, and that those of some parts are no results."""

from __future__ import annotations

from editing.report.markup import Markup, paragraph
from editing.report.provenance import Provenance

# What directions, neurons and settings are made from, as the commands have it (``neurons.text.corpus.PARTS``).
_MADE_FROM = ("estimate", "choose")


def of_part(origin: Provenance) -> str:
    """To stand behind what was measured: " of the part ..."; empty where the file names none."""
    if not origin.part:
        return ""
    return " of all parts of the text" if origin.part == "all" else f" of the part “{origin.part}”"


def part_warning(origin: Provenance, made: str) -> list[Markup]:
    """That the figures are no result where what is measured comes from the same text.

    Args:
        origin: of the figures.
        made: what is measured comes from: "directions or settings", "neurons".
    """
    if origin.part in _MADE_FROM:
        text = f"Measured on the part “{origin.part}”, which {made} come from: not a result."
    elif origin.part == "all":
        text = f"Measured on all parts of the text: not a result if {made} come from the same text."
    else:
        return []
    return [paragraph(text, class_="warning")]
