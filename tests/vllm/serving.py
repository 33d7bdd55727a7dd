"""vLLM's own server, on a checkpoint, for as long as a test needs it."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

SECONDS = 600


@contextmanager
def served(checkpoint, log, length):
    """The address of a server of one checkpoint, called "steered".

    Args:
        checkpoint: its directory.
        log: file that the server writes to.
        length: tokens of the longest conversation.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--served-model-name", "steered", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        str(length),
        "--max-num-seqs",
        "4",
        "--enforce-eager",
    ]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as stream:
        # Its engine in the server's own process group, so that both end together.
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            for _ in range(SECONDS):
                if process.poll() is not None or is_ready(address):
                    break
                time.sleep(1)
            assert process.poll() is None and is_ready(address), log.read_text()[-6000:]
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def is_ready(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(address, path, question=None):
    """The reply, as JSON."""
    with _reply(address, path, question) as reply:
        return json.load(reply)


def stream(address, path, question):
    """The events of a streamed reply, as JSON, one by one."""
    with _reply(address, path, question | {"stream": True}) as reply:
        for line in reply:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)


def _reply(address, path, question):
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)
