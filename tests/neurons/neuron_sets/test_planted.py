"""Models built so that their language neurons are known: identify() must find exactly those."""

from dataclasses import replace

import models
import pytest
import torch

from neurons.ablation.shapley import record_shapley
from neurons.models.source import load_model
from neurons.neuron_sets.identify import identify, neurons_from
from neurons.scorers.head_shapley import HeadShapley
from neurons.text.corpus import read_corpus

# The residual stream: one constant dimension, one a language, some of each language's own, and the rest.
CONSTANT = 0
SAYS = {language: 1 + k for k, language in enumerate(models.LANGUAGES)}
OWN = {language: slice(4 + 10 * k, 14 + 10 * k) for k, language in enumerate(models.LANGUAGES)}
REST = slice(34, 64)
NEURONS = 3 * 48


def planted_model():
    """A llama whose residual stream says each token's language, and beside it which token of the language.

    The i-th tokens of all languages look alike in the rest of the stream, so that whatever reads only
    the rest treats the languages alike.  No attention; the MLPs write little, and only to the rest.
    """
    model = models.tiny_model("llama", seed=3)
    random = torch.Generator().manual_seed(9)
    owners = models.token_languages()
    place = [owners[:token].count(language) for token, language in enumerate(owners)]
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, REST] = 0.3 * torch.randn(300, 30, generator=random)[place]
        embedding[:, CONSTANT] = 1
        head = model.lm_head.weight
        head.zero_()
        head[:, REST] = 0.5 * torch.randn(300, 30, generator=random)[place]
        for token, language in enumerate(owners):
            if language is not None:
                embedding[token, SAYS[language]] = 3
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight *= 0.02
            block.mlp.down_proj.weight[: REST.start] = 0
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
    return model, random


def found_by(model, directory, corpus, method, top_rate):
    models.save_checkpoint(model, directory)
    chosen = identify(load_model(str(directory), device="cpu"), corpus, method, top_rate, block=32)
    return chosen, {
        language: {tuple(r) for r in chosen.of(language).tolist()} for language in chosen.languages
    }


@pytest.fixture(scope="module")
def planted_corpus(tmp_path_factory):
    return read_corpus(models.write_corpus(tmp_path_factory.mktemp("planted"), lines=40, seed=2))


FIRES_FOR = {
    (0, 5): {"qaa"},
    (2, 47): {"qaa"},
    (1, 0): {"qab"},
    (1, 17): {"qab"},
    (0, 30): {"qac"},
    (2, 8): {"qac"},
    (1, 40): {"qaa", "qac"},
}


def test_lape_finds_the_planted_neurons_and_no_others(tmp_path, planted_corpus):
    model, random = planted_model()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            gate = block.mlp.gate_proj.weight
            # Fires for some tokens of every language: reads what says nothing about the language.
            gate.zero_()
            gate[:, REST] = 0.5 * torch.randn(48, 30, generator=random)
            gate[:, CONSTANT] = -0.3
            for (at, neuron), languages in FIRES_FOR.items():
                if at == layer:
                    gate[neuron] = 0
                    gate[neuron, CONSTANT] = -1
                    for language in languages:
                        gate[neuron, SAYS[language]] = 2
    chosen, found = found_by(model, tmp_path, planted_corpus, "lape", len(FIRES_FOR) / NEURONS)
    for language in models.LANGUAGES:
        assert found[language] == {place for place, own in FIRES_FOR.items() if language in own}
    assert chosen.metadata["method"] == "lape"
    assert chosen.metadata["corpora"][0]["digest"] == planted_corpus.digest
    assert 0 < chosen.metadata["notes"]["tau"] < 0.9
    # The score is minus the entropy: 0 for one language alone, at least -ln 2 for two.
    for language in models.LANGUAGES:
        for place, score in zip(chosen.of(language).tolist(), chosen.scores[language].tolist(), strict=True):
            assert 0 <= -score <= 1e-12 if len(FIRES_FOR[tuple(place)]) == 1 else 0.6 < -score <= 0.6932


