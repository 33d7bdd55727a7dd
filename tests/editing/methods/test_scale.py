"""Neuron scaling against hooks on the neurons."""

import math
from contextlib import contextmanager

import pytest
import torch

from editing.methods.scale import column_scaling, scale_plan
from editing.methods.scope import require_neurons
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import neuron_set

ROWS = {
    "qaa": torch.tensor([[2, 7], [0, 3], [0, 40]]),
    "qab": torch.tensor([[0, 3], [1, 11]]),
    "qac": torch.zeros(0, 2, dtype=torch.int64),
}


@pytest.fixture(scope="module")
def chosen():
    return neuron_set(ROWS, {k: torch.zeros(len(v)) for k, v in ROWS.items()}, 3, 48, {"method": "lape"})


@contextmanager
def neurons_scaled(model, rows, factor):
    """The activation of each neuron (layer, index) times a factor, by hooks."""

    def before(index):
        def scale(_, inputs):
            values = inputs[0].clone()
            values[..., index] *= factor
            return (values,)

        return scale

    handles = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(before(index))
        for layer, index in rows
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(loaded, ids=(0, 5, 80, 33, 200, 7)):
    with torch.no_grad():
        return loaded.model(torch.tensor([ids])).logits


@pytest.mark.parametrize("factor", [0.0, -1.5, 3.0])
@pytest.mark.parametrize("languages", [["qaa"], ["qab"], ["qaa", "qab"]], ids="+".join)
def test_equals_a_hook_on_each_neuron_once(llama, chosen, languages, factor):
    # Neuron (0, 3) belongs to both languages and is scaled once.
    rows = {tuple(row) for language in languages for row in ROWS[language].tolist()}
    with neurons_scaled(llama.model, sorted(rows), factor):
        expected = logits(llama)
    with applied(llama, scale_plan(llama, chosen, languages, factor)):
        result = logits(llama)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result - logits(llama)).abs().max() > 0.01


def test_zero_removes_the_output_of_the_neuron(llama, chosen):
    weight = llama.model.model.layers[0].mlp.down_proj.weight.clone()
    with applied(llama, scale_plan(llama, chosen, ["qaa"], 0.0)):
        edited = llama.model.model.layers[0].mlp.down_proj.weight
        assert not edited[:, [3, 40]].any()
        others = [j for j in range(48) if j not in (3, 40)]
        assert torch.equal(edited[:, others], weight[:, others])


def test_the_plan_lists_its_changes(llama, chosen):
    plan = scale_plan(llama, chosen, ["qab", "qaa"], 0.25)
    assert [(edit.layer, edit.block, edit.components) for edit in plan.edits] == [
        (0, "mlp", (3, 40)),
        (1, "mlp", (11,)),
        (2, "mlp", (7,)),
    ]
    assert plan.components == 4
    for edit in plan.edits:
        weight = llama.model.model.layers[edit.layer].mlp.down_proj.weight.double()
        size = sum(float(value) ** 2 for j in edit.components for value in weight[:, j] * 0.75)
        assert edit.notes["change_norm"] == pytest.approx(math.sqrt(size))
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
        assert edit.left is None and edit.right is None and edit.row_scale is None
        assert edit.details["factor"].tolist() == [0.25] * len(edit.components)
    assert plan.metadata["languages"] == ["qab", "qaa"]
    assert plan.metadata["settings"]["factor"] == 0.25


def test_refuses_a_language_without_neurons(llama, chosen):
    with pytest.raises(BrocaError, match="no neuron for qac"):
        scale_plan(llama, chosen, ["qac"], 0.0)
    with pytest.raises(UsageError, match="'xx'"):
        scale_plan(llama, chosen, ["qaa", "xx"], 0.0)


@pytest.mark.parametrize("factor", [1.0, 1, math.nan, math.inf, -math.inf])
def test_refuses_factors_that_change_nothing_or_all(llama, chosen, factor):
    with pytest.raises(UsageError, match="factor"):
        scale_plan(llama, chosen, ["qaa"], factor)


