"""A vector as a bias equals the hook, in families with a bias and in those whose config offers one."""

import models
import pytest
import torch

from editing.hooks.residual import residual_steering
from editing.methods.bake_bias import bake_bias_plan
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model, open_model

VECTOR = torch.linspace(-1, 2, 64).double()


def logits(loaded, ids=(0, 40, 90, 17, 200)):
    with torch.no_grad():
        return loaded.model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "granite"])
def test_equals_the_hook(checkpoint_of, tmp_path, family):
    multiplier = {"mlp_bias": True, "residual_multiplier": 0.25}
    made = (
        models.build_wrapper(tmp_path, family, **multiplier) if family == "granite" else checkpoint_of(family)
    )
    loaded = load_model(str(made), device="cpu")
    plan = bake_bias_plan(loaded, {1: VECTOR}, -0.5)
    with residual_steering(loaded, VECTOR, 1, -0.5):
        expected = logits(loaded)
    unsteered = logits(loaded)
    with applied(loaded, plan):
        result = logits(loaded)
    assert float((expected - unsteered).abs().max()) > 0.05
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)
    assert torch.equal(logits(loaded), unsteered)


def test_several_layers_add_up(checkpoint_of):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    plan = bake_bias_plan(loaded, {2: VECTOR, 0: VECTOR.flip(0)})
    assert [edit.layer for edit in plan.edits] == [0, 2]
    with residual_steering(loaded, VECTOR.flip(0), 0), residual_steering(loaded, VECTOR, 2):
        expected = logits(loaded)
    with applied(loaded, plan):
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-4)


def test_after_the_attention(checkpoint_of):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    bias = loaded.model.transformer.h[1].attn.c_proj.bias
    original = bias.clone()
    with applied(loaded, bake_bias_plan(loaded, {1: VECTOR}, 2.0, "attn")):
        torch.testing.assert_close(bias - original, 2 * VECTOR.float(), rtol=0, atol=1e-6)
    assert torch.equal(bias, original)


def test_the_plan_has_only_biases(checkpoint_of):
    source = open_model(str(checkpoint_of("gpt2")))
    plan = bake_bias_plan(source, {1: VECTOR.float()}, 3.0)
    (edit,) = plan.edits
    assert edit.rank == 0
    assert not edit.changes_weight
    assert edit.components == ()
    torch.testing.assert_close(edit.bias, 3 * VECTOR.float())
    assert edit.notes["change_norm"] == 0
    assert edit.notes["bias_norm"] == pytest.approx(3 * sum(x * x for x in VECTOR.tolist()) ** 0.5)
    assert plan.metadata["method"] == "bake-bias"
    assert plan.metadata["settings"] == {"layers": [1], "strength": 3.0, "block": "mlp"}


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_moe"])
def test_refuses_an_architecture_without_support_for_biases(checkpoint_of, family):
    source = open_model(str(checkpoint_of(family)))
    with pytest.raises(BrocaError, match=r"no bias.* --method bake"):
        bake_bias_plan(source, {1: VECTOR})


def test_refuses_bad_input(checkpoint_of):
    source = open_model(str(checkpoint_of("gpt2")))
    with pytest.raises(UsageError, match="64 dimensions"):
        bake_bias_plan(source, {1: torch.ones(7)})
    with pytest.raises(UsageError, match="strength 0"):
        bake_bias_plan(source, {1: VECTOR}, 0)
    norm_after = open_model(str(checkpoint_of("gemma2")))
    with pytest.raises(BrocaError, match="norm"):
        bake_bias_plan(norm_after, {1: VECTOR})
