"""``broca convert``: other projects' files to Broca's, and neurons back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from cli.options import IN_FILE, CommaSeparated, json_option, out_option
from cli.screen import Screen


@click.command("convert")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--languages", type=CommaSeparated(), help="masks: names in the file's order, as en,zh,fr.")
@click.option("--width", type=click.IntRange(min=1), help="masks: neurons a layer, which the file lacks.")
@click.option(
    "--subtract",
    "prefixes",
    metavar="LANGUAGE=FILE",
    multiple=True,
    help="counts: those of the prompts alone, so that only responses count; once for each language.",
)
@out_option("File for the result: .safetensors, or .pth for masks.")
@json_option
def command(
    files: tuple[str, ...],
    languages: tuple[str, ...] | None,
    width: int | None,
    prefixes: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Convert published masks or counts to Broca's files, or neurons to published masks.

    What FILE is decides: a mask file (list of languages of layers of neuron indices) becomes a neuron set, a
    neuron set becomes a mask file, and LANGUAGE=FILE, a count file (n and over_zero) each, become statistics.

    \b
    Examples:
      broca convert neurons.safetensors --out masks.pth
      broca convert masks.pth --languages en,zh --width 11008 --out neurons.safetensors
      broca convert en=en.pth zh=zh.pth --out statistics.safetensors \\
          --subtract en=prefix-en.pth --subtract zh=prefix-zh.pth
    """
    from neurons.errors import UsageError
    from neurons.neuron_sets.exchange import is_torch_file
    from neurons.text.corpus_files import language_label

    screen = Screen(as_json)
    named = [_is_named(file) for file in files]
    if any(named) != all(named):
        raise UsageError(
            f"{files[named.index(False)]} has no language: write LANGUAGE=FILE for every count file"
        )
    if all(named):
        if languages is not None or width is not None:
            raise UsageError("--languages and --width are for a mask file: count files are LANGUAGE=FILE")
        _counts(screen, _by_language(files), _by_language(prefixes), out)
        return
    if prefixes:
        raise UsageError("--subtract is for count files, written LANGUAGE=FILE")
    if len(files) > 1:
        raise UsageError(
            f"{len(files)} files: give one mask file, one neuron set, or count files as LANGUAGE=FILE"
        )
    file = _there(Path(files[0]))
    if is_torch_file(file):
        if languages is None or width is None:
            raise UsageError(
                f"{file}: a mask file names neither its languages nor its width: give --languages and "
                "--width (a count file is written LANGUAGE=FILE)"
            )
        _masks(screen, file, tuple(map(language_label, languages)), width, out)
        return
    if languages is not None or width is not None:
        raise UsageError(f"{file}: --languages and --width are for a mask file, which this is not")
    _neurons(screen, file, out)


def _is_named(file: str) -> bool:
    """Whether it is LANGUAGE=FILE; a path whose directory has a = is not."""
    name, equals, _ = file.partition("=")
    return bool(equals) and "/" not in name


def _by_language(files: Sequence[str]) -> dict[str, Path]:
    from neurons.errors import UsageError
    from neurons.text.corpus_files import language_label

    found: dict[str, Path] = {}
    for file in files:
        name, _, path = file.partition("=")
        language = language_label(name)
        if not _is_named(file) or not language or not path:
            raise UsageError(f"{file!r} is not LANGUAGE=FILE")
        if language in found:
            raise UsageError(f"language {language!r} is given twice: {found[language]} and {path}")
        found[language] = _there(Path(path))
    return found


def _there(path: Path) -> Path:
    """What an option for a file says of a path, said of one that is written LANGUAGE=FILE."""
    from neurons.errors import UsageError

    if fault := IN_FILE.fault(path):
        raise UsageError(fault)
    return path


def _counts(screen: Screen, files: dict[str, Path], prefixes: dict[str, Path], out: Path) -> None:
    from dataclasses import replace

    from neurons.errors import UsageError
    from neurons.neuron_sets.exchange import MOMENT, read_counts
    from neurons.statistics.statistics import subtract

    if prefixes and set(prefixes) != set(files):
        raise UsageError(
            f"counts of {', '.join(files)}, but --subtract of {', '.join(prefixes)}: give both of each language"
        )
    statistics = read_counts(files)
    if prefixes:
        prefix = read_counts({language: prefixes[language] for language in files})
        statistics = subtract(statistics, prefix)
        subtracted = {**statistics.metadata, "subtracted_files": prefix.metadata["files"]}
        statistics = replace(statistics, metadata=subtracted)
    statistics.save(out)
    layers, width, _ = statistics.moments[MOMENT].shape
    tokens = dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True))
    screen.table(
        f"counts of {layers} layers x {width} neurons",
        ["language", "tokens"],
        [[language, count] for language, count in tokens.items()],
    )
    screen.result(
        {"out": out, "kind": "statistics", "layers": layers, "neurons": width, "tokens": tokens}, out
    )


def _masks(screen: Screen, file: Path, languages: tuple[str, ...], width: int, out: Path) -> None:
    from neurons.neuron_sets.exchange import read_masks

    found = read_masks(file, languages, width)
    found.save(out)
    sizes = {language: len(found.of(language)) for language in found.languages}
    screen.table(
        f"neuron set, {found.layers} layers x {found.neurons} neurons",
        ["language", "neurons"],
        [[language, size] for language, size in sizes.items()],
    )
    value = {"kind": "neurons", "layers": found.layers, "languages": list(found.languages)}
    screen.result({"out": out, **value, "neurons": sizes}, out)


def _neurons(screen: Screen, file: Path, out: Path) -> None:
    from neurons.neuron_sets.exchange import write_masks
    from neurons.neuron_sets.neuron_set import load_neuron_set

    found = load_neuron_set(file)
    write_masks(found, out)
    screen.say(f"languages in the file's order, for it has no names: {', '.join(found.languages)}")
    screen.say(f"{found.layers} layers of {found.neurons} neurons; scores and kinds are not in such a file")
    value = {"kind": "masks", "layers": found.layers, "width": found.neurons}
    screen.result({"out": out, **value, "languages": list(found.languages)}, out)
