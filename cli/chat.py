"""``broca chat``: a conversation with a model in the terminal, or with two models at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from cli import options as opt
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.evaluation.talk import Talk

NEW = "/new"


@click.command("chat")
@opt.model
@click.option(
    "--beside", metavar="BASE", help="A second model that gets the same messages: hub id or directory."
)
@click.option("--web", is_flag=True, help="Chat on a page in the browser, on this machine only (broca[web]).")
@click.option("--system", help="A system message.  [default: that of the chat template]")
@opt.writing(512)
@opt.served_device
def command(
    model: str,
    beside: str | None,
    web: bool,
    system: str | None,
    new_tokens: int,
    temperature: float,
    device: str,
    dtype: str,
) -> None:
    """Talk to MODEL (hub id or directory).  A line is a message, /new starts a new conversation, an empty line ends.

    \b
    Examples:
      broca chat steered --beside Qwen/Qwen2.5-0.5B-Instruct
      broca chat steered --beside Qwen/Qwen2.5-0.5B-Instruct --web
    """
    from cli.loading import announced, require_models
    from editing.evaluation.talk import ContextFullError, Talk
    from editing.pipeline.lock_prompts import require_chat
    from neurons.models.own_dtype import own_dtype
    from neurons.models.source import load_model

    screen = Screen()
    if web:
        from cli.chat_page import require_gradio, serve

        require_gradio()
    require_models(model, beside)
    talk_of: dict[str, Callable[[str | None], Talk]] = {}
    for name in dict.fromkeys([model, *([] if beside is None else [beside])]):
        chosen = own_dtype(name, device, dtype)
        loaded = announced(screen, load_model(name, device, chosen))
        require_chat(loaded.name, loaded.tokenizer)
        talk_of[name] = partial(Talk, loaded, new_tokens=new_tokens, temperature=temperature)
    if web:
        serve(talk_of, system, screen.say)
        return
    talks = {name: talk(system) for name, talk in talk_of.items()}
    while message := _read():
        for name, talk in talks.items():
            if message == NEW:
                talk.reset()
                continue
            if len(talks) > 1:
                click.secho(f"{name}:", dim=True)
            try:
                for piece in talk.answer(message):
                    click.echo(piece, nl=False)
                click.echo()
            except ContextFullError as error:
                click.echo(f"{error}: {NEW}", err=True)


def _read() -> str:
    """The next message; empty at the end of the input."""
    if sys.stdin.isatty():
        click.secho("> ", nl=False, bold=True)
    return sys.stdin.readline().strip()
