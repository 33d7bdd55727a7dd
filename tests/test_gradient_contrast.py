"""Contrastive gradient x activation: the score from its formula, the recording from plain autograd."""

import math
import random

import models
import pytest
import torch

from neurons.batches import TokenBatch, packed_batches, text_batches
from neurons.errors import UsageError
from neurons.recording import record
from neurons.scorers.gradient_contrast import TOP_RATE, gradient_contrast


def naive_contrast(attribution, tokens, top_rate):
    """(share, score, kept) by loops; share and score as {(layer, neuron): [a number a language]}."""
    layers, width, languages = len(attribution), len(attribution[0]), len(tokens)
    everywhere = [(layer, neuron) for layer in range(layers) for neuron in range(width)]
    share = {place: [0.0] * languages for place in everywhere}
    for k in range(languages):
        mean = {(layer, j): attribution[layer][j][k] / tokens[k] for layer, j in everywhere}
        total = math.fsum(mean.values())
        for place in everywhere:
            share[place][k] = mean[place] / total
    score = {place: [own - max(s[:k] + s[k + 1 :]) for k, own in enumerate(s)] for place, s in share.items()}
    kept = []
    for k in range(languages):
        order = sorted(everywhere, key=lambda place: (-score[place][k], place))
        kept.append([place for place in order[: round(top_rate * len(everywhere))] if score[place][k] > 0])
    return share, score, kept


def places(rows):
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 4), chooser.randint(10, 40), chooser.randint(2, 7)
    tokens = [chooser.randint(10, 10**6) for _ in range(languages)]
    attribution = [
        [[n * chooser.random() ** 4 * (1 + k) for k, n in enumerate(tokens)] for _ in range(width)]
        for _ in range(layers)
    ]
    for _ in range(3):
        attribution[chooser.randrange(layers)][chooser.randrange(width)] = [0.0] * languages
    rate = chooser.uniform(0.05, 1)
    result = gradient_contrast(torch.tensor(attribution, dtype=torch.float64), torch.tensor(tokens), rate)
    share, score, kept = naive_contrast(attribution, tokens, rate)
    for (layer, neuron), expected in share.items():
        assert result.share[layer, neuron].tolist() == pytest.approx(expected, rel=1e-10)
        assert result.score[layer, neuron].tolist() == pytest.approx(score[layer, neuron], abs=1e-14)
    assert [places(rows) for rows in result.kept] == kept


def test_ties_are_ordered_by_layer_then_neuron_and_no_neuron_scores_for_a_shared_lead():
    attribution = torch.ones(2, 4, 3, dtype=torch.float64)
    attribution[0, 1, 0] = attribution[1, 0, 0] = attribution[1, 3, 0] = 2
    attribution[0, 2] = torch.tensor([1, 3, 3])
    attribution[1, 1, 1:] = 1.5  # keeps the totals alike
    result = gradient_contrast(attribution, torch.ones(3, dtype=torch.int64), top_rate=0.25)
    assert places(result.kept[0]) == [(0, 1), (1, 0)]
    assert result.score[0, 2, 1] == result.score[0, 2, 2] == 0
    assert (0, 2) not in places(result.kept[1]) + places(result.kept[2])


def test_many_ties_keep_the_first_neurons():
    attribution = torch.ones(3, 48, 2, dtype=torch.float64)
    attribution[:, ::2, 0] = 2
    attribution[:, 1::2, 1] = 2
    attribution[2, 6, 0], attribution[0, 9, 1] = 3, 3
    result = gradient_contrast(attribution, torch.tensor([5, 5]), top_rate=41 / 144)
    even = [(layer, neuron) for layer in range(3) for neuron in range(0, 48, 2)]
    odd = [(layer, neuron) for layer in range(3) for neuron in range(1, 48, 2) if (layer, neuron) != (0, 9)]
    assert places(result.kept[0]) == [(2, 6), *even[:40]]
    assert places(result.kept[1]) == [(0, 9), *odd[:40]]


def test_only_neurons_above_the_runner_up_are_kept():
    attribution = torch.tensor([[[1.0, 3.0], [1.0, 3.0], [2.0, 1.0]]], dtype=torch.float64)
    result = gradient_contrast(attribution, torch.tensor([1, 1]), top_rate=1.0)
    assert [places(rows) for rows in result.kept] == [[(0, 2)], [(0, 0), (0, 1)]]
    assert result.share.sum((0, 1)).tolist() == pytest.approx([1, 1])


def test_a_language_with_a_larger_loss_or_more_tokens_wins_nothing_by_that():
    attribution = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = gradient_contrast(attribution, torch.tensor([7, 7, 7]), 0.2)
    scaled = gradient_contrast(attribution * torch.tensor([1.0, 50.0, 3.0]), torch.tensor([7, 70, 700]), 0.2)
    assert [places(rows) for rows in plain.kept] == [places(rows) for rows in scaled.kept]
    torch.testing.assert_close(plain.score, scaled.score)


