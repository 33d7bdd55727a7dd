"""Training of autoencoders against steps by hand, planted features, and sampled states against a llama by hand."""

import models
import pytest
import torch

from editing.directions.sae_recording import sampled_states, text_codes
from editing.directions.sae_training import SaeTraining, train_autoencoder
from neurons.errors import BrocaError, UsageError
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus


def naive_training(states, training):
    """(W, b) in float64: gradients written out for one state at a time, and Adam's steps."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    trained_on = unit[[i for i in range(len(unit)) if i % 10]]
    generator = torch.Generator().manual_seed(training.seed)
    weight = torch.randn(unit.shape[1], training.features, generator=generator).double()
    weight /= weight.norm(dim=0)
    bias = torch.zeros(training.features).double()
    first, second = ([torch.zeros_like(weight), torch.zeros_like(bias)] for _ in range(2))
    for step in range(1, training.epochs + 1):
        torch.randperm(len(trained_on), generator=generator)  # one batch: the order does not matter
        slopes = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for x in trained_on:
            z = (x @ weight + bias).clamp(min=0)
            missed = weight @ z - x
            through = torch.where(z > 0, 2 * missed @ weight + training.l1, 0.0)
            slopes[0] += (torch.outer(x, through) + 2 * torch.outer(missed, z)) / len(trained_on)
            slopes[1] += through / len(trained_on)
        for at, parameter in enumerate((weight, bias)):
            first[at] = 0.9 * first[at] + 0.1 * slopes[at]
            second[at] = 0.999 * second[at] + 0.001 * slopes[at] ** 2
            mean, square = first[at] / (1 - 0.9**step), second[at] / (1 - 0.999**step)
            parameter -= training.rate * mean / (square.sqrt() + 1e-8)
        weight /= weight.norm(dim=0)
    return weight, bias, unit


def test_training_equals_steps_by_hand():
    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * 3
    training = SaeTraining(features=9, l1=0.05, rate=0.02, epochs=4, seed=3)
    done = []
    found, figures = train_autoencoder(states, 5, training, done.append)
    weight, bias, unit = naive_training(states, training)
    torch.testing.assert_close(found.encoder.double(), weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.encoder_bias.double(), bias, rtol=0, atol=1e-5)
    assert torch.equal(found.decoder, found.encoder.T) and not found.decoder_bias.any()
    assert (found.layer, found.site, found.unit, sum(done)) == (5, "block_out", True, 4)
    tested = unit[::10]
    z = (tested @ weight + bias).clamp(min=0)
    spread = ((tested - tested.mean(0)) ** 2).sum()
    assert figures.states == 36
    assert figures.unexplained == pytest.approx(
        float(((tested - z @ weight.T) ** 2).sum() / spread), rel=1e-4
    )
    assert figures.active == pytest.approx(float((z > 0).sum()) / 4)
    assert figures.dead == int(((unit @ weight + bias).clamp(min=0).sum(0) == 0).sum())


def test_recovers_planted_features():
    generator = torch.Generator().manual_seed(0)
    d, planted, count = 32, 12, 3000
    directions = torch.randn(planted, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    active = torch.rand(count, planted, generator=generator) < 0.1
    active[torch.arange(count), torch.randint(planted, (count,), generator=generator)] = True
    codes = active * (0.5 + torch.rand(count, planted, generator=generator))
    found, figures = train_autoencoder(codes @ directions, 0, SaeTraining(24, l1=0.1, rate=5e-3, epochs=100))
    cosines = directions @ found.encoder
    assert float(cosines.max(1).values.min()) > 0.9
    assert len(set(cosines.argmax(1).tolist())) == planted
    untrained = train_autoencoder(codes @ directions, 0, SaeTraining(24, epochs=0))[0]
    assert float((directions @ untrained.encoder).max(1).values.min()) < 0.6
    assert figures.unexplained < 0.1


def test_refuses_too_few_states():
    with pytest.raises(BrocaError, match="19 states"):
        train_autoencoder(torch.randn(19, 4), 0, SaeTraining(3))
    with pytest.raises(BrocaError, match="do not differ"):
        train_autoencoder(torch.ones(20, 4), 0, SaeTraining(3, epochs=1))


@pytest.fixture(scope="module")
def texts():
    made = {language: tuple(models.sentences(language, 6, 3, (1, 9))) for language in models.LANGUAGES}
    # Longer than the context of 128 tokens: two rows of one text.
    made["qab"] = (*made["qab"][:3], "", " ".join(models.sentences("qab", 14, 9, (9, 12))), *made["qab"][3:])
    return Corpus(made, "digest", "all")


def naive_states(llama, text):
    """layer -> the residual stream at the counted tokens of a text, by a model written out by hand."""
    ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    states = [[] for _ in range(3)]
    for first in range(0, len(ids), 127):
        _, layers = models.naive_llama(llama.model, [0, *ids[first : first + 127]])
        for of_layer, values in zip(states, layers, strict=True):
            of_layer.append(values["block_out"].detach()[1:])
    return [torch.cat(of_layer) for of_layer in states]


def test_samples_as_many_states_of_each_language(llama, texts):
    batches = language_batches(llama, texts)
    by_hand = [
        [
            torch.cat(parts)
            for parts in zip(*(naive_states(llama, text) for text in texts.texts[k] if text), strict=True)
        ]
        for k in models.LANGUAGES
    ]
    all_states = [torch.cat([of_language[layer] for of_language in by_hand]) for layer in range(3)]

    def apart(states):
        return torch.cdist(states.double(), all_states[2], compute_mode="donot_use_mm_for_euclid_dist")

    # Texts that begin alike have equal states: the first of them stands for all.
    alike = (apart(all_states[2]) < 1e-6).int().argmax(1)

    def places_of(states):
        return alike[apart(states).argmin(1)]

    found = sampled_states(llama, batches, [0, 2], 61, seed=4)
    assert found.shape == (2, 60, 64)
    places = places_of(found[1])
    for states, layer in zip(found, (0, 2), strict=True):
        torch.testing.assert_close(states.double(), all_states[layer][places], rtol=1e-4, atol=1e-4)
    total = alike.bincount(minlength=len(alike))
    assert bool((places.bincount(minlength=len(alike)) <= total).all())
    bounds = torch.tensor([len(of_language[0]) for of_language in by_hand]).cumsum(0)
    owners = torch.bucketize(places, bounds, right=True)
    assert owners.bincount().tolist() == [20, 20, 20] and len(owners.unique_consecutive()) > 6
    assert torch.equal(found, sampled_states(llama, batches, [0, 2], 61, seed=4))
    assert not torch.equal(found, sampled_states(llama, batches, [0, 2], 61, seed=5))
    # A short language gives all it has.
    (every,) = sampled_states(llama, batches, [2], 3 * 10**6)
    assert torch.equal(places_of(every).bincount(minlength=len(alike)), total)
    with pytest.raises(UsageError, match="fewer states than languages"):
        sampled_states(llama, batches, [1], 2)


def test_codes_are_means_over_a_text(llama, texts):
    states = sampled_states(llama, language_batches(llama, texts), [1], 10**6)[0]
    sae, _ = train_autoencoder(states, 1, SaeTraining(20, epochs=3))
    chosen = torch.tensor([3, 11, 17])
    lines, (codes,) = text_codes(llama, language_batches(llama, texts)["qab"], [sae], [chosen])
    assert lines.tolist() == [0, 1, 2, 4, 5, 6, 7]
    for line, code in zip(lines.tolist(), codes, strict=True):
        rows = naive_states(llama, texts.texts["qab"][line])[1]
        total = [0.0] * 3
        for h in rows:
            for f, feature in enumerate(chosen):
                before = float(
                    h @ sae.encoder[:, feature].double() / h.norm() + sae.encoder_bias[feature].double()
                )
                total[f] += max(before, 0.0) * float(h.norm())
        torch.testing.assert_close(code, torch.tensor(total).double() / len(rows), rtol=1e-4, atol=1e-4)
