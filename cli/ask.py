"""``broca ask``: a model's own answers to questions in many languages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.loading import announced
from cli.options import (
    IN_PATH,
    OUT_FILE,
    CommaSeparated,
    engine_option,
    json_option,
    model_argument,
    served_device_options,
    writing_options,
)
from cli.screen import Screen
from cli.steer import shipped_questions

if TYPE_CHECKING:
    from editing.evaluation.ask import Write

SHOWN = 60  # characters of an answer


@click.command("ask")
@model_argument
@click.option(
    "--questions",
    type=IN_PATH,
    help="A file or directory with question_id and text.  [default: Broca's own, 64 in 25 languages]",
)
@click.option("--languages", type=CommaSeparated(), help="Which of the questions.  [default: all]")
@engine_option
@writing_options(200)
@click.option("--seed", type=int, default=0, show_default=True)
@served_device_options
@click.option("--out", type=OUT_FILE, required=True, help="File for the conversations (.jsonl).")
@json_option
def command(**options: Any) -> None:
    """Let MODEL (an instruct model: hub id or directory) answer questions; a row a conversation.

    What is in the file already is not asked again: a run that was stopped goes on where it was.

    \b
    Example:
      broca ask Qwen/Qwen2.5-0.5B-Instruct --languages en,fr --out answers.jsonl
    """
    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    from editing.evaluation.ask import ask, read_answers, settings_digest
    from editing.evaluation.asking import chat_tokens
    from editing.evaluation.questions import read_questions
    from neurons.errors import UsageError
    from neurons.models.own_dtype import own_dtype
    from neurons.text.conversations import ANOTHER_MODEL
    from neurons.text.corpus_files import language_label

    if asked.out.suffix != ".jsonl":
        raise UsageError(f"{asked.out}: answers are written as .jsonl: name such a file")
    if asked.engine == "vllm" and asked.device != "auto":
        raise UsageError("vLLM runs on the device that it was built for: leave --device out")
    questions = read_questions(asked.questions or shipped_questions()).of
    wanted = tuple(questions) if asked.languages is None else tuple(map(language_label, asked.languages))
    if missing := [name for name in wanted if name not in questions]:
        raise UsageError(
            f"there are no questions in {missing[0]!r}: there are some in {', '.join(questions)}"
        )
    chosen = {name: questions[name] for name in wanted}
    # Another file is refused before a model is loaded.
    read_answers(asked.out)
    dtype = own_dtype(asked.model, asked.device) if asked.dtype == "auto" else asked.dtype
    settings = {"new_tokens": asked.new_tokens, "temperature": asked.temperature, "seed": asked.seed}
    count = sum(map(len, chosen.values()))
    with _engine(screen, asked, dtype) as (tokenizer, fingerprint, write):
        of = settings_digest(fingerprint, {**settings, "engine": asked.engine, "dtype": dtype})
        prompt = partial(chat_tokens, tokenizer, way_out=ANOTHER_MODEL)
        with screen.progress("Asking", count, "questions") as tell:
            rows = ask(partial(write, **settings), prompt, chosen, asked.out, of, tell)
    screen.table(
        f"{count} answers",
        ["language", "question", "answer"],
        [
            [row["language"], *(_short(message["content"]) for message in row["messages"])]
            for row in {row["language"]: row for row in reversed(rows)}.values()
        ],
        words=3,
    )
    screen.result({"out": asked.out, "answers": count, "languages": list(chosen), "of": of}, asked.out)


@contextmanager
def _engine(screen: Screen, asked: SimpleNamespace, dtype: str) -> Iterator[tuple[Any, str, Write]]:
    """The tokenizer, the fingerprint and what writes, which is started once for all questions."""
    from editing.pipeline.lock_prompts import require_chat

    if asked.engine == "vllm":
        import transformers

        from editing.evaluation.vllm_generation import VllmWriter, require_vllm
        from neurons.models.source import locate, open_model

        require_vllm()
        source = open_model(asked.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(asked.model), trust_remote_code=False)
        require_chat(asked.model, tokenizer)
        with VllmWriter(asked.model, tokenizer, dtype) as write:
            yield tokenizer, source.fingerprint, write
        return
    from editing.evaluation.generation import generate
    from neurons.models.source import load_model

    loaded = announced(screen, load_model(asked.model, asked.device, dtype))
    require_chat(loaded.name, loaded.tokenizer)
    yield loaded.tokenizer, loaded.fingerprint, partial(generate, loaded)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
