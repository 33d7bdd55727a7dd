"""``broca merge``: recordings of several texts or languages as one."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import click

from cli.options import FILE, json_option, out_option
from cli.screen import Screen


@click.command("merge")
@click.argument("files", metavar="STATISTICS...", type=FILE, nargs=-1, required=True)
@out_option("File for the statistics (.safetensors).")
@json_option
def command(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Add up two or more STATISTICS files of one model: of other texts, or of other languages.

    \b
    Example:
      broca merge monday.safetensors tuesday.safetensors --out statistics.safetensors
    """
    from neurons.errors import UsageError
    from neurons.statistics import load_statistics, merge

    screen = Screen(as_json)
    if len(files) < 2:
        raise UsageError("give at least two files of statistics to merge")
    merged = reduce(merge, map(load_statistics, files))
    merged.save(out)
    tokens = dict(zip(merged.languages, merged.tokens.tolist(), strict=True))
    texts = dict(zip(merged.languages, merged.texts.tolist(), strict=True))
    screen.table(
        f"statistics of {len(files)} files",
        ["language", "tokens", "texts"],
        [[language, tokens[language], texts[language]] for language in merged.languages],
    )
    screen.result({"out": out, "files": len(files), "tokens": tokens, "texts": texts}, out)
