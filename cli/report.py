"""``broca report``: all results of a directory on one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from cli import options as opt
from cli.screen import Screen

MAX_NAMED = 10  # files that are not recognised, in warnings


@click.command("report")
@click.argument("directory", metavar="DIR", type=opt.IN_DIRECTORY)
@click.option("--out", type=opt.OUT_FILE, help="File for the page (.html).  [default: DIR/report.html]")
@opt.json
def command(directory: Path, out: Path | None, as_json: bool) -> None:
    """Write one HTML page with all results in DIR: tables, heat maps, curves, text, settings and commands.

    The page is one file without external resources.  DIR may contain the outputs of broca run, evaluate, ablate, tune,
    identify and edit, also in subdirectories; a warning names files that are not recognised.

    \b
    Example:
      broca report demo --out demo.html
    """
    from editing.report.findings import read_findings
    from editing.report.study import study_page
    from neurons.errors import UsageError
    from neurons.files.artifact import write_atomically

    screen = Screen(as_json)
    out = directory / "report.html" if out is None else out
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"{out}: give a file that ends in .html")
    findings = read_findings(directory)
    content = study_page(findings)
    write_atomically(out, content)
    unrecognised = [file for file in findings.files if not file.understood]
    for file in unrecognised[:MAX_NAMED]:
        screen.warn(f"{directory / file.name}: {file.kind}")
    if (more := len(unrecognised) - MAX_NAMED) > 0:
        screen.warn(f"{more} more files are not understood: the page names them")
    shown = {
        "steering": [result.file for result in findings.steering],
        "searches": [result.file for result in findings.searches],
        "ablations": [result.file for result in findings.ablations],
        "neurons": [result.file for result in findings.neurons],
        "edits": [result.file for result in findings.edits],
        "choices": [result.file for result in findings.choices],
    }
    names = [file.name for file in unrecognised]
    screen.result(out=out, bytes=len(content), shown=shown, not_understood=names)
