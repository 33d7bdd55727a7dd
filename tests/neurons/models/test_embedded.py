"""Tokens that the tokenizer has and the embedding has not: only a text that needs one is refused, before the work."""

from dataclasses import replace

import models
import pytest

from editing.evaluation.generation import generate
from editing.evaluation.relevance import JudgeScorer
from neurons.errors import UsageError
from neurons.recording.answers import record_answers
from neurons.text.batches import language_batches, packed_corpus
from neurons.text.corpus import Corpus
from neurons.text.prompts import Prompt, Prompts

PROMPTS = ["beef cab", "a"]


@pytest.fixture
def extended(llama):
    """The llama with a tokenizer that a fine-tune gave a padding token."""
    tokenizer = models.tiny_tokenizer.__wrapped__()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == llama.embedding_rows
    return replace(llama, tokenizer=tokenizer)


def corpus_of(*texts):
    return Corpus({"qaa": texts}, "digest", "all")


def test_a_padding_token_without_an_embedding_is_not_needed(llama, extended):
    for temperature in (0, 0.7):
        assert generate(extended, PROMPTS, 6, temperature) == generate(llama, PROMPTS, 6, temperature)
    lines = models.sentences("qaa", 30)
    assert language_batches(extended, corpus_of(*lines))["qaa"]
    assert packed_corpus(extended, corpus_of(*lines), 16)["qaa"]


def needs_text(loaded, text):
    language_batches(loaded, corpus_of("beef", text))


def needs_packed(loaded, text):
    packed_corpus(loaded, corpus_of(*models.sentences("qaa", 20), text), 16)


def needs_prompt(loaded, text):
    generate(loaded, ["beef", text], 2)


def needs_answer(loaded, text):
    prompts = Prompts({"qaa": (Prompt("beef", " a"),), "qab": (Prompt(text, " a"),)}, "digest")
    record_answers(loaded, prompts, "answer")


@pytest.mark.parametrize("needs", [needs_text, needs_packed, needs_prompt, needs_answer])
def test_a_text_that_needs_such_a_token_is_refused_with_both_numbers(extended, needs, monkeypatch):
    monkeypatch.setattr(type(extended.model), "forward", lambda *_, **__: pytest.fail("work was done"))
    highest, rows = extended.tokenizer.pad_token_id, extended.embedding_rows
    with pytest.raises(UsageError, match=rf"{highest} \('\[PAD\]'\).* {rows} rows"):
        needs(extended, "cab [PAD] add cab add cab add cab add cab add cab add")


def test_a_judge_that_needs_such_a_token(extended):
    extended.tokenizer.chat_template = "[PAD] {{ messages[0]['content'] }}"
    from editing.evaluation.asking import OPENING, Prompt
    from editing.evaluation.generation import Continuation

    with pytest.raises(UsageError, match="PAD"):
        JudgeScorer(extended)([Prompt("beef", OPENING)], [Continuation((5,), "a")])


def test_a_prompt_without_a_token_is_refused(llama):
    bare = replace(llama, tokenizer=models.tiny_tokenizer(adds_start=False))
    with pytest.raises(UsageError, match="prompt 2 of 2 is empty"):
        generate(bare, ["beef", ""], 2)
    assert len(generate(llama, ["beef", ""], 2)) == 2
