"""Losses under ablation against copies of the model whose columns are zeroed, text by text in float64."""

import copy

import models
import pytest
import torch

from neurons.ablation.conditions import UNTOUCHED, Condition, InMemory, condition_losses
from neurons.ablation.ledger import LedgerFile
from neurons.ablation.replacement import Replacement, others
from neurons.architectures.anatomy import anatomy_of
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

FAMILIES = ["llama", "gpt2", "opt", "bloom", "gemma2", "phi3", "falcon-new", "gpt_oss", "qwen3_moe"]


def rows_of(*places):
    return torch.tensor(places, dtype=torch.int64).view(-1, 2)


def some_batches(loaded, count=7, tokens_a_batch=64):
    texts = {language: tuple(models.sentences(language, count)) for language in models.LANGUAGES[:2]}
    return language_batches(loaded, Corpus(texts, "", "all"), None, tokens_a_batch)


def random_conditions(anatomy, replacement=None):
    generator = torch.Generator().manual_seed(5)
    found = [UNTOUCHED]
    for first in range(anatomy.layers):
        picked = torch.randperm(anatomy.neurons, generator=generator)[: anatomy.neurons // 4]
        rows = [(first, int(j)) for j in picked.sort().values]
        rows += [(layer, int(picked[0])) for layer in range(first + 1, anatomy.layers)]
        found.append(Condition(rows_of(*rows), replacement or Replacement()))
    return found


def naive_texts(loaded, batches, rows, block="mlp"):
    """Loss of each text in float64: columns zeroed in a copy, a text at a time, the model's own logits."""
    model = copy.deepcopy(loaded.model).double()
    if loaded.anatomy.mixed:
        model.set_experts_implementation("eager")  # the others know no float64
    exact = anatomy_of(model)
    for layer, column in rows.tolist():
        exact.columns(layer, block, slice(column, column + 1)).zero_()
    found = []
    for batch in batches:
        for ids, attention in zip(batch.ids, batch.attention, strict=True):
            ids = ids[attention].long()
            with torch.no_grad():
                predicted = model(input_ids=ids[None], use_cache=False).logits[0]
            found.append(float(models.naive_loss(predicted, ids.tolist())))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_equals_zeroed_columns_of_a_copy(family, checkpoint_of):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = some_batches(loaded)
    conditions = random_conditions(loaded.anatomy)
    found = condition_losses(loaded, batches, conditions)
    for language, some in batches.items():
        assert found.sums[language].shape == (7, len(conditions))
        for c, condition in enumerate(conditions):
            expected = naive_texts(loaded, some, condition.rows)
            assert found.sums[language][:, c].tolist() == pytest.approx(expected, rel=2e-5)
        assert not torch.equal(found.sums[language][:, 0], found.sums[language][:, 1])
        expected = [int(row.sum()) - 1 for batch in some for row in batch.attention]
        assert found.tokens[language].tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_heads_equals_zeroed_columns_of_o_proj(family, checkpoint_of):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = some_batches(loaded, 4)
    width = loaded.anatomy.head_dim
    heads = [rows_of((1, 0)), rows_of((0, 1), (2, 0), (2, 1))]
    conditions = [
        UNTOUCHED,
        *(Condition(loaded.anatomy.unit_columns("head", rows), site="attn_in") for rows in heads),
    ]
    found = condition_losses(loaded, batches, conditions)
    for language, of_language in batches.items():
        for c, rows in enumerate([rows_of(), *heads]):
            columns = [(layer, head * width + i) for layer, head in rows.tolist() for i in range(width)]
            assert columns == [tuple(row) for row in conditions[c].rows.tolist()]
            expected = naive_texts(loaded, of_language, rows_of(*columns), "attn")
            assert found.sums[language][:, c].tolist() == pytest.approx(expected, rel=2e-5)
        changes = (found.sums[language][:, 1:] - found.sums[language][:, :1]).abs()
        assert float(changes.max(0).values.min()) > 1e-3


@pytest.mark.parametrize("way", ["zero", "mean", "resample"])
def test_heads_from_the_middle_have_the_bits_of_whole_passes(llama, way):
    batches, anatomy = some_batches(llama), llama.anatomy
    means = torch.randn(3, anatomy.width("attn_in"), generator=torch.Generator().manual_seed(1))
    how = Replacement(way, means, 3)
    columns = [anatomy.unit_columns("head", rows_of(*rows)) for rows in ([(2, 1)], [(1, 0), (2, 0)])]
    conditions = [UNTOUCHED, *(Condition(rows, how, "attn_in") for rows in columns)]
    one = condition_losses(llama, batches, conditions)
    other = condition_losses(llama, batches, conditions, whole=True)
    for language in batches:
        assert torch.equal(one.sums[language], other.sums[language])
        assert bool((one.sums[language][:, 1:] != one.sums[language][:, :1]).all())


def test_the_same_columns_of_another_site_are_another_condition():
    rows = rows_of((0, 3))
    assert Condition(rows).digest != Condition(rows, site="attn_in").digest


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
@pytest.mark.parametrize("way", ["zero", "mean", "resample"])
def test_starting_in_the_middle_has_the_bits_of_whole_passes(family, way, checkpoint_of):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = some_batches(loaded)
    means = torch.randn(
        loaded.anatomy.layers, loaded.anatomy.neurons, generator=torch.Generator().manual_seed(1)
    )
    conditions = random_conditions(loaded.anatomy, Replacement(way, means, 3))
    one = condition_losses(loaded, batches, conditions)
    other = condition_losses(loaded, batches, conditions, whole=True)
    for language in batches:
        assert torch.equal(one.sums[language], other.sums[language])
        differences = one.sums[language][:, 1:] - one.sums[language][:, :1]
        assert bool((differences.abs().sum(0) > 0).all())


def naive_replaced(loaded, batch, rows, replace_by):
    """Losses with ``mlp_in`` columns of a llama replaced by a loop over positions and neurons."""
    model = copy.deepcopy(loaded.model)
    handles = []
    for layer in range(loaded.anatomy.layers):
        own = [neuron for at, neuron in rows.tolist() if at == layer]

        def before(module, inputs, own=own, layer=layer):
            values = inputs[0].clone()
            for row in range(values.shape[0]):
                for place in range(values.shape[1]):
                    for neuron in own:
                        if batch.counted[row, place]:
                            values[row, place, neuron] = replace_by(inputs[0], row, place, layer, neuron)
            return (values,)

        handles.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(before))
    with torch.no_grad():
        predicted = model(
            input_ids=batch.ids.long(), attention_mask=batch.attention.long(), use_cache=False
        ).logits.double()
    return [
        float(models.naive_loss(predicted[row][seen], batch.ids[row][seen].tolist()))
        for row, seen in enumerate(batch.attention)
    ]


