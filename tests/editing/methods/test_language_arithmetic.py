"""Language arithmetic: map and mean shift against loops, edited model against the intervention."""

import math
from functools import partial

import models
import pytest
import torch

from editing.methods.affine_neurons import mean_shift
from editing.methods.language_arithmetic import ArithmeticEdit, activation_means, arithmetic
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

LANGUAGES = ("qaa", "qab", "qac")


def small_corpus(count=8, languages=LANGUAGES):
    return Corpus({k: tuple(models.sentences(k, count, 5, (2, 8))) for k in languages}, "digest", "all")


def some_neurons(loaded, layers=(0, 2)):
    """Neurons of qaa and qab in the layers; neuron 9 of each layer is in both."""
    rows = {
        "qaa": torch.tensor([[layer, j] for layer in layers for j in (3, 9, 40)]),
        "qab": torch.tensor([[layer, j] for layer in layers for j in (9, 17)]),
        "qac": torch.zeros(0, 2, dtype=torch.int64),
    }
    scores = {k: torch.zeros(len(v)) for k, v in rows.items()}
    return neuron_set(rows, scores, 3, 48, {"method": "lape", "fingerprint": loaded.fingerprint})


def plan_of(loaded, corpus, neurons, target=None, deactivate=(), **settings):
    method = ArithmeticEdit(target=target, deactivate=deactivate, **settings)
    return method.plan_for(Material(loaded, corpus, neurons=neurons))


@pytest.mark.parametrize("mode", ["additive", "replacement", "difference"])
@pytest.mark.parametrize("fill", [0.0, -0.4])
def test_the_map_equals_the_formula(mode, fill):
    generator = torch.Generator().manual_seed(1)
    target, other, values = torch.randn(3, 8, generator=generator).double()
    on = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]).bool()
    off = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0]).bool()
    result = arithmetic(target, other, on, off, mode, 1.5, fill)
    for j in range(8):
        s = float(values[j])
        if off[j]:
            s = fill
        if on[j]:
            m, o = float(target[j]), float(other[j])
            s = {"additive": s + 1.5 * m, "replacement": 1.5 * m, "difference": s + 1.5 * (m - o)}[mode]
        assert float(result.scale[j] * values[j] + result.offset[j]) == pytest.approx(s)
    assert set(result.scale.tolist()) == {0.0, 1.0}


def test_an_unknown_mode_is_refused():
    nothing = torch.zeros(2).bool()
    with pytest.raises(UsageError, match="additive, replacement, difference"):
        arithmetic(torch.ones(2), torch.ones(2), nothing, nothing, "times", 1.0, 0.0)


def test_mean_shift_equals_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(2)
    values, ups = torch.randn(5, 4, generator=generator), torch.randn(50, 4, generator=generator).double()
    offset = torch.tensor([0.5, -1.0, 2.0, 0.0]).double()
    apart = ups - ups.mean(0)
    shift, fraction = mean_shift(values, offset, ups.mean(0), apart.T @ apart / 50)
    changes = []
    for up in ups.tolist():
        changes.append(
            [sum(float(offset[j]) * up[j] * float(values[i, j]) for j in range(4)) for i in range(5)]
        )
    mean = [sum(change[i] for change in changes) / 50 for i in range(5)]
    assert shift.tolist() == pytest.approx(mean, rel=1e-5)
    square = sum(sum(x * x for x in change) for change in changes) / 50
    assert fraction == pytest.approx(sum(x * x for x in mean) / square, rel=1e-5)


def test_without_gates_the_change_is_constant():
    values, offset = torch.eye(3), torch.tensor([1.0, 0.0, -2.0]).double()
    shift, fraction = mean_shift(values, offset, torch.ones(3).double(), torch.zeros(3, 3).double())
    assert shift.tolist() == [1, 0, -2]
    assert fraction == 1


def test_activation_means_equal_a_loop_over_tokens(llama):
    corpus = small_corpus(4)
    result = activation_means(llama, language_batches(llama, corpus), [0, 2])
    for language in LANGUAGES:
        sums, count = {0: 0, 2: 0}, 0
        for text in corpus.texts[language]:
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(llama.model, ids)
            count += len(ids) - 1
            for layer in sums:
                gate = layers[layer]["mlp_act"].detach()[1:]
                sums[layer] = sums[layer] + (gate * torch.sigmoid(gate)).sum(0)
        for layer, total in sums.items():
            torch.testing.assert_close(result[layer][language], total / count, rtol=1e-3, atol=1e-4)


