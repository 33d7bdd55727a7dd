"""``broca ask``: a model's own answers to questions in many languages."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from cli.loading import announced
from cli.options import (
    IN_PATH,
    OUT_FILE,
    CommaSeparated,
    FiniteRange,
    json_option,
    model_argument,
    served_device_options,
)
from cli.screen import Screen
from cli.steer import shipped_questions

SHOWN = 60  # characters of an answer


@click.command("ask")
@model_argument
@click.option(
    "--questions",
    type=IN_PATH,
    help="A file or directory with question_id and text.  [default: Broca's own, 64 in 25 languages]",
)
@click.option("--languages", type=CommaSeparated(), help="Which of the questions.  [default: all]")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model; vllm must be installed beside Broca.",
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token always.",
)
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
    from editing.evaluation.ask import ask, settings_digest
    from editing.evaluation.asking import chat_tokens
    from editing.evaluation.questions import read_questions
    from neurons.errors import UsageError

    if asked.out.suffix != ".jsonl":
        raise UsageError(f"{asked.out}: answers are written as .jsonl: name such a file")
    questions = read_questions(asked.questions or shipped_questions()).of
    wanted = asked.languages or tuple(questions)
    if missing := [name for name in wanted if name not in questions]:
        raise UsageError(
            f"there are no questions in {missing[0]!r}: there are some in {', '.join(questions)}"
        )
    chosen = {name: questions[name] for name in wanted}
    settings = {
        "new_tokens": asked.new_tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "engine": asked.engine,
    }
    tokenizer, fingerprint, write = _engine(screen, asked)
    of = settings_digest(fingerprint, settings)
    count = sum(map(len, chosen.values()))
    with screen.progress("Asking", count, "questions") as tell:
        rows = ask(write, partial(chat_tokens, tokenizer), chosen, Path(asked.out), of, tell)
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


def _engine(screen: Screen, asked: SimpleNamespace) -> tuple[Any, str, Any]:
    """The tokenizer, the fingerprint and what writes."""
    from editing.evaluation.generation import generate
    from editing.pipeline.lock_text import require_chat
    from neurons.errors import UsageError
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model, locate, open_model

    settings = {
        "new_tokens": asked.new_tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
    }
    if asked.engine == "vllm":
        import transformers

        from editing.evaluation.vllm_generation import generate_by_vllm, require_vllm

        if asked.device != "auto":
            raise UsageError("vLLM runs on the device that it was built for: leave --device out")
        require_vllm()
        source = open_model(asked.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(asked.model), trust_remote_code=False)
        require_chat(asked.model, tokenizer)
        write = partial(generate_by_vllm, asked.model, tokenizer, dtype=asked.dtype, **settings)
        return tokenizer, source.fingerprint, write
    dtype = own_dtype(asked.model, asked.device) if asked.dtype == "auto" else asked.dtype
    loaded = announced(screen, load_model(asked.model, asked.device, dtype))
    require_chat(loaded.name, loaded.tokenizer)
    return loaded.tokenizer, loaded.fingerprint, partial(generate, loaded, **settings)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
