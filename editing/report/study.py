"""From findings to the page: which sections there are, and in which order."""

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
from editing.report.provenance_section import again_content, files_content, provenance_content
from editing.report.search_section import search_content
from editing.report.steering_section import steering_content
from editing.report.templating import rendered
from neurons.errors import BrocaError, first_line


@dataclass(frozen=True)
class Section:
    """Part of the page: its name for links (letters, digits, hyphens), its heading, and what stands under it."""

    name: str
    title: str
    content: Markup


def study_page(found: Findings) -> bytes:
    """The whole page, UTF-8; equal findings give equal bytes.

    Raises:
        BrocaError: a Broca file whose metadata is not what its kind has, by name.
    """
    sections = [
        *_each("steering", found.steering, "Steering: {0.source} to {0.target} ({1})", steering_content),
        *_each("search", found.searches, "Search: {0.source} to {0.target} ({1})", search_content),
        *_each("ablation", found.ablations, "Ablation: {1}", ablation_content),
        *_each("neurons", found.neurons, "Neurons: {1}", lambda neurons, _: neurons_content(neurons)),
        *_each("edit", found.edits, "Edit: {1}", edit_content),
        *_each("choice", found.choices, "Settings tried: {1}", choice_content),
    ]
    if found.steering or found.searches:
        sections.append(Section("meanings", "What the figures mean", rendered("meanings")))
    sections += [
        Section("made-of", "What it was made of", provenance_content(found)),
        Section("again", "How to make it again", again_content(found)),
        Section("files", "Files", files_content(found)),
    ]
    title = f"Study: {found.name}"
    page = rendered("page", title=title, subtitle=_subtitle(found), sections=sections, generator=GENERATOR)
    return f"{page}\n".encode()


def _each(
    kind: str, results: Sequence[Named[Any]], title: str, content: Callable[[Any, str], Markup]
) -> Iterator[Section]:
    for place, one in enumerate(results, start=1):
        name = f"{kind}-{place}"
        try:
            yield Section(name, title.format(one.result, one.file), content(one.result, name))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError) as error:
            raise BrocaError(
                f"{one.file}: cannot be shown ({first_line(error)}): move it out of the directory, or make it again"
            ) from error


def _subtitle(found: Findings) -> str:
    counted = (
        (len(found.steering), "steering result", "steering results"),
        (len(found.searches), "search", "searches"),
        (len(found.ablations), "ablation study", "ablation studies"),
        (len(found.neurons), "neuron set", "neuron sets"),
        (len(found.edits), "edit", "edits"),
        (len(found.choices), "choice of settings", "choices of settings"),
    )
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counted if count)
