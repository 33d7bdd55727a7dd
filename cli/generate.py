"""``broca generate``: text of the unedited and the edited model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.loading import announced, require_models
from cli.screen import Screen, one_line

if TYPE_CHECKING:
    from editing.evaluation.generation import Continuation

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
UNEDITED, EDITED = "unedited", "edited"


@click.command("generate", cls=opt.MultiValueCommand)
@opt.model
@click.option("--edit", "edit_path", type=opt.IN_FILE, help="A plan, applied in memory.")
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
@opt.engine
@opt.writing(40)
@opt.seed("Seed of the sampling.")
@opt.device
@click.option("--out", type=opt.OUT_FILE, help="File for the texts (.json).")
@opt.json
def command(**options: Any) -> None:
    """Generate text with MODEL (hub id or directory), with a plan applied to it, or with a steered checkpoint.

    \b
    Example:
      broca generate artifacts/demo/model --edit edit.safetensors --compare \\
          --prompts "After dinner my father" "The kitchen window"
    """
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically

    arguments = SimpleNamespace(**options)
    screen, against, out = Screen(arguments.as_json), arguments.against, arguments.out
    if arguments.edit_path is not None and against is not None:
        raise UsageError("--edit and --against exclude each other: give one")
    if arguments.compare and arguments.edit_path is None and against is None:
        raise UsageError("--compare needs --edit PLAN or --against CHECKPOINT")
    texts = _read_prompts(arguments.prompts)
    require_models(against)
    settings = {name: options[name] for name in ("new_tokens", "temperature", "seed")}
    if arguments.engine == "vllm":
        if arguments.edit_path is not None:
            raise UsageError(
                "--edit is not supported by vLLM: run `broca export` and give the result with --against"
            )
        if arguments.device != "auto":
            raise UsageError("--device is not supported by vLLM: leave it out")
        columns = _by_vllm(arguments, texts, settings)
    else:
        columns = _by_transformers(screen, arguments, texts, settings)
    rows = [
        {"prompt": text, **{name: continuations[i].text for name, continuations in columns.items()}}
        for i, text in enumerate(texts)
    ]
    value = {
        "model": arguments.model,
        "edit": arguments.edit_path,
        "against": against,
        "engine": arguments.engine,
        "settings": {**settings, "chat": arguments.chat},
        "texts": rows,
    }
    if out is not None:
        write_atomically(out, json_bytes(value))
    screen.table(
        f"{len(rows)} prompt{'s' * (len(rows) != 1)}",
        ["prompt", *columns],
        [[one_line(row[column]) for column in ("prompt", *columns)] for row in rows],
        words=1 + len(columns),
    )
    screen.result(out, **value)


def _by_transformers(
    screen: Screen, arguments: SimpleNamespace, texts: list[str], settings: dict[str, Any]
) -> dict[str, list[Continuation]]:
    from editing.evaluation.generation import generate
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from neurons.models.source import load_model

    against, compare, chat = arguments.against, arguments.compare, arguments.chat
    plan = None if arguments.edit_path is None else load_plan(arguments.edit_path)
    alone = plan is None and against is None
    columns: dict[str, list[Continuation]] = {}
    with screen.progress("Writing", len(texts) * (1 + compare), "prompts") as advance:
        if alone or plan is not None or compare:
            loaded = announced(screen, load_model(arguments.model, arguments.device, arguments.dtype))
            if plan is not None:
                loaded.require_fingerprint(plan.metadata, arguments.edit_path)
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
            other = load_model(against, arguments.device, arguments.dtype)
            columns[EDITED] = generate(other, _inputs(other.tokenizer, texts, chat), **settings)
            advance(len(texts))
    return columns


def _by_vllm(
    arguments: SimpleNamespace, texts: list[str], settings: dict[str, Any]
) -> dict[str, list[Continuation]]:
    from editing.evaluation.vllm_generation import VllmWriter, require_vllm
    from neurons.models.source import locate
    from neurons.models.tokenizer import load_tokenizer

    require_vllm()
    against = arguments.against
    checkpoints = {UNEDITED: arguments.model} if against is None or arguments.compare else {}
    if against is not None:
        checkpoints[EDITED] = against
    columns = {}
    for name, checkpoint in checkpoints.items():
        tokenizer = load_tokenizer(locate(checkpoint))
        inputs = _inputs(tokenizer, texts, arguments.chat)
        with VllmWriter(checkpoint, tokenizer, arguments.dtype) as write:
            columns[name] = write(inputs, **settings)
    return columns


def _inputs(tokenizer: Any, texts: list[str], chat: bool | None) -> list[str | tuple[int, ...]]:
    """The input of the engine for each prompt: text, or tokens of a chat."""
    from editing.evaluation.asking import CHAT, OPENING, Prompt, question_style
    from neurons.errors import UsageError

    has_template = question_style(tokenizer) == CHAT
    if chat and not has_template:
        raise UsageError("the tokenizer has no chat template: leave --chat out")
    style = CHAT if has_template and chat is not False else OPENING
    return [Prompt(text, style).model_input(tokenizer) for text in texts]


def _read_prompts(arguments: tuple[str, ...]) -> list[str]:
    from editing.evaluation.questions import read_questions
    from neurons.errors import UsageError
    from neurons.text.corpus_rows import read_lines

    texts: list[str] = []
    for argument in arguments:
        path = Path(argument)
        exists = path.suffix in SUFFIXES and opt.is_file(path)
        # A text may end with a file name.
        if path.suffix not in SUFFIXES or (" " in argument and not exists):
            texts.append(argument)
        elif not exists:
            raise UsageError(f"{argument}: there is no such file of prompts")
        elif path.suffix == ".txt":
            texts += [line.strip() for line in read_lines(path) if line.strip()]
        else:
            by_language = read_questions(path).of
            texts += [question.text for questions in by_language.values() for question in questions]
    if not any(text.strip() for text in texts):
        raise UsageError("there is no prompt: give texts, or a file with one prompt per line")
    return texts
