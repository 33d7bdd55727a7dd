"""``broca steer``: edits an instruct model so that it answers in one language, and writes the checkpoint."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.loading import announced, require_models
from cli.screen import Screen, one_line
from cli.shipped import QUESTIONS, shipped

if TYPE_CHECKING:
    from editing.evaluation.relevance import JudgeScorer
    from editing.pipeline.lock import Locked
    from editing.pipeline.lock_kinds import Lock
    from editing.pipeline.lock_measures import LockFigures, ThoughtFigures
    from editing.pipeline.steer_recipe import SteerRecipe
    from editing.plans.plan import Plan
    from neurons.models.source import ModelSource

SHOWN_EXAMPLES = 6


@click.command("steer")
@opt.model
@click.option(
    "--to", "target", type=opt.LANGUAGE, help="Language of the answers, or a label that --classifier knows."
)
@click.option(
    "--stay",
    is_flag=True,
    help="In place of --to: answer in the language of the question, whatever language the conversation had before.",
)
@click.option(
    "--from",
    "source",
    type=opt.LANGUAGE,
    help="Language of the questions that are answered in it; all: questions in every language.  [default: en]",
)
@click.option(
    "--instruction",
    help="An instruction that the model learns to follow without it, such as 'Answer formally, in German.'  [default: to "
    "answer in the language]",
)
@opt.choice(
    "--teacher",
    ("instruction", "question"),
    "What makes the unedited model answer in the language: an instruction after the question, or, for a model that "
    "does not obey instructions, the same question in the target language.",
)
@click.option(
    "--keep",
    type=opt.CommaSeparated(),
    help="Languages whose questions are answered as before.  [default: ar, de, en, es, fr, it, ja, pt, ru, zh]",
)
@click.option(
    "--questions",
    type=opt.IN_PATH,
    help="Questions, the same in every language: a directory of <language>.jsonl with question_id and text.  "
    "[default: Broca's questions, 64 in 25 languages]",
)
@click.option(
    "--judge",
    help="Model that judges whether answers address their questions: hub id or directory.  [default: no judge]",
)
@opt.classifier
@click.option(
    "--thoughts/--no-thoughts",
    default=None,
    help="Steer what the model thinks before it answers, too.  [default: if the chat template cannot turn it off]",
)
@click.option("--lora", type=opt.OUT_DIRECTORY, help="Directory for an adapter for PEFT and vLLM, too.")
@opt.seed("Seed of the order of the examples.")
@opt.served_device
@opt.dry_run
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option(
    "--out",
    type=opt.OUT_DIRECTORY,
    help="Directory for the checkpoint.  [default: <MODEL>-<TO>, or <MODEL>-stay]",
)
@opt.json
def command(**options: Any) -> None:
    """Make MODEL (an instruct model: hub id or directory) answer in a language, and write the checkpoint.

    It needs no data.  The model answers questions from Broca, with and without an instruction to answer in
    the language, and learns to answer as if it had the instruction.  Questions in other languages are
    answered as before.

    \b
    Example:
      broca steer Qwen/Qwen2.5-0.5B-Instruct --to fr --out steered
    """
    from editing.pipeline.steer_recipe import SteerRecipe

    arguments = SimpleNamespace(**options)
    recipe = SteerRecipe(
        **{one.name: options[one.name] for one in fields(SteerRecipe) if one.name in options}
    )
    steer(
        Screen(arguments.as_json),
        recipe,
        arguments.out,
        lora=arguments.lora,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
    )


def steer(
    screen: Screen,
    recipe: SteerRecipe,
    out: Path | None,
    *,
    lora: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Steer as a recipe says, write everything and print the figures, or the memory needs with ``dry_run``."""
    start = time.monotonic()
    from editing.checkpoints.adapter import CONFIG, adapted
    from editing.checkpoints.export import require_unedited
    from editing.checkpoints.staging import check_target, place_apart
    from editing.evaluation.questions import questions_by_language
    from editing.pipeline.lock import language_lock, locked_layers
    from editing.pipeline.lock_measures import lock_figures
    from editing.plans.plan import ModuleEdit
    from neurons.errors import UsageError
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model

    questions = questions_by_language(recipe.questions or shipped(QUESTIONS))
    lock = recipe.lock(questions)
    dtype = own_dtype(recipe.model, recipe.device, recipe.dtype)
    if dry_run:
        from cli.dry_run import dry_run as show
        from editing.pipeline.needs import lock_needs
        from neurons.models.source import plan_model

        judge_model = None
        if recipe.judge is not None:
            judge_model = plan_model(recipe.judge, recipe.device, own_dtype(recipe.judge, recipe.device))
        show(
            screen,
            replace(recipe, dtype=dtype),
            lambda planned: lock_needs(planned, questions, recipe.fitted(lock, planned)),
            judge_model,
        )
        return
    out = out or Path(f"{Path(recipe.model).resolve().name}-{lock.target or 'stay'}")
    check_target(out, overwrite)
    directories = [out]
    if lora is not None:
        if lora.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(lora.resolve()):
            raise UsageError(f"--lora {lora} and --out {out} overlap: name another directory for the adapter")
        check_target(lora, overwrite, CONFIG)
        directories.append(lora)
    if Path(recipe.model).is_dir():
        for directory in directories:
            place_apart(Path(recipe.model), directory)
    require_models(recipe.judge)
    loaded = announced(screen, load_model(recipe.model, recipe.device, dtype))
    require_unedited(loaded)
    recipe.require_model(loaded)
    lock = recipe.fitted(lock, loaded)
    if lora is not None:
        for layer in locked_layers(loaded.anatomy):
            adapted(loaded.anatomy, ModuleEdit(layer, "mlp", ()))
    judge = None if recipe.judge is None else _judge(screen, recipe.judge, recipe.device)
    locked = language_lock(loaded, questions, lock, seed=recipe.seed, stage=screen.progress)
    figures = lock_figures(loaded, questions, lock, locked.plan, judge=judge, stage=screen.progress)
    measured = figures.as_json()
    if judge is not None:
        measured["judge"] = {"model": judge.judge.label, "fingerprint": judge.judge.fingerprint}
    plan = replace(locked.plan, metadata={**locked.plan.metadata, "measured": measured})
    text = recipe.resolved(loaded, questions, lock).to_toml()
    written = _written(screen, loaded, plan, text, out, lora, overwrite)
    _show(screen, lock, locked, figures)
    if plan.metadata.get("thinks") is False:
        screen.say(
            "\nThe model can think before it answers. Answers without thoughts are steered and measured, thoughts are not "
            "(--thoughts)."
        )
    seconds = time.monotonic() - start
    screen.say(
        f"\nRepeat it: broca run {written['recipe']} --out DIR\nFigures on a page: {written['report']}"
    )
    screen.say(f"\nDone in {seconds / 60:.1f} minutes. Serve it: vllm serve {out}")
    screen.result(
        out=out,
        lock={"sources": list(lock.sources), "target": lock.target, "keep": list(lock.keep)},
        obeyed=dict(locked.obeyed),
        held_out=list(locked.held_out),
        key_deviations={str(layer): list(pair) for layer, pair in locked.deviations.items()},
        seconds=seconds,
        measured=measured,
        **written,
    )


