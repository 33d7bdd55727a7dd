"""``broca evaluate``: compare a steered model with the unedited model, or all methods in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.command_line import command_line, loaded_as
from cli.corpora import note_files, read_table
from cli.loading import announced, require_models
from cli.screen import Screen
from cli.tables import report_table, say_samples

if TYPE_CHECKING:
    from editing.evaluation.evaluation import Evaluation
    from editing.evaluation.lens import LanguageLens
    from editing.evaluation.likelihood import Steering
    from editing.evaluation.outcome import Outcome
    from editing.evaluation.questions import Questions
    from editing.evaluation.relevance import Scorer
    from editing.evaluation.vllm_generation import VllmWriter
    from editing.methods.material import Material
    from editing.methods.method import Method
    from editing.plans.plan import Plan
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.text.corpus import Corpus


@click.command("evaluate")
@opt.model
@click.option("--edit", "edit_path", type=opt.IN_FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint of the same architecture: hub id or directory.")
@click.option(
    "--methods",
    type=opt.CommaSeparated(),
    help="Methods to compare, as keyed,diffmean, or all: made from part estimate, with settings chosen on part choose "
    "and figures from part report; also writes the table as .md next to --out.",
)
@click.option(
    "--doses",
    type=opt.Fractions(),
    help="--methods: dose-response, also measure each method at these fractions of its chosen strength, as "
    "25%,50%,75%; also writes a plot as .png next to --out.",
)
@opt.corpus
@opt.pair
@click.option(
    "--questions",
    "questions_path",
    type=opt.IN_PATH,
    help="Questions, instead of openings of the lines: .jsonl, .csv or .parquet with question_id and text, or a "
    "directory of such files by language.",
)
@opt.classifier
@click.option(
    "--no-chat", is_flag=True, help="Ask questions as plain text, without the tokenizer's chat template."
)
@click.option("--judge", help="Model that judges relevance: hub id or directory.")
@opt.choice(
    "--relevance",
    ("auto", "judge", "chrf", "likelihood", "none"),
    "Measure of relevance; auto: the judge if given, else chrF if there are references, else the likelihood "
    "under the unedited model.",
)
@opt.choice(
    "--engine",
    opt.ENGINES,
    "What generates the answers; everything else runs with transformers. vllm needs the package vllm and "
    "exports --edit to a temporary checkpoint.",
)
@click.option(
    "--others/--no-others", default=False, help="Also measure answers to prompts in every other language."
)
@click.option(
    "--lens",
    is_flag=True,
    help="Also measure the logit lens: how likely each language's tokens are after each layer, at the end of the "
    "prompts; also writes a plot as .png next to --out.",
)
@opt.count("--prompts", "Maximum number of prompts.", 100)
@opt.count("--samples", "Continuations per prompt.", 1)
@opt.new_tokens(40)
@click.option(
    "--temperature",
    type=opt.FiniteRange(min=0),
    help="Sampling temperature; 0 is greedy decoding.  [default: 0.7, or 0 with --questions]",
)
@opt.seed("Seed of the sampling.")
@opt.tokens
@opt.device
@opt.dry_run
@opt.out("File for the results (.json).")
@opt.json
def command(**options: Any) -> None:
    """Evaluate MODEL (hub id or directory) and a plan or a steered checkpoint, or compare methods.

    \b
    Examples:
      broca evaluate artifacts/demo/model --edit edit.safetensors --corpus artifacts/demo/corpus \\
          --part report --source en --target fr --out report.json
      broca evaluate artifacts/demo/model --corpus artifacts/demo/corpus --methods all --prompts 30 \\
          --source en --target fr --out methods.json
    """
    from editing.checkpoints.weight_exchange import Exchange
    from editing.evaluation.classifier import load_classifier
    from editing.evaluation.evaluation import Evaluation
    from editing.evaluation.generation import TEMPERATURE, check_samples
    from editing.evaluation.questions import read_questions
    from editing.evaluation.relevance import JUDGE_PROMPT
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from editing.study.provenance import (
        file_read,
        measured_by,
        model_read,
        processor,
        text_measured,
        texts_read,
    )
    from neurons.models.source import load_model
    from neurons.text.corpus import read_corpus

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    _check_options(arguments)
    if arguments.engine == "vllm":
        from editing.evaluation.vllm_generation import require_vllm

        require_vllm()
    methods = None
    if arguments.methods is not None:
        from editing.study.registry import compared_named

        methods = compared_named(arguments.methods)
    if arguments.temperature is None:
        arguments.temperature = TEMPERATURE if arguments.questions_path is None else 0.0
    check_samples(arguments.samples, arguments.temperature)
    source, target = arguments.source, arguments.target
    classifier = load_classifier(arguments.classifier, device=arguments.device)
    questions = None
    if arguments.questions_path is not None:
        questions = read_questions(arguments.questions_path, source)
    corpora = {
        part: replace(
            read_corpus(arguments.corpus, arguments.languages, part, roles=arguments.roles),
            tokens=arguments.tokens,
        )
        for part in ((arguments.part,) if methods is None else ("estimate", "choose", "report"))
    }
    note_files(screen, arguments.corpus, arguments.languages, arguments.classifier is not None)
    reported = corpora[arguments.part if methods is None else "report"]
    classifier.require(reported.languages)
    reported.require(source, target)
    everywhere = arguments.others or methods is not None
    for language in reported.languages if everywhere else (source, target):
        if questions is None or language not in questions.of:
            reported.require_plain(language, remedy=f"ask questions in {language!r} with --questions")
    plan = None if arguments.edit_path is None else load_plan(arguments.edit_path)
    if arguments.dry_run:
        _dry_run(screen, arguments, methods, corpora, reported, plan)
        return
    require_models(arguments.against, arguments.judge)
    loaded = announced(screen, load_model(arguments.model, arguments.device, arguments.dtype))
    if plan is not None:
        loaded.require_fingerprint(plan.metadata, arguments.edit_path)
    inputs = [] if plan is None else [file_read("--edit", arguments.edit_path)]
    if questions is not None:
        inputs.append(
            {"option": "--questions", "file": str(arguments.questions_path), "digest": questions.digest}
        )
    if arguments.classifier is not None:
        inputs.append({"option": "--classifier", "file": classifier.name, "digest": str(classifier.digest)})
    judge = (
        None if arguments.judge is None else load_model(arguments.judge, arguments.device, arguments.dtype)
    )
    # Stays on disk; its tensors that differ are exchanged in the model in memory.
    other = (
        None
        if arguments.against is None
        else load_model(arguments.against, dtype=arguments.dtype, max_memory=0)
    )
    exchange = None if other is None else Exchange(loaded, other)
    steering = exchange if plan is None else partial(applied, loaded, plan)
    inputs += [
        model_read(option, model)
        for option, model in (("--against", other), ("--judge", judge))
        if model is not None
    ]
    # One scorer for the choosing and the reporting text.
    measured = [reported] if methods is None else [corpora["choose"], reported]
    scorer = _scorer(screen, arguments, loaded, judge, measured, questions)
    judged = {}
    if judge is not None:
        judged = {"judge": judge.label, "fingerprint": judge.fingerprint, "prompt": JUDGE_PROMPT}
    command_text = command_line(
        methods=None if methods is None else tuple(methods),
        languages=arguments.languages or reported.languages,
        others=everywhere,
        relevance="none" if scorer is None else scorer.name,
        temperature=arguments.temperature,
        **loaded_as(loaded, judge, other),
    )

    def evaluation(
        corpus: Corpus, questions: Questions | None, writer: VllmWriter | None = None
    ) -> Evaluation:
        return Evaluation(
            loaded,
            corpus,
            source,
            target,
            samples=arguments.samples,
            max_prompts=arguments.prompts,
            seed=arguments.seed,
            new_tokens=arguments.new_tokens,
            temperature=arguments.temperature,
            questions=questions,
            chat=not arguments.no_chat,
            scorer=scorer,
            write=writer,
            classifier=classifier,
        )

    def provenance(evaluation: Evaluation, writer: VllmWriter | None = None) -> dict[str, Any]:
        return {
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            "edit": arguments.edit_path,
            "against": arguments.against,
            "corpus": text_measured(reported),
            "corpora": texts_read(corpora.values()),
            "read": evaluation.read,
            "inputs": inputs,
            "classifier": classifier.provenance,
            "packages": {**measured_by(), **({} if writer is None else {"vllm": writer.version})},
            "processor": processor(loaded.device),
            "command": command_text,
            "questions": (
                None if questions is None else {"file": arguments.questions_path, "digest": questions.digest}
            ),
            "prompts": {"style": evaluation.prompt_style, "ceiling_on": evaluation.ceiling_from},
            "relevance": None if scorer is None else {"scorer": scorer.name, **judged},
            "settings": {
                "engine": arguments.engine,
                "samples": arguments.samples,
                "new_tokens": arguments.new_tokens,
                "temperature": arguments.temperature,
                "seed": arguments.seed,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
            },
        }

    if methods is not None:
        from editing.methods.material import Material

        def half_evaluation(part: str) -> Evaluation:
            return evaluation(corpora[part], None if questions is None else questions.half(part))

        material = Material(loaded, corpora["estimate"], source, target)
        _compare_methods(screen, arguments, methods, material, half_evaluation, provenance)
        return
    lens = None
    with (
        _writer(screen, arguments.engine, loaded, plan, other) as (writer, steered_writing),
        screen.progress("Measuring", 1 if steering is None else 2, "models") as advance,
    ):
        measuring = evaluation(reported, questions, writer)
        outcomes = _outcomes(arguments, measuring, plan, steering, steered_writing, advance)
        if arguments.lens:
            from editing.evaluation.lens import language_lens

            models = {"base": nullcontext, **({} if steering is None else {outcomes[-1].name: steering})}
            whole = read_corpus(arguments.corpus, arguments.languages, roles=arguments.roles)
            lens = language_lens(loaded, whole, measuring.source_rows, models)
    _save_report(screen, arguments, measuring, outcomes, lens, provenance(measuring, writer))


def _dry_run(
    screen: Screen,
    arguments: SimpleNamespace,
    methods: Mapping[str, type[Method]] | None,
    corpora: Mapping[str, Corpus],
    reported: Corpus,
    plan: Plan | None,
) -> None:
    from cli.dry_run import dry_run
    from editing.pipeline.needs import evaluation_need, study_needs
    from neurons.models.source import plan_model
    from neurons.recording.needs import text_of
    from neurons.text.token_budget import KEYS, LOSSES

    def needs(planned: LoadedModel) -> list[Need]:
        solving: list[Need] = []
        if methods is not None:
            text = text_of(planned, corpora["estimate"], default=KEYS.tokens)
            solving = study_needs(planned, text, methods.values())
        text = text_of(planned, reported, default=LOSSES.tokens)
        edits = plan.edits if plan is not None else None if methods is not None else ()
        return [*solving, evaluation_need(planned, text, new_tokens=arguments.new_tokens, edits=edits)]

    judge = None
    if arguments.judge is not None:
        judge = plan_model(arguments.judge, arguments.device, arguments.dtype)
    dry_run(screen, arguments, needs, judge)


def _check_options(arguments: SimpleNamespace) -> None:
    """Reject options that exclude each other, before any model is loaded."""
    from neurons.errors import UsageError

    methods, doses, out = arguments.methods, arguments.doses, arguments.out
    if arguments.source == arguments.target:
        raise UsageError(f"source and target are both {arguments.source!r}")
    if methods is not None and not arguments.others and opt.is_given(arguments, "others"):
        raise UsageError("--no-others is not supported by --methods, which measures them: leave it out")
    if arguments.edit_path is not None and arguments.against is not None:
        raise UsageError("--edit and --against exclude each other: give one")
    if methods is not None and (arguments.edit_path is not None or arguments.against is not None):
        raise UsageError("--methods makes its own edits: leave --edit and --against out")
    if methods is not None and arguments.part not in ("all", "report"):
        raise UsageError("--methods reads every part of the corpus: leave --part out")
    if methods is not None and arguments.lens:
        raise UsageError("--lens is of one edit, and not supported by --methods: leave it out")
    if arguments.lens and out.suffix == ".png":
        raise UsageError(f"{out}: --lens writes a plot to .png and the results to --out: name a .json")
    if methods is not None and out.suffix in (".md", ".png"):
        raise UsageError(
            f"{out}: --methods writes a table to .md, a plot to .png and the results to --out: name a .json"
        )
    if doses is not None and methods is None:
        raise UsageError("--doses needs --methods: give --methods too")
    if invalid := [f"{dose:g}" for dose in doses or () if not 0 < dose < 1]:
        raise UsageError(
            f"--doses {', '.join(invalid)}: give fractions of the strength between 0 and 1, as 25%,50%"
        )
    if methods is not None and arguments.engine == "vllm":
        raise UsageError(
            "--engine vllm is not supported by --methods, which compares hooks too: leave it out"
        )
    if arguments.judge is not None and arguments.relevance not in ("auto", "judge"):
        raise UsageError(f"--judge is not supported by --relevance {arguments.relevance}: leave one out")
    if arguments.relevance == "judge" and arguments.judge is None:
        raise UsageError("--relevance judge needs a model: give --judge MODEL")
    if arguments.no_chat and arguments.questions_path is None:
        raise UsageError(
            "--no-chat needs --questions, because openings of lines are plain text: leave it out"
        )


def _compare_methods(
    screen: Screen,
    arguments: SimpleNamespace,
    methods: Mapping[str, type[Method]],
    material: Material,
    evaluation: Callable[[str], Evaluation],
    provenance: Callable[[Evaluation], dict[str, Any]],
) -> None:
    """Choose, measure and report every method; the results so far are saved after each."""
    from editing.report.run_report import methods_markdown
    from editing.report.tables import methods_table
    from editing.study.protocol import compare_methods
    from neurons.files.artifact import json_bytes, text_bytes, write_atomically
    from neurons.files.json_file import document

    source, target, out = arguments.source, arguments.target, arguments.out
    table = out.with_suffix(".md")
    with screen.progress(f"Comparing, {source} to {target}", len(methods), "methods") as advance:
        choosing, reporting = evaluation("choose"), evaluation("report")
        doses = arguments.doses or ()
        stage = partial(screen.stage, state="choosing settings, then measuring")
        for compared in compare_methods(methods, material, choosing, reporting, stage, doses):
            report = replace(compared, about=provenance(reporting))
            write_atomically(out, json_bytes(document(report)))
            write_atomically(table, text_bytes(methods_markdown(report)))
            advance(1)
    screen.table(report.title, *methods_table(report))
    for note in report.notes or ():
        screen.say(note)
    screen.say(f"table in Markdown: {table}")
    if report.curves and report.third_languages:
        from editing.report.dose_response import dose_figure
        from neurons.neuron_sets.pictures import save_figure

        plot = out.with_suffix(".png")
        base_rate = report.outcomes[0].target_share
        save_figure(dose_figure(report.curves, source, target, report.ceiling, base_rate), plot)
        screen.say(f"plot of harm by target-language rate: {plot}")
    screen.result(out=out, **document(report))


def _outcomes(
    arguments: SimpleNamespace,
    evaluation: Evaluation,
    plan: Plan | None,
    steering: Steering | None,
    steered_writing: Steering,
    advance: Callable[[int], None],
) -> list[Outcome]:
    """The unedited model, and the steered model, if any."""
    others = arguments.others
    outcomes = [evaluation.measure("base", nullcontext, others=True) if others else evaluation.base]
    advance(1)
    if steering is not None:
        name, details = "against", {}
        if plan is not None:
            name = "edited"
            details = {"components": plan.components, "relative_change": plan.relative_change()}
        nested = _nested(steering, steered_writing)
        outcomes.append(evaluation.measure(name, nested, details, kl=True, others=others))
        advance(1)
    return outcomes


def _save_report(
    screen: Screen,
    arguments: SimpleNamespace,
    evaluation: Evaluation,
    outcomes: list[Outcome],
    lens: LanguageLens | None,
    provenance: dict[str, Any],
) -> None:
    from editing.report.tables import details_of
    from editing.study.results import Report
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.files.json_file import document
    from neurons.text.token_budget import LOSSES

    report = Report(
        arguments.source,
        arguments.target,
        evaluation.ceiling,
        evaluation.continuations,
        tuple(outcomes),
        lens=lens,
        about=provenance,
    )
    write_atomically(arguments.out, json_bytes(document(report)))
    read_table(screen, evaluation.read, LOSSES.minimum)
    report_table(screen, report)
    for line in details_of(report, outcomes[-1]):
        screen.say(line)
    say_samples(screen, outcomes[-1])
    if lens is not None:
        from editing.report.lens_figure import lens_figure, lens_table
        from neurons.neuron_sets.pictures import save_figure

        plot = arguments.out.with_suffix(".png")
        save_figure(lens_figure(lens, arguments.source, arguments.target), plot)
        screen.table(
            "mass of each language's tokens after each layer",
            *lens_table(lens, arguments.source, arguments.target),
        )
        screen.say(f"plot of the logit lens: {plot}")
    screen.result(out=arguments.out, **document(report))


@contextmanager
def _writer(
    screen: Screen, engine: str, loaded: LoadedModel, plan: Plan | None, other: LoadedModel | None
) -> Iterator[tuple[VllmWriter | None, Steering]]:
    """The writer that replaces the model in memory, if any, and the context in which it writes steered text."""
    if engine == "transformers":
        yield None, nullcontext
        return
    from editing.checkpoints.export import export
    from editing.evaluation.vllm_generation import VllmWriter

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    with (
        TemporaryDirectory(prefix="broca-") as directory,
        VllmWriter(str(loaded.checkpoint), loaded.tokenizer, dtype) as writer,
    ):
        steered = None if other is None else other.checkpoint
        if plan is not None:
            with screen.copying("Exporting for vLLM") as progress:
                steered = export(loaded, plan, Path(directory) / "steered", progress=progress).path
        yield writer, nullcontext if steered is None else partial(writer.writing_with, str(steered))


def _nested(first: Steering, second: Steering) -> Steering:
    @contextmanager
    def nested() -> Iterator[None]:
        with first(), second():
            yield

    return nested


def _scorer(
    screen: Screen,
    arguments: SimpleNamespace,
    loaded: LoadedModel,
    judge: LoadedModel | None,
    measured: list[Corpus],
    questions: Questions | None,
) -> Scorer | None:
    from editing.evaluation.asking import openings
    from editing.evaluation.relevance import ChrfScorer, JudgeScorer, LikelihoodScorer
    from neurons.errors import UsageError

    relevance, source, target = arguments.relevance, arguments.source, arguments.target
    if relevance == "none":
        return None
    if judge is not None:
        return JudgeScorer(judge)
    if relevance == "likelihood":
        return LikelihoodScorer(loaded)
    if questions is None:
        prompts = [one for corpus in measured for one in openings(corpus, source, target, arguments.prompts)]
        references = [prompt.reference for prompt in prompts]
    else:
        halves = [questions] if len(measured) == 1 else [questions.half("choose"), questions.half("report")]
        references = [one.reference for half in halves for one in half.of[source][: arguments.prompts]]
    if None not in references:
        if questions is None and relevance == "auto":
            screen.note(
                f"{source} and {target} have equally many lines: line i counts as a translation for chrF; give another "
                "--relevance if the lines are not parallel"
            )
        return ChrfScorer()
    if relevance == "auto":
        return LikelihoodScorer(loaded)
    raise UsageError(
        f"--relevance chrf: {references.count(None)} of {len(references)} prompts have no reference: give parallel text, "
        "or questions with a column reference"
    )
