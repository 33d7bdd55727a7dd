"""``broca evaluate``: a steered model beside the unedited one, or every way of steering in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from cli.command_line import command_line, loaded_as
from cli.corpora import tell, tell_read
from cli.loading import announced
from cli.options import (
    IN_FILE,
    IN_PATH,
    LANGUAGE,
    CommaSeparated,
    FiniteRange,
    Shares,
    corpus_options,
    device_options,
    dry_run_option,
    json_option,
    model_argument,
    out_option,
    tokens_option,
)
from cli.screen import Screen
from cli.tables import report_table, say_samples

if TYPE_CHECKING:
    from editing.evaluation.likelihood import Steering
    from editing.evaluation.questions import Questions
    from editing.evaluation.relevance import Scorer
    from editing.evaluation.vllm_generation import VllmWriter
    from editing.plans.plan import Plan
    from neurons.models.source import LoadedModel
    from neurons.text.corpus import Corpus

RELEVANCE = ("auto", "judge", "chrf", "likelihood", "none")


@click.command("evaluate")
@model_argument
@click.option("--edit", "edit_path", type=IN_FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint of the same architecture: hub id or directory.")
@click.option(
    "--methods",
    type=CommaSeparated(),
    help="Ways of steering to compare, as keyed,diffmean or all: made from part estimate, settings chosen on part "
    "choose, reported on part report; the table is also written as .md beside --out.",
)
@click.option(
    "--doses",
    type=Shares(),
    help="--methods: report each way at these parts of its chosen strength too, as 25%,50%,75%; drawn as .png "
    "beside --out.",
)
@corpus_options
@click.option("--source", type=LANGUAGE, required=True, help="Language of the prompts.")
@click.option("--target", type=LANGUAGE, required=True, help="Language that the answers are to be in.")
@click.option(
    "--questions",
    "questions_path",
    type=IN_PATH,
    help="Questions to answer instead of openings of lines: .jsonl, .csv or .parquet with question_id and text, "
    "or a directory of them by language.",
)
@click.option(
    "--no-chat", is_flag=True, help="Questions as plain text, not through the tokenizer's chat template."
)
@click.option("--judge", help="A model that judges relevance: hub id or directory.")
@click.option(
    "--relevance",
    type=click.Choice(RELEVANCE),
    default="auto",
    show_default=True,
    help="What relevance is measured by; auto: the judge if one is given, else chrF where there are references, "
    "else the unedited model's likelihood.",
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What writes the answers; all else is measured with transformers. vllm must be installed beside Broca; "
    "a plan is exported for it, for as long as it takes.",
)
@click.option("--others/--no-others", default=False, help="Answers to prompts of every other language too.")
@click.option(
    "--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Continuations a prompt."
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=40, show_default=True)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    help="0 takes the likeliest token always.  [default: 0.7; 0 with --questions]",
)
@click.option("--seed", type=int, default=0, show_default=True)
@tokens_option
@device_options
@dry_run_option
@out_option("File for the numbers (.json).")
@json_option
def command(
    model: str,
    edit_path: Path | None,
    against: str | None,
    methods: tuple[str, ...] | None,
    doses: tuple[float, ...] | None,
    corpus_path: Path,
    languages: tuple[str, ...] | None,
    part: str,
    source: str,
    target: str,
    questions_path: Path | None,
    no_chat: bool,
    judge: str | None,
    relevance: str,
    engine: str,
    others: bool,
    prompts: int,
    samples: int,
    new_tokens: int,
    temperature: float | None,
    seed: int,
    tokens: int | None,
    device: str,
    dtype: str,
    dry_run: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Measure MODEL (hub id or directory), and a plan or a steered checkpoint beside it; or compare all ways.

    \b
    Example:
      broca evaluate artifacts/demo/model --edit edit.safetensors --corpus artifacts/demo/corpus \\
          --part report --source en --target fr --out report.json
      broca evaluate artifacts/demo/model --corpus artifacts/demo/corpus --methods all --prompts 30 \\
          --source en --target fr --out methods.json
    """
    from editing.checkpoints.weight_exchange import Exchange
    from editing.evaluation.evaluation import Evaluation
    from editing.evaluation.generation import TEMPERATURE, check_samples
    from editing.evaluation.language_id import check_languages
    from editing.evaluation.questions import read_questions
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from editing.report.run_report import methods_markdown
    from editing.report.tables import details_of, methods_table
    from editing.study.provenance import (
        file_read,
        measured_by,
        model_read,
        processor,
        text_measured,
        texts_read,
    )
    from editing.study.results import Report
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.files.json_file import document
    from neurons.models.source import load_model
    from neurons.text.corpus import read_corpus
    from neurons.text.token_budget import LOSSES

    screen = Screen(as_json)
    if edit_path is not None and against is not None:
        raise UsageError("--edit and --against are two ways to name the steered model: give one")
    if methods is not None and (edit_path is not None or against is not None):
        raise UsageError("--methods makes its edits itself: leave --edit and --against out")
    if methods is not None and part not in ("all", "report"):
        raise UsageError("--methods estimates, chooses and reports on parts of their own: leave --part out")
    if methods is not None and out.suffix in (".md", ".png"):
        raise UsageError(
            f"{out}: --methods writes its table to .md and its picture to .png, and the numbers to --out: name a .json"
        )
    if doses is not None and methods is None:
        raise UsageError("--doses are of the ways that --methods compares: give --methods too")
    if wrong := [f"{dose:g}" for dose in doses or () if not 0 < dose < 1]:
        raise UsageError(f"--doses {', '.join(wrong)}: give parts of a strength, between 0 and 1, as 25%,50%")
    if methods is not None and engine == "vllm":
        raise UsageError("--methods compares hooks too, which vLLM cannot run: leave --engine vllm out")
    if judge is not None and relevance not in ("auto", "judge"):
        raise UsageError(f"--judge judges relevance, but --relevance {relevance} measures it otherwise")
    if relevance == "judge" and judge is None:
        raise UsageError("--relevance judge needs a model: --judge MODEL")
    if no_chat and questions_path is None:
        raise UsageError(
            "--no-chat is about questions, and openings of lines are plain text anyway: leave it out"
        )
    if engine == "vllm":
        from editing.evaluation.vllm_generation import require_vllm

        # Before minutes are spent on loading.
        require_vllm()
    ways = {}
    if methods is not None:
        from editing.study.registry import compared_named

        ways = compared_named(methods)
    if temperature is None:
        temperature = TEMPERATURE if questions_path is None else 0.0
    # Before minutes are spent on loading.
    check_samples(samples, temperature)
    questions = None if questions_path is None else read_questions(questions_path, source)
    corpora = {
        name: replace(read_corpus(corpus_path, languages, name), tokens=tokens)
        for name in ((part,) if methods is None else ("estimate", "choose", "report"))
    }
    tell(screen, corpus_path, languages)
    reported = corpora["report" if methods is not None else part]
    check_languages(reported.languages)
    plan = None if edit_path is None else load_plan(edit_path)
    if dry_run:
        from cli.dry_run import dry_run as show
        from editing.pipeline.needs import evaluation_need
        from neurons.recording.needs import text_of

        show(
            screen,
            model,
            device,
            dtype,
            lambda planned: [evaluation_need(planned, text_of(planned, reported))],
        )
        return
    loaded = announced(screen, load_model(model, device, dtype))
    if plan is not None:
        loaded.require_fingerprint(plan.metadata, edit_path)
    inputs = [] if edit_path is None else [file_read("--edit", edit_path)]
    if questions is not None:
        inputs.append({"option": "--questions", "file": str(questions_path), "digest": questions.digest})
    judging = None if judge is None else load_model(judge, device, dtype)
    # Left on disk: what differs is exchanged in the one model that is in memory.
    other = None if against is None else load_model(against, dtype=dtype, max_memory=0)
    with_others = None if other is None else Exchange(loaded, other)
    inputs += [
        model_read(option, one)
        for option, one in (("--against", other), ("--judge", judging))
        if one is not None
    ]
    # The same scorer on the text that is chosen on and on that which is reported.
    measured = [reported] if methods is None else [corpora["choose"], reported]
    scorer = _scorer(relevance, loaded, judging, measured, questions, source, target, prompts)
    repeats = command_line(
        methods=tuple(ways) or None,
        languages=languages or reported.languages,
        relevance="none" if scorer is None else scorer.name,
        temperature=temperature,
        **loaded_as(loaded, judging, other),
    )

    def evaluation(corpus: Corpus, asked: Questions | None, writer: VllmWriter | None = None) -> Evaluation:
        return Evaluation(
            loaded,
            corpus,
            source,
            target,
            samples=samples,
            max_prompts=prompts,
            seed=seed,
            new_tokens=new_tokens,
            temperature=temperature,
            questions=asked,
            chat=not no_chat,
            scorer=scorer,
            write=writer,
        )

    def about(measuring: Evaluation, writer: VllmWriter | None = None) -> dict[str, Any]:
        return {
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            "edit": edit_path,
            "against": against,
            "corpus": text_measured(reported),
            "corpora": texts_read(corpora.values()),
            "inputs": inputs,
            "packages": {**measured_by(), **({} if writer is None else {"vllm": writer.version})},
            "processor": processor(loaded.device),
            "command": repeats,
            "questions": (
                None if questions is None else {"file": questions_path, "digest": questions.digest}
            ),
            "prompts": {"style": measuring.prompt_style, "ceiling_on": measuring.ceiling_from},
            "relevance": None if scorer is None else _scorer_told(scorer.name, judging),
            "settings": {
                "engine": engine,
                "samples": samples,
                "new_tokens": new_tokens,
                "temperature": temperature,
                "seed": seed,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
            },
        }

    if methods is not None:
        from editing.methods.material import Material
        from editing.study.protocol import compare_methods

        material = Material(loaded, corpora["estimate"], source, target)
        halves = {name: None if questions is None else questions.half(name) for name in ("choose", "report")}
        table = out.with_suffix(".md")
        with screen.progress(f"Comparing, {source} to {target}", len(ways), "ways") as advance:
            choosing, measuring = (evaluation(corpora[name], halves[name]) for name in ("choose", "report"))
            for compared in compare_methods(ways, material, choosing, measuring, _stage(screen), doses or ()):
                report = replace(compared, about=about(measuring))
                # After every way: whoever stops it here keeps what was measured.
                write_atomically(out, json_bytes(document(report)))
                write_atomically(table, methods_markdown(report).encode())
                advance(1)
        screen.table(report.title, *methods_table(report))
        for note in report.notes or ():
            screen.say(note)
        screen.say(f"the same as Markdown: {table}")
        if report.curves:
            from editing.report.dose_response import dose_figure
            from neurons.neuron_sets.pictures import save_figure

            picture = out.with_suffix(".png")
            least = report.outcomes[0].target_share
            save_figure(dose_figure(report.curves, source, target, report.ceiling, least), picture)
            screen.say(f"what each way costs at the share that it reaches: {picture}")
        screen.result({"out": out, **document(report)}, out)
        return
    models = 1 if plan is None and other is None else 2
    with (
        _writer(screen, engine, loaded, plan, other) as (writer, writing_steered),
        screen.progress("Measuring", models, "models") as advance,
    ):
        measuring = evaluation(reported, questions, writer)
        outcomes = [measuring.measure("base", nullcontext, others=True) if others else measuring.base]
        advance(1)
        if plan is not None:
            details = {"components": plan.components, "relative_change": plan.relative_change()}
            steering, name = _both(partial(applied, loaded, plan), writing_steered), "edited"
            outcomes.append(measuring.measure(name, steering, details, kl=True, others=others))
            advance(1)
        elif with_others is not None:
            steering = _both(with_others, writing_steered)
            outcomes.append(measuring.measure("against", steering, kl=True, others=others))
            advance(1)
    report = Report(
        source,
        target,
        measuring.ceiling,
        measuring.continuations,
        tuple(outcomes),
        about=about(measuring, writer),
    )
    write_atomically(out, json_bytes(document(report)))
    tell_read(screen, measuring.read, LOSSES.minimum)
    report_table(screen, report)
    for line in details_of(report, outcomes[-1]):
        screen.say(line)
    say_samples(screen, outcomes[-1])
    screen.result({"out": out, **document(report)}, out)


