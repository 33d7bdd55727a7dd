"""Covariances of groups of layers equal those of all layers at once, and no layer runs twice."""

import models
import pytest
import torch
from conversations import said, written

from neurons.errors import BrocaError
from neurons.models import memory
from neurons.models.source import load_model
from neurons.recording.covariance import each_moments
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "falcon", "gptj", "bloom"]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, checkpoint_of):
    return load_model(str(checkpoint_of(request.param)), device="cpu")


@pytest.fixture(scope="module")
def corpus(corpus_directory):
    return read_corpus(corpus_directory)


def units_of(loaded):
    return {
        (site, layer): torch.arange(loaded.anatomy.width(site))
        for layer in range(loaded.anatomy.layers)
        for site in ("attn_in", "mlp_in")
    }


def one_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(memory, "WORK", 1)


def test_groups_of_layers_are_all_layers_at_once(loaded, corpus, monkeypatch):
    batches = language_batches(loaded, corpus)
    whole = dict(each_moments(loaded, batches, units_of(loaded)))
    runs = [0] * loaded.anatomy.layers
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
        for layer, block in enumerate(loaded.anatomy.blocks)
    ]
    one_layer_at_a_time(monkeypatch)
    reported = []
    result = dict(each_moments(loaded, batches, units_of(loaded), reported.append))
    for handle in handles:
        handle.remove()
    assert list(result) == sorted(result, key=lambda place: place[1])
    for place, moments in whole.items():
        for name in ("mean", "covariance", "start"):
            assert torch.equal(getattr(result[place], name), getattr(moments, name)), (place, name)
    # Once for each batch, and on the few tokens of the check whether layers can be skipped.
    texts = sum(len(of_language) for of_language in batches.values())
    assert all(texts <= count <= texts + 4 for count in runs)
    assert sum(reported) == sum(
        int(batch.counted.sum()) for of_language in batches.values() for batch in of_language
    )


def test_moments_are_those_of_loops(llama, corpus):
    """Mean and pooled covariance of one layer from the definition, a token at a time, in float64."""
    batches = language_batches(llama, corpus)
    moments = dict(each_moments(llama, batches, {("mlp_in", 1): torch.arange(48)}))["mlp_in", 1]
    rows = {}
    for k, language in enumerate(corpus.languages):
        rows[k] = []
        for text in corpus.texts[language]:
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(llama.model, ids)
            rows[k] += list(layers[1]["mlp_in"].detach()[1:])
    tokens = sum(map(len, rows.values()))
    covariance = torch.zeros(48, 48, dtype=torch.float64)
    for k, of_language in rows.items():
        mean = torch.stack(of_language).mean(0)
        torch.testing.assert_close(moments.mean[:, k], mean, rtol=1e-4, atol=1e-6)
        for row in of_language:
            covariance += torch.outer(row - mean, row - mean) / tokens
    torch.testing.assert_close(moments.covariance, covariance, rtol=1e-4, atol=1e-6)


def test_the_first_tokens_of_conversations_are_apart_from_their_template(chatting, tmp_path):
    rows = {"qaa": [said(("user", "bad cab"), ("assistant", "abe")), said(("user", "fed"))]}
    corpus = read_corpus(written(tmp_path / "text", rows), min_languages=1, roles=["user"])
    batches = language_batches(chatting, corpus)
    moments = dict(each_moments(chatting, batches, {("mlp_in", 1): torch.arange(48)}))["mlp_in", 1]
    first = []
    for batch in batches["qaa"]:
        for ids in batch.ids.tolist():
            first.append(models.naive_llama(chatting.model, ids)[1][1]["mlp_in"].detach()[0])
    torch.testing.assert_close(moments.start, torch.stack(first).mean(0), rtol=1e-4, atol=1e-6)


def test_a_layer_that_cannot_fit_is_refused_beforehand(llama, corpus, monkeypatch):
    batches = language_batches(llama, corpus, tokens_a_batch=100)
    monkeypatch.setattr(memory, "_limit", memory.LIBRARIES + memory.sizes_of(llama).weights + 8 * 48**2)
    with pytest.raises(BrocaError, match="layer 0"):
        dict(each_moments(llama, batches, {("mlp_in", 0): torch.arange(48)}))
