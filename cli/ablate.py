"""``broca ablate``: the loss of a model without the neurons of each language."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.command_line import command_line, loaded_as
from cli.corpora import noted_corpus, read_table
from cli.loading import loaded_model
from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.neuron_sets.neuron_set import NeuronSet
    from neurons.text.corpus import Corpus
    from neurons.text.prompts import Prompts


@click.command("ablate")
@opt.model
@click.argument("more", nargs=-1, type=opt.IN_FILE, metavar="[NEURONS]...")
@opt.corpus
@click.option(
    "--neurons",
    "neuron_paths",
    type=opt.IN_FILE,
    multiple=True,
    help="Neuron set; repeat the option, or list several files after it.",
)
@click.option(
    "--prompts",
    type=opt.IN_PATH,
    help="Prompts with answers, to measure accuracy on too: a .jsonl with prompt, answer and label, or a directory of "
    "<language>.jsonl.",
)
@opt.choice(
    "--way",
    ("zero", "mean", "resample"),
    "What replaces the values: 0, their mean, or the values at a random other token.",
)
@click.option(
    "--mean-of", type=opt.LANGUAGE, help="--way mean: the mean over this language.  [default: over all text]"
)
@click.option(
    "--controls",
    type=opt.CommaSeparated(),
    default=("random", "matched"),
    help="random (the same number in each layer), matched (also of similar activity).  [default: random,matched]",
)
@opt.count("--draws", "Draws of each control; 0 for none.", 3, minimum=0)
@click.option(
    "--doses",
    type=opt.Fractions(),
    help="Also ablate these fractions of each set, best neurons first, as 1%,2%,5%,10%.",
)
@opt.choice(
    "--dose-of",
    ("set", "model"),
    "Base of the fractions in --doses: the set, or all neurons of the model (a top rate).",
)
@click.option(
    "--statistics",
    type=opt.IN_FILE,
    help="Statistics for matched controls and means.  [default: record them]",
)
@opt.tokens
@opt.batch_tokens
@opt.count("--resamples", "Bootstrap samples of the texts.", 2000)
@click.option(
    "--confidence", type=opt.FINITE, default=0.95, show_default=True, help="Level of the intervals."
)
@opt.seed("Seed of all draws.")
@opt.device
@opt.dry_run
@opt.quantised
@click.option("--picture", type=opt.OUT_FILE, help="File for heat maps of the results (.png or .svg).")
@click.option("--dose-picture", type=opt.OUT_FILE, help="File for the dose-response curves (.png or .svg).")
@click.option(
    "--out", type=opt.OUT_FILE, help="File for the study (.json); unfinished work is kept next to it."
)
@opt.json
def command(**options: Any) -> None:
    """Ablate the neurons of each language in MODEL (hub id or directory) and measure the loss of every language.

    The text is read once unedited and once for each language, draw of a control and dose: at most about 45 forward
    passes for six languages with the default controls.  Reduce them with --draws and --tokens.  The output is small.

    With --prompts, the fraction of right answers is measured too, before and after.

    With --out, the same command resumes an interrupted study.

    \b
    Examples:
      broca ablate artifacts/demo/model --corpus artifacts/demo/corpus --part report \\
          --neurons neurons.safetensors --out ablation.json
      broca ablate MODEL --corpus DIR --neurons lape.safetensors gradient.safetensors random.safetensors
      broca ablate artifacts/demo/model --corpus artifacts/demo/corpus --part report \\
          --neurons neurons.safetensors --prompts artifacts/demo/prompts --controls random
    """
    from editing.study.provenance import file_read, processor
    from neurons.ablation import pictures as ablation_pictures
    from neurons.ablation.ledger import LedgerFile
    from neurons.ablation.report import as_markdown
    from neurons.ablation.study import Settings, ablation_study
    from neurons.ablation.study_file import study_document
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.neuron_sets import pictures
    from neurons.statistics.statistics import load_statistics
    from neurons.text.prompts import read_prompts
    from neurons.text.token_budget import LOSSES

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    paths = (*arguments.neuron_paths, *arguments.more)
    if not paths:
        raise UsageError("--neurons is missing: give a neuron set, from `broca identify`")
    settings = Settings(
        way=arguments.way,
        mean_of=arguments.mean_of,
        controls=arguments.controls,
        draws=arguments.draws,
        doses=arguments.doses or (),
        dose_of_model=arguments.dose_of == "model",
        seed=arguments.seed,
        resamples=arguments.resamples,
        confidence=arguments.confidence,
    )
    for picture in (arguments.picture, arguments.dose_picture):
        if picture is not None:
            pictures.picture_format(picture)
    if arguments.dose_picture is not None and not settings.doses:
        raise UsageError("--dose-picture needs --doses, for example 1%,2%,5%,10%")
    if settings.dose_of_model and not settings.doses:
        raise UsageError("--dose-of model needs --doses, for example 1%,2%,5%,10%")
    sets = _sets(paths)
    if arguments.statistics is not None and not settings.moments(sets.values()):
        raise UsageError("--statistics is not used by this study: leave it out")
    statistics = None if arguments.statistics is None else load_statistics(arguments.statistics)
    inputs = [file_read("--neurons", path) for path in paths]
    if arguments.statistics is not None:
        inputs.append(file_read("--statistics", arguments.statistics))
    corpus = noted_corpus(screen, arguments)
    known = corpus.languages if statistics is None else statistics.languages
    if arguments.mean_of not in (None, *known):
        raise UsageError(f"--mean-of {arguments.mean_of!r} was not read: choose from {', '.join(known)}")
    prompts = None
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts, corpus.languages)
        inputs.append(file_read("--prompts", arguments.prompts))
    if arguments.dry_run:
        moments = settings.moments(sets.values()) if statistics is None else ()
        _dry_run(screen, arguments, corpus, moments, prompts)
        return
    loaded = loaded_model(screen, arguments)
    with _progress(screen) as progress:
        study = ablation_study(
            loaded,
            corpus,
            sets,
            settings,
            statistics,
            arguments.tokens,
            arguments.batch_tokens,
            arguments.out,
            progress,
            prompts,
        )
    command_text = command_line(
        neuron_paths=paths,
        more=None,
        languages=arguments.languages or study.languages,
        batch_tokens=study.metadata["settings"]["batch_tokens"],
        **loaded_as(loaded),
    )
    provenance = {"command": command_text, "inputs": inputs, "processor": processor(loaded.device)}
    document = study_document(replace(study, metadata=study.metadata | provenance))
    if arguments.picture is not None:
        pictures.save_figure(ablation_pictures.matrix_figure(study), arguments.picture)
    if arguments.dose_picture is not None:
        pictures.save_figure(ablation_pictures.doses_figure(study), arguments.dose_picture)
    if arguments.out is not None:
        write_atomically(arguments.out, json_bytes(document))
        LedgerFile(arguments.out, "").remove()
    read_table(screen, study.metadata["read"], LOSSES.minimum)
    for neuron_set in study.sets:
        sizes = zip(study.languages, neuron_set.sizes, strict=True)
        if empty := [language for language, size in sizes if not size]:
            screen.warn(
                f"{neuron_set.name} has no {neuron_set.unit}s for {', '.join(empty)}: nothing is ablated there"
            )
    screen.say(as_markdown(study))
    screen.result(**document, out=arguments.out)


def _dry_run(
    screen: Screen,
    arguments: SimpleNamespace,
    corpus: Corpus,
    moments: Sequence[str],
    prompts: Prompts | None,
) -> None:
    """Print the memory needs of recording the moments, and of ablating neurons on text and prompts."""
    from cli.dry_run import dry_run
    from neurons.ablation.accuracy import PromptBatches
    from neurons.models.memory import MAX_TOKENS
    from neurons.recording.needs import ablation_need, recording_need, text_of, text_of_batches
    from neurons.scorers.method import TEXTS
    from neurons.text.token_budget import LOSSES, budget_of

    size = arguments.batch_tokens

    def needs(planned: LoadedModel) -> list[Need]:
        read = partial(text_of, planned, corpus, arguments.tokens, batch_tokens=size)
        texts = [read(default=LOSSES.tokens)]
        if prompts is not None and planned.tokenizer is not None:
            texts.append(text_of_batches(PromptBatches(planned, prompts, size or MAX_TOKENS).of))
        stages = [max((ablation_need(planned, text, size) for text in texts), key=attrgetter("total"))]
        if moments:
            text = read(default=budget_of(moments, TEXTS).tokens)
            stages.insert(0, recording_need(planned, text, moments, TEXTS, batch_tokens=size))
        return stages

    dry_run(screen, arguments, needs)


@contextmanager
def _progress(screen: Screen) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that starts at the first callback, which gives the total."""
    with ExitStack() as stack:
        bars: list[Callable[[int], None]] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(screen.progress("Ablating", total, "tokens")))
            bars[0](done)

        yield advance


def _sets(paths: Sequence[Path]) -> dict[str, NeuronSet]:
    """The neuron sets by file stem, or by path where two files have the same stem."""
    from neurons.errors import UsageError
    from neurons.neuron_sets.neuron_set import load_neuron_set

    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the neuron set {repeated[0]} is given twice")
    return {name: load_neuron_set(path) for name, path in zip(names, paths, strict=True)}
