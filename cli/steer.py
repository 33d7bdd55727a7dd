"""``broca steer``: edits an instruct model so that it answers in one language, and writes the checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.loading import announced
from cli.options import (
    IN_PATH,
    LANGUAGE,
    OUT_DIRECTORY,
    CommaSeparated,
    dry_run_option,
    json_option,
    model_argument,
    served_device_options,
)
from cli.screen import Screen
from cli.shipped import QUESTIONS, shipped

if TYPE_CHECKING:
    from editing.pipeline.lock import Locked
    from editing.pipeline.lock_kinds import Lock
    from editing.pipeline.lock_measures import LockFigures
    from editing.plans.plan import Plan
    from neurons.models.source import ModelSource

ALL = "all"
DEFAULT_SOURCE = "en"
SHOWN_EXAMPLES = 6


@click.command("steer")
@model_argument
@click.option("--to", "target", type=LANGUAGE, help="Language of the answers.")
@click.option(
    "--stay",
    is_flag=True,
    help="In place of --to: answer in the language of the question, whatever language the conversation had before.",
)
@click.option(
    "--from",
    "source",
    type=LANGUAGE,
    help="Language of the questions that are answered in it; all: questions in every language.  [default: en]",
)
@click.option(
    "--instruction",
    help="An instruction that the model learns to follow without it, such as 'Answer formally, in German.'  [default: to "
    "answer in the language]",
)
@click.option(
    "--teacher",
    type=click.Choice(("instruction", "question")),
    default="instruction",
    show_default=True,
    help="What makes the unedited model answer in the language: an instruction after the question, or, for a model that "
    "does not obey instructions, the same question in the target language.",
)
@click.option(
    "--keep",
    type=CommaSeparated(),
    help="Languages whose questions are answered as before.  [default: ar, de, en, es, fr, it, ja, pt, ru, zh]",
)
@click.option(
    "--questions",
    type=IN_PATH,
    help="Questions, the same in every language: a directory of <language>.jsonl with question_id and text.  "
    "[default: Broca's questions, 64 in 25 languages]",
)
@click.option("--lora", type=OUT_DIRECTORY, help="Directory for an adapter for PEFT and vLLM, too.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the examples.")
@served_device_options
@dry_run_option
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option(
    "--out",
    type=OUT_DIRECTORY,
    help="Directory for the checkpoint.  [default: <MODEL>-<TO>, or <MODEL>-stay]",
)
@json_option
def command(**options: Any) -> None:
    """Make MODEL (an instruct model: hub id or directory) answer in a language, and write the checkpoint.

    It needs no data.  The model answers questions from Broca, with and without an instruction to answer in
    the language, and learns to answer as if it had the instruction.  Questions in other languages are
    answered as before.

    \b
    Example:
      broca steer Qwen/Qwen2.5-0.5B-Instruct --to fr --out steered
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    start = time.monotonic()
    from editing.checkpoints.adapter import check_adapter_place
    from editing.checkpoints.export import require_unedited
    from editing.checkpoints.staging import check_target, place_apart
    from editing.evaluation.questions import read_questions
    from editing.pipeline.lock import language_lock
    from editing.pipeline.lock_kinds import lock_of
    from editing.pipeline.lock_measures import lock_figures
    from neurons.errors import UsageError
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model
    from neurons.text.conversations import OPTIONAL, thinking
    from neurons.text.corpus_files import language_label

    questions = read_questions(arguments.questions or shipped(QUESTIONS))
    keep = None if arguments.keep is None else tuple(map(language_label, arguments.keep))
    if (arguments.target is None) != arguments.stay:
        raise UsageError("give either --to, the language of the answers, or --stay")
    source = arguments.source or (ALL if arguments.stay else DEFAULT_SOURCE)
    lock = lock_of(
        questions,
        arguments.target,
        None if source == ALL else source,
        keep,
        instruction=arguments.instruction,
        teacher=arguments.teacher,
    )
    dtype = own_dtype(arguments.model, arguments.device) if arguments.dtype == "auto" else arguments.dtype
    if arguments.dry_run:
        from cli.dry_run import dry_run
        from editing.pipeline.needs import lock_needs

        dry_run(
            screen,
            arguments.model,
            arguments.device,
            dtype,
            lambda planned: lock_needs(planned, questions, lock),
        )
        return
    out = arguments.out or Path(f"{Path(arguments.model).resolve().name}-{arguments.target or 'stay'}")
    check_target(out, arguments.overwrite)
    directories = [out]
    if arguments.lora is not None:
        if arguments.lora.resolve() == out.resolve():
            raise UsageError(f"{out} is both --out and --lora: name another directory for the adapter")
        check_adapter_place(arguments.lora, arguments.overwrite)
        directories.append(arguments.lora)
    if Path(arguments.model).is_dir():
        for directory in directories:
            place_apart(Path(arguments.model), directory)
    loaded = announced(screen, load_model(arguments.model, arguments.device, dtype))
    require_unedited(loaded)
    locked = language_lock(loaded, questions, lock, seed=arguments.seed, stage=screen.progress)
    figures = lock_figures(loaded, questions, lock, locked.plan, stage=screen.progress)
    plan = replace(locked.plan, metadata={**locked.plan.metadata, "measured": figures.as_json()})
    written = _written(screen, arguments, loaded, out, plan)
    _show(screen, lock, locked, figures)
    if thinking(loaded.tokenizer) == OPTIONAL:
        screen.say(
            "\nThe model can think before it answers. Answers without thoughts are steered and measured, thoughts are not."
        )
    seconds = time.monotonic() - start
    screen.say(f"\nDone in {seconds / 60:.1f} minutes. Serve it: vllm serve {out}")
    screen.result(
        {
            "out": out,
            "lock": {"sources": list(lock.sources), "target": lock.target, "keep": list(lock.keep)},
            "obeyed": dict(locked.obeyed),
            "held_out": list(locked.held_out),
            "key_deviations": {str(layer): list(pair) for layer, pair in locked.deviations.items()},
            "seconds": seconds,
            "measured": figures.as_json(),
            **written,
        },
        out,
    )


