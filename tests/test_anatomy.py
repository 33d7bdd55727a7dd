"""Every known architecture: what a hook silences is what its checkpoint column silences."""

from contextlib import contextmanager

import models
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.activations import ACT2FN

from neurons.anatomy import LAYOUTS, SIGN_PRESERVING, SITES, anatomy_of, site_module
from neurons.errors import BrocaError
from neurons.recording import reading
from neurons.source import load_model

CASES = [
    pytest.param(model_type, tied, dtype, id=f"{model_type}-{'tied' if tied else 'untied'}-{dtype}")
    for model_type in LAYOUTS
    for tied, dtype in ((False, "float32"), (True, "bfloat16"))
]
IDS = torch.tensor([[0, 40, 263, 270, 41, 99, 280, 265, 30], [0, 266, 50, 51, 289, 290, 7, 261, 262]])


@pytest.fixture(scope="module")
def loaded_case(checkpoint_of):
    """A checkpoint loaded in its own dtype; a test that changes a weight puts it back."""
    cases = {}

    def load(model_type, tied, dtype):
        key = (model_type, tied, dtype)
        if key not in cases:
            cases[key] = load_model(str(checkpoint_of(*key)), device="cpu", dtype=dtype)
        return cases[key]

    return load


@contextmanager
def silenced(anatomy, site, layer, columns):
    """Zero some of a site's values in the forward pass."""
    module, is_input = site_module(anatomy, site, layer)
    assert is_input

    def silence(_, inputs):
        values = inputs[0].clone()
        values[..., columns] = 0
        return (values,)

    handle = module.register_forward_pre_hook(silence)
    yield
    handle.remove()


@contextmanager
def columns_zeroed(anatomy, block, layer, columns):
    weight = anatomy.outputs[block][layer].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, columns] = 0
    yield
    with torch.no_grad():
        weight.copy_(before)


