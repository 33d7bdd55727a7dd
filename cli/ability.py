"""``broca ability``: what a model can do, and what of it is left after an edit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.command_line import command_line, loaded_as
from cli.loading import announced, require_models
from cli.screen import Screen
from cli.shipped import CHOICES, CODE_REQUESTS, QUESTIONS, shipped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from editing.evaluation.ability import Ability, Rate, Tasks
    from neurons.statistics.proportions import Interval


@click.command("ability")
@opt.model
@click.option("--edit", "edit_path", type=opt.IN_FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint of the same architecture: hub id or directory.")
@click.option(
    "--languages", type=opt.CommaSeparated(), help="Languages of the questions, as en,fr.  [default: all]"
)
@click.option(
    "--instruction",
    help="Also measure the unedited model with this instruction after every question.  [default: the instructions that "
    "a plan of `broca steer` was taught, in its own languages]",
)
@opt.served_device
@click.option("--out", type=opt.OUT_FILE, help="File for the figures (.json).")
@opt.json
def command(**options: Any) -> None:
    """Measure what MODEL (an instruct model: hub id or directory) can do, and what is left of it after an edit.

    It needs no data: 200 multiple-choice items and 12 requests for code in ten languages, and the model's own
    answers to everyday questions.

    \b
    Example:
      broca ability Qwen/Qwen2.5-0.5B-Instruct --edit steered/broca/edit.safetensors --languages en,fr
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    from editing.checkpoints.weight_exchange import Exchange
    from editing.evaluation.ability import ability
    from editing.pipeline.lock_prompts import require_chat
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from editing.study.provenance import file_read, model_read, processor
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, package_versions, write_atomically
    from neurons.files.json_file import document
    from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model

    if arguments.edit_path is not None and arguments.against is not None:
        raise UsageError("--edit and --against exclude each other: give one")
    if arguments.instruction is not None and not arguments.instruction.strip():
        raise UsageError("the instruction is empty: leave --instruction out")
    tasks, languages = _tasks(arguments.languages)
    plan = None if arguments.edit_path is None else load_plan(arguments.edit_path)
    require_models(arguments.against)
    dtype = own_dtype(arguments.model, arguments.device, arguments.dtype)
    loaded = announced(screen, load_model(arguments.model, arguments.device, dtype))
    if plan is not None:
        loaded.require_fingerprint(plan.metadata, arguments.edit_path)
    require_chat(loaded.name, loaded.tokenizer)
    # Stays on disk; its tensors that differ are exchanged in the model in memory.
    other = None if arguments.against is None else load_model(arguments.against, dtype=dtype, max_memory=0)
    exchange = None if other is None else Exchange(loaded, other)
    if other is not None and (other.checkpoint / PLAN_IN_CHECKPOINT).is_file():
        plan_metadata = load_plan(other.checkpoint / PLAN_IN_CHECKPOINT).metadata
    else:
        plan_metadata = {} if plan is None else plan.metadata
    instructions, answers_in = _meant(plan_metadata, languages)
    if arguments.instruction is not None:
        instructions = dict.fromkeys(languages, arguments.instruction)
    # Choices in the language of the question are right for labels such as registers.
    answers_in = {
        language: to for language, to in answers_in.items() if to in tasks.choices or to in tasks.questions
    }
    for language, to in answers_in.items():
        if to not in tasks.choices:
            screen.warn(
                f"questions in {language!r} are to be answered in {to!r}, in which there are no choices: their multiple "
                "choice is that of the unedited model alone"
            )
    steering = exchange if plan is None else partial(applied, loaded, plan)
    count = tasks.items(languages) * (1 if steering is None else 2) + tasks.items(instructions)
    with screen.progress("Measuring", count, "items") as advance:
        result = ability(
            loaded,
            tasks,
            languages,
            steering=steering,
            instructions=instructions,
            answers_in=answers_in,
            progress=advance,
        )
    folders = [shipped(name) for name in (CHOICES, CODE_REQUESTS, QUESTIONS)]
    inputs = [file_read("Broca's", folder) for folder in folders]
    inputs += [] if plan is None else [file_read("--edit", arguments.edit_path)]
    inputs += [] if other is None else [model_read("--against", other)]
    about = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "edit": arguments.edit_path,
        "against": arguments.against,
        "inputs": inputs,
        "packages": package_versions(),
        "processor": processor(loaded.device),
        "command": command_line(languages=languages, **loaded_as(loaded, other)),
        "settings": {
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "instructions": instructions,
            "answers_in": answers_in,
        },
    }
    result = replace(result, about=about)
    if arguments.out is not None:
        write_atomically(arguments.out, json_bytes(document(result)))
    _show(screen, result)
    screen.result(out=arguments.out, **document(result))


def _tasks(languages: tuple[str, ...] | None) -> tuple[Tasks, tuple[str, ...]]:
    """What Broca asks, and the languages of the questions: the given ones, or all."""
    from editing.evaluation.ability import Tasks
    from editing.evaluation.choices import read_choices
    from editing.evaluation.questions import questions_of_part, read_questions
    from neurons.errors import UsageError
    from neurons.text.corpus_files import language_label

    choices = read_choices(shipped(CHOICES))
    code = read_questions(shipped(CODE_REQUESTS)).of
    questions = {
        language: questions_of_part(of_language, "report")
        for language, of_language in read_questions(shipped(QUESTIONS)).of.items()
    }
    chosen = tuple(choices) if languages is None else tuple(dict.fromkeys(map(language_label, languages)))
    if missing := [language for language in chosen if language not in choices]:
        raise UsageError(f"there are no choices in {missing[0]!r}: choose from {', '.join(choices)}")
    return Tasks(choices, code, questions), chosen


def _meant(metadata: Mapping[str, Any], languages: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """What a plan of `broca steer` was taught: language of the questions -> instruction, and language of the answers."""
    if metadata.get("method") != "steer":
        return {}, {}
    settings, target = metadata["settings"], metadata["target"]
    sources = [language for language in languages if language in settings["sources"]]
    # A lock whose teacher was asked in the target has no instructions.
    taught = settings["instructions"]
    instructions = {language: taught[language] for language in sources if language in taught}
    return instructions, {} if target is None else dict.fromkeys(sources, target)


def _show(screen: Screen, result: Ability) -> None:
    for title, kind in (
        ("Multiple choice: right items", result.accuracy),
        ("Requests for code: answers with a fenced block", result.blocks),
        ("Requests for code: answers whose block is Python", result.python),
    ):
        screen.table(
            f"{title} (95 % intervals)",
            ["questions in", "model", "items", "fraction", "interval", "change", "interval"],
            [
                [language, model, rate.items, rate.rate.value, *_intervals(rate)]
                for language, of_model in kind.items()
                for model, rate in of_model.items()
            ],
            words=2,
        )
    screen.table(
        "The unedited model's own answers: nats a token",
        ["questions in", "tokens", "base", "edited", "KL to base"],
        [
            [language, answers.tokens, answers.base, answers.edited, answers.divergence]
            for language, answers in result.own_answers.items()
        ],
    )


def _intervals(rate: Rate) -> list[Any]:
    change = rate.change
    return [_shown(rate.rate), *((None, None) if change is None else (change.value, _shown(change)))]


def _shown(interval: Interval) -> str:
    return f"{interval.low:.2f} to {interval.high:.2f}"