def _written(
    screen: Screen, arguments: SimpleNamespace, source: ModelSource, out: Path, plan: Plan
) -> dict[str, Any]:
    """Write the checkpoint, and the adapter with --lora; their part of the result."""
    from editing.checkpoints.adapter import export_adapter
    from editing.checkpoints.export import export

    with screen.copying("Writing") as progress:
        exported = export(source, plan, out, arguments.overwrite, progress)
    result: dict[str, Any] = {"tensors": len(exported.tensors), "relative_change": exported.relative_change}
    if arguments.lora is not None:
        export_adapter(source, plan, arguments.lora, arguments.overwrite)
        result["lora"] = arguments.lora
    return result


def _show(screen: Screen, lock: Lock, locked: Locked, figures: LockFigures) -> None:
    """Print the figures of the training, both tables and some answers."""
    for source, obeyed in locked.obeyed.items():
        screen.say(
            f"as the teacher, the model answers {obeyed:.0%} of the questions in {source} in {lock.target_of(source)}"
        )
    solved, others = (
        sum(pair[i] for pair in locked.deviations.values()) / len(locked.deviations) for i in (0, 1)
    )
    screen.say(
        f"keys of {len(locked.deviations)} layers: standard deviation {solved:.2f} on the text they were solved on, "
        f"{others:.2f} on other questions; divergence from the teacher on other questions: {locked.held_out[0]:.2f} nats a "
        f"token before training, {min(locked.held_out):.2f} after"
    )
    if lock.target is None:
        answers, kept = "the question's language, after planted drift", "The same questions without drift"
    else:
        answers, kept = lock.target, "Questions in kept languages"
    screen.table(
        f"Answers in {answers}, on held-out questions",
        [
            "questions in",
            "model",
            "answers",
            "whole text",
            "every line",
            "first words",
            "chrF",
            "KL to prompted",
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
            ]
            for source, of_source in figures.sources.items()
            for model, language in of_source.language.items()
        ],
        words=2,
    )
    if figures.kept:
        screen.table(
            f"{kept}: answers in the question's own language",
            ["questions in", "answers", "base", "steered", "KL to base"],
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
    for example in figures.examples[:SHOWN_EXAMPLES]:
        screen.say(
            f"\n? {example.question}\n  before: {_line(example.before)}\n  after:  {_line(example.after)}"
        )


def _line(text: str) -> str:
    return " ".join(text.split())
