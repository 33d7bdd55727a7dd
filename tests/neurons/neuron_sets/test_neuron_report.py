"""One neuron explained, against the hand-written llama and by cases whose answer is known."""

import json
import math

import models
import pytest
from click.testing import CliRunner

from cli.neuron import command
from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_report import neuron_report
from neurons.text.corpus import PARTS, read_corpus

LAYER, NEURON = 1, 17


@pytest.fixture(scope="module")
def report(llama, corpus):
    return neuron_report(llama, corpus, LAYER, NEURON, snippets=6, tokens=5)


@pytest.fixture(scope="module")
def by_hand(llama, corpus):
    """language -> per text (ids, pre-activations, values at mlp_in), in float64."""
    found = {}
    for language, texts in corpus.texts.items():
        found[language] = []
        for text in texts:
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            sites = models.naive_llama(llama.model, ids)[1][LAYER]
            found[language].append(
                (ids, sites["mlp_act"][:, NEURON].tolist(), sites["mlp_in"][:, NEURON].tolist())
            )
    return found


def test_activity_by_language(report, by_hand):
    for language, texts in by_hand.items():
        values = [value for _, _, inside in texts for value in inside[1:]]
        gates = [gate for _, gate, _ in texts for gate in gate[1:]]
        found = report.activity[language]
        assert found.tokens == len(values)
        assert found.firing == pytest.approx(sum(gate > 0 for gate in gates) / len(gates))
        assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
        assert found.absolute == pytest.approx(sum(map(abs, values)) / len(values), rel=1e-4)
        assert (found.low, found.high) == pytest.approx((min(values), max(values)), rel=1e-4)


def test_snippets_are_the_strongest_place_of_the_strongest_texts(llama, report, by_hand, corpus):
    strongest = []
    for language, texts in by_hand.items():
        for line, (_, _, inside) in enumerate(texts):
            place = max(range(1, len(inside)), key=lambda i, inside=inside: abs(inside[i]))
            strongest.append((abs(inside[place]), inside[place], language, line, place))
    strongest.sort(reverse=True)
    assert len(report.snippets) == 6
    for snippet, (size, value, _, _, _) in zip(report.snippets, strongest, strict=False):
        assert abs(snippet.value) == pytest.approx(size, rel=1e-4)
        text = corpus.texts[snippet.language][snippet.line]
        whole = snippet.before + snippet.token + snippet.after
        assert whole in text
        assert snippet.token
        places = [place for _, v, k, n, place in strongest if (k, n) == (snippet.language, snippet.line)]
        ids = by_hand[snippet.language][snippet.line][0]
        assert snippet.token == llama.tokenizer.decode([ids[places[0]]])
        assert math.copysign(1, snippet.value) == math.copysign(1, value)


def test_tokens_by_the_lens(llama, report):
    model = llama.model
    value = model.model.layers[LAYER].mlp.down_proj.weight[:, NEURON].detach().double()
    normed = value / (value.pow(2).mean() + model.config.rms_norm_eps).sqrt()
    rises = (model.lm_head.weight.double() @ (normed * model.model.norm.weight.double())).tolist()
    order = sorted(range(len(llama.tokenizer)), key=lambda token: (-rises[token], token))
    for found, expected in ((report.promoted, order[:5]), (report.suppressed, order[::-1][:5])):
        assert [text for text, _ in found] == [llama.tokenizer.decode([token]) for token in expected]
        assert [rise for _, rise in found] == pytest.approx([rises[token] for token in expected], rel=1e-4)
    assert report.value_norm == pytest.approx(float(value.norm()))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_oss", "qwen3_moe"])
def test_other_architectures(family, checkpoint_of, corpus):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    anatomy = loaded.anatomy
    neuron = anatomy.neurons - 3
    found = neuron_report(loaded, corpus, 2, neuron, snippets=3, tokens=4)
    tokens = {language: one.tokens for language, one in found.activity.items()}
    plain = neuron_report(loaded, corpus, 2, 0, snippets=0, tokens=1)
    if anatomy.mixed:
        assert all(count >= 0 for count in tokens.values())
        assert tokens != {language: one.tokens for language, one in plain.activity.items()}
    else:
        assert tokens == {language: one.tokens for language, one in plain.activity.items()}
    assert plain.snippets == ()
    strongest = max(max(abs(one.low), abs(one.high)) for one in found.activity.values() if one.tokens)
    assert abs(found.snippets[0].value) == pytest.approx(strongest)


def test_a_letter_of_several_tokens_is_shown_whole(llama):
    from dataclasses import replace

    texts = {"qaa": ("abe é cab",)}
    odd = replace(read_corpus_like(), texts=texts)
    found = neuron_report(llama, odd, LAYER, NEURON, snippets=1)
    (snippet,) = found.snippets
    assert snippet.before + snippet.token + snippet.after == "abe é cab"


def read_corpus_like():
    from neurons.text.corpus import Corpus

    return Corpus({}, "", "all")


@pytest.mark.parametrize("place", [(3, 0), (0, 48), (-1, 0), (0, -1)])
def test_a_neuron_that_there_is_not_is_refused(llama, corpus, place):
    with pytest.raises(UsageError, match="layers are 0-2, neurons 0-47"):
        neuron_report(llama, corpus, *place)


def test_the_command(llama, report, corpus_directory):
    arguments = [llama.name, str(LAYER), str(NEURON), "--corpus", str(corpus_directory), "--device", "cpu"]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    strongest = report.snippets[0]
    (row,) = (line for line in shown.stdout.splitlines() if f"{strongest.value:+.3f}" in line and "»" in line)
    assert f"»{strongest.token}«" in row and str(strongest.line + 1) in row.split()
    told = CliRunner().invoke(command, [*arguments, "--top", "5", "--json"], catch_exceptions=False)
    document = json.loads(told.stdout)
    assert [tuple(item) for item in document["promoted"]] == [tuple(item) for item in report.promoted]
    assert document["snippets"][0]["value"] == report.snippets[0].value
    assert document["activity"]["qab"]["tokens"] == report.activity["qab"].tokens
    assert document["corpus"]["digest"] == read_corpus(corpus_directory).digest


def test_lines_are_those_of_the_file(llama, corpus, corpus_directory):
    for name in PARTS:
        part = read_corpus(corpus_directory, part=name)
        for language, texts in part.texts.items():
            assert texts == tuple(corpus.texts[language][part.file_line(i)] for i in range(len(texts)))
    found = neuron_report(llama, read_corpus(corpus_directory, part="report"), 1, 5, snippets=3).snippets
    assert [snippet.line % 4 for snippet in found] == [3, 3, 3]
