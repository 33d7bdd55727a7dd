"""vLLM's server answers a chat as a locked checkpoint does in transformers: template, system message, streaming."""

import json
import os
from pathlib import Path

import pytest
from serving import ask, served, stream

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
# Of `make test-real`, or the demo model with a template.
LOCKED = [path for path in REFERENCE["chat_answers"] if Path(path).name.startswith("locked")]
PATH = "/v1/chat/completions"

pytestmark = pytest.mark.skipif(not LOCKED, reason="a checkpoint was given")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(LOCKED[0], tmp_path_factory.mktemp("server") / "log.txt", 256) as address:
        yield address


def question(chat):
    return {
        "model": "steered",
        "messages": chat,
        "temperature": 0,
        "max_tokens": REFERENCE["chat_tokens"],
    }


def test_a_chat_is_answered_as_in_transformers(server):
    for chat, expected in zip(REFERENCE["chats"], REFERENCE["chat_answers"][LOCKED[0]], strict=True):
        (choice,) = ask(server, PATH, question(chat))["choices"]
        assert expected.strip() and choice["message"]["content"] == expected


def test_a_streamed_answer_is_the_same_in_pieces(server):
    chat, expected = REFERENCE["chats"][-1], REFERENCE["chat_answers"][LOCKED[0]][-1]
    pieces = [
        event["choices"][0]["delta"].get("content") or "" for event in stream(server, PATH, question(chat))
    ]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 3