def logits_of(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits.float()


@pytest.mark.parametrize(("model_type", "tied", "dtype"), CASES)
def test_a_silent_neuron_or_head_is_its_columns_zeroed(loaded_case, model_type, tied, dtype):
    loaded = loaded_case(model_type, tied, dtype)
    anatomy = loaded.anatomy
    plain = logits_of(loaded)
    heads = range(anatomy.heads)
    wanted = [("mlp", layer, [neuron]) for layer, neuron in ((0, 0), (1, 25), (2, anatomy.neurons - 1))]
    wanted += [
        ("attn", layer, range(head * anatomy.head_dim, (head + 1) * anatomy.head_dim))
        for layer in range(anatomy.layers)
        for head in heads
    ]
    for block, layer, columns in wanted:
        columns = list(columns)
        with silenced(anatomy, f"{block}_in", layer, columns):
            by_hook = logits_of(loaded)
        with columns_zeroed(anatomy, block, layer, columns):
            by_column = logits_of(loaded)
        torch.testing.assert_close(by_hook, by_column, rtol=0, atol=0)
        assert not torch.equal(by_hook, plain)
    assert torch.equal(logits_of(loaded), plain)


@pytest.mark.parametrize(("model_type", "tied", "dtype"), CASES)
def test_head_columns_are_that_heads_output(loaded_case, model_type, tied, dtype):
    """A query head that attends nowhere new: zeroing its q changes its own columns of attn_in only."""
    loaded = loaded_case(model_type, tied, dtype)
    anatomy = loaded.anatomy
    width = anatomy.head_dim
    values = {}

    def run(name):
        with reading(anatomy, {("attn_in", 0): lambda v: values.__setitem__(name, v.detach().clone())}):
            logits_of(loaded)

    run("before")
    query = anatomy.blocks[0].self_attn.q_proj
    kept = query.weight.detach().clone()
    assert len(kept) == anatomy.heads * width == anatomy.width("attn_in")
    with torch.no_grad():
        query.weight[width : 2 * width] *= -1
    run("after")
    with torch.no_grad():
        query.weight.copy_(kept)
    changed = (values["before"] != values["after"]).any(0).any(0)
    assert not changed[:width].any()
    assert changed[width:].all()


@pytest.mark.parametrize(("model_type", "tied", "dtype"), CASES)
def test_tensor_names_lead_to_the_same_weights_on_disk(loaded_case, model_type, tied, dtype):
    loaded = loaded_case(model_type, tied, dtype)
    anatomy = loaded.anatomy
    width = {"attn": anatomy.heads * anatomy.head_dim, "mlp": anatomy.neurons}
    with safe_open(str(loaded.checkpoint / "model.safetensors"), framework="pt") as stored:
        for block in ("attn", "mlp"):
            for layer in range(anatomy.layers):
                tensor = stored.get_tensor(anatomy.tensor_name(layer, block))
                assert tuple(tensor.shape) == (anatomy.residual, width[block])
                assert tensor.dtype == getattr(torch, dtype)
                assert torch.equal(tensor, anatomy.outputs[block][layer].weight)
        assert ("lm_head.weight" in stored.keys()) != tied  # noqa: SIM118


@pytest.mark.parametrize(("model_type", "tied", "dtype"), CASES)
def test_sites_are_what_they_say(loaded_case, model_type, tied, dtype):
    loaded = loaded_case(model_type, tied, dtype)
    anatomy = loaded.anatomy
    config = loaded.model.config
    assert anatomy.model_type == model_type
    assert (anatomy.layers, anatomy.residual, anatomy.neurons, anatomy.heads) == (3, 64, 48, 2)
    assert anatomy.component_width("attn") == anatomy.head_dim == (getattr(config, "head_dim", None) or 32)
    assert anatomy.component_width("mlp") == 1
    seen = {}
    readers = {
        (site, layer): lambda v, at=(site, layer): seen.__setitem__(at, v.detach())
        for site in SITES
        for layer in range(3)
    }
    with reading(anatomy, readers), torch.no_grad():
        states = loaded.model(IDS, output_hidden_states=True).hidden_states
    for layer, block in enumerate(anatomy.blocks):
        at = {site: seen[site, layer] for site in SITES}
        for site in SITES:
            assert at[site].shape == (*IDS.shape, anatomy.width(site))
        into = states[layer] + at["attn_out"]
        gate, up = block.mlp.gate_proj, block.mlp.up_proj
        normed = block.post_attention_layernorm(into)
        activation = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]
        assert torch.equal(at["mlp_act"], gate(normed))
        assert torch.equal(at["mlp_in"], activation(gate(normed)) * up(normed))
        assert torch.equal(at["mlp_out"], block.mlp.down_proj(at["mlp_in"]))
        assert torch.equal(at["attn_out"], block.self_attn.o_proj(at["attn_in"]))
        assert torch.equal(at["block_out"], into + at["mlp_out"])
    assert torch.equal(seen["block_out", 0], states[1])


@pytest.mark.parametrize("name", SIGN_PRESERVING)
def test_sign_preserving_activations_are(name):
    values = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([1e-6, -1e-6, 0.0])])
    assert torch.equal(ACT2FN[name](values) > 0, values > 0)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=300, n_positions=32)
    models.save_checkpoint(transformers.GPT2LMHeadModel(config), tmp_path)
    with pytest.raises(BrocaError, match=r"'gpt2' is not known.*llama"):
        load_model(str(tmp_path), device="cpu")


def test_an_activation_whose_sign_says_nothing_is_refused_by_name(tmp_path):
    models.build_checkpoint(tmp_path, hidden_act="sigmoid")
    with pytest.raises(BrocaError, match="'sigmoid' of llama"):
        load_model(str(tmp_path), device="cpu")


def test_a_weight_of_an_unexpected_shape_is_named():
    model = models.tiny_model()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(47, 64, bias=False)
    with pytest.raises(BrocaError, match=r"layer 1, mlp\.down_proj.*\(64, 47\).*\(64, 48\)"):
        anatomy_of(model)


def test_a_missing_module_is_named():
    model = models.tiny_model()
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(BrocaError, match=r"mlp\.gate_proj"):
        anatomy_of(model)
