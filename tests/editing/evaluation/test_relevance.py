"""Three scorers of relevance, each against its formula."""

import math
from collections import Counter
from dataclasses import replace

import models
import pytest
import torch

from editing.evaluation.asking import CHAT, COMPLETION, OPENING, Prompt
from editing.evaluation.generation import Continuation
from editing.evaluation.relevance import (
    JUDGE_COMPLETION,
    JUDGE_PROMPT,
    ChrfScorer,
    JudgeScorer,
    LikelihoodScorer,
    harmonic_mean,
    relevance,
)
from neurons.errors import UsageError
from neurons.models.source import load_model


def written(loaded, text):
    return Continuation(tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]), text)


PROMPTS = [Prompt("beef cab", OPENING), Prompt("stop", COMPLETION), Prompt("high him", OPENING)]
TEXTS = ["fade face", "milk hill pop", ""]


def test_likelihood_is_the_geometric_mean_of_the_answers_tokens(llama):
    answers = [written(llama, text) for text in TEXTS]
    scores = LikelihoodScorer(llama)(PROMPTS, answers)
    for prompt, answer, score in zip(PROMPTS, answers, scores, strict=True):
        if not answer.ids:
            assert score == 0
            continue
        read = llama.tokenizer(prompt.text + ("\n" if prompt.style == COMPLETION else ""))["input_ids"]
        product, ids = 1.0, [*read, *answer.ids]
        for i in range(len(read), len(ids)):
            with torch.no_grad():
                p = llama.model(torch.tensor([ids[:i]])).logits[0, -1].double().softmax(-1)
            product *= float(p[ids[i]])
        assert score == pytest.approx(product ** (1 / len(answer.ids)), rel=1e-4)
    assert len(set(scores)) == 3
    assert LikelihoodScorer(llama)(PROMPTS[:1], [Continuation(answers[0].ids, "\n")]) == [0]


CHATS = {
    "text": None,
    "chat": "{{ bos_token }}({{ messages[0]['content'] }})",
    "a judge that thinks": "{{ bos_token }}({{ messages[0]['content'] }}"
    "{{ ')' if enable_thinking is defined and not enable_thinking else ' think' }}",
}


@pytest.mark.parametrize("chat", CHATS)
def test_the_judge_says_yes_with_a_probability(llama, monkeypatch, chat):
    tokenizer = models.tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = CHATS[chat]
    judge = replace(llama, tokenizer=tokenizer)
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 600)
    monkeypatch.setattr("editing.evaluation.relevance.JUDGE_PROMPT", "{question} / {answer}?")
    scores = JudgeScorer(judge)(PROMPTS, [written(llama, text) for text in TEXTS])
    words = (("Yes", " Yes", "yes", " yes", "YES"), ("No", " No", "no", " no", "NO"))
    yes, no = (
        {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in spellings}
        for spellings in words
    )
    both = yes & no
    assert both == {tokenizer(" Y", add_special_tokens=False)["input_ids"][0]}  # the space alone is a token
    for prompt, text, score in zip(PROMPTS, TEXTS, scores, strict=True):
        if not text:
            assert score == 0
            continue
        shown = f"{prompt.text} / {text}?"
        shown = f"({shown})" if CHATS[chat] else shown + JUDGE_COMPLETION
        ids = [0, *tokenizer(shown, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            p = llama.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        p_yes, p_no = (sum(float(p[i]) for i in ids - both) for ids in (yes, no))
        assert score == pytest.approx(p_yes / (p_yes + p_no), rel=1e-4)


def test_the_judges_prompt_shows_question_and_answer():
    assert JUDGE_PROMPT.count("{question}") == JUDGE_PROMPT.count("{answer}") == 1
    assert "Yes or No" in JUDGE_PROMPT


def test_a_judge_that_cannot_say_yes_is_refused(llama):
    class OneToken:
        chat_template = None

        def __call__(self, *_, **__):
            return {"input_ids": [3]}

    with pytest.raises(UsageError, match="Yes from No"):
        JudgeScorer(replace(llama, tokenizer=OneToken()))(PROMPTS, [written(llama, text) for text in TEXTS])


def test_a_judge_whose_chat_template_fails_is_refused(llama):
    tokenizer = models.tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = "{{ raise_exception('not this way') }}"
    with pytest.raises(UsageError, match=r"not this way.*another judge"):
        JudgeScorer(replace(llama, tokenizer=tokenizer))(PROMPTS, [written(llama, text) for text in TEXTS])


def naive_chrf(answer, reference, order=6, beta=2):
    """chrF of Popović (2015): n-gram precision and recall of characters without spaces, averaged over n."""
    answer, reference = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, order + 1):
        written_ngrams, reference_ngrams = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (answer, reference)
        )
        if not written_ngrams or not reference_ngrams:
            continue
        common = sum((written_ngrams & reference_ngrams).values())
        precisions.append(common / sum(written_ngrams.values()))
        recalls.append(common / sum(reference_ngrams.values()))
    p, r = (sum(values) / len(values) if values else 0.0 for values in (precisions, recalls))
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


def test_chrf_against_the_reference(llama):
    reference = "dans le jardin quand il pleut"
    prompts = [Prompt("q", OPENING, reference)] * 4
    texts = [reference, "dans la maison quand il neige", "xyz", " "]
    scores = ChrfScorer()(prompts, [Continuation((1,), text) for text in texts])
    assert scores == pytest.approx([naive_chrf(text, reference) for text in texts], abs=1e-6)
    assert scores[0] == 1 and scores[2:] == [0, 0] and 0.3 < scores[1] < 0.9


def test_chrf_without_references_is_refused():
    prompts = [Prompt("q", OPENING, "oui"), Prompt("q", OPENING)]
    with pytest.raises(UsageError, match="1 of 2 prompts"):
        ChrfScorer()(prompts, [Continuation((1,), "oui")] * 2)


def test_both_harmonic_means():
    measured = relevance("chrf", [True, False, True, True], [0.5, 0.9, 0.0, 1.0])
    rate, mean = 3 / 4, 2.4 / 4
    assert (measured.scorer, measured.mean) == ("chrf", pytest.approx(mean))
    assert measured.steering_score == pytest.approx(2 / (1 / rate + 1 / mean))
    assert measured.item_score == pytest.approx((2 / (1 + 1 / 0.5) + 0 + 0 + 1) / 4)
    assert harmonic_mean(0, 0) == 0
    assert not math.isnan(relevance("judge", [False], [0.0]).steering_score)


def test_chat_questions_are_scored_by_their_tokens(checkpoint_of):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    loaded.tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    answer = written(loaded, "fade")
    as_chat = LikelihoodScorer(loaded)([Prompt("beef", CHAT)], [answer])
    as_text = LikelihoodScorer(loaded)([Prompt("beef", OPENING)], [answer])
    assert as_chat == as_text