def _judge(screen: Screen, name: str, device: str) -> JudgeScorer:
    """The judge, after a trial: a model that cannot judge is refused before the work."""
    from editing.evaluation.asking import CHAT, Prompt
    from editing.evaluation.generation import Continuation
    from editing.evaluation.relevance import JudgeScorer
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model

    judge = JudgeScorer(announced(screen, load_model(name, device, own_dtype(name, device))))
    judge([Prompt("How much is one and one?", CHAT)], [Continuation((), "Two.")])
    return judge


def _written(
    screen: Screen,
    source: ModelSource,
    plan: Plan,
    recipe: str,
    out: Path,
    lora: Path | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the checkpoint with its recipe and report, and the adapter; their part of the result."""
    from editing.checkpoints.adapter import export_adapter
    from editing.checkpoints.export import export
    from editing.checkpoints.model_card import RECIPE_IN_CHECKPOINT
    from editing.report.findings import read_findings
    from editing.report.study import study_page
    from neurons.files.artifact import write_atomically

    with screen.copying("Writing") as progress:
        exported = export(source, plan, out, overwrite, progress, recipe=recipe)
    for warning in exported.warnings:
        screen.warn(warning)
    recipe_path = out / RECIPE_IN_CHECKPOINT
    report = recipe_path.with_name("report.html")
    write_atomically(report, study_page(read_findings(recipe_path.parent)))
    result: dict[str, Any] = {
        "tensors": len(exported.tensors),
        "relative_change": exported.relative_change,
        "recipe": recipe_path,
        "report": report,
    }
    if lora is not None:
        export_adapter(source, plan, lora, overwrite)
        result["lora"] = lora
    return result


def _show(screen: Screen, lock: Lock, locked: Locked, figures: LockFigures) -> None:
    """Print the figures of the training, both tables and some answers."""
    in_language = "the language of the question" if lock.target is None else lock.target
    fractions = ", ".join(f"{source} {obeyed:.0%}" for source, obeyed in locked.obeyed.items())
    screen.say(f"as the teacher, the model answers in {in_language} to questions in: {fractions}")
    if locked.thoughts is False:
        screen.say(
            f"as the teacher, the model thinks in {in_language} too rarely: its thoughts stay as they are"
        )
    solved, others = (
        sum(pair[i] for pair in locked.deviations.values()) / len(locked.deviations) for i in (0, 1)
    )
    screen.say(
        f"keys of {len(locked.deviations)} layers: standard deviation {solved:.2f} on the text they were solved on, "
        f"{others:.2f} on other questions; divergence from the teacher on other questions: {locked.held_out[0]:.2f} nats a "
        f"token before training, {min(locked.held_out):.2f} after"
    )
    _tables(screen, lock, "Answers", figures)
    if figures.thoughts is not None:
        _tables(screen, lock, "Thoughts", figures.thoughts)
    for example in figures.examples[:SHOWN_EXAMPLES]:
        screen.say(
            f"\n? {example.question}\n  before: {one_line(example.before)}\n  after:  {one_line(example.after)}"
        )


def _tables(screen: Screen, lock: Lock, what: str, figures: LockFigures | ThoughtFigures) -> None:
    """Print the figures of answers, or of thoughts, to questions in source and in kept languages."""
    if lock.target is None:
        language_of, kept = "the question's language, after planted drift", "The same questions without drift"
    else:
        language_of, kept = lock.target, "Questions in kept languages"
    judged = any(of_source.relevance for of_source in figures.sources.values())
    screen.table(
        f"{what} in {language_of}, on held-out questions",
        [
            "questions in",
            "model",
            what.lower(),
            "whole text",
            "every line",
            "first words",
            "chrF",
            "KL to prompted",
            *(["relevance (judge)"] if judged else []),
        ],
        [
            [
                source,
                model,
                language.answers,
                language.whole,
                language.lines,
                language.begins,
                of_source.chrf[model],
                of_source.divergence[model],
                *([of_source.relevance[model]] if judged else []),
            ]
            for source, of_source in figures.sources.items()
            for model, language in of_source.language.items()
        ],
        words=2,
    )
    if figures.kept:
        screen.table(
            f"{kept}: {what.lower()} in the question's own language",
            ["questions in", what.lower(), "base", "steered", "KL to base"],
            [
                [
                    language,
                    of_kept.base.answers,
                    of_kept.base.whole,
                    of_kept.steered.whole,
                    of_kept.divergence,
                ]
                for language, of_kept in figures.kept.items()
            ],
        )