def intervention(result):
    """A hook that replaces the input of down_proj by the formula, token by token."""

    def read(values, _):
        scale, offset = result.scale.to(values), result.offset.to(values)
        return values * scale + offset

    return read


def logits(loaded, ids=(0, 40, 90, 17, 200)):
    with torch.no_grad():
        return loaded.model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("mode", ["additive", "replacement", "difference"])
def test_without_gates_the_bias_form_is_exactly_the_intervention(checkpoint_of, family, mode):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    corpus, neurons = small_corpus(), some_neurons(loaded)
    options = {"target": "qab", "deactivate": ["qaa"], "mode": mode, "strength": 2.0, "fill": -0.1}
    plan = plan_of(loaded, corpus, neurons, **options, as_bias=True)
    means = activation_means(loaded, language_batches(loaded, corpus), [0, 2])
    readers = {}
    for layer in (0, 2):
        on, off = torch.zeros(48).bool(), torch.zeros(48).bool()
        on[[9, 17]], off[[3, 9, 40]] = True, True
        of_layer = means[layer]
        readers["mlp_in", layer] = intervention(
            arithmetic(of_layer["qab"], of_layer["qaa"], on, off, mode, 2.0, -0.1)
        )
    unsteered = logits(loaded)
    with site_hooks(loaded.anatomy, readers):
        expected = logits(loaded)
    with applied(loaded, plan):
        result = logits(loaded)
    assert float((expected - unsteered).abs().max()) > 1e-2
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-4)
    for edit in plan.edits:
        assert edit.notes["constant_share"] == 1
        assert edit.rank == 0
        assert edit.components == (3, 9, 17, 40)
        assert edit.details["scale"][:2].tolist() == [0, 0]


def test_in_a_gated_model_the_mean_of_the_change_is_baked(llama):
    corpus, neurons = small_corpus(), some_neurons(llama, layers=(1,))
    plan = plan_of(llama, corpus, neurons, "qab", mode="additive", strength=3.0)
    (edit,) = plan.edits
    assert edit.column_scale is None
    offsets = torch.zeros(48).double()
    mean = activation_means(llama, language_batches(llama, corpus), [1])[1]["qab"]
    offsets[[9, 17]] = 3 * mean[[9, 17]]
    changes, added = [], []
    weight = llama.model.model.layers[1].mlp.down_proj.weight.double()
    for language in LANGUAGES:
        for text in corpus.texts[language]:
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(llama.model, ids)
            up, inside = (layers[1][site].detach()[1:] for site in ("mlp_up", "mlp_in"))
            changes.append((up * offsets) @ weight.T)
            added.append(inside @ (edit.left.double() @ edit.right.double().T).T)
    changes, added = torch.cat(changes), torch.cat(added)
    scale = float(changes.abs().max())
    torch.testing.assert_close(added.mean(0), changes.mean(0), rtol=0, atol=2e-3 * scale)
    torch.testing.assert_close(edit.left[:, 0].double(), changes.mean(0), rtol=0, atol=2e-3 * scale)
    fraction = float(changes.mean(0).square().sum() / changes.square().sum(1).mean())
    assert edit.notes["constant_share"] == pytest.approx(fraction, rel=1e-2)
    assert 0 < fraction < 1
    assert edit.notes["change_norm"] == pytest.approx(float(edit.left.norm() * edit.right.norm()), rel=1e-4)


