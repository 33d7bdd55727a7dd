"""From findings to the page: which sections there are, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from editing.report.ablation_section import ablation_content
from editing.report.choice_section import choice_content
from editing.report.edits_section import edit_content
from editing.report.findings import Findings, Named
from editing.report.markup import Markup
from editing.report.neurons_section import neurons_content
from editing.report.page import page
from editing.report.provenance_section import again_content, files_content, provenance_content
from editing.report.search_results import SearchResult
from editing.report.search_section import search_content
from editing.report.sections import Section
from editing.report.steering_results import Choice, Steering
from editing.report.steering_section import meanings, steering_content
from neurons.errors import BrocaError, first_line

Result = TypeVar("Result")


def study_page(found: Findings) -> bytes:
    """The whole page, UTF-8; equal findings give equal bytes.

    Raises:
        BrocaError: a Broca file whose metadata is not what its kind has, by name.
    """
    sections = [
        *_each(
            "steering",
            found.steering,
            _steering_title,
            lambda one, name: steering_content(one.result, name),
        ),
        *_each(
            "search",
            found.searches,
            _search_title,
            lambda one, name: search_content(one.result, name),
        ),
        *_each(
            "ablation",
            found.ablations,
            lambda one: f"Ablation: {one.file}",
            lambda one, name: ablation_content(one.result, name),
        ),
        *_each(
            "neurons",
            found.neurons,
            lambda one: f"Neurons: {one.file}",
            lambda one, _: neurons_content(one.result),
        ),
        *_each(
            "edit",
            found.edits,
            lambda one: f"Edit: {one.file}",
            lambda one, name: edit_content(one.result, name),
        ),
        *_each(
            "choice",
            found.choices,
            lambda one: f"Settings tried: {one.file}",
            lambda one, name: choice_content(one.result, _source(found, one), name),
        ),
    ]
    if found.steering or found.searches:
        sections.append(Section("meanings", "What the figures mean", meanings()))
    sections += [
        Section("made-of", "What it was made of", provenance_content(found)),
        Section("again", "How to make it again", again_content(found)),
        Section("files", "Files", files_content(found)),
    ]
    return page(f"Study: {found.name}", _subtitle(found), sections).encode()


def _each(
    kind: str,
    results: Sequence[Named[Result]],
    title: Callable[[Named[Result]], str],
    content: Callable[[Named[Result], str], Markup],
) -> list[Section]:
    sections = []
    for place, one in enumerate(results, start=1):
        name = f"{kind}-{place}"
        try:
            sections.append(Section(name, title(one), content(one, name)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BrocaError(
                f"{one.file}: cannot be shown ({first_line(error)}): move it out of the directory, or make it again"
            ) from error
    return sections


def _steering_title(one: Named[Steering]) -> str:
    return f"Steering: {one.result.source} to {one.result.target} ({one.file})"


def _search_title(one: Named[SearchResult]) -> str:
    pair = f"{one.result.source} to {one.result.target} " if one.result.target else ""
    return f"Search: {pair}({one.file})"


def _source(found: Findings, choice: Named[Choice]) -> str | None:
    """The source language of a choice: as it says, or of the measurement that lies beside it."""
    if choice.result.source:
        return choice.result.source
    place = choice.file.rpartition("/")[0]
    sources = {
        one.result.source
        for one in found.steering
        if one.result.target == choice.result.target and one.file.rpartition("/")[0] == place
    }
    return sources.pop() if len(sources) == 1 else None


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
