"""Gradient x activation: means over tokens, by loops and by cases whose answer is known."""

import random

import models
import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.record import record
from neurons.scorers.gradient import HeadGradient, gradient
from neurons.scorers.selection import Selection, select
from neurons.text.batches import text_batches


def chosen(scores, **settings):
    return [[tuple(row) for row in of.rows.tolist()] for of in select(scores, Selection(**settings))]


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula(seed, experts):
    chooser = random.Random(seed)
    layers, width, languages = chooser.randint(1, 4), chooser.randint(10, 40), chooser.randint(1, 6)
    tokens = [chooser.randint(10, 10**6) for _ in range(languages)]
    seen = [
        [[chooser.randint(0, n) if experts else n for n in tokens] for _ in range(width)]
        for _ in range(layers)
    ]
    sums = [
        [[n * chooser.random() ** 4 if n and chooser.random() < 0.9 else 0.0 for n in row] for row in rows]
        for rows in seen
    ]
    result = gradient(
        torch.tensor(sums, dtype=torch.float64), torch.tensor(seen) if experts else torch.tensor(tokens)
    )
    mean = {}
    for layer in range(layers):
        for neuron in range(width):
            row = [s / n if n else 0.0 for s, n in zip(sums[layer][neuron], seen[layer][neuron], strict=True)]
            mean[layer, neuron] = row
            total = sum(row)
            assert result.values[layer, neuron].tolist() == pytest.approx(row, rel=1e-14)
            assert result.member[layer, neuron].tolist() == [r > 0 for r in row]
            parts = [r / total if total else 0.0 for r in row]
            assert result.exclusivity[layer, neuron].tolist() == pytest.approx(parts, rel=1e-12)
    for k, found in enumerate(chosen(result, top_rate=0.2)):
        order = sorted(
            (place for place in mean if mean[place][k] > 0), key=lambda place: (-mean[place][k], place)
        )
        assert found == order[: round(0.2 * layers * width)]


def test_a_shared_neuron_is_first_for_all_and_exclusivity_takes_it_away():
    sums = torch.tensor([[[90.0, 900.0], [30.0, 10.0], [1.0, 400.0], [0.0, 0.0]]], dtype=torch.float64)
    result = gradient(sums, torch.tensor([10, 100]))
    assert chosen(result, top_rate=0.5) == [[(0, 0), (0, 1)], [(0, 0), (0, 2)]]
    assert chosen(result, top_rate=0.5, min_exclusivity=0.6) == [[(0, 1)], [(0, 2)]]
    assert chosen(result, top_rate=1.0)[0] == [(0, 0), (0, 1), (0, 2)]  # a neuron that does nothing is out


def test_refusals():
    ones, tokens = torch.ones(2, 5, 3, dtype=torch.float64), torch.tensor([3, 3, 3])
    with pytest.raises(UsageError, match="number 3 has no tokens"):
        gradient(ones, torch.tensor([3, 3, 0]))
    with pytest.raises(UsageError, match="number 1 has no tokens"):
        gradient(ones, torch.ones(2, 5, 3, dtype=torch.int64) * torch.tensor([0, 1, 1]))
    ones[1, 4, 2] = torch.nan
    with pytest.raises(BrocaError, match="neuron 4 in layer 1"):
        gradient(ones, tokens)
    ones[1, 4, 2] = -1
    with pytest.raises(BrocaError, match="negative"):
        gradient(ones, tokens)


def naive_head_attribution(model, ids, counted):
    """[L, A]: |sum over a head's channels of x * dLoss/dx|, summed over the counted positions of one text."""
    logits, layers = models.naive_llama(model, ids)
    at = [layer["attn_in"] for layer in layers]
    gradients = torch.autograd.grad(models.naive_loss(logits, ids), at)
    heads = model.config.num_attention_heads
    width = at[0].shape[1] // heads
    found = torch.zeros(len(layers), heads, dtype=torch.float64)
    for layer, (values, gradient_of) in enumerate(zip(at, gradients, strict=True)):
        for head in range(heads):
            for position in counted:
                effect = 0.0
                for c in range(head * width, (head + 1) * width):
                    effect += float(values[position, c].detach() * gradient_of[position, c])
                found[layer, head] += abs(effect)
    return found


def test_the_attribution_of_heads_equals_loops_over_channels(llama):
    texts = {language: models.sentences(language, 4, seed=3) for language in models.LANGUAGES[:2]}
    batches = {k: text_batches(of, llama.tokenizer, 64, tokens_a_batch=50) for k, of in texts.items()}
    statistics = record(llama, batches, ["attn_in:attribution", "mlp_in:attribution"])
    found = statistics.moment("attn_in:attribution")
    assert found.shape == (3, 2, 2) and found.dtype == torch.float64
    for k, of_language in enumerate(batches.values()):
        expected = torch.zeros(3, 2, dtype=torch.float64)
        for batch in of_language:
            for ids, attention, counted in zip(batch.ids, batch.attention, batch.counted, strict=True):
                expected += naive_head_attribution(
                    llama.model, ids[attention].tolist(), counted.nonzero()[:, 0].tolist()
                )
        torch.testing.assert_close(found[..., k], expected, rtol=1e-4, atol=1e-6)
        assert expected.min() > 1e-4
    scores = HeadGradient().scores(statistics, 0.5)
    torch.testing.assert_close(scores.values, found / statistics.tokens, rtol=1e-14, atol=0)
    alone = record(llama, batches, ["attn_in:attribution"]).moment("attn_in:attribution")
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss", "qwen3_moe"])
def test_the_attribution_is_the_slope_of_the_loss_in_a_heads_factor(family, checkpoint_of):
    """Of one text with one counted token: |d loss / d factor| of the head's columns at that token alone."""
    from neurons.architectures.sites import site_hooks
    from neurons.recording.record import loss_sum

    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    (batch,) = text_batches(["high milk jim"], loaded.tokenizer, 64)
    batch.counted[:, 3:] = False
    batch.counted[:, 2] = True
    batch.counted[:, 1] = False
    found = record(loaded, {"qab": [batch]}, ["attn_in:attribution"]).moment("attn_in:attribution")
    counts, on_device = loaded.anatomy.unit_counts("head"), batch.to(loaded.device)
    assert counts == (2, 2, 2)
    for layer, head in ((0, 1), (2, 0)):
        columns = loaded.anatomy.unit_columns("head", torch.tensor([[layer, head]]))[:, 1]

        def loss(factor, layer=layer, columns=columns):
            def scaled(values, routed):
                values = values.clone()
                values[0, 2, columns] *= factor
                return values

            with site_hooks(loaded.anatomy, {("attn_in", layer): scaled}), torch.no_grad():
                return float(loss_sum(loaded.model, on_device).double())

        slope = (loss(1.05) - loss(0.95)) / 0.1
        assert float(found[layer, head, 0]) == pytest.approx(abs(slope), rel=2e-2, abs=2e-5)
