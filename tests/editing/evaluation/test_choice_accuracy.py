"""Scores of choices against a loop over single tokens, and a model that knows the answers."""

from dataclasses import replace

import models
import pytest
import torch
from conversations import CHATML, MAY_THINK, OPENS_THOUGHT

from editing.evaluation import choice_accuracy
from editing.evaluation.choice_accuracy import choice_log_probabilities, right
from editing.evaluation.choices import Choice, read_choices
from neurons.errors import UsageError
from neurons.models.memory import sizes_of
from neurons.models.source import load_model

QUESTIONS = ["abe?", "Where does the cab stop, in the face of it all?", "bad", "the milk hill pop trust bead"]
CHOICES = [
    ["abe", "face", "a", "milk hill pop"],
    ["b", "c", "d", "e"],
    ["12", "13", "cafe decaf face", "14"],
    ["trust", "stop", "bead", "hill"],
]


def naive(loaded, question, choice):
    """The sum of the log-probabilities of the choice's tokens, from whole rows without padding and cache."""
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt, answer = loaded.tokenizer([text, choice], add_special_tokens=False)["input_ids"]
    total = 0.0
    for place, token in enumerate(answer):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gemma2", "gemma3_text", "gpt2", "opt", "bloom", "falcon", "mixtral"),
        # Of images and text, whose positions have three coordinates, or whose base model has another name.
        *("qwen2_vl", "qwen3_vl", "glm4v", "llama4"),
    ],
)
def test_scores_equal_a_loop_over_tokens(checkpoint_of, tmp_path, family, monkeypatch):
    known = family in models.FAMILIES
    loaded = load_model(
        str(checkpoint_of(family) if known else models.build_wrapper(tmp_path, family)), device="cpu"
    )
    loaded.tokenizer.chat_template = CHATML
    monkeypatch.setattr(choice_accuracy, "MAX_TOKENS", 1024)  # some batches, with padding
    done = []
    scores = choice_log_probabilities(loaded, QUESTIONS, CHOICES, done.append)
    expected = [
        [naive(loaded, question, choice) for choice in of_item]
        for question, of_item in zip(QUESTIONS, CHOICES, strict=True)
    ]
    assert scores.dtype == torch.float64
    assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert sum(done) == 4 and len(done) > 1


def test_batches_are_small_where_keys_and_values_are_large(chatting, monkeypatch):
    sizes, batches = sizes_of(chatting), []
    monkeypatch.setattr(
        choice_accuracy, "row_batches", lambda *_, tokens_a_batch: batches.append(tokens_a_batch) or []
    )
    for keys in (sizes.keys, 2**20):
        monkeypatch.setattr(choice_accuracy, "sizes_of", lambda _, keys=keys: replace(sizes, keys=keys))
        monkeypatch.setattr(choice_accuracy, "max_room", lambda _: 2**32)
        choice_log_probabilities(chatting, QUESTIONS, CHOICES)
    assert batches[0] == choice_accuracy.MAX_TOKENS // 4
    # 24 bytes of keys and values in three layers, of 2**20 numbers each
    assert 0 < 4 * batches[1] * 24 * 2**20 <= 2**32


@pytest.mark.parametrize("template", [MAY_THINK, OPENS_THOUGHT])
def test_a_model_that_thinks_is_scored_without_thoughts(chatting, monkeypatch, template):
    closed = CHATML.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n\n</think>\n\n{% endif")
    monkeypatch.setattr(chatting.tokenizer, "chat_template", closed)
    expected = [naive(chatting, QUESTIONS[0], choice) for choice in CHOICES[0]]
    monkeypatch.setattr(chatting.tokenizer, "chat_template", template)
    scores = choice_log_probabilities(chatting, QUESTIONS[:1], CHOICES[:1])
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_a_model_that_is_sure_of_the_answers_is_right(chatting):
    (token,) = chatting.tokenizer("e", add_special_tokens=False)["input_ids"]

    def sure(_, __, logits):
        return logits.index_fill(-1, torch.tensor([token]), 50.0)

    handle = chatting.model.lm_head.register_forward_hook(sure)
    try:
        choices = [["b", "c", "d", "e"], ["e", "b", "c", "d"]]
        scores = choice_log_probabilities(chatting, ["which?", "which?"], choices)
    finally:
        handle.remove()
    assert right(scores, [3, 0]) == [True, True] and right(scores, [0, 1]) == [False, False]
    assert scores[0, 3] == pytest.approx(0, abs=1e-6)


def test_a_tie_is_wrong():
    scores = torch.tensor([[-1.0, -1.0, -2.0, -3.0], [-1.0, -0.9, -2.0, -3.0], [-5.0, -5.0, -5.0, -5.0]])
    assert right(scores, [0, 1, 2]) == [False, True, False]


def test_an_item_longer_than_the_context_is_refused_by_number(checkpoint_of, tmp_path):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    loaded.tokenizer.chat_template = CHATML
    with pytest.raises(UsageError, match="reads 128"):
        choice_log_probabilities(loaded, ["milk " * 100], [["a", "b", "c", "d"]])


@pytest.mark.parametrize(
    "row, named",
    [
        ('{"question_id": "1", "text": "", "choices": ["a", "b", "c", "d"], "answer": "A"}', "row 1"),
        ('{"question_id": "1", "text": "x", "choices": ["a", "b", "c"], "answer": "A"}', "row 1"),
        ('{"question_id": "1", "text": "x", "choices": ["a", "b", "c", "a"], "answer": "A"}', "row 1"),
        ('{"question_id": "1", "text": "x", "choices": ["a", "b", "c", 4], "answer": "A"}', "row 1"),
        ('{"question_id": "1", "text": "x", "choices": ["a", "b", "c", "d"], "answer": "E"}', "'E'"),
        ("nonsense", "line 1"),
        ("", "no multiple-choice items"),
    ],
)
def test_wrong_rows_are_refused_by_place(tmp_path, row, named):
    (tmp_path / "en.jsonl").write_text(row)
    with pytest.raises(UsageError, match=named):
        read_choices(tmp_path)


def test_an_id_twice_is_refused(tmp_path):
    row = '{"question_id": "7", "text": "x", "choices": ["a", "b", "c", "d"], "answer": "A"}\n'
    (tmp_path / "en.jsonl").write_text(row * 2)
    with pytest.raises(UsageError, match="'7'"):
        read_choices(tmp_path)


def test_items_are_read_by_language(tmp_path):
    (tmp_path / "fra.jsonl").write_text(
        '{"question_id": 7, "text": " x ", "choices": ["a", " b ", "c", "d"], "answer": "B"}\n'
    )
    ((language, (item,)),) = read_choices(tmp_path).items()
    assert (language, item) == ("fr", Choice("7", "x", ("a", "b", "c", "d"), 1))
