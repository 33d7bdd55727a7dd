"""What a tokenizer puts before a text, found by asking it."""

import models
import pytest
from tokenizers import processors

from editing.evaluation.generation import encoded
from editing.methods.crossings import crossings
from neurons.errors import BrocaError
from neurons.models.start_tokens import start_tokens
from neurons.text.prompts import Prompt, answer_tokens

SPECIAL = [("<s>", 0), ("</s>", 1)]


def tokenizer_with(template):
    tokenizer = models.tiny_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=SPECIAL
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [("$A", ()), ("<s> $A", (0,)), ("$A </s>", ()), ("<s> $A </s>", (0,)), ("</s> <s> $A </s>", (1, 0))],
)
def test_only_what_stands_before_the_text_counts(template, expected):
    tokenizer = tokenizer_with(template)
    assert tokenizer.bos_token_id == 0
    assert start_tokens(tokenizer) == expected
    text = tokenizer("beef cab", add_special_tokens=False)["input_ids"]
    assert encoded(tokenizer, ["beef cab"]) == [[*expected, *text]]
    assert answer_tokens(tokenizer, Prompt("beef cab", " add"))[0] == [*expected, *text]
    (row,) = crossings(tokenizer, ["beef cab"], [" add"], 0)
    assert (row.ids[: row.crosses], row.crosses) == ((*expected, *text), len(expected) + len(text))


def test_a_tokenizer_that_reads_texts_in_two_ways_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [5, 6] if add_special_tokens else [7]}

    with pytest.raises(BrocaError, match=r"\[7\].*\[5, 6\]"):
        start_tokens(tokenizer)
