"""`broca generate` and `broca evaluate` with `--engine vllm`, Broca installed beside vLLM, write what transformers does.

run.sh prepares what is read here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
# The demo's, or the one that was given.
CASE = next(iter(REFERENCE["cases"][name] for name in ("demo", "own") if name in REFERENCE["cases"]))
BASE, (STEERED,) = CASE["base"], CASE["exported"]
SECONDS = 600


def broca(*arguments, **environment):
    command = [str(Path(sys.executable).parent / "broca"), *map(str, arguments)]
    where = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=where)


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


def evaluated(out, engine, temporary):
    plan = Path(STEERED) / "broca" / "edit.safetensors"
    asked = ["--corpus", "artifacts/demo/corpus", "--part", "report", "--source", "en", "--target", "fr"]
    few = ["--prompts", 6, "--new-tokens", REFERENCE["new_tokens"], "--temperature", 0]
    told = ["--engine", engine, "--out", out, "--json"]
    done = broca("evaluate", BASE, "--edit", plan, *asked, *few, *told, TMPDIR=temporary)
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads(done.stdout)["settings"]["engine"] == engine
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_plan_is_evaluated_by_the_answers_of_its_export_as_in_memory(tmp_path):
    # Sockets lie in there, whose paths may not be as long as those that pytest makes.
    with TemporaryDirectory() as temporary:
        found = evaluated(tmp_path / "vllm.json", "vllm", temporary)
        assert not list(Path(temporary).glob("broca-*"))
        expected = evaluated(tmp_path / "transformers.json", "transformers", temporary)
    assert found["packages"]["vllm"] and "vllm" not in expected["packages"]
    assert found["ceiling"] == expected["ceiling"]
    for own, other in zip(found["outcomes"], expected["outcomes"], strict=True):
        assert own["samples"] == other["samples"]
        for name, value in other.items():
            if isinstance(value, float):
                assert own[name] == pytest.approx(value, abs=1e-4), name
        # All that is not written: by transformers in both, beside vLLM's own changes to it.
        assert (own["nll"], own["kl"]) == (other["nll"], other["kl"])
    base, edited = found["outcomes"]
    assert base["samples"] != edited["samples"]
