"""What a study was made of and how it is made again: models, texts, packages, commands, files."""

from __future__ import annotations

from editing.report.commands import Again, recipe, ways_again
from editing.report.findings import Findings
from editing.report.formats import NOTHING, SHOWN_OF_DIGEST, plain
from editing.report.markup import Content, Markup, element, joined, paragraph
from editing.report.tables import settings_table, table


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
    inputs = dict.fromkeys(one for origin in origins for one in origin.inputs)
    pairs += [(f"{option} {file}", _code(digest)) for option, file, digest in inputs]
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
    return joined((*parts, *_made_of(found), *_settings(found)))


def again_content(found: Findings) -> Markup:
    """The command of every result, or that its file names none."""
    parts: list[Markup] = [
        paragraph(
            "Paths count from where the command was given. With the same texts and files (their digests are above), "
            "the same packages, processor and threads (OMP_NUM_THREADS) it gives the same figures to the last digit; "
            "elsewhere the last digits may differ, and where text is sampled, some of what is written."
        )
    ]
    parts += [part for way in ways_again(found) for part in _again(way)]
    written = recipe(found)
    if written is not None:
        parts += [
            paragraph(
                "The files of the run name no command: an older Broca wrote them. A run is made again by ",
                element("code", "broca run recipe.toml"),
                " with its recipe; as far as its files tell, that was:",
            ),
            element("pre", written),
        ]
    parts += [paragraph("This page:"), element("pre", "broca report DIR")]
    return joined(parts)


def _again(way: Again) -> list[Markup]:
    files = joined((element("code", file) for file in way.files), ", ")
    names = "name" if len(way.files) > 1 else "names"
    if way.command is None:
        return [
            paragraph(
                files,
                f" {names} no command that makes {'them' if len(way.files) > 1 else 'it'} again: what is known of the "
                "making stands under “What it was made of”.",
            )
        ]
    if not way.told:
        return [
            paragraph(files, f" {names} no command; as far as the settings tell, it was:"),
            element("pre", way.command),
        ]
    computed = f", computed on {way.processor}" if way.processor else ""
    parts = [paragraph(files, f"{computed}:"), element("pre", way.command)]
    if way.recipe is not None:
        parts += [paragraph("The recipe that it read was:"), element("pre", way.recipe)]
    return parts


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


def _made_of(found: Findings) -> list[Markup]:
    """Which file was made of what: files of one command that differ here are not of one making."""
    rows: list[list[Content]] = [
        [
            file.name,
            _code(file.origin.fingerprint) if file.origin.fingerprint else NOTHING,
            _digests([(part, digest) for digest, part in file.origin.texts]),
            _digests([(name, digest) for _, name, digest in file.origin.inputs]),
        ]
        for file in found.files
        if file.origin is not None and (file.origin.fingerprint or file.origin.texts or file.origin.inputs)
    ]
    caption = "Made of what, by file (the beginnings of digests)"
    return (
        [table(caption, ["file", "model", "text", "further files"], rows, words=(0, 1, 2, 3))] if rows else []
    )


def _digests(named: list[tuple[str, str]]) -> Content:
    if not named:
        return NOTHING
    return joined((joined((name, " ", _code(digest[:SHOWN_OF_DIGEST]))) for name, digest in named), ", ")


def _settings(found: Findings) -> list[Markup]:
    rows: list[list[Content]] = [
        [file.name, plain({k: v for k, v in file.origin.settings.items() if v is not None})]
        for file in found.files
        if file.origin is not None and file.origin.settings
    ]
    return [table("Settings, by file", ["file", "settings"], rows, words=(0, 1))] if rows else []


def _code(text: str) -> Markup:
    return element("code", text)
