"""Shapley values of heads against the exact values from all 64 sets of heads of a tiny model, in float64."""

import copy
import itertools
import math

import models
import pytest
import torch

from neurons.ablation import shapley
from neurons.ablation.conditions import InMemory
from neurons.ablation.shapley import marginal_values, record_shapley
from neurons.architectures.anatomy import anatomy_of
from neurons.models.source import load_model
from neurons.neuron_sets.identify import neurons_from
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.head_shapley import HeadShapley
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

LAYERS, HEADS = 2, 3
PLAYERS = LAYERS * HEADS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two layers of three heads."""
    directory = models.build_checkpoint(
        tmp_path_factory.mktemp("heads"),
        hidden_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=16,
    )
    return load_model(str(directory), device="cpu")


@pytest.fixture(scope="module")
def text():
    return Corpus({k: tuple(models.sentences(k, 3, seed=4)) for k in models.LANGUAGES[:2]}, "", "all")


def naive_value(loaded, batches, removed):
    """v without heads, by number: o_proj's columns zeroed in a float64 copy, one text at a time."""
    model = copy.deepcopy(loaded.model).double()
    exact = anatomy_of(model)
    for player in removed:
        layer, head = divmod(player, HEADS)
        exact.columns(layer, "attn", slice(16 * head, 16 * (head + 1))).zero_()
    loss, tokens = 0.0, 0
    for batch in batches:
        for ids, attention in zip(batch.ids, batch.attention, strict=True):
            ids = ids[attention].long()
            with torch.no_grad():
                loss += float(models.naive_loss(model(input_ids=ids[None]).logits[0], ids.tolist()))
            tokens += len(ids) - 1
    return -loss / tokens


@pytest.fixture(scope="module")
def values(tiny, text):
    """Language -> set of removed heads -> v, of all sets."""
    batches = language_batches(tiny, text)
    return {
        language: {
            frozenset(removed): naive_value(tiny, of_language, removed)
            for size in range(PLAYERS + 1)
            for removed in itertools.combinations(range(PLAYERS), size)
        }
        for language, of_language in batches.items()
    }


def exact_shapley(value):
    """phi by its formula: a weighted sum over all sets of other players that are present."""
    everyone = frozenset(range(PLAYERS))
    found = []
    for player in range(PLAYERS):
        total = 0.0
        for size in range(PLAYERS):
            weight = math.factorial(size) * math.factorial(PLAYERS - size - 1) / math.factorial(PLAYERS)
            for present in itertools.combinations(everyone - {player}, size):
                absent = everyone - set(present)
                total += weight * (value[absent - {player}] - value[absent])
        found.append(total)
    return found


def table(value):
    return lambda removed: value[frozenset(removed.tolist())]


def test_the_mean_over_all_permutations_is_the_shapley_value(values):
    value = values["qaa"]
    total = torch.zeros(PLAYERS, dtype=torch.float64)
    for order in itertools.permutations(range(PLAYERS)):
        marginal, count = marginal_values(table(value), torch.tensor(order), 0.0)
        assert count == PLAYERS
        total += marginal
    exact = exact_shapley(value)
    assert (total / math.factorial(PLAYERS)).tolist() == pytest.approx(exact, abs=1e-12)
    assert math.fsum(exact) == pytest.approx(value[frozenset()] - value[frozenset(range(PLAYERS))], abs=1e-12)
    assert max(map(abs, exact)) > 0.01


def test_recorded_permutations_are_those_of_the_seed_and_lie_around_the_exact_values(tiny, text, values):
    method = HeadShapley(permutations=150, tolerance=0.0, seed=7)
    done = []
    statistics = record_shapley(tiny, text, method, progress=done.append)
    assert sum(done) == 150 * PLAYERS * 2
    scores = method.scores(statistics, 0.5)
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(PLAYERS, generator=generator) for _ in range(150)]
    for k, language in enumerate(statistics.languages):
        value = values[language]
        naive = torch.stack([marginal_values(table(value), order, 0.0)[0] for order in orders])
        found = scores.values[..., k].flatten()
        assert found.tolist() == pytest.approx(naive.mean(0).tolist(), abs=2e-5)
        errors = torch.tensor(scores.notes["standard_errors"][k]).flatten()
        assert errors.tolist() == pytest.approx((naive.std(0) / 150**0.5).tolist(), abs=2e-5)
        assert ((found - torch.tensor(exact_shapley(value))).abs() < 4 * errors + 1e-5).all()
        whole = value[frozenset()] - value[frozenset(range(PLAYERS))]
        assert float(found.sum()) == pytest.approx(whole, abs=1e-5)
    assert statistics.metadata["removed"] == dict.fromkeys(text.languages, float(PLAYERS))


