"""Sections on provenance, reproduction and files of a study."""

from __future__ import annotations

from markupsafe import Markup

from editing.report.findings import Findings
from editing.report.formats import SHOWN_OF_DIGEST, plain
from editing.report.reproduction import recipe, reproductions
from editing.report.templating import rendered


def provenance_content(findings: Findings) -> Markup:
    """The section on the provenance that the files record."""
    recorded = {file.name: file.provenance for file in findings.files if file.provenance is not None}
    models: dict[str, dict[str, None]] = {}
    packages: dict[str, dict[str, None]] = {}
    for provenance in recorded.values():
        if provenance.fingerprint:
            names = models.setdefault(provenance.fingerprint, {})
            names.update({provenance.model: None} if provenance.model else {})
        for name, version in provenance.packages.items():
            packages.setdefault(name, {})[version] = None
    texts = dict.fromkeys(text for provenance in recorded.values() for text in provenance.texts)
    inputs = dict.fromkeys(entry for provenance in recorded.values() for entry in provenance.inputs)
    return rendered(
        "provenance",
        models=models,
        # (name, words, digest)
        pairs=[
            *(("model", ", ".join(names) or "not named", digest) for digest, names in models.items()),
            *((f"text, part {part}", "", digest) for digest, part in texts),
            *((f"{option} {file}", "", digest) for option, file, digest in inputs),
            *((name, ", ".join(versions), "") for name, versions in sorted(packages.items())),
        ],
        # By file: files of the same command that differ here are from different runs.
        made_of=[
            (
                name,
                provenance.fingerprint or "",
                [(part, digest) for digest, part in provenance.texts],
                [(file, digest) for _, file, digest in provenance.inputs],
            )
            for name, provenance in recorded.items()
            if provenance.fingerprint or provenance.texts or provenance.inputs
        ],
        settings=[
            (name, plain({k: v for k, v in provenance.settings.items() if v is not None}))
            for name, provenance in recorded.items()
            if provenance.settings
        ],
        SHOWN_OF_DIGEST=SHOWN_OF_DIGEST,
    )


def reproduction_content(findings: Findings) -> Markup:
    """The section on the commands that reproduce the results."""
    return rendered("reproduction", reproductions=reproductions(findings), recipe=recipe(findings))


def files_content(findings: Findings) -> Markup:
    """The section on the files; those that are not understood come first."""
    unknown = [file for file in findings.files if not file.understood]
    files = [*unknown, *(file for file in findings.files if file.understood)]
    return rendered("files", unknown=[file.name for file in unknown], files=files)
