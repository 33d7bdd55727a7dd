"""Likelihoods and divergences against loops over single tokens."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import models
import pytest
import torch
from conversations import counted_by_hand

from editing.evaluation.generation import Continuation
from editing.evaluation.likelihood import (
    continuation_nll,
    mean_kl,
    mean_nll,
    read_again,
    read_unedited,
    unedited_head,
)
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from neurons.architectures.anatomy import OUTSIDE
from neurons.models.source import load_model
from neurons.text.batches import packed_batches, text_batches
from neurons.text.conversations import Message
from neurons.text.corpus_rows import Conversation


def log_probabilities(model, ids):
    """[position][token], in float64, of one row without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].double()
    return [[float(x) for x in row - row.logsumexp(0)] for row in logits]


def naive_nlls(model, rows):
    """-ln p of every token but a row's first, given those before it."""
    nlls = []
    for ids in rows:
        predicted = log_probabilities(model, ids)
        nlls += [-predicted[position - 1][ids[position]] for position in range(1, len(ids))]
    return nlls


def texts(count=5, seed=1):
    return models.sentences("qaa", count, seed, (1, 9))


def padded_batches(loaded, monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 60)
    monkeypatch.setattr("neurons.models.next_token.LOGIT_BYTES_AT_ONCE", 5000)  # four positions
    batches = text_batches(texts(), loaded.tokenizer, 128)
    assert len(batches) > 1 and any(batch.padded for batch in batches)
    return batches


def rows_of(loaded):
    return [loaded.tokenizer(text)["input_ids"] for text in texts()]


def test_mean_nll_is_over_tokens_not_texts(llama, monkeypatch):
    batches = padded_batches(llama, monkeypatch)
    nlls = naive_nlls(llama.model, rows_of(llama))
    assert mean_nll(llama, batches) == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_the_likelihood_of_answers_is_over_their_tokens(chatting):
    conversation = Conversation((Message("user", "bad cab"), Message("assistant", "a bee")))
    pieces = [
        ("template", "<|system|>\nbe good<|end|>\n<|user|>\n"),
        ("user", "bad cab"),
        ("template", "<|end|>\n<|assistant|>\n"),
        ("answer", "a bee"),
        ("template", "<|end|>\n"),
    ]
    ids, counted = counted_by_hand(chatting.tokenizer, pieces, ("answer",))
    nlls = naive_nlls(chatting.model, [ids])
    expected = sum(nlls[position - 1] for position in counted) / len(counted)
    batches = text_batches([conversation], chatting.tokenizer, 128, roles=("answer",))
    assert mean_nll(chatting, batches) == pytest.approx(expected, rel=1e-5)


def test_mean_nll_without_a_start_token(llama, monkeypatch):
    bare = replace(llama, tokenizer=models.tiny_tokenizer(adds_start=False))
    batches = padded_batches(bare, monkeypatch)
    nlls = naive_nlls(llama.model, [row[1:] for row in rows_of(llama)])
    assert mean_nll(bare, batches) == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_nll_of_packed_rows(llama):
    batches = packed_batches(models.sentences("qac", 9), llama.tokenizer, 12, "qac")
    nlls = naive_nlls(llama.model, [row for batch in batches for row in batch.ids.tolist()])
    assert mean_nll(llama, batches) == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_likelihood_and_divergence_of_one_pass_are_those_of_two(llama, monkeypatch):
    batches = padded_batches(llama, monkeypatch)
    before = read_unedited(llama, batches, unedited_head(llama))
    assert before.nll == mean_nll(llama, batches)
    divergence = mean_kl(llama, batches, lambda: blurred(llama.model))
    with blurred(llama.model):
        assert read_again(llama, before) == (mean_nll(llama, batches), divergence)
        likelihood, none = read_again(llama, read_unedited(llama, batches), kl=False)
        assert likelihood == mean_nll(llama, batches) and math.isnan(none)