def test_scale_and_constant_are_in_one_plan(llama):
    plan = plan_of(llama, small_corpus(), some_neurons(llama), "qab", ["qaa"])
    assert [edit.layer for edit in plan.edits] == [0, 2]
    for edit in plan.edits:
        zero = (edit.column_scale == 0).nonzero()[:, 0].tolist()
        assert zero == [3, 9, 40]
        assert edit.rank == 1
        assert edit.components == tuple(range(48))
        weight = llama.anatomy.parts(edit.layer, "mlp")[0].weight.double()
        change = edit.apply(weight) - weight
        assert edit.notes["change_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert edit.details["offset"].nonzero()[:, 0].tolist() == [9, 17]
    assert plan.metadata["languages"] == ["qaa", "qab"]
    assert plan.metadata["settings"]["mode"] == "additive"


def test_deactivation_is_exact_and_reads_no_text(llama, monkeypatch):
    monkeypatch.setattr("editing.methods.language_arithmetic.read_text", None)
    plan = plan_of(llama, small_corpus(), some_neurons(llama), None, ["qaa"])
    unsteered = logits(llama)

    def silence(values, _):
        values = values.clone()
        values[..., [3, 9, 40]] = 0
        return values

    with site_hooks(llama.anatomy, {("mlp_in", layer): silence for layer in (0, 2)}):
        expected = logits(llama)
    with applied(llama, plan):
        result = logits(llama)
    assert float((expected - unsteered).abs().max()) > 1e-2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert all(edit.rank == 0 and edit.bias is None for edit in plan.edits)


def test_other_strengths_read_no_text_again(llama, monkeypatch):
    kept = Material(llama, small_corpus(), neurons=some_neurons(llama))

    def plan(material, mode="additive", **settings):
        return ArithmeticEdit(target="qab", deactivate=("qaa",), mode=mode, **settings).plan_for(material)

    plan(kept)
    tried = [("additive", 0.01), ("difference", 0.01), ("additive", 0.1)]
    expected = [
        plan(Material(llama, small_corpus(), neurons=some_neurons(llama)), mode, strength=2.0, eps=eps)
        for mode, eps in tried
    ]

    def read(*_, **__):
        raise AssertionError("the text was read again")

    with monkeypatch.context() as patch:
        patch.setattr("editing.methods.language_arithmetic.read_text", read)
        patch.setattr("editing.methods.language_arithmetic.language_moments", read)
        patch.setattr("editing.methods.language_arithmetic.constant_keys", read)
        again = plan(kept, strength=2.0)
        with pytest.raises(AssertionError):
            plan(kept, eps=0.1)
    assert again.to_bytes() == expected[0].to_bytes()
    for other, (mode, eps) in zip(expected[1:], tried[1:], strict=True):
        assert plan(kept, mode, strength=2.0, eps=eps).to_bytes() == other.to_bytes()


def test_a_bias_in_a_llama_is_its_mean_shift(llama):
    make = partial(plan_of, llama, small_corpus(), some_neurons(llama), "qab")
    for weights, bias in zip(make().edits, make(as_bias=True).edits, strict=True):
        torch.testing.assert_close(bias.bias, weights.left[:, 0])
        assert not bias.changes_weight
        assert bias.components == (9, 17)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": None}, "target"),
        ({"target": "qxx"}, "no language 'qxx'"),
        ({"target": "qab", "mode": "times"}, "mode 'times'"),
        ({"target": "qab", "mode": "difference"}, "another language"),
        ({"target": "qab", "mode": "difference", "other": "qab"}, "another language"),
        ({"target": "qab", "strength": 0.0}, "strength 0"),
        ({"target": "qab", "strength": math.nan}, "finite"),
        ({"target": "qab", "deactivate": ["qaa"], "fill": 0.5}, "fill"),
    ],
)
def test_refuses_bad_input(llama, options, match):
    with pytest.raises(UsageError, match=match):
        plan_of(llama, small_corpus(2), some_neurons(llama), **options)


def test_refuses_a_language_without_neurons(llama):
    with pytest.raises(BrocaError, match="no neuron for qac"):
        plan_of(llama, small_corpus(2), some_neurons(llama), "qac")


def test_refuses_an_unsupported_bias(checkpoint_of):
    qwen = load_model(str(checkpoint_of("qwen2")), device="cpu")
    with pytest.raises(BrocaError, match=r"no bias.*--set as_bias=yes"):
        plan_of(qwen, small_corpus(2), some_neurons(qwen), "qab", as_bias=True)


def test_a_norm_after_the_mlp_is_supported(checkpoint_of):
    loaded = load_model(str(checkpoint_of("gemma2")), device="cpu")
    plan = plan_of(loaded, small_corpus(3), some_neurons(loaded), "qab", ["qaa"])
    assert [edit.rank for edit in plan.edits] == [1, 1]