def test_a_permutation_ends_when_little_remains():
    """v = 10, 6, 1.02, 1.3, 1 without 0, 1, 2, 3, 4 players; a tolerance of .01 is .09."""
    reached = []

    def value(removed):
        reached.append(len(removed))
        return {0: 10.0, 1: 6.0, 2: 1.02, 3: 1.3, 4: 1.0}[len(removed)]

    order = torch.tensor([2, 0, 3, 1])
    marginal, count = marginal_values(value, order, 0.01)
    assert count == 2 and 3 not in reached
    assert marginal.tolist() == pytest.approx([4.98, 0.0, 4.0, 0.0])
    marginal, count = marginal_values(value, order, 0.0)
    assert count == 4
    assert marginal.tolist() == pytest.approx([4.98, 0.3, 4.0, -0.28])


def test_equal_commands_give_equal_values_and_the_mean_is_another_ablation(tiny, text):
    first, again = (record_shapley(tiny, text, HeadShapley(permutations=2)) for _ in range(2))
    name = "attn_in:shapley"
    assert torch.equal(first.moment(name), again.moment(name))
    by_mean = record_shapley(tiny, text, HeadShapley(permutations=1, way="mean", tolerance=0.0))
    means = record_corpus(tiny, text, ("attn_in:sum",), "texts")
    # Every head replaced by its mean: o_proj's input is constant at counted tokens.
    constant = (means.moment("attn_in:sum").sum(-1) / means.tokens.sum()).float()
    handles = []
    for layer, block in enumerate(tiny.model.model.layers):

        def replaced(module, inputs, layer=layer):
            values = inputs[0].clone()
            values[:, 1:] = constant[layer]
            return (values,)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(replaced))
    loss = {True: 0.0, False: 0.0}
    for hooked in (True, False):
        for line in text.texts["qaa"]:
            ids = tiny.tokenizer(line)["input_ids"]
            with torch.no_grad():
                logits = tiny.model(torch.tensor([ids])).logits[0].double()
            loss[hooked] += float(models.naive_loss(logits, ids))
        for handle in handles:
            handle.remove()
    tokens = sum(len(tiny.tokenizer(line)["input_ids"]) - 1 for line in text.texts["qaa"])
    assert float(by_mean.moment(name)[..., 0].sum()) == pytest.approx(
        (loss[True] - loss[False]) / tokens, rel=1e-3
    )


def test_the_set_says_how_its_values_were_estimated(tiny, text):
    method = HeadShapley(permutations=2)
    heads = neurons_from(
        record_shapley(tiny, text, method), "head-shapley", 0.5, settings={"permutations": 2}
    )
    assert (heads.unit, heads.layers, heads.neurons, heads.counts) == (
        "head",
        LAYERS,
        HEADS,
        [HEADS] * LAYERS,
    )
    assert heads.metadata["settings"]["permutations"] == 2
    assert len(heads.metadata["notes"]["standard_errors"]) == 2
    assert [len(heads.of(k)) for k in heads.languages] == [3, 3]


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_stopped(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr("neurons.recording.resume.Unfinished.is_due", lambda self: True)
    method, out, done = HeadShapley(permutations=2), tmp_path / "heads.safetensors", []

    def stopped(count):
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    whole = record_shapley(tiny, text, method)
    with pytest.raises(KeyboardInterrupt):
        record_shapley(tiny, text, method, progress=stopped, out=out)
    steps, heads = [], LAYERS * HEADS
    again = record_shapley(tiny, text, method, progress=steps.append, out=out)
    assert steps == [2 * heads, heads, heads]
    assert again.metadata["removed"] == whole.metadata["removed"]
    for moment in whole.moments:
        assert torch.equal(again.moment(moment), whole.moment(moment))
    steps.clear()
    record_shapley(tiny, text, HeadShapley(permutations=2, seed=1), progress=steps.append, out=out)
    assert steps == [heads] * 4  # another sample


def test_only_the_losses_with_all_heads_and_with_none_are_kept(tiny, text, monkeypatch):
    kept = InMemory()
    monkeypatch.setattr(shapley, "InMemory", lambda: kept)
    record_shapley(tiny, text, HeadShapley(permutations=2, tolerance=0.0))
    assert len({digest for _, _, digest in kept._held}) == 2
