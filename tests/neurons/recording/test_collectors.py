"""Sums over tokens and texts, against loops over a hand-written llama and over plain hooks."""

import models
import pytest
import torch

from neurons.architectures.anatomy import first
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError
from neurons.models.source import load_model
from neurons.recording.collectors import Attribution
from neurons.recording.record import record
from neurons.recording.text_pass import Position
from neurons.statistics.totals import Totals
from neurons.text.batches import text_batches

ORDER = ("qac", "qaa")
LAYERS, WIDTH = 3, 48


def make_texts(language):
    """Texts of different lengths, with one empty line."""
    texts = models.sentences(language, 7, seed=3, words=(1, 9))
    return [texts[0], "", *texts[1:]]


def make_batches(tokenizer):
    batches = {k: text_batches(make_texts(k), tokenizer, 100, tokens_a_batch=60) for k in ORDER}
    assert all(len(of_language) > 1 for of_language in batches.values())
    assert any(batch.padded for of_language in batches.values() for batch in of_language)
    return batches


@pytest.fixture(scope="module")
def by_line(llama):
    """language -> line -> site -> float64 [layers, counted tokens, width]."""
    result = {}
    for language in ORDER:
        result[language] = {}
        for line, text in enumerate(make_texts(language)):
            if text:
                ids = llama.tokenizer(text)["input_ids"]
                _, layers = models.naive_llama(llama.model, ids)
                result[language][line] = {
                    site: torch.stack([layer[site].detach()[1:] for layer in layers])
                    for site in ("mlp_in", "mlp_up")
                }
    return result


def test_squares_and_sizes_of_tokens_and_texts(llama, by_line):
    names = ("square", "absolute", "text_square", "text_absolute")
    result = record(llama, make_batches(llama.tokenizer), [f"mlp_in:{name}" for name in names])
    for k, language in enumerate(ORDER):
        wanted = {name: torch.zeros(LAYERS, WIDTH, dtype=torch.float64) for name in names}
        for sites in by_line[language].values():
            values = sites["mlp_in"]
            mean = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
            for token in values.unbind(1):
                wanted["square"] += token * token
                wanted["absolute"] += token.abs()
                mean += token / values.shape[1]
            wanted["text_square"] += mean * mean
            wanted["text_absolute"] += mean.abs()
        for name, expected in wanted.items():
            values = result.moments[f"mlp_in:{name}"]
            assert values.dtype == torch.float64
            torch.testing.assert_close(values[..., k], expected, rtol=1e-4, atol=1e-5)


def naive_worst_ranks(importances):
    """(worst rank, its minimum and maximum up to rounding), each [layers][width].

    ``importances``: for each text [layers][width].
    """
    exact, minimum, maximum = ([[0] * WIDTH for _ in range(LAYERS)] for _ in range(3))
    for importance in importances:
        for layer, row in enumerate(importance):
            for j, value in enumerate(row):
                above = sum(other > value for other in row)
                surely = sum(other > value * (1 + 1e-4) for other in row)
                maybe = sum(other > value * (1 - 1e-4) for other in row) - 1
                exact[layer][j] = max(exact[layer][j], above)
                minimum[layer][j] = max(minimum[layer][j], surely)
                maximum[layer][j] = max(maximum[layer][j], maybe)
    return torch.tensor(exact), torch.tensor(minimum), torch.tensor(maximum)


@pytest.mark.parametrize("site", ["mlp_in", "mlp_up"])
def test_worst_rank_over_the_texts(llama, by_line, site):
    result = record(llama, make_batches(llama.tokenizer), [f"{site}:worst_rank"]).moments[
        f"{site}:worst_rank"
    ]
    assert result.dtype == torch.int64
    for k, language in enumerate(ORDER):
        importances, unweighted = [], []
        for sites in by_line[language].values():
            importance = []
            for layer in range(LAYERS):
                weight = llama.model.model.layers[layer].mlp.down_proj.weight.detach().double()
                sizes = [sum(abs(float(x)) for x in sites[site][layer, :, j]) for j in range(WIDTH)]
                norms = [float(weight[:, j].norm()) if site == "mlp_in" else 1.0 for j in range(WIDTH)]
                importance.append([size * norm for size, norm in zip(sizes, norms, strict=True)])
                unweighted.append(sizes)
            importances.append(importance)
        exact, minimum, maximum = naive_worst_ranks(importances)
        assert bool(((minimum <= result[..., k]) & (result[..., k] <= maximum)).all())
        assert float((result[..., k] == exact).double().mean()) > 0.95
        # A single text has every rank of a layer once; the worst ranks of several texts are higher.
        assert int(result[..., k].sum()) > LAYERS * WIDTH * (WIDTH - 1) // 2


