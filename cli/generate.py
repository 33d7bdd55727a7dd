"""``broca generate``: what a model writes, unedited and edited side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.loading import announced
from cli.options import (
    IN_FILE,
    OUT_FILE,
    Many,
    device_options,
    engine_option,
    json_option,
    model_argument,
    writing_options,
)
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.evaluation.asking import Prompt
    from editing.evaluation.generation import Continuation

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
UNEDITED, EDITED = "unedited", "edited"


@click.command("generate", cls=Many)
@model_argument
@click.option("--edit", "edit_path", type=IN_FILE, help="A plan, applied in memory.")
@click.option("--against", help="A steered checkpoint: hub id or directory.")
@click.option(
    "--prompts",
    multiple=True,
    required=True,
    help="Texts, or files: .txt (a prompt a line), or .jsonl, .csv and .parquet with question_id and text.",
)
@click.option("--compare", is_flag=True, help="The unedited model's text beside the edited one's.")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Through the tokenizer's chat template, or as plain text to go on with.  [default: as the tokenizer has it]",
)
@engine_option
@writing_options(40)
@click.option("--seed", type=int, default=0, show_default=True)
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
    """Write with MODEL (hub id or directory), with a plan applied to it, or with a steered checkpoint.

    \b
    Example:
      broca generate artifacts/demo/model --edit edit.safetensors --compare \\
          --prompts "After dinner my father" "The kitchen window"
    """
    from neurons.errors import UsageError
    from neurons.files.artifact import json_bytes, write_atomically

    screen = Screen(as_json)
    if edit_path is not None and against is not None:
        raise UsageError("--edit and --against are two ways to name the steered model: give one")
    if compare and edit_path is None and against is None:
        raise UsageError("--compare needs something to compare with: --edit PLAN or --against CHECKPOINT")
    asked = _prompts(prompts)
    settings = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    if engine == "vllm":
        if edit_path is not None:
            raise UsageError(
                "vLLM reads checkpoints: `broca export` the plan and name the result with --against"
            )
        if device != "auto":
            raise UsageError("vLLM runs on the device that it was built for: leave --device out")
        texts = _by_vllm(model, against, asked, compare, chat, dtype, settings)
    else:
        texts = _by_transformers(
            screen, model, edit_path, against, asked, compare, chat, (device, dtype), settings
        )
    rows = [
        {"prompt": prompt, **{name: found[i].text for name, found in texts.items()}}
        for i, prompt in enumerate(asked)
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
        ["prompt", *texts],
        [[_line(row[column]) for column in ("prompt", *texts)] for row in rows],
        words=1 + len(texts),
    )
    screen.result(value, out)


def _by_transformers(
    screen: Screen,
    model: str,
    edit_path: Path | None,
    against: str | None,
    asked: list[str],
    compare: bool,
    chat: bool | None,
    place: tuple[str, str],
    settings: dict[str, Any],
) -> dict[str, list[Continuation]]:
    from editing.evaluation.generation import generate
    from editing.plans.applied import applied
    from editing.plans.plan import load_plan
    from neurons.models.source import load_model

    plan = None if edit_path is None else load_plan(edit_path)
    alone = plan is None and against is None
    found: dict[str, list[Continuation]] = {}
    with screen.progress("Writing", len(asked) * (1 + compare), "prompts") as advance:
        if alone or plan is not None or compare:
            loaded = announced(screen, load_model(model, *place))
            if plan is not None:
                loaded.require_fingerprint(plan.metadata, edit_path)
            write = partial(generate, loaded, _given(loaded.tokenizer, asked, chat), **settings)
            if alone or compare:
                found[UNEDITED] = write()
                advance(len(asked))
            if plan is not None:
                with applied(loaded, plan):
                    found[EDITED] = write()
                advance(len(asked))
            del loaded, write
        if against is not None:
            other = load_model(against, *place)
            found[EDITED] = generate(other, _given(other.tokenizer, asked, chat), **settings)
            advance(len(asked))
    return found


def _by_vllm(
    model: str,
    against: str | None,
    asked: list[str],
    compare: bool,
    chat: bool | None,
    dtype: str,
    settings: dict[str, Any],
) -> dict[str, list[Continuation]]:
    from editing.evaluation.vllm_generation import generate_by_vllm, require_vllm
    from neurons.models.source import locate

    require_vllm()
    import transformers

    wanted = {UNEDITED: model} if against is None or compare else {}
    if against is not None:
        wanted[EDITED] = against
    found = {}
    for name, checkpoint in wanted.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(checkpoint), trust_remote_code=False)
        given = _given(tokenizer, asked, chat)
        found[name] = generate_by_vllm(checkpoint, tokenizer, given, dtype=dtype, **settings)
    return found


def _given(tokenizer: Any, asked: list[str], chat: bool | None) -> list[str | tuple[int, ...]]:
    """What the engine is given for each prompt.

    Raises:
        UsageError: a chat is asked for, and the tokenizer has no template.
    """
    from editing.evaluation.asking import CHAT, OPENING, Prompt, question_style
    from neurons.errors import UsageError

    has_template = question_style(tokenizer) == CHAT
    if chat and not has_template:
        raise UsageError("this model's tokenizer has no chat template: leave --chat out")
    style = CHAT if has_template and chat is not False else OPENING
    found: list[Prompt] = [Prompt(text, style) for text in asked]
    return [prompt.model_input(tokenizer) for prompt in found]


def _prompts(given: tuple[str, ...]) -> list[str]:
    """The prompts, files read.

    Raises:
        UsageError: none at all, or a file that is not there or holds none.
    """
    from editing.evaluation.questions import read_questions
    from neurons.errors import UsageError

    found: list[str] = []
    for one in given:
        path = Path(one)
        is_file = path.suffix in SUFFIXES and _is_file(path)
        # A text may end in the name of a file.
        if path.suffix not in SUFFIXES or (" " in one and not is_file):
            found.append(one)
        elif not is_file:
            raise UsageError(f"{one}: there is no such file of prompts")
        elif path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            found += [line.strip() for line in lines if line.strip()]
        else:
            questions = read_questions(path)
            found += [question.text for some in questions.of.values() for question in some]
    if not any(text.strip() for text in found):
        raise UsageError("there is no prompt to write on: give texts, or a file with a prompt a line")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text may be longer than a name can be
        return False


def _line(text: str) -> str:
    return " ".join(text.split())
