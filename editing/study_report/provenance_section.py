"""What a study was made of and how it is made again: models, texts, packages, commands, files."""

from __future__ import annotations

from editing.study_report.commands import commands, recipe
from editing.study_report.findings import Findings
from editing.study_report.formats import NOTHING, plain
from editing.study_report.markup import Content, Markup, element, joined, paragraph
from editing.study_report.tables import settings_table, table


def provenance_content(found: Findings) -> Markup:
    """Everything that the files say of their making."""
    origins = [file.origin for file in found.files if file.origin is not None]
    models: dict[str, list[str]] = {}
    for origin in origins:
        if origin.fingerprint:
            names = models.setdefault(origin.fingerprint, [])
            if origin.model and origin.model not in names:
                names.append(origin.model)
    texts = dict.fromkeys(text for origin in origins for text in origin.texts)
    packages: dict[str, list[str]] = {}
    for origin in origins:
        for name, version in origin.packages.items():
            if version not in packages.setdefault(name, []):
                packages[name].append(version)
    pairs: list[tuple[str, Content]] = []
    for fingerprint, names in models.items():
        pairs.append(("model", joined((", ".join(names) or "not named", " ", _code(fingerprint)))))
    pairs += [(f"text, part {part}", _code(digest)) for digest, part in texts]
    pairs += [(name, ", ".join(versions)) for name, versions in sorted(packages.items())]
    parts = []
    if len(models) > 1:
        parts.append(
            paragraph(
                "The files are of more than one model (their fingerprints differ): figures of different models do "
                "not belong in one comparison.",
                class_="warning",
            )
        )
    if pairs:
        parts.append(settings_table("Models by fingerprint, texts by digest, packages by version", pairs))
    return joined((*parts, *_settings(found)))


def again_content(found: Findings) -> Markup:
    """The commands."""
    parts: list[Markup] = []
    written = recipe(found)
    if written is not None:
        parts += [
            paragraph(
                "A run is made again by ",
                element("code", "broca run recipe.toml"),
                " with its recipe; as far as its files tell, that was:",
            ),
            element("pre", written),
        ]
    for file, command in commands(found):
        parts += [paragraph(element("code", file)), element("pre", command)]
    parts += [paragraph("This page:"), element("pre", "broca report DIR")]
    return joined(parts)


def files_content(found: Findings) -> Markup:
    """Every file, those that are not understood first."""
    strange = [file for file in found.files if not file.understood]
    parts = []
    if strange:
        names = ", ".join(file.name for file in strange)
        parts.append(paragraph(f"Not understood, and not on this page: {names}.", class_="warning"))
    order = [*strange, *(file for file in found.files if file.understood)]
    rows: list[list[Content]] = [
        [file.name, file.what, _code(file.digest[:16]) if file.digest else NOTHING] for file in order
    ]
    parts.append(
        table(
            "Files of the directory", ["file", "what it is", "sha256, its beginning"], rows, words=(0, 1, 2)
        )
    )
    return joined(parts)


def _settings(found: Findings) -> list[Markup]:
    rows: list[list[Content]] = [
        [file.name, plain({k: v for k, v in file.origin.settings.items() if v is not None})]
        for file in found.files
        if file.origin is not None and file.origin.settings
    ]
    return [table("Settings, by file", ["file", "settings"], rows, words=(0, 1))] if rows else []


def _code(text: str) -> Markup:
    return element("code", text)
