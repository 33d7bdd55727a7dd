"""A language lock in conversations unlike those of its training: second turns, system messages, long answers.

Fractions of the steered model's answers that are in the target, compared with those of the unedited model with the
instruction ("prompted"), on the REPORT questions:

    first turn      as in training
    second turn     after another question and its answer
    system 1 to 4   after a system message
    long            answers of up to --long tokens
    long, end       their last ``LAST_WORDS`` words

and the chrF of two sampled answers of the prompted model to each question, with which that of the steered model to the
prompted one compares.

    python benchmarks/lock.py MODEL --edit steered/broca/edit.safetensors --dtype bfloat16

With ``--questions DIR --every``, on all of the questions in another directory (the first ``--most``).  With ``--languages``,
only first turns, with questions in these languages instead, which a lock from every language need not have seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from cli.shipped import QUESTIONS, shipped
from editing.evaluation.answer_language import answer_language
from editing.evaluation.generation import generate
from editing.evaluation.questions import questions_of_part, read_questions
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_measures import mean_chrf
from editing.pipeline.lock_prompts import REPORT
from editing.pipeline.lock_text import ANSWER_TOKENS
from editing.plans.applied import applied
from editing.plans.plan import load_plan
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model
from neurons.text.conversations import Message, role_tokens

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a patient teacher. Explain everything as to a ten-year-old child.",
    "You are the support assistant of an online shop. Be brief and polite.",
    "Today is Monday. The user is an experienced engineer and dislikes small talk.",
)
LAST_WORDS = 20
TEMPERATURE = 0.7


def answers(
    loaded: LoadedModel,
    chats: Sequence[Sequence[Message]],
    tokens: int,
    temperature: float = 0,
    seed: int = 0,
) -> list[str]:
    prompts = [
        role_tokens(loaded.tokenizer, chat, answer_follows=True, thinks=False).ids.tolist() for chat in chats
    ]
    return [answer.text for answer in generate(loaded, prompts, tokens, temperature, seed)]


def fractions(texts: Sequence[str], target: str, source: str, languages: Sequence[str]) -> list[float]:
    """Of answers, the fractions in the target: whole text, every line, first words."""
    result = answer_language(texts, target, languages, source)
    return [result.whole, result.lines, float(result.begins or 0)]


def measured(
    loaded: LoadedModel,
    texts: Sequence[str],
    target: str,
    source: str,
    languages: Sequence[str],
    long: int,
) -> dict[str, list[float]]:
    """Situation -> fractions of answers in the target: whole text, every line, first words."""

    def of_target(texts: Sequence[str]) -> list[float]:
        return fractions(texts, target, source, languages)

    first = answers(loaded, [[Message("user", text)] for text in texts], ANSWER_TOKENS)
    result = {"first turn": of_target(first)}
    before = [
        [Message("user", text), Message("assistant", answer or "-")]
        for text, answer in zip(texts, first, strict=True)
    ]
    # Each question follows another one.
    second = [[*before[i - 1], Message("user", text)] for i, text in enumerate(texts)]
    result["second turn"] = of_target(answers(loaded, second, ANSWER_TOKENS))
    for number, system in enumerate(SYSTEMS, start=1):
        chats = [[Message("system", system), Message("user", text)] for text in texts]
        result[f"system {number}"] = of_target(answers(loaded, chats, ANSWER_TOKENS))
    whole = answers(loaded, [[Message("user", text)] for text in texts], long)
    result["long"] = of_target(whole)
    result["long, end"] = of_target([" ".join(text.split()[-LAST_WORDS:]) for text in whole])
    return result


def sampled_chrf(loaded: LoadedModel, texts: Sequence[str]) -> float:
    """Mean chrF of two sampled answers to each question."""
    chats = [[Message("user", text)] for text in texts]
    first, second = (answers(loaded, chats, ANSWER_TOKENS, TEMPERATURE, seed) for seed in (0, 1))
    return mean_chrf(first, second)


@click.command()
@click.argument("model")
@click.option("--edit", type=click.Path(path_type=Path), required=True)
@click.option("--questions", type=click.Path(path_type=Path), help="[default: Broca's questions]")
@click.option("--every", is_flag=True, help="All these questions: no part of them was trained on.")
@click.option("--languages", help="Languages of the questions, separated by commas.")
@click.option("--dtype", default="auto")
@click.option("--long", default=300, show_default=True)
@click.option("--most", type=int, help="Maximum number of questions.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    edit: Path,
    questions: Path | None,
    every: bool,
    languages: str | None,
    dtype: str,
    long: int,
    most: int | None,
    json_path: Path | None,
) -> None:
    """Print a table."""
    keep_freed_memory()
    plan = load_plan(edit)
    target = plan.metadata["target"]
    shipped_questions = read_questions(shipped(QUESTIONS)).of
    by_language = shipped_questions if questions is None else read_questions(questions).of
    loaded = load_model(model, dtype=dtype)
    candidates = tuple(dict.fromkeys([*shipped_questions, *by_language]))
    names = plan.metadata["settings"]["sources"] if languages is None else languages.split(",")
    texts = {
        name: [
            question.text
            for question in (by_language[name] if every else questions_of_part(by_language[name], REPORT))
        ][:most]
        for name in names
    }
    instructed = {
        name: [f"{text} {Lock(target, (name,), ()).instruction_in(name)}" for text in of_language]
        for name, of_language in texts.items()
    }

    def all_measured(questions: dict[str, list[str]]) -> dict[str, list[float]]:
        if languages is None:
            ((source, of_source),) = questions.items()
            return measured(loaded, of_source, target, source, candidates, long)
        return {
            f"questions in {name}": fractions(
                answers(loaded, [[Message("user", text)] for text in of_language], ANSWER_TOKENS),
                target,
                name,
                candidates,
            )
            for name, of_language in questions.items()
        }

    result = {"prompted": all_measured(instructed)}
    with applied(loaded, plan):
        result["steered"] = all_measured(texts)
    print(
        f"{loaded.label}, {', '.join(names)} to {target}, {max(map(len, texts.values()))} questions; whole text / every line "
        "/ first words\n"
    )
    print("| | prompted | steered |\n|---|---|---|")
    for situation in result["steered"]:
        cells = [" / ".join(f"{rate:.2f}" for rate in result[model_name][situation]) for model_name in result]
        print(f"| {situation} | {' | '.join(cells)} |")
    if languages is None:
        ((_, prompted),) = instructed.items()
        print(
            f"\nchrF of two prompted answers at temperature {TEMPERATURE}: {sampled_chrf(loaded, prompted):.2f}"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
