"""``broca report``: a study as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import IN_DIRECTORY, OUT_FILE, json_option
from cli.screen import Screen


@click.command("report")
@click.argument("directory", metavar="DIR", type=IN_DIRECTORY)
@click.option("--out", type=OUT_FILE, help="File for the page (.html).  [default: DIR/report.html]")
@json_option
def command(directory: Path, out: Path | None, as_json: bool) -> None:
    """Show all results that lie in DIR on one page: tables, heat maps, curves, text, settings and commands.

    The page is one file that asks for nothing from anywhere.  DIR may hold what broca run, evaluate, ablate,
    tune, identify and edit wrote, also in directories of its own; what is not understood is named.

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
        raise UsageError(f"{out}: a page ends in .html")
    found = read_findings(directory)
    content = study_page(found)
    write_atomically(out, content)
    strange = [file.name for file in found.files if not file.understood]
    for file in found.files:
        if not file.understood:
            screen.warn(f"{directory / file.name}: {file.kind}")
    shown = {
        "steering": [one.file for one in found.steering],
        "searches": [one.file for one in found.searches],
        "ablations": [one.file for one in found.ablations],
        "neurons": [one.file for one in found.neurons],
        "edits": [one.file for one in found.edits],
        "choices": [one.file for one in found.choices],
    }
    screen.result({"out": out, "bytes": len(content), "shown": shown, "not_understood": strange}, out)
