"""``broca steer``: an instruct model in, a checkpoint that answers in one language out."""

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

if TYPE_CHECKING:
    from editing.pipeline.lock import Locked
    from editing.pipeline.lock_kinds import Lock
    from editing.pipeline.lock_measures import LockFigures
    from editing.plans.plan import Plan
    from neurons.models.source import ModelSource

ALL = "all"
DEFAULT_SOURCE = "en"
SHOWN = 6  # questions side by side


def shipped_questions() -> Path:
    """Broca's own questions: in an installed wheel beside this file, in a checkout under artifacts/.

    Raises:
        BrocaError: neither is there.
    """
    from neurons.errors import BrocaError

    here = Path(__file__).resolve().parent
    for place in (here / "questions", here.parent / "artifacts" / "questions"):
        if place.is_dir():
            return place
    raise BrocaError("the questions are missing from this installation: install broca again")


@click.command("steer")
@model_argument
@click.option("--to", "target", type=LANGUAGE, help="Language of the answers.")
@click.option(
    "--stay",
    is_flag=True,
    help="In place of --to: answers stay in the language of the question, whatever the conversation holds before it.",
)
@click.option(
    "--from",
    "source",
    type=LANGUAGE,
    help="Language of the questions that are to be answered in it; all: of every question.  [default: en]",
)
@click.option(
    "--instruction",
    help="What the model learns to do without being told, as 'Answer formally, in German.'  [default: to answer in the "
    "language]",
)
@click.option(
    "--teacher",
    type=click.Choice(("instruction", "question")),
    default="instruction",
    show_default=True,
    help="What brings the unedited model to answer so: an instruction behind the question, or the same question in the "
    "target language, for a model that does not obey.",
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
    "[default: Broca's own, 64 in 25 languages]",
)
@click.option("--lora", type=OUT_DIRECTORY, help="Write an adapter for PEFT and vLLM here, too.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the examples.")
@served_device_options
@dry_run_option
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@click.option(
    "--out",
    type=OUT_DIRECTORY,
    help="Directory for the checkpoint.  [default: <MODEL>-<TO>, or <MODEL>-stay]",
)
@json_option
def command(**options: Any) -> None:
    """Make MODEL (an instruct model: hub id or directory) answer in a language, and write the checkpoint.

    It needs no data: the model answers questions that Broca brings, once as they are and once with the
    instruction to answer in the language, and learns to do without the instruction.  Questions in other
    languages are answered as before.

    \b
    Example:
      broca steer Qwen/Qwen2.5-0.5B-Instruct --to fr --out steered
    """
    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    begin = time.monotonic()
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
    from neurons.text.corpus_files import language_label

    questions = read_questions(asked.questions or shipped_questions())
    keep = None if asked.keep is None else tuple(map(language_label, asked.keep))
    if (asked.target is None) != asked.stay:
        raise UsageError("give either --to, the language of the answers, or --stay")
    source = asked.source or (ALL if asked.stay else DEFAULT_SOURCE)
    lock = lock_of(
        questions,
        asked.target,
        None if source == ALL else source,
        keep,
        instruction=asked.instruction,
        teacher=asked.teacher,
    )
    dtype = own_dtype(asked.model, asked.device) if asked.dtype == "auto" else asked.dtype
    if asked.dry_run:
        from cli.dry_run import dry_run
        from editing.pipeline.needs import lock_needs

        dry_run(
            screen, asked.model, asked.device, dtype, lambda planned: lock_needs(planned, questions, lock)
        )
        return
    out = asked.out or Path(f"{Path(asked.model).resolve().name}-{asked.target or 'stay'}")
    check_target(out, asked.overwrite)
    places = [out]
    if asked.lora is not None:
        if asked.lora.resolve() == out.resolve():
            raise UsageError(f"{out} is both --out and --lora: name another directory for the adapter")
        check_adapter_place(asked.lora, asked.overwrite)
        places.append(asked.lora)
    if Path(asked.model).is_dir():
        for place in places:
            place_apart(Path(asked.model), place)
    loaded = announced(screen, load_model(asked.model, asked.device, dtype))
    require_unedited(loaded)
    made = language_lock(loaded, questions, lock, seed=asked.seed, stage=screen.progress)
    figures = lock_figures(loaded, questions, lock, made.plan, stage=screen.progress)
    plan = replace(made.plan, metadata={**made.plan.metadata, "measured": figures.as_json()})
    written = _written(screen, asked, loaded, out, plan)
    _show(screen, lock, made, figures)
    seconds = time.monotonic() - begin
    screen.say(f"\nDone in {seconds / 60:.1f} minutes. Serve it: vllm serve {out}")
    screen.result(
        {
            "out": out,
            "lock": {"sources": list(lock.sources), "target": lock.target, "keep": list(lock.keep)},
            "obeyed": dict(made.obeyed),
            "held_out": list(made.held_out),
            "key_deviations": {str(layer): list(both) for layer, both in made.deviations.items()},
            "seconds": seconds,
            "measured": figures.as_json(),
            **written,
        },
        out,
    )


def _written(
    screen: Screen, asked: SimpleNamespace, source: ModelSource, out: Path, plan: Plan
) -> dict[str, Any]:
    """The checkpoint, and the adapter where one is wanted."""
    from editing.checkpoints.adapter import export_adapter
    from editing.checkpoints.export import export

    with screen.copying("Writing") as tell:
        found = export(source, plan, out, asked.overwrite, tell)
    result: dict[str, Any] = {"tensors": len(found.tensors), "relative_change": found.relative_change}
    if asked.lora is not None:
        export_adapter(source, plan, asked.lora, asked.overwrite)
        result["lora"] = asked.lora
    return result


def _show(screen: Screen, lock: Lock, made: Locked, figures: LockFigures) -> None:
    """What a person sees: what was learned, both tables and some answers."""
    for source, obeyed in made.obeyed.items():
        screen.say(
            f"as the teacher, the model answers {obeyed:.0%} of the questions in {source} in {lock.target_of(source)}"
        )
    on, off = (sum(both[i] for both in made.deviations.values()) / len(made.deviations) for i in (0, 1))
    screen.say(
        f"keys of {len(made.deviations)} layers: standard deviation {on:.2f} on the text they were solved on, {off:.2f} on "
        f"other questions; learning: {made.held_out[0]:.2f} to {min(made.held_out):.2f} nats a token on other questions"
    )
    if lock.target is None:
        answers, kept = "the question's language, behind planted drift", "The same questions alone"
    else:
        answers, kept = lock.target, "Questions in languages that are kept"
    screen.table(
        f"Answers in {answers}, on questions that nothing was made or chosen on",
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
                one.language[model].answers,
                one.language[model].whole,
                one.language[model].lines,
                one.language[model].begins,
                one.chrf[model],
                one.divergence[model],
            ]
            for source, one in figures.sources.items()
            for model in one.language
        ],
        words=2,
    )
    screen.table(
        f"{kept}: answers in the question's own language",
        ["questions in", "answers", "base", "steered", "KL to base"],
        [
            [language, one.base.answers, one.base.whole, one.steered.whole, one.divergence]
            for language, one in figures.kept.items()
        ],
    )
    for one in figures.examples[:SHOWN]:
        screen.say(f"\n? {one.question}\n  before: {_line(one.before)}\n  after:  {_line(one.after)}")


def _line(text: str) -> str:
    return " ".join(text.split())
