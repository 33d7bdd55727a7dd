"""The page: its sections and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from markupsafe import Markup

from editing.report.ablation_section import ablation_content
from editing.report.choice_section import choice_content
from editing.report.edits_section import edit_content
from editing.report.findings import GENERATOR, Findings, Named
from editing.report.neurons_section import neurons_content
from editing.report.provenance_section import files_content, provenance_content, reproduction_content
from editing.report.search_section import search_content
from editing.report.steering_section import steering_content
from editing.report.templating import rendered
from neurons.errors import BrocaError, first_line
from neurons.files.artifact import text_bytes


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: for links: letters, digits and hyphens.
        title: heading.
        content: HTML.
    """

    name: str
    title: str
    content: Markup


def study_page(findings: Findings) -> bytes:
    """The page, UTF-8; equal findings give equal bytes.

    Raises:
        BrocaError: a file whose content does not fit its kind; the message names it.
    """
    sections = [
        *_each("steering", findings.steering, "Steering: {0.source} to {0.target} ({1})", steering_content),
        *_each("search", findings.searches, "Search: {0.source} to {0.target} ({1})", search_content),
        *_each("ablation", findings.ablations, "Ablation: {1}", ablation_content),
        *_each("neurons", findings.neurons, "Neurons: {1}", lambda neurons, _: neurons_content(neurons)),
        *_each("edit", findings.edits, "Edit: {1}", edit_content),
        *_each("choice", findings.choices, "Settings tried: {1}", choice_content),
    ]
    if findings.steering or findings.searches:
        sections.append(Section("meanings", "What the figures mean", rendered("meanings")))
    sections += [
        Section("made-of", "What it was made of", provenance_content(findings)),
        Section("again", "How to make it again", reproduction_content(findings)),
        Section("files", "Files", files_content(findings)),
    ]
    title = f"Study: {findings.name}"
    page = rendered("page", title=title, subtitle=_subtitle(findings), sections=sections, generator=GENERATOR)
    return text_bytes(f"{page}\n")


def _each(
    kind: str, results: Sequence[Named[Any]], title: str, content: Callable[[Any, str], Markup]
) -> Iterator[Section]:
    for number, named in enumerate(results, start=1):
        name = f"{kind}-{number}"
        try:
            yield Section(name, title.format(named.result, named.file), content(named.result, name))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError) as error:
            raise BrocaError(
                f"{named.file}: cannot be shown ({first_line(error)}): move it out of the directory, or write it again"
            ) from error


def _subtitle(findings: Findings) -> str:
    counts = (
        (len(findings.steering), "steering result", "steering results"),
        (len(findings.searches), "search", "searches"),
        (len(findings.ablations), "ablation study", "ablation studies"),
        (len(findings.neurons), "neuron set", "neuron sets"),
        (len(findings.edits), "edit", "edits"),
        (len(findings.choices), "choice of settings", "choices of settings"),
    )
    return ", ".join(
        f"{count} {singular if count == 1 else plural}" for count, singular, plural in counts if count
    )
