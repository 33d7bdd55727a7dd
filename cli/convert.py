"""``broca convert``: published masks and counts to Broca's files, and neuron sets to masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from cli import options as opt
from cli.screen import Screen


@click.command("convert")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--languages",
    type=opt.CommaSeparated(),
    help="masks: language names in the order of the file, as en,zh,fr.",
)
@click.option(
    "--width", type=click.IntRange(min=1), help="masks: neurons per layer, which the file does not contain."
)
@click.option(
    "--subtract",
    "prefixes",
    metavar="LANGUAGE=FILE",
    multiple=True,
    help="counts: file with the counts of the prompts, to subtract; one for each language.",
)
@opt.out("File for the result: .safetensors, or .pth for masks.")
@opt.json
def command(
    files: tuple[str, ...],
    languages: tuple[str, ...] | None,
    width: int | None,
    prefixes: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Convert published masks or counts to Broca's files, or neurons to published masks.

    A mask file (a list of languages of layers of neuron indices) becomes a neuron set, a neuron set becomes a mask
    file, and count files (n and over_zero), given as LANGUAGE=FILE, become statistics.

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
            f"{files[named.index(False)]} has no language: write LANGUAGE=FILE for each count file"
        )
    if all(named):
        if languages is not None or width is not None:
            raise UsageError(
                "--languages and --width are only for a mask file: leave them out for count files"
            )
        _counts(screen, _by_language(files), _by_language(prefixes), out)
        return
    if prefixes:
        raise UsageError("--subtract is only for count files, written LANGUAGE=FILE")
    if len(files) > 1:
        raise UsageError(
            f"{len(files)} files: give one mask file, one neuron set, or count files as LANGUAGE=FILE"
        )
    file = opt.IN_FILE.convert(files[0], None, None)
    if is_torch_file(file):
        if languages is None or width is None:
            raise UsageError(
                f"{file}: a mask file does not contain languages and width: give --languages and --width "
                "(write a count file as LANGUAGE=FILE)"
            )
        _masks(screen, file, tuple(map(language_label, languages)), width, out)
        return
    if languages is not None or width is not None:
        raise UsageError(f"{file}: --languages and --width are only for a mask file: leave them out")
    _neurons(screen, file, out)


def _is_named(file: str) -> bool:
    """Whether an argument is LANGUAGE=FILE; a path with = in the name of a directory is not."""
    name, equals, _ = file.partition("=")
    return bool(equals) and "/" not in name


def _by_language(files: Sequence[str]) -> dict[str, Path]:
    from neurons.errors import UsageError
    from neurons.text.corpus_files import language_label

    paths: dict[str, Path] = {}
    for file in files:
        name, _, path = file.partition("=")
        language = language_label(name)
        if not _is_named(file) or not language or not path:
            raise UsageError(f"{file!r} is not LANGUAGE=FILE")
        if language in paths:
            raise UsageError(f"language {language!r} is given twice: {paths[language]} and {path}")
        paths[language] = opt.IN_FILE.convert(path, None, None)
    return paths


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
    screen.result(out=out, kind="statistics", layers=layers, neurons=width, tokens=tokens)


def _masks(screen: Screen, file: Path, languages: tuple[str, ...], width: int, out: Path) -> None:
    from neurons.neuron_sets.exchange import read_masks

    neurons = read_masks(file, languages, width)
    neurons.save(out)
    sizes = {language: len(neurons.of(language)) for language in neurons.languages}
    screen.table(
        f"neuron set, {neurons.layers} layers x {neurons.neurons} neurons",
        ["language", "neurons"],
        [[language, size] for language, size in sizes.items()],
    )
    value = {"kind": "neurons", "layers": neurons.layers, "languages": list(neurons.languages)}
    screen.result(out=out, **value, neurons=sizes)


def _neurons(screen: Screen, file: Path, out: Path) -> None:
    from neurons.neuron_sets.exchange import write_masks
    from neurons.neuron_sets.neuron_set import load_neuron_set

    neurons = load_neuron_set(file)
    write_masks(neurons, out)
    screen.say(
        f"languages in the order of the file, which does not contain their names: {', '.join(neurons.languages)}"
    )
    screen.say(
        f"{neurons.layers} layers of {neurons.neurons} neurons; a mask file does not contain scores and kinds"
    )
    value = {"kind": "masks", "layers": neurons.layers, "width": neurons.neurons}
    screen.result(out=out, **value, languages=list(neurons.languages))
