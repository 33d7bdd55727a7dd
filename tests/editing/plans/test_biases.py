"""A plan's biases: on models that have them, on those whose config can ask for them, and on no others."""

import json

import pytest
import torch
from safetensors import safe_open

from editing.checkpoints.export import export
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from neurons.errors import BrocaError
from neurons.models.source import load_model

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])


def bias_plan(loaded, blocks=("attn", "mlp"), layer=1):
    generator = torch.Generator().manual_seed(2)
    edits = [
        ModuleEdit(
            layer,
            block,
            (),
            bias=torch.randn(loaded.anatomy.residual, generator=generator),
            notes={"change_norm": 0.0, "weight_norm": 1.0},
        )
        for block in blocks
    ]
    return make_plan(edits, {"fingerprint": loaded.fingerprint, "method": "made", "settings": {}})


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


def hooked(loaded, plan):
    """Logits with the vectors added to the modules' outputs."""
    handles = [
        loaded.anatomy.outputs[edit.block][edit.layer].register_forward_hook(
            lambda _, __, output, added=edit.bias: output + added
        )
        for edit in plan.edits
    ]
    found = logits(loaded)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "bloom", "llama"])
def test_a_bias_is_the_vector_added_to_the_output(checkpoint_of, tmp_path, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    plan = bias_plan(loaded)
    base, expected = logits(loaded), hooked(loaded, plan)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with applied(loaded, plan):
        found = logits(loaded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.1
    after = loaded.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    export(loaded, plan, tmp_path / "out")
    assert torch.equal(logits(load_model(str(tmp_path / "out"), device="cpu")), found)


def test_a_llama_gets_every_bias_that_its_config_then_asks_for(checkpoint_of, tmp_path):
    loaded = load_model(str(checkpoint_of("llama")), device="cpu")
    done = export(loaded, bias_plan(loaded, ("mlp",)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True and not config.get("attention_bias")
    names = {
        f"model.layers.{layer}.mlp.{part}_proj.bias" for layer in range(3) for part in ("gate", "up", "down")
    }
    assert set(done.added) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        with safe_open(tmp_path / "out" / index[name], "pt") as file:
            assert bool(file.get_tensor(name).any()) == (name == "model.layers.1.mlp.down_proj.bias")


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma"])
def test_where_no_config_can_ask_for_it_a_bias_is_refused(checkpoint_of, tmp_path, model_type):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    assert not loaded.anatomy.supports_bias("mlp")
    plan = bias_plan(loaded, ("mlp",))
    with pytest.raises(BrocaError, match="has no bias"), applied(loaded, plan):
        raise AssertionError("entered")
    with pytest.raises(BrocaError, match="has no bias"):
        export(loaded, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_have_no_bias_in_common(checkpoint_of):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    assert not loaded.anatomy.supports_bias("mlp")
    with pytest.raises(BrocaError, match="experts"), applied(loaded, bias_plan(loaded, ("mlp",))):
        raise AssertionError("entered")
