"""What a study was made of and how it is made again: models, texts, packages, commands, files."""

from __future__ import annotations

from markupsafe import Markup

from editing.report.commands import recipe, ways_again
from editing.report.findings import Findings
from editing.report.formats import SHOWN_OF_DIGEST, plain
from editing.report.templating import rendered


def provenance_content(found: Findings) -> Markup:
    """Everything that the files say of their making."""
    named = [(file.name, file.origin) for file in found.files if file.origin is not None]
    origins = [origin for _, origin in named]
    models: dict[str, dict[str, None]] = {}
    packages: dict[str, dict[str, None]] = {}
    for origin in origins:
        if origin.fingerprint:
            models.setdefault(origin.fingerprint, {}).update({origin.model: None} if origin.model else {})
        for name, version in origin.packages.items():
            packages.setdefault(name, {})[version] = None
    texts = dict.fromkeys(text for origin in origins for text in origin.texts)
    inputs = dict.fromkeys(one for origin in origins for one in origin.inputs)
    return rendered(
        "provenance",
        models=models,
        # Name, words, and a digest to be set off.
        pairs=[
            *(("model", ", ".join(names) or "not named", digest) for digest, names in models.items()),
            *((f"text, part {part}", "", digest) for digest, part in texts),
            *((f"{option} {file}", "", digest) for option, file, digest in inputs),
            *((name, ", ".join(versions), "") for name, versions in sorted(packages.items())),
        ],
        # Which file was made of what: files of one command that differ here are not of one making.
        made_of=[
            (
                name,
                origin.fingerprint or "",
                [(part, digest) for digest, part in origin.texts],
                [(file, digest) for _, file, digest in origin.inputs],
            )
            for name, origin in named
            if origin.fingerprint or origin.texts or origin.inputs
        ],
        settings=[
            (name, plain({k: v for k, v in origin.settings.items() if v is not None}))
            for name, origin in named
            if origin.settings
        ],
        SHOWN_OF_DIGEST=SHOWN_OF_DIGEST,
    )


def again_content(found: Findings) -> Markup:
    """The command of every result, or that its file names none."""
    return rendered("again", ways=ways_again(found), recipe=recipe(found))


def files_content(found: Findings) -> Markup:
    """Every file, those that are not understood first."""
    strange = [file for file in found.files if not file.understood]
    files = [*strange, *(file for file in found.files if file.understood)]
    return rendered("files", strange=[file.name for file in strange], files=files)
