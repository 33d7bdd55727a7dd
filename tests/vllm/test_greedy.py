"""An exported checkpoint answers in a real vLLM as it does in transformers; run.sh prepares what is read here."""

import json
import os
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

REFERENCE = json.loads(Path(os.environ["REFERENCE"]).read_text(encoding="utf-8"))
PROMPTS = REFERENCE["prompts"]


@pytest.fixture(scope="session")
def outputs():
    # float32, because in bfloat16 the two libraries already differ by rounding.
    model = LLM(
        model=os.environ["EXPORTED"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
    )
    return model.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=REFERENCE["new_tokens"]))


@pytest.fixture(scope="session")
def answers(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("i", range(len(PROMPTS)), ids=PROMPTS)
def test_answers_as_transformers_does(outputs, answers, i):
    expected = REFERENCE["exported"][i]
    assert list(outputs[i].prompt_token_ids) == expected["prompt"]
    assert answers[i] == expected["answer"]


def test_the_edit_is_visible(answers):
    assert any(answer != base["answer"] for answer, base in zip(answers, REFERENCE["base"], strict=True))


def test_the_answers_are_not_degenerate(answers):
    # Broken weights (NaN, zeros) repeat one token in both libraries alike, and equality would prove nothing.
    assert len({token for answer in answers for token in answer}) > 2 * len(PROMPTS)
