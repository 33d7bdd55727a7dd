"""``broca ask``: a model's answers to questions in many languages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.loading import announced
from cli.screen import Screen, one_line
from cli.shipped import QUESTIONS, shipped

if TYPE_CHECKING:
    from editing.evaluation.ask import Write
    from neurons.models.source import ModelSource

MAX_SHOWN = 60  # characters of an answer


@click.command("ask")
@opt.model
@click.option(
    "--questions",
    type=opt.IN_PATH,
    help="A file or directory with question_id and text.  [default: Broca's questions, 64 in 25 languages]",
)
@click.option("--languages", type=opt.CommaSeparated(), help="Languages of the questions.  [default: all]")
@opt.engine
@opt.writing(200)
@opt.seed("Seed of the sampling.")
@opt.served_device
@click.option("--out", type=opt.OUT_FILE, required=True, help="File for the conversations (.jsonl).")
@opt.json
def command(**options: Any) -> None:
    """Let MODEL (an instruct model: hub id or directory) answer questions, and write a row for each.

    The file is a corpus of conversations: other commands read it with --corpus.

    Questions with an answer in the file are skipped, so a stopped run continues where it stopped.

    \b
    Example:
      broca ask Qwen/Qwen2.5-0.5B-Instruct --languages en,fr --out answers.jsonl
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    from editing.evaluation.ask import ask, read_answers, settings_digest
    from editing.evaluation.asking import chat_tokens
    from editing.evaluation.questions import questions_by_language
    from neurons.errors import UsageError
    from neurons.files.locked import locked
    from neurons.models.own_dtype import own_dtype
    from neurons.text.conversations import ANOTHER_MODEL
    from neurons.text.corpus_files import language_label

    if arguments.out.suffix != ".jsonl":
        raise UsageError(
            f"{arguments.out}: answers are written as .jsonl: choose a file name with this suffix"
        )
    if arguments.engine == "vllm" and arguments.device != "auto":
        raise UsageError("vLLM runs on the device that it was built for: leave --device out")
    questions = questions_by_language(arguments.questions or shipped(QUESTIONS)).of
    languages = (
        tuple(questions) if arguments.languages is None else tuple(map(language_label, arguments.languages))
    )
    if missing := [language for language in languages if language not in questions]:
        raise UsageError(
            f"there are no questions in {missing[0]!r}: choose from {', '.join(questions)}, or give others with --questions"
        )
    chosen = {language: questions[language] for language in languages}
    # Refuses another file before a model is loaded.
    read_answers(arguments.out)
    dtype = own_dtype(arguments.model, arguments.device, arguments.dtype)
    settings = {name: options[name] for name in ("new_tokens", "temperature", "seed")}
    count = sum(map(len, chosen.values()))
    # The file itself is replaced after every batch.
    lock = arguments.out.with_name(f".{arguments.out.name}.lock")
    with (
        locked(lock, f"{arguments.out}: another `broca ask` is writing this file"),
        _engine(screen, arguments, dtype) as (tokenizer, source, write),
    ):
        how = {**settings, "engine": arguments.engine, "dtype": dtype, "files": source.files_digest}
        of = settings_digest(source.fingerprint, how)
        prompt = partial(chat_tokens, tokenizer, remedy=ANOTHER_MODEL)
        with screen.progress("Asking", count, "questions") as advance:
            rows = ask(partial(write, **settings), prompt, chosen, arguments.out, of, advance)
    screen.table(
        f"{count} answers",
        ["language", "question", "answer"],
        [
            [row["language"], *(_short(message["content"]) for message in row["messages"])]
            for row in {row["language"]: row for row in reversed(rows)}.values()
        ],
        words=3,
    )
    screen.result(out=arguments.out, answers=count, languages=list(chosen), of=of)


@contextmanager
def _engine(
    screen: Screen, arguments: SimpleNamespace, dtype: str
) -> Iterator[tuple[Any, ModelSource, Write]]:
    """Context with the tokenizer, the model and the writer, which is started once for all questions."""
    from editing.pipeline.lock_prompts import require_chat

    if arguments.engine == "vllm":
        from editing.evaluation.vllm_generation import VllmWriter, require_vllm
        from neurons.models.source import locate, open_model
        from neurons.models.tokenizer import load_tokenizer

        require_vllm()
        source = open_model(arguments.model)
        tokenizer = load_tokenizer(locate(arguments.model))
        require_chat(arguments.model, tokenizer)
        with VllmWriter(arguments.model, tokenizer, dtype) as write:
            yield tokenizer, source, write
        return
    from editing.evaluation.generation import generate
    from neurons.models.source import load_model

    loaded = announced(screen, load_model(arguments.model, arguments.device, dtype))
    require_chat(loaded.name, loaded.tokenizer)
    yield loaded.tokenizer, loaded, partial(generate, loaded)


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 1] + "…"
