"""`broca generate --engine vllm`, Broca installed beside vLLM, writes what transformers does; run.sh prepares it."""

import json
import os
import subprocess
import sys
from pathlib import Path

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
# The demo's, or the one that was given.
CASE = next(iter(REFERENCE["cases"][name] for name in ("demo", "own") if name in REFERENCE["cases"]))
BASE, (STEERED,) = CASE["base"], CASE["exported"]
SECONDS = 600


def broca(*arguments):
    command = [str(Path(sys.executable).parent / "broca"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def texts(engine):
    both = ["--against", STEERED, "--compare", "--new-tokens", REFERENCE["new_tokens"]]
    done = broca("generate", BASE, *both, "--engine", engine, "--json", "--prompts", *REFERENCE["prompts"])
    assert done.returncode == 0, done.stderr[-6000:]
    # vLLM's own log is not on standard output: all of it is one JSON object.
    return json.loads(done.stdout)["texts"]


def test_two_checkpoints_one_after_the_other_as_transformers():
    found = texts("vllm")
    assert found == texts("transformers")
    assert [row["prompt"] for row in found] == REFERENCE["prompts"]
    assert all(row["edited"] != row["unedited"] for row in found[:2])
    # A model that only repeats itself would do so in both.
    assert len({word for row in found for word in f"{row['unedited']} {row['edited']}".split()}) >= 20


def test_more_than_the_model_has_room_for_is_one_sentence():
    done = broca("generate", BASE, "--engine", "vllm", "--new-tokens", 10**9, "--prompts", "After dinner")
    assert done.returncode == 1
    assert done.stdout == ""
    (said,) = [line for line in done.stderr.splitlines() if "vLLM cannot load it" in line]
    assert "1000000" in said
    assert "Traceback" not in done.stderr
