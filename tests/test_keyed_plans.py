"""Several strengths at once are the plans that each strength makes alone, also where a norm follows."""

import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.edits.keyed import keyed_plan, keyed_plans
from neurons.source import load_model


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_each_plan_is_the_one_of_its_strength(checkpoint_of, corpus, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    strengths = (0.5, 2.0)
    found = keyed_plans(loaded, corpus, direction, strengths, layers=[1])
    for plan, strength in zip(found, strengths, strict=True):
        (edit,), (alone,) = plan.edits, keyed_plan(loaded, corpus, direction, [1], strength).edits
        expected = alone.left.double() @ alone.right.double().T
        torch.testing.assert_close(
            edit.left.double() @ edit.right.double().T,
            expected,
            rtol=1e-4,
            atol=1e-4 * float(expected.abs().max()),
        )
        assert plan.metadata["settings"]["strength"] == strength
