"""Contrastive gradient x activation: the score from its formula, the recording from plain autograd."""

import math
import random

import models
import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.recording.record import record
from neurons.scorers.gradient_contrast import gradient_contrast
from neurons.scorers.selection import Selection, select
from neurons.text.batches import TokenBatch, packed_batches, text_batches


def naive_contrast(attribution, tokens, top_rate):
    """(S, score, kept) by loops; S and score as {(layer, neuron): [a number a language]}."""
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


def chosen(scores, top_rate):
    """Each language's neurons, the best first."""
    found = select(scores, Selection(scope="language", top_rate=top_rate))
    return [[tuple(row) for row in of.rows.tolist()] for of in found]


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 4), chooser.randint(10, 40), chooser.randint(2, 7)
    tokens = [chooser.randint(10, 10**6) for _ in range(languages)]
    attribution = [
        [[n * chooser.random() ** 4 * (1 + k) for k, n in enumerate(tokens)] for _ in range(width)]
        for _ in range(layers)
    ]
    dead = {(chooser.randrange(layers), chooser.randrange(width)) for _ in range(3)}
    for layer, neuron in dead:
        attribution[layer][neuron] = [0.0] * languages
    rate = chooser.uniform(0.05, 1)
    result = gradient_contrast(torch.tensor(attribution, dtype=torch.float64), torch.tensor(tokens))
    share, score, kept = naive_contrast(attribution, tokens, rate)
    for (layer, neuron), expected in share.items():
        total = sum(expected)
        parts = [0.0] * languages if (layer, neuron) in dead else [s / total for s in expected]
        assert result.exclusivity[layer, neuron].tolist() == pytest.approx(parts, rel=1e-10)
        assert result.values[layer, neuron].tolist() == pytest.approx(score[layer, neuron], abs=1e-14)
        assert result.member[layer, neuron].tolist() == [s > 0 for s in score[layer, neuron]]
    assert result.values.dtype == result.exclusivity.dtype == torch.float64
    assert chosen(result, rate) == kept


def test_ties_are_ordered_by_layer_then_neuron_and_no_neuron_scores_for_a_shared_lead():
    attribution = torch.ones(2, 4, 3, dtype=torch.float64)
    attribution[0, 1, 0] = attribution[1, 0, 0] = attribution[1, 3, 0] = 2
    attribution[0, 2] = torch.tensor([1, 3, 3])
    attribution[1, 1, 1:] = 1.5  # keeps the totals alike
    result = gradient_contrast(attribution, torch.ones(3, dtype=torch.int64))
    found = chosen(result, 0.25)
    assert found[0] == [(0, 1), (1, 0)]
    assert result.values[0, 2, 1] == result.values[0, 2, 2] == 0
    assert (0, 2) not in found[1] + found[2]


def test_many_ties_keep_the_first_neurons():
    attribution = torch.ones(3, 48, 2, dtype=torch.float64)
    attribution[:, ::2, 0] = 2
    attribution[:, 1::2, 1] = 2
    attribution[2, 6, 0], attribution[0, 9, 1] = 3, 3
    found = chosen(gradient_contrast(attribution, torch.tensor([5, 5])), 41 / 144)
    even = [(layer, neuron) for layer in range(3) for neuron in range(0, 48, 2)]
    odd = [(layer, neuron) for layer in range(3) for neuron in range(1, 48, 2) if (layer, neuron) != (0, 9)]
    assert found[0] == [(2, 6), *[place for place in even if place != (2, 6)][:40]]
    assert found[1] == [(0, 9), *odd[:40]]


def test_only_neurons_above_the_runner_up_are_kept():
    attribution = torch.tensor([[[1.0, 3.0], [1.0, 3.0], [2.0, 1.0]]], dtype=torch.float64)
    result = gradient_contrast(attribution, torch.tensor([1, 1]))
    assert chosen(result, 1.0) == [[(0, 2)], [(0, 0), (0, 1)]]
    # S is 1/4 1/4 1/2 for the first language and 3/7 3/7 1/7 for the second.
    assert result.exclusivity[0, :, 0].tolist() == pytest.approx([7 / 19, 7 / 19, 7 / 9])


def test_a_language_with_a_larger_loss_or_more_tokens_wins_nothing_by_that():
    attribution = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = gradient_contrast(attribution, torch.tensor([7, 7, 7]))
    scaled = gradient_contrast(attribution * torch.tensor([1.0, 50.0, 3.0]), torch.tensor([7, 70, 700]))
    assert chosen(plain, 0.2) == chosen(scaled, 0.2)
    torch.testing.assert_close(plain.values, scaled.values)
    torch.testing.assert_close(plain.exclusivity, scaled.exclusivity)


def test_refusals():
    ones, tokens = torch.ones(1, 5, 2, dtype=torch.float64), torch.tensor([3, 3])
    with pytest.raises(UsageError, match="at least two"):
        gradient_contrast(ones[..., :1], tokens[:1])
    with pytest.raises(UsageError, match="language number 2 has no attribution"):
        gradient_contrast(ones * torch.tensor([1.0, 0.0]), tokens)
    with pytest.raises(UsageError, match="number 2 has no tokens"):
        gradient_contrast(ones, torch.tensor([3, 0]))
    with pytest.raises(BrocaError, match="neuron 0 in layer 0"):
        gradient_contrast(ones * torch.tensor([1.0, torch.inf]), tokens)
    with pytest.raises(BrocaError, match="negative"):
        gradient_contrast(-ones, tokens)


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
    ids = llama.tokenizer("hill milk jig un")["input_ids"][:8]
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
        monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", tokens_a_batch)
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


def hooks(model):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]


def test_recording_leaves_no_gradient_and_no_hook_behind(llama):
    batches = {"qaa": text_batches(models.sentences("qaa", 4), llama.tokenizer, 32)}
    # transformers leaves hooks of its own behind once somebody has asked it for hidden states.
    before = hooks(llama.model)
    record(llama, batches, ["mlp_in:attribution"])
    assert all(p.grad is None and not p.requires_grad for p in llama.model.parameters())
    assert hooks(llama.model) == before
