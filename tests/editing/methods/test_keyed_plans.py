"""A study of several strengths gives the plans of the single strengths, also with a norm after the module."""

from functools import partial

import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.methods.keyed import keyed_plan
from editing.methods.keyed_edit import Keyed
from editing.methods.learned_values import LEARNED_AT, learned_values
from editing.methods.material import Material
from neurons.models.source import load_model


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_values_are_learned_once_or_with_a_norm_at_each_strength(
    checkpoint_of, corpus, model_type, monkeypatch
):
    quick = partial(learned_values, passes=1)
    monkeypatch.setattr("editing.methods.keyed_edit.learned_values", quick)
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    sources, targets = corpus.texts["qaa"], corpus.texts["qab"]
    material = Material(loaded, corpus, "qaa", "qab", directions=(direction,))
    result = [Keyed(strength=s, learn=True, blocks=("attn", "mlp")).plan_for(material) for s in (1.0, 3.0)]
    for plan, strength in zip(result, (1.0, 3.0), strict=True):
        at = LEARNED_AT if model_type == "llama" else strength
        plain = keyed_plan(loaded, corpus, direction, None, at, blocks=("attn", "mlp"))
        expected = quick(loaded, plain, sources, targets).scaled(strength / at)
        for edit, other in zip(plan.edits, expected.edits, strict=True):
            assert torch.equal(edit.left, other.left) and torch.equal(edit.right, other.right)
        assert plan.metadata["settings"]["strength"] == strength


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_each_plan_equals_that_of_its_strength(checkpoint_of, corpus, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    strengths = (0.5, 2.0)
    material = Material(loaded, corpus, "qaa", "qab", directions=(direction,), layers=(1,))
    result = [Keyed(strength=strength).plan_for(material) for strength in strengths]
    for plan, strength in zip(result, strengths, strict=True):
        (edit,), (alone,) = plan.edits, keyed_plan(loaded, corpus, direction, [1], strength).edits
        expected = alone.left.double() @ alone.right.double().T
        torch.testing.assert_close(
            edit.left.double() @ edit.right.double().T,
            expected,
            rtol=1e-4,
            atol=1e-4 * float(expected.abs().max()),
        )
        assert plan.metadata["settings"]["strength"] == strength
