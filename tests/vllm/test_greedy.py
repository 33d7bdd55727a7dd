"""Exported checkpoints and adapters answer in a real vLLM as in transformers; run.sh prepares what is read here."""

import json
import os
from pathlib import Path

import pytest
from compare import TOLERANCE, first_difference
from served import SERVED

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
CASES, EXPECTED = REFERENCE["cases"], REFERENCE["answers"]
FOUND = json.loads(Path(os.environ["ANSWERS"]).read_text(encoding="utf-8"))
CHECKPOINTS = {
    f"{name}: {Path(path).name}": (case["base"], path)
    for name, case in CASES.items()
    for path in case["exported"]
    if path in FOUND
}
ADAPTERS = {
    f"{name}: {Path(adapter['path']).name}": (case["base"], adapter["path"], adapter["checkpoint"])
    for name, case in CASES.items()
    for adapter in case["adapters"]
}


def assert_the_same(path, expected):
    assert isinstance(FOUND[path], list), FOUND[path]  # else the end of vLLM's log
    assert first_difference(FOUND[path], expected) == ""


def assert_another_model(path, base):
    found, plain = FOUND[path], EXPECTED[base]
    assert [answer["answer"] for answer in found] != [answer["answer"] for answer in plain]
    # Not by a tie that fell out otherwise: the first token's probability is another.
    first = [(own["logprobs"][0], theirs["logprobs"][0]) for own, theirs in zip(found, plain, strict=True)]
    assert max(abs(own - theirs) for own, theirs in first) > 10 * TOLERANCE
    # Broken weights (NaN, zeros) repeat one token in both libraries alike, and equality would prove nothing.
    assert len({token for answer in found for token in answer["answer"]}) >= 10


def test_everything_was_asked():
    if "own" not in CASES:
        tried = {name.partition(":")[0] for name in CHECKPOINTS} - {"smollm2", "chat"}
        assert tried == {*SERVED, "demo", "demo-float32"}
        assert len(ADAPTERS) == 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_answers_as_in_transformers(name):
    base, path = CHECKPOINTS[name]
    assert_the_same(path, EXPECTED[path])
    assert_another_model(path, base)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_answers_as_its_checkpoint(name):
    base, adapter, checkpoint = ADAPTERS[name]
    assert_the_same(adapter, EXPECTED[checkpoint])
    assert_another_model(adapter, base)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["base"] in FOUND])
def test_a_base_model_is_itself(name):
    """Also beside its adapters."""
    base = CASES[name]["base"]
    assert_the_same(base, EXPECTED[base])