def test_refusals():
    ones, tokens = torch.ones(1, 5, 2, dtype=torch.float64), torch.tensor([3, 3])
    assert TOP_RATE == 0.01
    with pytest.raises(UsageError, match="at least two"):
        gradient_contrast(ones[..., :1], tokens[:1])
    for rate in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(UsageError, match="top rate"):
            gradient_contrast(ones, tokens, rate)
    with pytest.raises(UsageError, match="no attribution"):
        gradient_contrast(ones * torch.tensor([1.0, 0.0]), tokens)
    with pytest.raises(UsageError, match="no tokens"):
        gradient_contrast(ones * torch.tensor([1.0, 0.0]), torch.tensor([3, 0]))


# --- the recording -------------------------------------------------------------------------------


def naive_attribution(model, row, counted):
    """Sum over the counted positions of one row of |h * dLoss/dh|, [layers, neurons], by autograd."""
    logits, layers = models.naive_llama(model, row)
    for layer in layers:
        layer["mlp_in"].retain_grad()
    models.naive_loss(logits, row).backward()
    products = [(layer["mlp_in"] * layer["mlp_in"].grad).detach().abs() for layer in layers]
    return torch.stack([product[counted].sum(0) for product in products])


def rows_of(batches):
    """(tokens without padding, which are counted) of every row."""
    for batch in batches:
        for ids, attention, counted in zip(batch.ids, batch.attention, batch.counted, strict=True):
            yield ids[attention].tolist(), counted[attention]


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_recording_equals_plain_autograd(llama, kind):
    batches = {}
    for language in ("qab", "qaa"):
        texts = models.sentences(language, 9, seed=5)
        if kind == "packed":
            batches[language] = packed_batches(texts, llama.tokenizer, 20, language)
        else:
            batches[language] = text_batches(texts, llama.tokenizer, 24)
            assert any(batch.padded for batch in batches[language])
    statistics = record(llama, batches, ["mlp_in:attribution"])
    found = statistics.moments["mlp_in:attribution"]
    assert found.dtype == torch.float64
    for k, language in enumerate(batches):
        expected = sum(naive_attribution(llama.model, *row) for row in rows_of(batches[language]))
        torch.testing.assert_close(found[..., k], expected, rtol=1e-4, atol=1e-6)
        assert expected.min() > 1e-4


def test_recording_equals_finite_differences(llama):
    ids = [llama.tokenizer.bos_token_id, *llama.tokenizer("hill milk jig un")["input_ids"][:7]]
    counted = torch.tensor([[False] + [True] * (len(ids) - 1)])
    batch = TokenBatch(torch.tensor([ids]), torch.ones_like(counted), counted)
    found = record(llama, {"qab": [batch]}, ["mlp_in:attribution"]).moments["mlp_in:attribution"]
    _, layers = models.naive_llama(llama.model, ids)
    step = 1e-4
    for layer, neuron in [(0, 3), (1, 47), (2, 20)]:
        total = 0.0
        for position in range(1, len(ids)):
            losses = []
            for by in (step, -step):
                logits, _ = models.naive_llama(llama.model, ids, {(layer, position, neuron): by})
                losses.append(float(models.naive_loss(logits, ids).detach()))
            slope = (losses[0] - losses[1]) / (2 * step)
            total += abs(float(layers[layer]["mlp_in"][position, neuron].detach()) * slope)
        assert float(found[layer, neuron, 0]) == pytest.approx(total, rel=1e-4)


def test_recording_does_not_depend_on_the_batch_size(llama, monkeypatch):
    texts = models.sentences("qac", 8, seed=6)

    def recorded(tokens_a_batch):
        monkeypatch.setattr("neurons.batches.TOKENS_A_BATCH", tokens_a_batch)
        batches = {
            "packed": packed_batches(texts, llama.tokenizer, 16, "qac"),
            "padded": text_batches(texts, llama.tokenizer, 64),
        }
        assert all((len(b) > 1) == (tokens_a_batch < 4096) for b in batches.values())
        return record(llama, batches, ["mlp_in:attribution"])

    large, small, single = recorded(4096), recorded(50), recorded(1)
    for other in (small, single):
        assert other.tokens.tolist() == large.tokens.tolist()
        assert other.texts.tolist() == large.texts.tolist()
        torch.testing.assert_close(
            other.moments["mlp_in:attribution"], large.moments["mlp_in:attribution"], rtol=1e-4, atol=1e-6
        )


def test_recording_leaves_no_gradient_and_no_hook_behind(llama):
    batches = {"qaa": text_batches(models.sentences("qaa", 4), llama.tokenizer, 32)}
    record(llama, batches, ["mlp_in:attribution"])
    assert all(p.grad is None and not p.requires_grad for p in llama.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
