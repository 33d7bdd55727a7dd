"""An exported checkpoint loads in every usual way, without Broca, and gives the same logits."""

from dataclasses import replace

import accelerate
import models
import pytest
import torch
import transformers
from safetensors.torch import load_file

from editing.checkpoints.export import export
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from neurons.models.source import load_model

NOTES = {"change_norm": 1.0, "weight_norm": 5.0}


def plan_for(source):
    """A plan with low-rank changes, column scales and both."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(layer, block):
        left = 0.2 * torch.randn(64, 2, generator=generator)
        right = torch.randn(source.anatomy.width(f"{block}_in"), 2, generator=generator)
        return ModuleEdit(layer, block, (0, 1), left=left, right=right, notes=NOTES)

    scale = torch.ones(source.anatomy.neurons)
    scale[::3] = -0.5
    edits = [
        low_rank(0, "attn"),
        replace(low_rank(0, "mlp"), column_scale=scale),
        ModuleEdit(2, "mlp", (0, 3), column_scale=scale, notes=NOTES),
    ]
    about = {"model": source.label, "fingerprint": source.fingerprint, "method": "test", "settings": {}}
    return make_plan(edits, about)


@torch.inference_mode()
def logits(model):
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(8))
    return model(input_ids=ids).logits.float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Family (and dtype) -> the exported sharded checkpoint and its expected logits, built once."""
    built = {}

    def build(name):
        if name in built:
            return built[name]
        family, _, dtype = name.partition(" ")
        directory = tmp_path_factory.mktemp(family)
        model = models.tiny_model(family, dtype=dtype or "float32")
        models.save_checkpoint(model, directory / "base", max_shard_size="60KB")
        base = load_model(str(directory / "base"), device="cpu", dtype=dtype or "float32")
        plan = plan_for(base)
        export(base, plan, directory / "exported")
        plain = logits(base.model)
        with applied(base, plan):
            expected = logits(base.model)
        assert (expected - plain).abs().max() > 0.05 * expected.abs().max()
        assert len(list((directory / "exported").glob("model-*.safetensors"))) > 2
        built[name] = directory / "exported", expected
        return built[name]

    return build


# Families with the same names on disk and in memory; for the others, only the loader of transformers knows the
# parameter of each name on disk.
SAME_NAMES = ["llama", "llama bfloat16", "gpt2", "phi3"]
RENAMED = ["gemma3", "qwen3_moe"]


@pytest.mark.parametrize("settings", [{}, {"device_map": "cpu"}], ids=["plain", "device map"])
@pytest.mark.parametrize("name", SAME_NAMES + RENAMED)
def test_transformers(exported, name, settings):
    path, expected = exported(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **settings).eval()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def empty_model(path):
    config = transformers.AutoConfig.from_pretrained(path)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    return model


@pytest.mark.parametrize("name", SAME_NAMES)
def test_accelerate_into_an_empty_model(exported, name):
    path, expected = exported(name)
    model = accelerate.load_checkpoint_and_dispatch(empty_model(path), str(path), device_map={"": "cpu"})
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=0)


def test_accelerate_with_layers_left_on_disk(exported, tmp_path):
    path, expected = exported("llama")
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    model = accelerate.load_checkpoint_and_dispatch(
        empty_model(path), str(path), device_map=where, offload_folder=str(tmp_path)
    )
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_by_hand_from_the_shards(exported, name):
    path, expected = exported(name)
    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    tensors = {}
    for file in path.glob("model-*.safetensors"):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
