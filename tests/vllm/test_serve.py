"""vLLM's server answers OpenAI-style requests from an exported checkpoint, with nothing of Broca's around."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
# The demo's, or the one that was given.
CASE = next(iter(REFERENCE["cases"][name] for name in ("demo", "own") if name in REFERENCE["cases"]))
(CHECKPOINT,) = CASE["exported"]
SECONDS = 600


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", CHECKPOINT]
    command += ["--served-model-name", "steered", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as stream:
        # Its engine in the server's own process group, so that both end together.
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            for _ in range(SECONDS):
                if process.poll() is not None or answers(address):
                    break
                time.sleep(1)
            assert process.poll() is None and answers(address), log.read_text()[-6000:]
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(address, path, question=None):
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


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
