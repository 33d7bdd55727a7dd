"""The self-check passes on every known architecture, refuses anatomies that are wrong, and admits new ones."""

import gc
import weakref
from dataclasses import replace

import models
import pytest
import torch
import transformers
from test_anatomy import IDS, logits_of, silencing_plan

from editing.checkpoints.export import export
from editing.plans.applied import applied
from neurons.architectures import examination, sites
from neurons.architectures.anatomy import anatomy_of
from neurons.architectures.examination import examine
from neurons.architectures.layouts import LAYOUTS
from neurons.architectures.self_check import checked, example_ids, self_check, writes_to_residual
from neurons.architectures.sites import logits
from neurons.errors import BrocaError
from neurons.files.tensor_files import tensor_entries
from neurons.models.source import _compare_with_disk, load_model, open_model

_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
# Real families that are not in the table: (config class, model class, what differs, what is found).
NEW = {
    "stablelm": (
        transformers.StableLmConfig,
        transformers.StableLmForCausalLM,
        {},
        ("mlp.gate_proj", "mlp.up_proj", True, "model.layers.1.mlp.down_proj.weight"),
    ),
    "starcoder2": (
        transformers.Starcoder2Config,
        transformers.Starcoder2ForCausalLM,
        {},
        ("mlp.c_fc", None, True, "model.layers.1.mlp.c_proj.weight"),
    ),
    "granite": (
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {"logits_scaling": 3.0, "residual_multiplier": 0.5},
        ("mlp.gate_proj", "mlp.up_proj", False, "model.layers.1.mlp.down_proj.weight"),
    ),
    "gpt_bigcode": (
        transformers.GPTBigCodeConfig,
        transformers.GPTBigCodeForCausalLM,
        {"n_inner": 48},
        ("mlp.c_fc", None, True, "transformer.h.1.mlp.c_proj.weight"),
    ),
    "glm4": (
        transformers.Glm4Config,
        transformers.Glm4ForCausalLM,
        {"head_dim": 32},
        ("mlp.gate_up_proj", "mlp.gate_up_proj", False, "model.layers.1.mlp.down_proj.weight"),
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        transformers.OlmoeForCausalLM,
        _EXPERTS,
        ("mlp.experts", "mlp.experts", True, "model.layers.1.mlp.experts.2.down_proj.weight"),
    ),
}

NEW |= {
    "phimoe": (
        transformers.PhimoeConfig,
        transformers.PhimoeForCausalLM,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        ("mlp.experts", "mlp.experts", True, "block_sparse_moe.experts.1.w2.weight"),
    ),
    "minimax_m2": (
        transformers.MiniMaxM2Config,
        transformers.MiniMaxM2ForCausalLM,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        ("mlp.experts", "mlp.experts", True, "block_sparse_moe.experts.1.w2.weight"),
    ),
    "granitemoe": (
        transformers.GraniteMoeConfig,
        transformers.GraniteMoeForCausalLM,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        (
            "block_sparse_moe.experts",
            "block_sparse_moe.experts",
            True,
            "block_sparse_moe.output_linear.weight",
        ),
    ),
}


