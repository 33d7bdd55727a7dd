"""Sizes of components against sums written out, and a heat map that shows them where they are."""

from dataclasses import replace

import pytest
import torch

from editing.plans.component_changes import component_count
from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.plan_pictures import MAX_COLUMNS, component_sizes, plan_figure
from neurons.errors import BrocaError
from neurons.neuron_sets.pictures import save_figure

D, HEADS, WIDTH = 6, 4, 3


def head_edit(layer=0, chosen=(1, 2)):
    generator = torch.Generator().manual_seed(layer)
    right = torch.zeros(HEADS, WIDTH, 2)
    right[list(chosen)] = torch.randn(len(chosen), WIDTH, 2, generator=generator)
    return ModuleEdit(
        layer,
        "attn",
        tuple(chosen),
        left=torch.randn(D, 2, generator=generator),
        right=right.view(HEADS * WIDTH, 2),
    )


def neuron_edit(layer, count, chosen, factor=0.25):
    scale = torch.ones(count)
    scale[list(chosen)] = factor
    return ModuleEdit(layer, "mlp", tuple(chosen), column_scale=scale)


def test_size_is_the_norm_of_what_is_added():
    edit = head_edit()
    change = edit.left.double() @ edit.right.double().T
    expected = [float(change[:, i * WIDTH : (i + 1) * WIDTH].norm()) for i in range(HEADS)]
    assert component_sizes(edit, HEADS).tolist() == pytest.approx(expected)


def test_size_of_a_neuron_is_that_of_its_deltas():
    deltas = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    output = ModuleEdit(0, "mlp", (1, 3), columns=torch.tensor([1, 3]), column_deltas=deltas[:2])
    # Gate and linear branch of both neurons in one module.
    gate = ModuleEdit(0, "mlp.gate_up", (1, 3), rows=torch.tensor([1, 3, 6, 8]), row_deltas=deltas)
    assert component_sizes(output, 5).tolist() == pytest.approx(
        [0, float(deltas[0].norm()), 0, float(deltas[1].norm()), 0]
    )
    pairs = [float(deltas[[i, i + 2]].norm()) for i in (0, 1)]
    assert component_sizes(gate, 5).tolist() == pytest.approx([0, pairs[0], 0, pairs[1], 0])
    with pytest.raises(BrocaError, match="nothing to draw"):
        plan_figure(make_plan([ModuleEdit(0, "self_attn.q_proj", (), left=deltas, right=deltas)], {}))


def test_size_of_a_scale_is_its_distance_from_one():
    assert component_sizes(neuron_edit(0, 5, (1, 3)), 5).tolist() == [0, 0.75, 0, 0.75, 0]


def test_what_is_scaled_counts_beside_what_is_added():
    added = head_edit()
    scale = torch.ones(HEADS, WIDTH)
    scale[0] = 0.0
    edit = replace(added, components=(0, 1, 2), column_scale=scale.flatten(), notes={"weight_norm": 9.0})
    alone = component_sizes(added, HEADS).tolist()
    assert component_sizes(edit, HEADS).tolist() == pytest.approx([9 / HEADS**0.5, *alone[1:]])
    assert component_count(edit) == HEADS


@pytest.mark.parametrize(
    ("chosen", "columns", "count"),
    [
        ((0,), range(16), 4),
        ((0, 2), [*range(8), *range(32, 45)], 4),  # a sparse key leaves columns of a head out
        ((0, 1, 2), range(60), 3),
        ((1, 3), range(64), 4),  # no width fits
    ],
)
def test_heads_are_counted_from_the_columns_that_change(chosen, columns, count):
    right = torch.zeros(64 if count != 3 else 60, 1)
    right[list(columns)] = 1
    edit = ModuleEdit(0, "attn", chosen, left=torch.ones(D, 1), right=right)
    assert component_count(edit) == count


def test_heat_map_shows_each_component_in_its_place(tmp_path):
    plan = make_plan(
        [head_edit(0), head_edit(2, (0, 3)), neuron_edit(1, 2 * MAX_COLUMNS, (0, 7))],
        {"method": "made"},
    )
    figure = plan_figure(plan)
    heads, neurons = (axis.images[0].get_array() for axis in figure.axes if axis.images)
    assert heads.shape == (3, HEADS)
    assert (heads > 0).tolist() == [[False, True, True, False], [False] * 4, [True, False, False, True]]
    assert neurons.shape == (3, MAX_COLUMNS)
    assert neurons.nonzero()[1].tolist() == [0, 3]
    assert neurons.nonzero()[0].tolist() == [1, 1]
    assert figure.get_suptitle() == "change of each component\nmade"
    save_figure(figure, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_title_names_pair_method_and_model():
    about = {"method": "keyed", "model": "m", "fingerprint": "0123456789", "source": "en", "target": "fr"}
    title = plan_figure(make_plan([head_edit()], about)).get_suptitle()
    assert title == "change of each component, en to fr\nkeyed; m (01234567)"
