"""The page of ``broca chat --web``: a column for each model, with streamed answers (gradio, the extra ``broca[web]``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from editing.evaluation.talk import Talk
from neurons.errors import BrocaError, UsageError

# Gradio reports its use to its makers by default.
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
HOST = "127.0.0.1"
# Right-to-left text stands on its own side, and lines and indentation of an answer stay.
CSS = ".message-content .md { unicode-bidi: plaintext; white-space: pre-wrap; }"
History = list[dict[str, str]]


def require_gradio() -> Any:
    """Import gradio, which then sends nothing about its use.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.update(SILENT)
    try:
        # Not a dependency of Broca, so type checkers may not find it.
        return import_module("gradio")
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError("the page needs gradio: pip install 'broca[web]'") from error


def serve(
    talk_of: dict[str, Callable[[str | None], Talk]], system: str | None, say: Callable[[str], None]
) -> None:
    """Serve the page on this machine only until the process is stopped.

    Args:
        talk_of: name of a model -> a new conversation with it, after a system message.
        system: the system message at the beginning; None: that of the chat template.
        say: called with the page's address.
    """
    gradio = require_gradio()
    page = chat_page(gradio, talk_of, system)
    _, url, _ = page.launch(
        server_name=HOST,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        enable_monitoring=False,
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        # Fonts of the system: none is fetched.
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    say(url)
    page.block_thread()


def chat_page(gradio: Any, talk_of: dict[str, Callable[[str | None], Talk]], system: str | None) -> Any:
    """The page, a ``gradio.Blocks``; its arguments are those of ``serve``."""
    names = list(talk_of)
    with gradio.Blocks(title="broca chat", analytics_enabled=False, fill_height=True) as page:
        system_box = gradio.Textbox(
            label="System message", value=system or "", placeholder="that of the chat template", lines=1
        )
        with gradio.Row(equal_height=True):
            # Text is shown as the model wrote it: Markdown could fetch pictures from the web.
            columns = [
                gradio.Chatbot(
                    label=name, render_markdown=False, buttons=["copy"], feedback_options=None, scale=1
                )
                for name in names
            ]
        message_box = gradio.Textbox(label="Message", submit_btn="Send", autofocus=True, lines=1)
        clear = gradio.Button("Clear")
        histories = gradio.State([[] for _ in names])

        def respond(message: str, system: str, before: list[History]) -> Iterator[tuple[Any, ...]]:
            said = [list(history) for history in before]
            if not message.strip():
                yield message, said, *said
                return
            for name, history in zip(names, said, strict=True):
                talk = talk_of[name](system.strip() or None)
                talk.messages += history
                answer = {"role": "assistant", "content": ""}
                history += [{"role": "user", "content": message}, answer]
                yield "" if history is said[0] else gradio.skip(), said, *said
                try:
                    for piece in talk.answer(message):
                        answer["content"] += piece
                        # The next message may be being written meanwhile.
                        yield gradio.skip(), said, *said
                except BrocaError as error:
                    del history[-2:]
                    yield message, said, *said
                    raise gradio.Error(str(error), print_exception=False) from error

        outputs = [message_box, histories, *columns]
        sent = message_box.submit(
            respond, [message_box, system_box, histories], outputs, show_progress="hidden"
        )
        # A column's own button clears all: they are one conversation.
        gradio.on(
            [clear.click, *(column.clear for column in columns)],
            lambda: ("", [[] for _ in names], *([] for _ in names)),
            None,
            outputs,
            cancels=[sent],
        )
    return page