def test_layers_restrict_which_neurons_are_scaled(llama, chosen):
    plan = scale_plan(llama, chosen, ["qaa", "qab"], 0.0, [0, 2])
    assert [(edit.layer, edit.components) for edit in plan.edits] == [(0, (3, 40)), (2, (7,))]
    assert plan.metadata["settings"]["layers"] == [0, 2]
    with neurons_scaled(llama.model, [(0, 3), (0, 40), (2, 7)], 0.0):
        expected = logits(llama)
    with applied(llama, plan):
        torch.testing.assert_close(logits(llama), expected, rtol=1e-4, atol=1e-4)
    whole = scale_plan(llama, chosen, ["qaa", "qab"], 0.0)
    same = scale_plan(llama, chosen, ["qaa", "qab"], 0.0, [0, 1, 2])
    assert "layers" not in whole.metadata["settings"]
    assert [edit.components for edit in same.edits] == [edit.components for edit in whole.edits]


def test_refuses_layers_without_the_languages_neurons(llama, chosen):
    with pytest.raises(BrocaError, match="no neuron for qaa in these layers"):
        scale_plan(llama, chosen, ["qab", "qaa"], 0.0, [1])
    with pytest.raises(UsageError, match="layer 3"):
        scale_plan(llama, chosen, ["qaa"], 0.0, [0, 3])
    with pytest.raises(UsageError, match="at least one layer"):
        scale_plan(llama, chosen, ["qaa"], 0.0, [])


def test_refuses_neurons_of_a_model_of_another_size(llama):
    foreign = neuron_set({"qaa": torch.tensor([[0, 50]])}, {"qaa": torch.zeros(1)}, 3, 64, {})
    with pytest.raises(BrocaError, match=r"3 x 64 .*3 x 48"):
        scale_plan(llama, foreign, ["qaa"], 0.0)


def test_refuses_a_factor_that_is_one_in_float32(llama, chosen):
    with pytest.raises(UsageError, match=r"layer 0, mlp.*channel 3"):
        scale_plan(llama, chosen, ["qaa"], 1 + 1e-12)


def test_channels_of_a_head_are_scaled_one_by_one(llama):
    scale = torch.ones(3, 64, dtype=torch.float64)
    scale[1, [33, 40]] = torch.tensor([3.0, -1.0]).double()
    (edit,) = column_scaling(llama, "attn", scale)
    assert (edit.layer, edit.block, edit.components) == (1, "attn", (1,))
    weight = llama.model.model.layers[1].self_attn.o_proj.weight.double()
    expected = weight.clone()
    for row in range(64):
        expected[row, 33] *= 3
        expected[row, 40] *= -1
    torch.testing.assert_close(edit.apply(weight), expected)
    assert edit.notes["change_norm"] == pytest.approx(float((expected - weight).norm()))
    assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
    assert edit.details["factor"].tolist() == pytest.approx([(30 + 3 - 1) / 32])


HEADS = {"qaa": torch.tensor([[0, 1], [2, 0]]), "qab": torch.tensor([[1, 1]])}


@pytest.fixture(scope="module")
def heads():
    scores = {k: torch.zeros(len(v)) for k, v in HEADS.items()}
    return neuron_set(HEADS, scores, 3, 2, {"method": "head-gradient", "unit": "head", "heads": [2, 2, 2]})


@pytest.mark.parametrize("factor", [0.0, -1.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_heads_are_columns_of_o_proj_and_equal_a_hook(checkpoint_of, heads, family, factor):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    width = loaded.anatomy.head_dim

    def scaled(head):
        def hook(values, routed):
            values = values.clone()
            values[..., head * width : (head + 1) * width] *= factor
            return values

        return hook

    plan = scale_plan(loaded, heads, ["qaa"], factor)
    assert [(edit.layer, edit.block, edit.components) for edit in plan.edits] == [
        (0, "attn", (1,)),
        (2, "attn", (0,)),
    ]
    with site_hooks(
        loaded.anatomy, {("attn_in", layer): scaled(head) for layer, head in HEADS["qaa"].tolist()}
    ):
        expected = logits(loaded)
    before = logits(loaded)
    with applied(loaded, plan):
        result = logits(loaded)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result - before).abs().max() > 0.01


def test_a_set_of_heads_is_refused_where_neurons_are_edited_and_one_of_another_shape(llama, heads):
    with pytest.raises(UsageError, match="heads"):
        require_neurons(llama, heads)
    other = neuron_set(
        {"qaa": HEADS["qab"]}, {"qaa": torch.zeros(1)}, 3, 4, {"unit": "head", "heads": [4] * 3}
    )
    with pytest.raises(BrocaError, match="3 x 4 heads, but the model has 3 x 2"):
        scale_plan(llama, other, ["qaa"], 0.0)