def test_responses_are_in_the_order_of_the_lines(llama, by_line):
    batches = make_batches(llama.tokenizer)
    result = record(llama, batches, ["mlp_in:responses"])
    assert not result.moments
    for language in ORDER:
        read = [line for batch in batches[language] for line in batch.line_numbers.tolist()]
        assert read != sorted(read)
        assert result.lines[language].tolist() == [0, 2, 3, 4, 5, 6, 7]
        responses = result.responses[language]
        assert responses.dtype == torch.float32
        assert responses.shape == (7, LAYERS, WIDTH)
        for response, line in zip(responses, result.lines[language].tolist(), strict=True):
            expected = by_line[language][line]["mlp_in"].mean(1)
            torch.testing.assert_close(response.double(), expected, rtol=1e-4, atol=1e-5)


def hooked(loaded, batches, sites):
    """site -> language -> float64 [layers, counted tokens, experts * I], 0 for tokens that are not routed to an expert."""
    anatomy, width = loaded.anatomy, loaded.anatomy.expert_width
    result = {site: {language: [] for language in batches} for site in sites}
    for language, of_language in batches.items():
        for batch in of_language:
            rows, length = batch.ids.shape
            dense = {
                site: torch.zeros(anatomy.layers, rows * length, anatomy.neurons, dtype=torch.float64)
                for site in sites
            }

            def reader(site, layer, dense=dense):
                def read(values, routed):
                    for value, token in zip(values, routed.tokens.tolist(), strict=True):
                        first = routed.expert * width
                        dense[site][layer, token, first : first + width] = value.double()

                return read

            readers = {
                (site, layer): reader(site, layer) for site in sites for layer in range(anatomy.layers)
            }
            with site_hooks(anatomy, readers), torch.no_grad():
                loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
            for site in sites:
                result[site][language].append(dense[site][:, batch.counted.flatten()])
    return {
        site: {k: torch.cat(of_language, 1) for k, of_language in of.items()} for site, of in result.items()
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_sums_equal_those_of_a_plain_hook(checkpoint_of, family):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = make_batches(loaded.tokenizer)
    result = record(loaded, batches, ["mlp_act:positive", "mlp_act:sum", "mlp_in:square"])
    values = hooked(loaded, batches, ("mlp_act", "mlp_in"))
    width = loaded.anatomy.expert_width
    for k, language in enumerate(ORDER):
        gate, inside = values["mlp_act"][language], values["mlp_in"][language]
        assert int(result.tokens[k]) == gate.shape[1]
        assert torch.equal(result.moments["mlp_act:positive"][..., k], (gate > 0).sum(1))
        torch.testing.assert_close(result.moments["mlp_act:sum"][..., k], gate.sum(1), rtol=1e-9, atol=1e-9)
        squares = (inside * inside).sum(1)
        torch.testing.assert_close(result.moments["mlp_in:square"][..., k], squares, rtol=1e-9, atol=1e-9)
        routed = gate.unflatten(-1, (-1, width)).ne(0).any(-1).sum(1)
        assert torch.equal(result.routed[..., k], routed)
    assert torch.equal(result.routed.sum(1), 2 * result.tokens.expand(LAYERS, -1))
    assert len(result.routed.unique()) > 3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tokens_that_are_not_routed_to_an_expert_count_0_in_texts(checkpoint_of, family):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = make_batches(loaded.tokenizer)
    result = record(loaded, batches, ["mlp_in:text_mean", "mlp_in:text_square", "mlp_in:responses"])
    values = hooked(loaded, batches, ("mlp_in",))["mlp_in"]
    for k, language in enumerate(ORDER):
        lengths = [int(n) for batch in batches[language] for n in batch.counted.sum(1)]
        lines = [line for batch in batches[language] for line in batch.line_numbers.tolist()]
        means = [text.mean(1) for text in values[language].split(lengths, dim=1)]
        total = torch.stack(means).sum(0)
        torch.testing.assert_close(result.moments["mlp_in:text_mean"][..., k], total, rtol=1e-9, atol=1e-9)
        total = torch.stack([mean * mean for mean in means]).sum(0)
        torch.testing.assert_close(result.moments["mlp_in:text_square"][..., k], total, rtol=1e-9, atol=1e-9)
        for line, mean in zip(lines, means, strict=True):
            place = result.lines[language].tolist().index(line)
            torch.testing.assert_close(result.responses[language][place].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_worst_rank_is_by_the_change_of_a_mixtures_output_without_the_neuron(tmp_path, family):
    """Of routed experts, and of a shared one whose output has a factor of its own."""
    loaded = load_model(str(models.build_wrapper(tmp_path, family)), device="cpu")
    loaded.model.double()  # so that differences of outputs have the digits to rank by
    loaded.model.set_experts_implementation("eager")  # the grouped one has no float64
    anatomy, layer, inputs, effects = loaded.anatomy, 1, [], []
    (batch,) = text_batches(make_texts("qac"), loaded.tokenizer, 100)
    mixture = anatomy.mixtures[layer]
    handle = mixture.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    result = record(loaded, {"qac": [batch]}, ["mlp_in:worst_rank"]).moments["mlp_in:worst_rank"]
    handle.remove()
    with torch.no_grad():
        whole = first(mixture(*inputs))
        for neuron in range(anatomy.width("mlp_in", layer)):
            value = anatomy.value(layer, neuron)
            before = value.clone()
            value.zero_()
            change = (whole - first(mixture(*inputs))).norm(dim=-1)
            value.copy_(before)
            effects.append((change.view(batch.ids.shape) * batch.counted).sum(1))
    ranks = torch.stack(effects, dim=1).sort(dim=1, descending=True, stable=True).indices.argsort(1)
    assert len(ranks) > 3
    assert result[layer, :, 0].tolist() == ranks.amax(0).tolist()


@pytest.mark.parametrize(
    "moment", ["square", "absolute", "text_square", "text_absolute", "worst_rank", "responses"]
)
def test_a_weight_that_is_not_a_number_is_named_by_its_layer(checkpoint_of, moment):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    with torch.no_grad():
        loaded.anatomy.gates[1].weight[7] = float("nan")
    with pytest.raises(BrocaError, match="layer 1"):
        record(loaded, make_batches(loaded.tokenizer), [f"mlp_in:{moment}"])


@pytest.mark.parametrize("moment", ["positive", "sum"])
def test_an_expert_that_is_not_a_number_is_named_by_its_layer(checkpoint_of, moment):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.experts.gate_up_proj[:, 7] = float("nan")
    with pytest.raises(BrocaError, match="layer 1"):
        record(loaded, make_batches(loaded.tokenizer), [f"mlp_act:{moment}"])


def test_attributions_of_half_precision_are_multiplied_in_float32(llama):
    """In float16 a value of .01 times a gradient of 2e-6 is 0."""
    (batch,) = text_batches(["abe cab dab"], llama.tokenizer, 100)
    totals = Totals(1, LAYERS, {"mlp_in:attribution": WIDTH}, {"mlp_in:attribution": torch.float64})
    values = torch.full((*batch.ids.shape, WIDTH), 0.01, dtype=torch.float16)
    gradient = torch.full_like(values, 2e-6)
    Attribution("mlp_in", llama.anatomy, totals).add(1, values, None, Position(0, 0, batch))
    values.backward(gradient)
    expected = float(values.detach()[0, 0, 0]) * float(gradient[0, 0, 0]) * int(batch.counted.sum())
    found = totals.stacked("mlp_in:attribution")[1, :, 0]
    torch.testing.assert_close(found, torch.full((WIDTH,), expected, dtype=torch.float64), rtol=1e-6, atol=0)
