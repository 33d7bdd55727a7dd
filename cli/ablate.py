"""``broca ablate``: what a model loses without a language's neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.command_line import command_line, loaded_as
from cli.corpora import read, tell_read
from cli.loading import announced
from cli.options import (
    FINITE,
    IN_FILE,
    OUT_FILE,
    CommaSeparated,
    Shares,
    bits_asked,
    corpus_options,
    device_options,
    dry_run_option,
    json_option,
    model_argument,
    quantised_options,
    tokens_option,
)
from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.neuron_sets.neuron_set import NeuronSet


@click.command("ablate")
@model_argument
@click.argument("more", nargs=-1, type=IN_FILE, metavar="[NEURONS]...")
@corpus_options
@click.option(
    "--neurons",
    "neuron_paths",
    type=IN_FILE,
    multiple=True,
    help="Neuron set; again for another, or name the others behind it.",
)
@click.option(
    "--way",
    type=click.Choice(["zero", "mean", "resample"]),
    default="zero",
    show_default=True,
    help="What takes the values' place: 0, their mean, or the values at a random other token.",
)
@click.option("--mean-of", help="--way mean: this language's mean.  [default: of all text]")
@click.option(
    "--controls",
    type=CommaSeparated(),
    default=("random", "matched"),
    help="random (as many in each layer) and matched (about as active too).  [default: random,matched]",
)
@click.option(
    "--draws", type=click.IntRange(min=0), default=3, show_default=True, help="Of each control; 0: none."
)
@click.option("--doses", type=Shares(), help="Shares of each set, best first, as 1%,2%,5%,10%.")
@click.option(
    "--dose-of",
    type=click.Choice(["set", "model"]),
    default="set",
    show_default=True,
    help="What doses are shares of: the set, or all neurons of the model (a top rate).",
)
@click.option("--statistics", type=IN_FILE, help="For matched controls and means.  [default: record now]")
@tokens_option
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), help="Tokens read at once.  [default: what memory allows]"
)
@click.option(
    "--resamples", type=click.IntRange(min=1), default=2000, show_default=True, help="Of the texts."
)
@click.option("--confidence", type=FINITE, default=0.95, show_default=True, help="Of the intervals.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all draws.")
@device_options
@dry_run_option
@quantised_options
@click.option("--picture", type=OUT_FILE, help="File for a heat map of the matrices (.png or .svg).")
@click.option("--dose-picture", type=OUT_FILE, help="File for the dose curves (.png or .svg).")
@click.option("--out", type=OUT_FILE, help="File for the study (.json); unfinished work is kept beside it.")
@json_option
def command(**options: Any) -> None:
    """Ablate each language's neurons in MODEL (hub id or directory) and read every language without them.

    It reads the text once unedited and once for each language, draw of a control and dose: six languages with
    the default controls take some 45 forward passes over it at most; --draws and --tokens say how many and
    how long.  The file is small.

    A study that is stopped goes on where it was when the same command is given again, if it has --out.

    \b
    Examples:
      broca ablate artifacts/demo/model --corpus artifacts/demo/corpus --part report \\
          --neurons neurons.safetensors --out ablation.json
      broca ablate MODEL --corpus DIR --neurons lape.safetensors gradient.safetensors random.safetensors
    """
    from editing.study.provenance import file_read, processor
    from neurons.ablation import pictures as ablation_pictures
    from neurons.ablation.ledger import LedgerFile
    from neurons.ablation.report import as_markdown
    from neurons.ablation.study import Settings, ablation_study
    from neurons.ablation.study_file import study_document
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.models.source import load_model
    from neurons.neuron_sets import pictures
    from neurons.statistics.statistics import load_statistics
    from neurons.text.token_budget import LOSSES

    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    paths = (*asked.neuron_paths, *asked.more)
    if not paths:
        raise UsageError("--neurons is missing: name a neuron set, from `broca identify`")
    settings = Settings(
        way=asked.way,
        mean_of=asked.mean_of,
        controls=asked.controls,
        draws=asked.draws,
        doses=asked.doses or (),
        dose_of_model=asked.dose_of == "model",
        seed=asked.seed,
        resamples=asked.resamples,
        confidence=asked.confidence,
    )
    for picture in (asked.picture, asked.dose_picture):
        if picture is not None:
            pictures.picture_format(picture)
    if asked.dose_picture is not None and not settings.doses:
        raise UsageError("--dose-picture needs --doses, as 1%,2%,5%,10%")
    if asked.statistics is not None and not settings.moments():
        raise UsageError("--statistics means nothing to this study: leave it out")
    sets = _sets(paths)
    statistics = None if asked.statistics is None else load_statistics(asked.statistics)
    inputs = [file_read("--neurons", path) for path in paths]
    if asked.statistics is not None:
        inputs.append(file_read("--statistics", asked.statistics))
    corpus = read(screen, asked.corpus_path, asked.languages, asked.part)
    if asked.dry_run:
        from cli.dry_run import dry_run_of_text
        from neurons.recording.needs import ablation_need

        dry_run_of_text(screen, asked, corpus, ablation_need)
        return
    loaded = announced(screen, load_model(asked.model, asked.device, asked.dtype, bits=bits_asked(asked)))
    with _bar(screen) as progress:
        study = ablation_study(
            loaded,
            corpus,
            sets,
            settings,
            statistics,
            asked.tokens,
            asked.batch_tokens,
            asked.out,
            progress,
        )
    repeats = command_line(
        neuron_paths=paths,
        more=None,
        languages=asked.languages or study.languages,
        batch_tokens=study.metadata["settings"]["batch_tokens"],
        **loaded_as(loaded),
    )
    about = {"command": repeats, "inputs": inputs, "processor": processor(loaded.device)}
    document = study_document(replace(study, metadata=study.metadata | about))
    if asked.picture is not None:
        pictures.save_figure(ablation_pictures.matrix_figure(study), asked.picture)
    if asked.dose_picture is not None:
        pictures.save_figure(ablation_pictures.doses_figure(study), asked.dose_picture)
    if asked.out is not None:
        write_atomically(asked.out, json_bytes(document))
        LedgerFile(asked.out, "").remove()
    tell_read(screen, study.metadata["read"], LOSSES.minimum)
    for one in study.sets:
        empty = [language for language, size in zip(study.languages, one.sizes, strict=True) if not size]
        if empty:
            screen.warn(f"{one.name} has no neuron for {', '.join(empty)}: nothing was ablated there")
    screen.say(as_markdown(study))
    screen.result({**document, "out": asked.out}, asked.out)


@contextmanager
def _bar(screen: Screen) -> Iterator[Callable[[int, int], None]]:
    """A bar that begins when it is known how much there is to do."""
    with ExitStack() as open_now:
        bars: list[Callable[[int], None]] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(open_now.enter_context(screen.progress("Ablating", total, "tokens")))
            bars[0](done)

        yield advance


def _sets(paths: Sequence[Path]) -> dict[str, NeuronSet]:
    """By file name without its ending, or by path where two files have the same."""
    from neurons.errors import UsageError
    from neurons.neuron_sets.neuron_set import load_neuron_set

    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the neuron set {twice[0]} is named twice")
    return {name: load_neuron_set(path) for name, path in zip(names, paths, strict=True)}
