"""Norms and what reads them: found without names, and refused where a weight cannot contain a change of them."""

import models
import pytest
import torch
from torch import nn

from neurons.architectures.anatomy import anatomy_of
from neurons.architectures.reading_norms import ReadingNorm, reading_norms
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError
from neurons.models.source import load_model

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
UP = ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"input_layernorm": QKV, "post_attention_layernorm": UP}),
        ("qwen3", {"input_layernorm": QKV, "post_attention_layernorm": UP}),
        ("gemma2", {"input_layernorm": QKV, "pre_feedforward_layernorm": UP}),
        ("phi3", {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}),
        ("gpt2", {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}),
        ("opt", {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)}),
        ("cohere", {"input_layernorm": QKV + UP}),
    ],
)  # fmt: skip
def test_readers_are_those_of_the_architecture(family, expected):
    model = models.tiny_model(family)
    found = reading_norms(model, anatomy_of(model), [2, 0])
    assert found == tuple(
        ReadingNorm(layer, path, readers) for layer in (0, 2) for path, readers in expected.items()
    )


def test_equal_norms_in_parallel_are_not_confused():
    """GPT-NeoX reads one input with two norms, whose outputs are equal before training."""
    model = models.tiny_model("gpt_neox")
    for block in model.gpt_neox.layers:
        block.post_attention_layernorm.load_state_dict(block.input_layernorm.state_dict())
    found = reading_norms(model, anatomy_of(model), [1])
    assert [norm.readers for norm in found] == [("attention.query_key_value",), ("mlp.dense_h_to_4h",)]


@pytest.mark.parametrize("family", ["opt-post_norm", "olmo2"])
def test_a_norm_that_the_residual_reads_is_refused(family):
    model = models.tiny_model(family)
    with pytest.raises(BrocaError, match=f"{model.config.model_type}: layer 0"):
        reading_norms(model, anatomy_of(model), range(3))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_refused(family):
    model = models.tiny_model(family)
    with pytest.raises(BrocaError, match=f"{family}: layer 1 is a mixture"):
        reading_norms(model, anatomy_of(model), [1])


def test_a_reader_that_is_no_module_is_noticed():
    """An MLP that also adds its input to its output, as a residual connection inside would."""
    model = models.tiny_model("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + hidden
    anatomy = anatomy_of(model)
    assert len(reading_norms(model, anatomy, [0, 2])) == 4
    with pytest.raises(BrocaError, match="layer 1 "):
        reading_norms(model, anatomy, range(3))


def test_a_model_on_disk_has_the_same(checkpoint_of):
    path = str(checkpoint_of())
    whole, other = load_model(path, "cpu"), load_model(path, max_memory=0)
    found = reading_norms(other.model, other.anatomy, range(3))
    assert found == reading_norms(whole.model, whole.anatomy, range(3))


def test_the_path_of_a_module_is_a_site():
    model = models.tiny_model("gpt_neox")
    seen, kept = [], []
    block: nn.Module = model.gpt_neox.layers[1]
    block.post_attention_layernorm.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    hooks = {("post_attention_layernorm", 1): lambda values, _: kept.append(values.clone())}
    with torch.no_grad(), site_hooks(anatomy_of(model), hooks):
        model(torch.tensor([[1, 5, 9]]))
    torch.testing.assert_close(kept[0], seen[0], rtol=0, atol=0)
