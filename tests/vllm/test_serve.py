"""vLLM's server answers OpenAI-style requests from an exported checkpoint, with nothing of Broca's around."""

import json
import os
from pathlib import Path

import pytest
from serving import ask, served

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
# The demo's, or the one that was given.
CASE = next(iter(REFERENCE["cases"][name] for name in ("demo", "own") if name in REFERENCE["cases"]))
(CHECKPOINT,) = CASE["exported"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(CHECKPOINT, tmp_path_factory.mktemp("server") / "log.txt", 128) as address:
        yield address


def test_names_its_model(server):
    assert [model["id"] for model in ask(server, "/v1/models")["data"]] == ["steered"]


def test_completes_as_transformers_does(server):
    for prompt, expected in zip(REFERENCE["prompts"], REFERENCE["answers"][CHECKPOINT], strict=True):
        question = {"model": "steered", "prompt": prompt, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        reply = ask(server, "/v1/completions", question | {"max_tokens": REFERENCE["new_tokens"]})
        (choice,) = reply["choices"]
        assert choice["text"] == expected["text"]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
        assert reply["usage"]["completion_tokens"] == REFERENCE["new_tokens"]