@contextmanager
def _writer(
    screen: Screen, engine: str, loaded: LoadedModel, plan: Plan | None, other: LoadedModel | None
) -> Iterator[tuple[VllmWriter | None, Steering]]:
    """What writes in place of the model in memory, and the context in which it writes steered."""
    if engine == "transformers":
        yield None, nullcontext
        return
    from editing.checkpoints.export import export
    from editing.evaluation.vllm_generation import VllmWriter

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    with (
        TemporaryDirectory(prefix="broca-") as made,
        VllmWriter(str(loaded.checkpoint), loaded.tokenizer, dtype) as writer,
    ):
        steered = None if other is None else other.checkpoint
        if plan is not None:
            with screen.copying("Exporting for vLLM") as tell:
                steered = export(loaded, plan, Path(made) / "steered", progress=tell).path
        yield writer, nullcontext if steered is None else partial(writer.writing_with, str(steered))


def _both(first: Steering, second: Steering) -> Steering:
    @contextmanager
    def entered() -> Iterator[None]:
        with first(), second():
            yield

    return entered


def _stage(screen: Screen) -> Callable[[str], None]:
    return lambda title: screen.stage(title, "choosing, then measuring")


def _scorer(
    relevance: str,
    loaded: LoadedModel,
    judge: LoadedModel | None,
    measured: list[Corpus],
    questions: Questions | None,
    source: str,
    target: str,
    prompts: int,
) -> Scorer | None:
    """What measures relevance here."""
    from editing.evaluation.asking import openings
    from editing.evaluation.relevance import ChrfScorer, JudgeScorer, LikelihoodScorer

    if relevance == "none":
        return None
    if judge is not None:
        return JudgeScorer(judge)
    if relevance == "auto":
        referenced = (
            all(one.reference for corpus in measured for one in openings(corpus, source, target, prompts))
            if questions is None
            else all(one.reference is not None for one in questions.of[source])
        )
        relevance = "chrf" if referenced else "likelihood"
    return ChrfScorer() if relevance == "chrf" else LikelihoodScorer(loaded)


def _scorer_told(name: str, judge: LoadedModel | None) -> dict[str, Any]:
    """What a reader needs to know of the scorer."""
    from editing.evaluation.relevance import JUDGE_PROMPT

    if judge is None:
        return {"scorer": name}
    return {"scorer": name, "judge": judge.label, "fingerprint": judge.fingerprint, "prompt": JUDGE_PROMPT}
