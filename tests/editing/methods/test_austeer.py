"""AUSteer against loops over pairs of texts, and against hooks on the input channels."""

import math

import models
import pytest
import torch

from editing.methods import austeer as austeer_module
from editing.methods.austeer import ALPHA, CHANNELS, AusteerEdit, austeer, corpus_rates, neuron_rates
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.record import record
from neurons.scorers.momentum import MomentumRates, momentum_rates
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])


def responses(width, pairs=4, layers=3, seed=0):
    """Small integers, so that rates and differences are often equal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 4, (2, pairs, layers, width), generator=generator)
    return drawn.double()


def naive(halves, channels, alpha, layers):
    """[(layer, index of the module, channel, gamma)] in order of rank, by loops."""
    ranked = []
    for number, (target, source) in enumerate(halves):
        pairs = len(target)
        for layer in layers:
            for channel in range(target.shape[2]):
                steps = [float(target[i, layer, channel] - source[i, layer, channel]) for i in range(pairs)]
                up = sum(step > 0 for step in steps) / pairs
                down = sum(step < 0 for step in steps) / pairs
                size = sum(abs(step) for step in steps) / pairs
                gamma = alpha * up if up >= down else -alpha * down
                if max(up, down) > 0:
                    ranked.append((-max(up, down), -size, layer, number, channel, gamma))
    return [row[2:] for row in sorted(ranked)[:channels]]


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize(("channels", "alpha"), [(1, 2.0), (7, -0.5), (20, 10.0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula(seed, channels, alpha, layers):
    halves = [responses(6, seed=seed), responses(11, seed=100 + seed)]
    rates = {block: momentum_rates(*both) for block, both in zip(("attn", "mlp"), halves, strict=True)}
    result = austeer(rates, channels, alpha, layers)
    expected = naive(halves, channels, alpha, layers or range(3))
    for number, block in enumerate(("attn", "mlp")):
        of_block = sorted((layer, channel, gamma) for layer, of, channel, gamma in expected if of == number)
        assert (block in result) == bool(of_block)
        if of_block:
            scale = torch.ones(rates[block].rate_up.shape, dtype=torch.float64)
            for layer, channel, gamma in of_block:
                scale[layer, channel] = 1 + gamma
            torch.testing.assert_close(result[block], scale)


def test_by_hand():
    rates = MomentumRates(
        rate_up=torch.tensor([[0.5, 0.25, 0.9, 0.0, 0.5]], dtype=torch.float64),
        rate_down=torch.tensor([[0.5, 0.75, 0.1, 0.0, 0.25]]).double(),
        difference=torch.tensor([[1.0, 1.0, 1.0, 0.0, 2.0]]).double(),
    )
    result = austeer({"mlp": rates}, 4, 2.0)["mlp"]
    assert result.tolist() == [pytest.approx([2.0, -0.5, 2.8, 1.0, 2.0])]
    # Of the two with score .5 the larger difference comes first.
    assert austeer({"mlp": rates}, 3, 2.0)["mlp"].tolist() == [pytest.approx([1.0, -0.5, 2.8, 1.0, 2.0])]
    with pytest.raises(BrocaError, match=r"only 4 .* 5"):
        austeer({"mlp": rates}, 5, 2.0)


def test_finds_the_planted_channels():
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(20, 2, 30, generator=generator, dtype=torch.float64)
    target = torch.randn(20, 2, 30, generator=generator, dtype=torch.float64)
    target[:, 1, 4] = source[:, 1, 4] + 0.01
    target[:, 0, 17] = source[:, 0, 17] - 0.01
    result = austeer({"mlp": momentum_rates(target, source)}, 2, 0.5)["mlp"]
    assert (result != 1).nonzero().tolist() == [[0, 17], [1, 4]]
    assert result[result != 1].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "0 channels"),
        ({"alpha": 0.0}, "strength 0"),
        ({"alpha": math.nan}, "strength nan"),
        ({"layers": [3]}, "layer 3"),
    ],
)
def test_refuses_settings_out_of_range(llama, settings, message):
    rates = {"mlp": momentum_rates(*responses(48))}
    with pytest.raises(UsageError, match=message):
        plan_of(llama, rates, **{"channels": 5, **settings})


def test_refuses_rates_of_another_model(llama):
    for rates in ({}, {"mlp_in": momentum_rates(*responses(48))}):
        with pytest.raises(UsageError, match="block"):
            plan_of(llama, rates, channels=5)
    with pytest.raises(BrocaError, match=r"attn .*\[3, 48\].*\[3, 64\]"):
        plan_of(llama, {"attn": momentum_rates(*responses(48))}, channels=5)


def plan_of(loaded, rates, languages=("qaa", "qab"), layers=None, **settings):
    return AusteerEdit(**settings).plan((Material(loaded, languages=languages, layers=layers), rates))


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_equals_a_hook_on_the_input_channels(checkpoint_of, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    widths = {block: loaded.anatomy.width(f"{block}_in") for block in ("attn", "mlp")}
    halves = [responses(width, pairs=9, seed=i) for i, width in enumerate(widths.values())]
    rates = {block: momentum_rates(*both) for block, both in zip(widths, halves, strict=True)}
    plan = plan_of(loaded, rates, channels=40, alpha=1.5)
    factors = {block: torch.ones(3, width) for block, width in widths.items()}
    for layer, number, channel, gamma in naive(halves, 40, 1.5, range(3)):
        factors[("attn", "mlp")[number]][layer, channel] = 1 + gamma

    def reader_of(block, layer):
        def read(values, routed):
            factor = factors[block][layer]
            if routed is not None:
                width = loaded.anatomy.expert_width
                factor = factor[routed.expert * width : (routed.expert + 1) * width]
            return values * factor

        return read

    readers = {(f"{block}_in", layer): reader_of(block, layer) for block in widths for layer in range(3)}
    with site_hooks(loaded.anatomy, readers):
        expected = logits(loaded)
    with applied(loaded, plan):
        result = logits(loaded)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result - logits(loaded)).abs().max() > 0.01
    assert {edit.block for edit in plan.edits} == {"attn", "mlp"}
    for edit in plan.edits:
        factor = factors[edit.block][edit.layer]
        width = loaded.anatomy.component_width(edit.block, edit.layer)
        assert edit.components == tuple((factor != 1).view(-1, width).any(1).nonzero()[:, 0].tolist())
        torch.testing.assert_close(edit.column_scale, factor)


def test_the_plan_lists_its_changes(llama):
    rates = {"attn": momentum_rates(*responses(64)), "mlp": momentum_rates(*responses(48, seed=9))}
    plan = plan_of(llama, rates, ("qab", "qac"), [0, 2], channels=12, alpha=-0.5)
    counts = dict.fromkeys(rates, 0)
    for edit in plan.edits:
        assert edit.layer in (0, 2)
        layer = llama.model.model.layers[edit.layer]
        module = layer.self_attn.o_proj if edit.block == "attn" else layer.mlp.down_proj
        weight = module.weight.double()
        change = edit.apply(weight) - weight
        counts[edit.block] += int(change.any(0).sum())
        assert edit.notes["change_norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
    assert sum(counts.values()) == 12
    assert plan.metadata["settings"]["channels"] == {k: n for k, n in counts.items() if n}
    assert (plan.metadata["source"], plan.metadata["target"]) == ("qab", "qac")
    assert (CHANNELS, ALPHA) == (100, 1.0)


def test_a_scaled_plan_scales_gamma(llama):
    rates = {"mlp": momentum_rates(*responses(48))}
    scaled = plan_of(llama, rates, channels=9, alpha=1.5).scaled(-2.0)
    expected = plan_of(llama, rates, channels=9, alpha=-3.0)
    for a, b in zip(scaled.edits, expected.edits, strict=True):
        torch.testing.assert_close(a.column_scale, b.column_scale)
        torch.testing.assert_close(a.details["factor"], b.details["factor"])
        assert a.notes == pytest.approx(b.notes)
    assert scaled.metadata["settings"]["strength"] == -2.0


@pytest.fixture(scope="module")
def parallel():
    """Line 1 has no text in the first language, line 3 none in the second."""
    texts = {language: models.sentences(language, 6, 3, (1, 9)) for language in models.LANGUAGES}
    texts["qaa"][1] = texts["qab"][3] = ""
    return Corpus({language: tuple(lines) for language, lines in texts.items()}, "digest", "all")


def test_rates_of_a_corpus_are_those_of_its_pairs(llama, parallel):
    result = corpus_rates(llama, parallel, "qab", "qaa")
    steps = {"attn": [], "mlp": []}
    for line in (0, 2, 4, 5):
        means = {}
        for language in ("qaa", "qab"):
            text = parallel.texts[language][line]
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(llama.model, ids)
            means[language] = {
                block: torch.stack(
                    [
                        sum(layer[f"{block}_in"][p].detach() for p in range(1, len(ids))) / (len(ids) - 1)
                        for layer in layers
                    ]
                )
                for block in steps
            }
        for block, of_block in steps.items():
            of_block.append(means["qaa"][block] - means["qab"][block])
    for block, of_block in steps.items():
        step = torch.stack(of_block)
        assert step.abs().min() > 1e-7  # no sign hangs on rounding
        assert torch.equal(result[block].rate_up, (step > 0).double().mean(0))
        assert torch.equal(result[block].rate_down, (step < 0).double().mean(0))
        torch.testing.assert_close(result[block].difference, step.abs().mean(0), rtol=1e-3, atol=1e-4)
    assert tuple(result["attn"].rate_up.shape) == (3, 64)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_rates_of_statistics_are_those_of_the_corpus(checkpoint_of, parallel, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    statistics = record(loaded, language_batches(loaded, parallel), ["mlp_in:responses"])
    result = neuron_rates(loaded, statistics, "qab", "qaa")
    done = []
    expected = corpus_rates(loaded, parallel, "qab", "qaa", ["mlp"], done.append)
    assert list(expected) == ["mlp"]
    for name in ("rate_up", "rate_down", "difference"):
        assert torch.equal(getattr(result, name), getattr(expected["mlp"], name))
    assert sum(done) == int(statistics.tokens[:2].sum())


def test_swapped_languages_swap_the_rates(llama, parallel):
    there, back = (corpus_rates(llama, parallel, *pair) for pair in (("qaa", "qac"), ("qac", "qaa")))
    for block in ("attn", "mlp"):
        assert torch.equal(there[block].rate_up, back[block].rate_down)
        assert there[block].rate_up.max() == 1


def test_refuses_languages_that_do_not_pair(llama, parallel):
    with pytest.raises(UsageError, match="'xx'"):
        corpus_rates(llama, parallel, "qaa", "xx")
    with pytest.raises(UsageError, match="both 'qaa'"):
        corpus_rates(llama, parallel, "qaa", "qaa")
    with pytest.raises(UsageError, match="gate"):
        corpus_rates(llama, parallel, "qaa", "qab", ["gate"])
    apart = Corpus({"qaa": ("abe cab", ""), "qab": ("", "high him")}, "digest", "all")
    with pytest.raises(UsageError, match=r"'qaa'.*'qab'"):
        corpus_rates(llama, apart, "qaa", "qab")
    silent = Corpus({"qaa": ("abe cab",), "qab": ("",)}, "digest", "all")
    with pytest.raises(UsageError, match="'qab' has no text"):
        corpus_rates(llama, silent, "qaa", "qab")
    statistics = record(llama, language_batches(llama, parallel), ["mlp_in:text_mean"])
    with pytest.raises(UsageError, match="no responses"):
        neuron_rates(llama, statistics, "qaa", "qab")


def test_refuses_too_many_texts(llama, parallel, monkeypatch):
    # 10 texts of 4 bytes * 3 layers * 112 channels.
    monkeypatch.setattr(austeer_module, "MAX_RESPONSE_BYTES", 10 * 4 * 3 * 112 - 1)
    with pytest.raises(UsageError, match="at most 4 lines"):
        corpus_rates(llama, parallel, "qaa", "qab")
    assert corpus_rates(llama, parallel, "qaa", "qab", ["mlp"])


def test_refuses_statistics_of_another_model(llama, checkpoint_of, parallel):
    other = load_model(str(checkpoint_of("qwen3")), device="cpu")
    statistics = record(other, language_batches(other, parallel), ["mlp_in:responses"])
    with pytest.raises(BrocaError, match="the statistics: made for the model"):
        neuron_rates(llama, statistics, "qaa", "qab")
