"""``broca merge``: the sum of several statistics."""

from __future__ import annotations

from pathlib import Path

import click

from cli import options as opt
from cli.screen import Screen


@click.command("merge")
@click.argument("files", metavar="STATISTICS...", type=opt.IN_FILE, nargs=-1, required=True)
@opt.out("File for the statistics (.safetensors).")
@opt.json
def command(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Add up two or more STATISTICS files of one model, of different texts or languages.

    \b
    Example:
      broca merge monday.safetensors tuesday.safetensors --out statistics.safetensors
    """
    from neurons.errors import BrocaError, UsageError
    from neurons.statistics.statistics import load_statistics, merge

    screen = Screen(as_json)
    if len(files) < 2:
        raise UsageError("give at least two files of statistics to merge")
    if repeated := [file for file in files if files.count(file) > 1]:
        raise UsageError(f"{repeated[0]} is given twice, so its text would count twice: give it once")
    merged = load_statistics(files[0])
    for file in files[1:]:
        try:
            merged = merge(merged, load_statistics(file))
        except UsageError as error:
            # The content of files is not an error of the command line.
            raise BrocaError(f"{file} and {files[0]} cannot be added up: {error}") from error
    merged.save(out)
    tokens = dict(zip(merged.languages, merged.tokens.tolist(), strict=True))
    texts = dict(zip(merged.languages, merged.texts.tolist(), strict=True))
    screen.table(
        f"statistics of {len(files)} files",
        ["language", "tokens", "texts"],
        [[language, tokens[language], texts[language]] for language in merged.languages],
    )
    screen.result(out=out, files=len(files), tokens=tokens, texts=texts)
