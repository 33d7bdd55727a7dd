"""With a norm after the edited module an edit holds only for its strength: other strengths are refused or solved again."""

from functools import partial

import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.methods.keyed import keyed_plan
from editing.methods.learned_values import learned_values
from editing.methods.material import Material
from editing.plans.algebra import compose, inverted, restricted
from editing.study.candidates import candidate, candidates_of
from editing.study.dose_response import weaker
from editing.study.registry import compared
from neurons.errors import UsageError
from neurons.models.source import load_model


@pytest.fixture(scope="module")
def normed(checkpoint_of):
    return load_model(str(checkpoint_of("gemma2")), device="cpu")


@pytest.fixture(scope="module")
def plan(normed, parts):
    direction = diffmean_direction(normed, parts["estimate"], "en", "fr")
    return keyed_plan(normed, parts["estimate"], direction, [0, 1], 1.0, blocks=("attn", "mlp"))


DERIVED = {
    "itself": lambda loaded, plan, texts: plan,
    "composed": lambda loaded, plan, texts: compose([plan, plan], loaded),
    "inverted": lambda loaded, plan, texts: inverted(loaded, plan),
    "restricted": lambda loaded, plan, texts: restricted(loaded, plan, components={"mlp": range(5)}),
    "learned": lambda loaded, plan, texts: learned_values(loaded, plan, texts["en"], texts["fr"], passes=1),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_multiple_is_refused(normed, plan, parts, tmp_path, broca, name):
    made = DERIVED[name](normed, plan, parts["estimate"].texts)
    with pytest.raises(UsageError, match=r"layer 0, attn.*0\.5"):
        made.scaled(0.5)
    assert made.scaled(1) is made
    path = tmp_path / "edit.safetensors"
    made.save(path)
    out = tmp_path / "out"
    for words in (
        ["export", normed.checkpoint, "--edit", path, "--strength", "2", "--out", out],
        ["edit", "--compose", path, "--strength", "2", "--out", out],
    ):
        status, _, err = broca(*words)
        assert status == 2 and "broca edit --strength" in err and err.count("\n") == 1, err
        assert not out.exists()


@pytest.mark.parametrize("name", ["keyed", "keyed-learned"])
def test_fractions_of_a_strength_are_solved_again(normed, parts, name, monkeypatch):
    monkeypatch.setattr("editing.methods.keyed_edit.learned_values", partial(learned_values, passes=1))
    material = Material(normed, parts["estimate"], "en", "fr")
    method = compared()[name]
    (chosen, *_), _ = candidates_of(method, material)
    ((fraction, weak),) = weaker(method, material, chosen, (0.5,))
    assert fraction == 0.5 and weak.settings == {
        **chosen.settings,
        "strength": 0.5 * chosen.settings["strength"],
    }
    expected = candidate(method, material, weak.settings).plan
    for edit, other, whole in zip(weak.plan.edits, expected.edits, chosen.plan.edits, strict=True):
        assert torch.equal(edit.left, other.left) and torch.equal(edit.right, other.right)
        assert not torch.allclose(edit.left, 0.5 * whole.left, rtol=1e-3)