def test_mean_nll_of_nothing_is_nan(llama):
    assert math.isnan(mean_nll(llama, []))


@contextmanager
def blurred(model):
    """Logits halved."""
    handle = model.lm_head.register_forward_hook(lambda _, __, logits: logits / 2)
    try:
        yield
    finally:
        handle.remove()


def naive_kl(loaded, steering):
    """KL(unedited || steered), position by position."""
    total, positions = 0.0, 0
    for ids in rows_of(loaded):
        before = log_probabilities(loaded.model, ids)
        with steering():
            after = log_probabilities(loaded.model, ids)
        for p, q in zip(before[:-1], after[:-1], strict=True):
            total += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            positions += 1
    return total / positions


@contextmanager
def other_head(model):
    """Another output embedding, as another checkpoint may have."""
    kept = model.lm_head.weight.data
    model.lm_head.weight.data = kept.flip(0) * 0.5
    try:
        yield
    finally:
        model.lm_head.weight.data = kept


@pytest.mark.parametrize("change", [blurred, other_head, models.shifted])
def test_mean_kl(llama, monkeypatch, change):
    batches = padded_batches(llama, monkeypatch)
    monkeypatch.setattr("neurons.models.next_token.LOGIT_BYTES_AT_ONCE", 5000)  # a few positions at a time
    expected = naive_kl(llama, lambda: change(llama.model))
    divergence = mean_kl(llama, batches, lambda: change(llama.model))
    assert divergence == pytest.approx(expected, rel=1e-3)
    assert divergence > 0.001


@pytest.mark.parametrize("tied", [False, True])
def test_mean_kl_of_a_plan_that_edits_embeddings_or_head(tmp_path, monkeypatch, tied):
    loaded = load_model(str(models.build_checkpoint(tmp_path, tied=tied)))
    batches = padded_batches(loaded, monkeypatch)
    deltas = 2 * torch.randn(40, loaded.anatomy.residual, generator=torch.Generator().manual_seed(0))
    edit = ModuleEdit(
        OUTSIDE, "model.embed_tokens" if tied else "lm_head", (), rows=torch.arange(40), row_deltas=deltas
    )
    plan = make_plan([edit], {"fingerprint": loaded.fingerprint, "method": "m", "settings": {}})
    expected = naive_kl(loaded, lambda: applied(loaded, plan))
    assert expected > 0.001
    assert mean_kl(loaded, batches, lambda: applied(loaded, plan)) == pytest.approx(expected, rel=1e-3)


def test_mean_kl_of_a_model_to_itself(llama, monkeypatch):
    assert mean_kl(llama, padded_batches(llama, monkeypatch), nullcontext) == 0
    assert math.isnan(mean_kl(llama, [], nullcontext))


CONTINUATIONS = [
    Continuation((5, 80, 33), ""),
    Continuation((), ""),
    Continuation((200,), ""),
    Continuation((7, 7, 90, 91, 17, 4), ""),
]


def test_continuations_are_read_without_their_prompts(llama):
    rows = [[0, *item.ids] for item in CONTINUATIONS if item.ids]
    nlls = naive_nlls(llama.model, rows)
    assert len(nlls) == 10
    assert continuation_nll(llama, CONTINUATIONS) == pytest.approx(sum(nlls) / 10, rel=1e-5)


def test_without_a_start_token_the_first_token_is_only_read(llama):
    bare = replace(llama, tokenizer=models.tiny_tokenizer(adds_start=False))
    nlls = naive_nlls(llama.model, [item.ids for item in CONTINUATIONS if len(item.ids) > 1])
    assert len(nlls) == 7
    assert continuation_nll(bare, CONTINUATIONS) == pytest.approx(sum(nlls) / 7, rel=1e-5)


@pytest.mark.parametrize("written", [[], [Continuation((), "")]])
def test_nothing_written_is_nan(llama, written):
    assert math.isnan(continuation_nll(llama, written))