def test_lape_says_which_languages_got_no_neuron(tmp_path, planted_corpus):
    """More than 5 % of neurons fire on every token, so no probability is above the threshold 1."""
    model, _ = planted_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight[:20] = 0
            block.mlp.gate_proj.weight[:20, CONSTANT] = 1
            block.mlp.gate_proj.weight[30] = 0
            block.mlp.gate_proj.weight[30, CONSTANT] = -1
            block.mlp.gate_proj.weight[30, SAYS["qab"]] = 2
    chosen, found = found_by(model, tmp_path, planted_corpus, "lape", 0.1)
    assert chosen.metadata["notes"]["tau"] == 1
    assert chosen.empty_languages == models.LANGUAGES
    assert found == {language: set() for language in models.LANGUAGES}


MATTERS_FOR = {
    (0, 11): "qaa",
    (2, 3): "qaa",
    (0, 44): "qab",
    (1, 20): "qab",
    (1, 21): "qac",
    (2, 46): "qac",
}


def test_gradient_contrast_finds_the_planted_neurons_and_no_others(tmp_path, planted_corpus):
    """Every neuron has one value, the same on all tokens; only where its column writes differs.

    Neurons that write to the rest matter more than the planted ones, but to every language.
    """
    model, random = planted_model()
    with torch.no_grad():
        # A token predicts its own language, whose tokens differ in the language's own dimensions.
        for token, language in enumerate(models.token_languages()):
            if language is not None:
                model.lm_head.weight[token, SAYS[language]] = 6
                model.lm_head.weight[token, OWN[language]] = torch.randn(10, generator=random)
        for layer, block in enumerate(model.model.layers):
            for projection in (block.mlp.gate_proj, block.mlp.up_proj):
                projection.weight.zero_()
                projection.weight[:, CONSTANT] = 1
            for (at, neuron), language in MATTERS_FOR.items():
                if at == layer:
                    block.mlp.down_proj.weight[:, neuron] = 0
                    block.mlp.down_proj.weight[OWN[language], neuron] = 0.005
    chosen, found = found_by(model, tmp_path, planted_corpus, "gradient-contrast", 2 / NEURONS)
    for language in models.LANGUAGES:
        assert found[language] == {place for place, own in MATTERS_FOR.items() if own == language}
        assert bool((chosen.scores[language] > 0).all())


def test_equal_runs_save_equal_bytes(llama, corpus, tmp_path):
    files = []
    for run in ("one", "two"):
        identify(llama, corpus, "gradient-contrast", 0.05, tokens=200, block=32).save(tmp_path / run)
        files.append((tmp_path / run).read_bytes())
    assert files[0] == files[1]


CARRIES = {(0, 1): "qaa", (1, 0): "qab", (2, 1): "qac"}


@pytest.fixture(scope="module")
def planted_heads(tmp_path_factory):
    """Without MLPs; one head of each language tells its tokens' language to the output, the others write little.

    A planted head reads what only its language's embeddings say, and writes what only its tokens' output
    embeddings read.
    """
    model, _ = planted_model()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            attention = block.self_attn
            attention.o_proj.weight.normal_(std=0.005, generator=torch.Generator().manual_seed(layer))
            for (at, head), language in CARRIES.items():
                if at == layer:
                    # Both heads share the keys and values.
                    attention.v_proj.weight[0] = 0
                    attention.v_proj.weight[0, SAYS[language]] = 2
                    attention.o_proj.weight[:, head * 32] = 0
                    attention.o_proj.weight[OWN[language].start, head * 32] = 2
                    attention.o_proj.weight[:, (1 - head) * 32] = 0
        for token, language in enumerate(models.token_languages()):
            if language is not None:
                model.lm_head.weight[token, OWN[language].start] = 2
    return models.save_checkpoint(model, tmp_path_factory.mktemp("heads"))


@pytest.mark.parametrize("method", ["head-gradient", "head-gradient-contrast", "head-shapley"])
def test_the_head_that_alone_carries_a_language_is_found(planted_heads, planted_corpus, method):
    loaded = load_model(str(planted_heads), device="cpu")
    if method == "head-shapley":
        few = replace(planted_corpus, texts={k: texts[:8] for k, texts in planted_corpus.texts.items()})
        heads = neurons_from(record_shapley(loaded, few, HeadShapley(permutations=4)), method, 1 / 6)
    else:
        heads = identify(loaded, planted_corpus, method, 1 / 6, block=32)
    assert (heads.unit, heads.neurons) == ("head", 2)
    found = {language: [tuple(row) for row in heads.of(language).tolist()] for language in heads.languages}
    assert found == {language: [place] for place, language in CARRIES.items()}