def save_new(directory, config_class, model_class, **differs):
    """A random checkpoint of a family that is not in the table."""
    small = {"vocab_size": len(models.tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 1}
    sizes = {**models._SMALL, **small, "pad_token_id": None, **differs}
    model = model_class(config_class(**sizes)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return models.save_checkpoint(model, directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_known_architectures_pass_and_stay_bit_identical(family, dtype):
    model = models.tiny_model(family, dtype=dtype).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    self_check(model, anatomy_of(model), IDS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def swapped(modules):
    return (modules[1], modules[0], *modules[2:])


WRONG = {
    "gate is up": ("llama", lambda a: replace(a, gates=a.ups, ups=a.gates), r"layer 0, mlp.*its input"),
    "layers mixed up": (
        "llama",
        lambda a: replace(a, outputs={**a.outputs, "mlp": swapped(a.outputs["mlp"])}),
        r"layer 0, mlp",
    ),
    "attentions mixed up": (
        "gpt2",
        lambda a: replace(a, outputs={**a.outputs, "attn": swapped(a.outputs["attn"])}),
        r"layer 0, attn",
    ),
    "not the output": (
        "olmo2",
        lambda a: replace(
            a,
            outputs={**a.outputs, "attn": tuple(block.self_attn.q_proj for block in a.blocks)},
            layout=replace(a.layout, outputs={**a.layout.outputs, "attn": "self_attn.q_proj"}),
        ),
        r"layer 0, attn.*last linear module that runs is self_attn\.o_proj",
    ),
    "a norm in between": (
        "gemma2",
        lambda a: replace(a, layout=replace(a.layout, residual=True)),
        r"layer 2, mlp.*residual",
    ),
    "transposed": (
        "gpt_oss",
        lambda a: replace(a, layout=replace(a.layout, transposed=())),
        r"layer 0, mlp",
    ),
    "experts mixed up": (
        "mixtral",
        lambda a: replace(a, outputs={**a.outputs, "mlp": swapped(a.outputs["mlp"])}),
        r"layer 0, mlp",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_anatomy_is_refused_by_layer_and_block(name):
    family, spoil, message = WRONG[name]
    # As many neurons as the residual is wide: a transposed weight has the right shape.
    sizes = {"intermediate_size": 64} if name == "transposed" else {}
    model = models.tiny_model(family, **sizes).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(BrocaError, match=message):
        self_check(model, spoil(anatomy_of(model)), IDS)
    for key, tensor in model.state_dict().items():
        assert torch.equal(before[key], tensor)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_logits_that_the_head_alone_does_not_give_are_refused(family, monkeypatch):
    model = models.tiny_model(family).requires_grad_(False)
    anatomy = anatomy_of(model)
    plain = replace(LAYOUTS[family], softcap=None, logit_scale=None)
    monkeypatch.setitem(LAYOUTS, family, plain)
    with pytest.raises(BrocaError, match=f"{family}.*logits"):
        self_check(model, anatomy, IDS)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_what_reaches_the_residual_is_measured(family):
    model = models.tiny_model(family).requires_grad_(False)
    anatomy = anatomy_of(model)
    assert writes_to_residual(model, anatomy, IDS) == anatomy.residual_output


@pytest.mark.parametrize("name", NEW)
def test_an_architecture_that_is_not_in_the_table_is_found_by_structure(tmp_path, monkeypatch, name):
    monkeypatch.delitem(LAYOUTS, name, raising=False)
    config_class, model_class, differs, (gate, up, residual, tensor) = NEW[name]
    source = save_new(tmp_path / name, config_class, model_class, **differs)
    loaded = load_model(str(source), device="cpu")
    for anatomy in (loaded.anatomy, open_model(str(source)).anatomy):
        assert anatomy.layout.examined
        assert (anatomy.layout.gate, anatomy.layout.up) == (gate, up)
        assert anatomy.residual_output == residual
        names = tensor_entries(source)
        assert any(piece.tensor.endswith(tensor) for piece in anatomy.stored(1, "mlp", names))
        assert anatomy.layers == 3
    ids = example_ids(300)
    with torch.no_grad():
        hidden = loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits(loaded.model, hidden), loaded.model(ids).logits)
    plan, readers = silencing_plan(loaded)
    by_hook = logits_of(loaded, readers)
    assert not torch.equal(logits_of(loaded), by_hook)
    with applied(loaded, plan):
        assert torch.equal(logits_of(loaded), by_hook)
    export(loaded, plan, tmp_path / "steered")
    assert torch.equal(logits_of(load_model(str(tmp_path / "steered"), device="cpu")), by_hook)


def test_logits_examine_a_model_once_and_do_not_keep_it(monkeypatch):
    seen = []

    def counted(model):
        seen.append(id(model))
        return examine(model)

    monkeypatch.setattr(sites, "examine", counted)
    monkeypatch.delitem(LAYOUTS, "granite", raising=False)
    config_class, model_class, differs, _ = NEW["granite"]
    config = config_class(**{**models._SMALL, "pad_token_id": None, **differs})
    made = [model_class(config).eval().requires_grad_(False) for _ in range(2)]
    hidden = torch.randn(4, config.hidden_size)
    first = logits(made[0], hidden)
    torch.testing.assert_close(first, made[0].lm_head(hidden) / 3)
    for _ in range(3):
        assert torch.equal(logits(made[0], hidden), first)
        logits(made[1], hidden)
    assert seen == [id(made[0]), id(made[1])]
    gone = weakref.ref(made.pop())
    gc.collect()
    assert gone() is None and len(made) == 1


def test_a_new_architecture_that_is_turned_while_loading_is_refused(tmp_path):
    """Its bytes on disk stand for other weights than those in memory."""
    save_new(tmp_path / "a", *NEW["stablelm"][:2])
    loaded = load_model(str(tmp_path / "a"), device="cpu")
    with torch.no_grad():
        weight = loaded.model.model.layers[2].self_attn.o_proj.weight
        weight.copy_(weight.T.clone())
    with pytest.raises(BrocaError, match=r"layers\.2\.self_attn\.o_proj\.weight"):
        _compare_with_disk("a", tmp_path / "a", loaded.anatomy)


@pytest.mark.parametrize(
    ("config_class", "model_class", "differs", "message"),
    [
        (
            transformers.MambaConfig,
            transformers.MambaForCausalLM,
            {},
            r"'mamba'.*neither attention nor an MLP",
        ),
        (transformers.RwkvConfig, transformers.RwkvForCausalLM, {}, r"rwkv.*feed_forward\.value"),
    ],
    ids=["mamba", "rwkv"],
)
def test_an_architecture_without_the_parts_is_refused_by_what_is_missing(
    tmp_path, config_class, model_class, differs, message
):
    save_new(tmp_path, config_class, model_class, **differs)
    for look in (open_model, lambda path: load_model(path, device="cpu")):
        with pytest.raises(BrocaError, match=message):
            look(str(tmp_path))


def test_an_activation_that_changes_signs_is_read_at_its_output(tmp_path, monkeypatch):
    """Signs of its input are not counted: Broca does not know that they are the same."""
    monkeypatch.delitem(LAYOUTS, "stablelm", raising=False)
    save_new(tmp_path, transformers.StableLmConfig, transformers.StableLmForCausalLM, hidden_act="tanh")
    for look in (open_model, lambda path: load_model(path, device="cpu")):
        layout = look(str(tmp_path)).anatomy.layout
        assert (layout.gate, layout.up, layout.activation) == ("mlp.act_fn", "mlp.up_proj", None)


def test_a_loaded_model_of_a_new_architecture_is_checked_itself(tmp_path):
    """Its weights say what its config cannot: neurons that write nothing."""
    save_new(tmp_path, *NEW["stablelm"][:2])
    loaded = load_model(str(tmp_path), device="cpu")
    model = loaded.model
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    with pytest.raises(BrocaError, match=r"stablelm, layer 2, mlp.*changes nothing"):
        checked(model, anatomy_of(model))


def test_a_model_that_cannot_run_is_refused(tmp_path):
    save_new(tmp_path, *NEW["stablelm"][:2])
    model = load_model(str(tmp_path), device="cpu").model
    anatomy = anatomy_of(model)

    def fail(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    model.model.layers[0].self_attn.forward = fail
    with pytest.raises(BrocaError, match=r"could not run \(RuntimeError: no such kernel\)"):
        checked(model, anatomy)


def test_a_packed_weight_does_not_hide_the_shape_of_its_module():
    linear = torch.nn.Linear(4, 6)
    linear.weight = torch.nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert examination._linear_shapes(torch.nn.Sequential(linear)) == {"0": (6, 4)}
