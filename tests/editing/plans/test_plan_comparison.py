"""Agreement of two plans against dW written out."""

import pytest
import torch

from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.plan_comparison import agreement, compare_plans
from neurons.errors import BrocaError
from neurons.models.source import load_model

D, N = 5, 8


def edit(seed, components, layer=0, block="mlp", scaled=False):
    generator = torch.Generator().manual_seed(seed)
    right = torch.zeros(N, 2)
    right[list(components)] = torch.randn(len(components), 2, generator=generator)
    scale = torch.ones(N)
    scale[list(components)] = 0.5
    return ModuleEdit(
        layer,
        block,
        tuple(components),
        column_scale=scale if scaled else None,
        left=torch.randn(D, 2, generator=generator),
        right=right,
    )


def written_out(first, second, weight):
    changes = []
    for one in (first, second):
        change = torch.zeros(D, N, dtype=torch.float64)
        for r in range(D):
            for c in range(N):
                scale = 1.0 if one.column_scale is None else float(one.column_scale[c])
                change[r, c] = (scale - 1) * float(weight[r, c]) + sum(
                    float(one.left[r, i]) * float(one.right[c, i]) for i in range(2)
                )
        changes.append(change)
    a, b = changes
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("scaled", [False, True])
def test_cosine_is_that_of_the_changes(scaled):
    first, second = edit(1, (0, 2, 5), scaled=scaled), edit(2, (2, 5, 6, 7), scaled=scaled)
    weight = torch.randn(D, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = agreement(first, second, weight)
    assert found.cosine == pytest.approx(written_out(first, second, weight), abs=1e-9)
    assert (found.first, found.second, found.shared) == (3, 4, 2)
    assert found.jaccard == pytest.approx(2 / 5)
    without = agreement(first, second)
    assert without.cosine is None if scaled else without.cosine == pytest.approx(found.cosine)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_deltas_of_the_same_form_are_compared(name):
    generator = torch.Generator().manual_seed(5)
    size, other = (N, D) if name == "columns" else (D, N)
    edits, changes = [], []
    for places in ([0, 2, 3], [2, 3, 4]):
        deltas = torch.randn(3, other, generator=generator)
        fields = {name: torch.tensor(places), f"{name.removesuffix('s')}_deltas": deltas}
        edits.append(ModuleEdit(0, "mlp", (), **fields))
        changes.append(torch.zeros(size, other, dtype=torch.float64))
        changes[-1][places] = deltas.double()
    expected = float((changes[0] * changes[1]).sum() / changes[0].norm() / changes[1].norm())
    assert agreement(*edits).cosine == pytest.approx(expected)
    assert agreement(edits[0], edit(1, (0,))).cosine is None


def test_the_same_edit_agrees_and_the_opposite_disagrees():
    one = edit(4, (1, 3))
    assert agreement(one, one).cosine == pytest.approx(1)
    assert agreement(one, one.scaled(-2)).cosine == pytest.approx(-1)


def test_a_module_of_one_plan_only():
    found = agreement(None, edit(5, (1,), layer=3))
    assert (found.layer, found.first, found.second, found.jaccard, found.cosine) == (3, 0, 1, 0.0, None)


def test_rows_are_in_order_and_models_must_agree():
    metadata = {"fingerprint": "f"}
    first = make_plan([edit(1, (0,), 2), edit(2, (1,), 0, "attn")], metadata)
    second = make_plan([edit(3, (0,), 0), edit(4, (0,), 2)], metadata)
    assert [(row.layer, row.block) for row in compare_plans(first, second)] == [
        (0, "attn"),
        (0, "mlp"),
        (2, "mlp"),
    ]
    with pytest.raises(BrocaError, match="different models"):
        compare_plans(first, make_plan(list(second.edits), {"fingerprint": "g"}))


def test_with_the_model_scales_are_compared(checkpoint_of):
    loaded = load_model(str(checkpoint_of("llama")))
    n = loaded.anatomy.neurons
    scales = [torch.ones(n), torch.ones(n)]
    scales[0][:4], scales[1][2:4] = 0.0, 0.0
    plans = [
        make_plan(
            [ModuleEdit(1, "mlp", tuple((scale == 0).nonzero()[:, 0].tolist()), column_scale=scale)],
            {"fingerprint": loaded.fingerprint},
        )
        for scale in scales
    ]
    (row,) = compare_plans(*plans, loaded)
    weight = loaded.anatomy.parts(1, "mlp")[0].weight.double()
    assert row.cosine == pytest.approx(float(weight[:, 2:4].norm() / weight[:, :4].norm()))
    assert compare_plans(*plans)[0].cosine is None