def test_the_mean_replaces_counted_tokens_alone(llama):
    batches = {"qaa": some_batches(llama)["qaa"][:2]}
    means = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    rows = rows_of((0, 3), (0, 40), (2, 7))
    found = condition_losses(llama, batches, [UNTOUCHED, Condition(rows, Replacement("mean", means))])
    expected = [
        loss
        for batch in batches["qaa"]
        for loss in naive_replaced(llama, batch, rows, lambda v, r, p, layer, n: means[layer, n])
    ]
    assert found.sums["qaa"][:, 1].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.sums["qaa"][:, 1].tolist() != pytest.approx(found.sums["qaa"][:, 0].tolist(), rel=1e-3)


def test_resampling_takes_another_counted_token_of_the_batch(llama):
    batches = {"qaa": some_batches(llama)["qaa"][:2]}
    rows = rows_of((0, 3), (0, 40), (2, 7))
    found = condition_losses(llama, batches, [Condition(rows, Replacement("resample", seed=9))])
    expected = []
    for turn, batch in enumerate(batches["qaa"]):
        places = batch.counted.nonzero().tolist()
        source = others(len(places), f"9 qaa {turn}").tolist()
        partner = {tuple(place): places[source[i]] for i, place in enumerate(places)}
        assert all(list(place) != other for place, other in partner.items())
        expected += naive_replaced(
            llama,
            batch,
            rows,
            lambda values, row, place, layer, neuron, partner=partner: values[
                partner[row, place][0], partner[row, place][1], neuron
            ],
        )
    assert found.sums["qaa"][:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    again = condition_losses(llama, batches, [Condition(rows, Replacement("resample", seed=9))])
    assert torch.equal(again.sums["qaa"], found.sums["qaa"])
    other = condition_losses(llama, batches, [Condition(rows, Replacement("resample", seed=8))])
    assert not torch.equal(other.sums["qaa"], found.sums["qaa"])


def test_a_random_other_one():
    for count in (2, 3, 50):
        found = others(count, "name")
        assert bool((found != torch.arange(count)).all())
        assert set(found.tolist()) <= set(range(count))
    assert others(1, "name").tolist() == [0]
    assert len(others(0, "name")) == 0
    assert len(others(1000, "name").unique()) > 500
    assert others(50, "a").tolist() == others(50, "a").tolist() != others(50, "b").tolist()


def test_a_condition_runs_only_the_layers_from_its_first_up(llama):
    batches = some_batches(llama)
    passes = {"qaa": len(batches["qaa"]), "qab": len(batches["qab"])}
    ran = [0, 0, 0]

    def count(layer):
        def after(*_):
            ran[layer] += 1

        return after

    handles = [llama.anatomy.outputs["attn"][layer].register_forward_hook(count(layer)) for layer in range(3)]
    try:
        conditions = [UNTOUCHED, *(Condition(rows_of((2, j))) for j in range(4)), Condition(rows_of((2, 1)))]
        condition_losses(llama, batches, conditions)
        looked, ran[:] = list(ran), [0, 0, 0]
        condition_losses(llama, batches, conditions[:1])
        check = [a - b for a, b in zip(looked, ran, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
    # Beside the one whole pass a batch: nothing below layer 2, and equal conditions once.
    assert check == [0, 0, 4 * sum(passes.values())]


class Stopping(InMemory):
    """Stops when some losses are put down."""

    def __init__(self, ledger, after):
        super().__init__()
        self.ledger, self.left = ledger, after

    def get(self, *key):
        return self.ledger.get(*key)

    def put(self, *key):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.ledger.put(*key)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("after", [0, 1, 6, 13])
def test_resumed_equals_uninterrupted_bit_for_bit(family, after, checkpoint_of, tmp_path):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    batches = some_batches(loaded)
    conditions = random_conditions(loaded.anatomy, Replacement("resample", seed=2))
    whole = condition_losses(loaded, batches, conditions)
    out = tmp_path / "study.json"
    with LedgerFile(out, "key") as ledger, pytest.raises(KeyboardInterrupt):
        condition_losses(loaded, batches, conditions, Stopping(ledger, after))
    with ledger.path.open("ab") as stream:
        stream.write(b'{"at": ["qaa", 0, "half of a li')
    with LedgerFile(out, "key") as ledger:
        assert len(ledger._held) == after
        done = []
        resumed = condition_losses(loaded, batches, conditions, ledger, done.append)
    counted = sum(int(batch.counted.sum()) for some in batches.values() for batch in some)
    assert sum(done) == counted * len(conditions)
    for language in batches:
        assert torch.equal(resumed.sums[language], whole.sums[language])
    with LedgerFile(out, "key") as ledger:
        assert len(ledger._held) == len(conditions) * sum(len(some) for some in batches.values())
    with LedgerFile(out, "another key") as ledger:
        assert len(ledger._held) == 0
    ledger.remove()
    assert not ledger.path.exists()


def test_the_model_is_unchanged(llama):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    condition_losses(llama, some_batches(llama), random_conditions(llama.anatomy))
    after = llama.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_digests_name_what_differs():
    rows, means = rows_of((0, 1), (2, 3)), torch.zeros(3, 4)
    others_means = means.clone()
    others_means[1, 1] = 1
    assert Condition(rows).digest == Condition(rows.clone()).digest
    same = Condition(rows, Replacement("mean", means)).digest
    assert same == Condition(rows, Replacement("mean", others_means)).digest
    others_means[2, 3] = 1
    found = [
        Condition(rows),
        Condition(rows[:1]),
        UNTOUCHED,
        Condition(rows, Replacement("mean", means)),
        Condition(rows, Replacement("mean", others_means)),
        Condition(rows, Replacement("resample", seed=1)),
        Condition(rows, Replacement("resample", seed=2)),
    ]
    assert len({condition.digest for condition in found}) == len(found)
    assert UNTOUCHED.digest == Condition(rows[:0], Replacement("resample", seed=2)).digest


@pytest.mark.parametrize("place", [(3, 0), (0, 48), (-1, 0)])
def test_a_neuron_that_the_model_lacks_is_refused(llama, place):
    with pytest.raises(BrocaError, match="3 x 48"):
        condition_losses(llama, some_batches(llama), [Condition(rows_of(place))])


def test_an_unknown_way_or_a_mean_without_means_is_refused():
    with pytest.raises(UsageError, match="zero, mean, resample"):
        Replacement("median")
    with pytest.raises(UsageError, match="mlp_in:sum"):
        Replacement("mean")
