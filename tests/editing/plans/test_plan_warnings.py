"""Reversed directions and large changes are named, others are not."""

import torch

from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.plan_warnings import LARGE_CHANGE, plan_warnings
from neurons.architectures.anatomy import OUTSIDE


def edit(layer, c, change):
    return ModuleEdit(
        layer,
        "mlp",
        (0, 1),
        column_scale=torch.tensor([0.5, 0.5]),
        details={"c": torch.tensor(c, dtype=torch.float64)},
        notes={"change_norm": change, "weight_norm": 1.0},
    )


def test_what_is_unusual_is_named():
    plan = make_plan([edit(0, [-1.0, 0.5], 1.0), edit(1, [-1.1, 0.0], 0.2), edit(2, [0.0, 0.0], 1.5)], {})
    reversed_, large = plan_warnings(plan)
    assert reversed_.startswith("layer 1, mlp: 1 of 2 components have c < -1")
    outside = ModuleEdit(
        OUTSIDE, "lm_head", (), column_scale=torch.ones(2), notes={"change_norm": 2.0, "weight_norm": 1.0}
    )
    assert plan_warnings(make_plan([outside], {}))[0].startswith(f"{outside.where}: ||dW||")
    assert "layer" not in outside.where
    assert large.startswith("layer 2, mlp: ||dW|| is 1.50 times ||W||") and LARGE_CHANGE == 1.0


def test_an_ordinary_plan_is_passed_in_silence():
    assert plan_warnings(make_plan([edit(0, [-1.0, 3.0], 0.5)], {})) == []
