"""``broca generate``: text of the unedited and the edited model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.loading import announced
from cli.options import (
    IN_FILE,
    OUT_FILE,
    MultiValueCommand,
    device_options,
    engine_option,
    json_option,
    model_argument,
    writing_options,
)
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.evaluation.generation import Continuation

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
UNEDITED, EDITED = "unedited", "edited"


@click.command("generate", cls=MultiValueCommand)
@model_argument
@click.option("--edit", "edit_path", type=IN_FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint: hub id or directory.")
@click.option(
    "--prompts",
    multiple=True,
    required=True,
    help="Texts, or files: .txt with one prompt per line, or .jsonl, .csv or .parquet with question_id and text.",
)
@click.option("--compare", is_flag=True, help="Show the text of the unedited model too.")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Use the tokenizer's chat template, or continue plain text.  [default: --chat if it has a template]",
)
@engine_option
@writing_options(40)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@device_options
@click.option("--out", type=OUT_FILE, help="File for the texts (.json).")
@json_option
def command(
    model: str,
    edit_path: Path | None,
    against: str | None,
    prompts: tuple[str, ...],
    compare: bool,
    chat: bool | None,
    engine: str,
    new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Generate text with MODEL (hub id or directory), with a plan applied to it, or with a steered checkpoint.

    \b
    Example:
      broca generate artifacts/demo/model --edit edit.safetensors --compare \\
          --prompts "After dinner my father" "The kitchen window"
    """
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically

    screen = Screen(as_json)
    if edit_path is not None and against is not None:
        raise UsageError("--edit and --against exclude each other: give one")
    if compare and edit_path is None and against is None:
        raise UsageError("--compare needs --edit PLAN or --against CHECKPOINT")
    texts = _read_prompts(prompts)
    settings = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    if engine == "vllm":
        if edit_path is not None:
            raise UsageError(
                "--edit is not supported by vLLM: run `broca export` and give the result with --against"
            )
        if device != "auto":
            raise UsageError("--device is not supported by vLLM: leave it out")
        columns = _by_vllm(model, against, texts, compare, chat, dtype, settings)
    else:
        columns = _by_transformers(
            screen, model, edit_path, against, texts, compare, chat, (device, dtype), settings
        )
    rows = [
        {"prompt": text, **{name: continuations[i].text for name, continuations in columns.items()}}
        for i, text in enumerate(texts)
    ]
    value = {
        "model": model,
        "edit": edit_path,
        "against": against,
        "engine": engine,
        "settings": {**settings, "chat": chat},
        "texts": rows,
    }
    if out is not None:
        write_atomically(out, json_bytes(value))
    screen.table(
        f"{len(rows)} prompts",
        ["prompt", *columns],
        [[_one_line(row[column]) for column in ("prompt", *columns)] for row in rows],
        words=1 + len(columns),
    )
    screen.result(value, out)


def _by_transformers(
    screen: Screen,
    model: str,
    edit_path: Path | None,
    against: str | None,
    texts: list[str],
    compare: bool,
    chat: bool | None,
    device_and_dtype: tuple[str, str],
    settings: dict[str, Any],
) -> dict[str, list[Continuation]]:
    from editing.evaluation.generation import generate
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from neurons.models.source import load_model

    plan = None if edit_path is None else load_plan(edit_path)
    alone = plan is None and against is None
    columns: dict[str, list[Continuation]] = {}
    with screen.progress("Writing", len(texts) * (1 + compare), "prompts") as advance:
        if alone or plan is not None or compare:
            loaded = announced(screen, load_model(model, *device_and_dtype))
            if plan is not None:
                loaded.require_fingerprint(plan.metadata, edit_path)
            write = partial(generate, loaded, _inputs(loaded.tokenizer, texts, chat), **settings)
            if alone or compare:
                columns[UNEDITED] = write()
                advance(len(texts))
            if plan is not None:
                with applied(loaded, plan):
                    columns[EDITED] = write()
                advance(len(texts))
            del loaded, write
        if against is not None:
            other = load_model(against, *device_and_dtype)
            columns[EDITED] = generate(other, _inputs(other.tokenizer, texts, chat), **settings)
            advance(len(texts))
    return columns


def _by_vllm(
    model: str,
    against: str | None,
    texts: list[str],
    compare: bool,
    chat: bool | None,
    dtype: str,
    settings: dict[str, Any],
) -> dict[str, list[Continuation]]:
    from editing.evaluation.vllm_generation import generate_by_vllm, require_vllm
    from neurons.models.source import locate
    from neurons.models.tokenizer import load_tokenizer

    require_vllm()
    checkpoints = {UNEDITED: model} if against is None or compare else {}
    if against is not None:
        checkpoints[EDITED] = against
    columns = {}
    for name, checkpoint in checkpoints.items():
        tokenizer = load_tokenizer(locate(checkpoint))
        inputs = _inputs(tokenizer, texts, chat)
        columns[name] = generate_by_vllm(checkpoint, tokenizer, inputs, dtype=dtype, **settings)
    return columns


def _inputs(tokenizer: Any, texts: list[str], chat: bool | None) -> list[str | tuple[int, ...]]:
    """The input of the engine for each prompt: text, or tokens of a chat.

    Raises:
        UsageError: ``chat`` is true and the tokenizer has no chat template.
    """
    from editing.evaluation.asking import CHAT, OPENING, Prompt, question_style
    from neurons.errors import UsageError

    has_template = question_style(tokenizer) == CHAT
    if chat and not has_template:
        raise UsageError("the tokenizer has no chat template: leave --chat out")
    style = CHAT if has_template and chat is not False else OPENING
    return [Prompt(text, style).model_input(tokenizer) for text in texts]


def _read_prompts(arguments: tuple[str, ...]) -> list[str]:
    """The prompts from texts and files.

    Raises:
        UsageError: there is no prompt, or a file does not exist.
    """
    from editing.evaluation.questions import read_questions
    from neurons.errors import UsageError

    texts: list[str] = []
    for argument in arguments:
        path = Path(argument)
        is_file = path.suffix in SUFFIXES and _is_file(path)
        # A text may end with a file name.
        if path.suffix not in SUFFIXES or (" " in argument and not is_file):
            texts.append(argument)
        elif not is_file:
            raise UsageError(f"{argument}: there is no such file of prompts")
        elif path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            texts += [line.strip() for line in lines if line.strip()]
        else:
            by_language = read_questions(path).of
            texts += [question.text for questions in by_language.values() for question in questions]
    if not any(text.strip() for text in texts):
        raise UsageError("there is no prompt: give texts, or a file with one prompt per line")
    return texts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text may be longer than a path can be
        return False


def _one_line(text: str) -> str:
    return " ".join(text.split())
