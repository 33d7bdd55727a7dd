"""The anatomy from config.json and headers alone is the one that transformers' model class gives, or none."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neurons.architectures.anatomy import BLOCKS, OUTSIDE, SITES, anatomy_of
from neurons.architectures.stored_anatomy import stored_anatomy
from neurons.errors import BrocaError
from neurons.files.tensor_files import tensor_entries
from neurons.models.source import open_model

# Of the families that the tests know, those whose experts only transformers can describe.
SLOW = ("mixtral", "qwen3_moe", "gpt_oss")
FAST = [family for family in models.FAMILIES if family not in SLOW]
MODULES = ("blocks", "gates", "ups", "outputs", "mixtures", "outside")


@pytest.fixture
def copy(checkpoint_of, tmp_path):
    """A checkpoint of a family that may be changed."""

    def make(family="llama"):
        return shutil.copytree(checkpoint_of(family), tmp_path / family)

    return make


def settings_of(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())


def fast(checkpoint):
    return stored_anatomy(settings_of(checkpoint), tensor_entries(checkpoint))


def slow(checkpoint):
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        return anatomy_of(transformers.AutoModelForCausalLM.from_config(config))


def changed_tensors(checkpoint, change):
    """Rewrite the weights as ``change`` leaves the dict of them."""
    stored = load_file(checkpoint / "model.safetensors")
    change(stored)
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        checkpoint / "model.safetensors",
        metadata={"format": "pt"},
    )


def outcome(call, *arguments):
    try:
        return call(*arguments)
    except BrocaError as error:
        return str(error)


def assert_the_same(found, expected, names):
    for field in fields(expected):
        if field.name not in MODULES:
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    for attribute in ("mixed", "residual_output"):
        assert getattr(found, attribute) == getattr(expected, attribute)
    for site in SITES:
        assert found.width(site) == expected.width(site)
    for part in MODULES[:3]:
        assert len(getattr(found, part)) == len(getattr(expected, part)) == expected.layers
    assert found.mixtures == expected.mixtures == ()
    for block in BLOCKS:
        assert found.supports_bias(block) == expected.supports_bias(block)
        for layer in range(expected.layers):
            parts = [anatomy.parts(layer, block)[0] for anatomy in (found, expected)]
            shapes = [getattr(part.module, part.parameter).shape for part in parts]
            assert shapes[0] == shapes[1]
            assert found.parts(layer, block)[0].weight.shape == expected.parts(layer, block)[0].weight.shape
            biases = [anatomy.output_bias(layer, block) for anatomy in (found, expected)]
            assert len({None if bias is None else bias.shape for bias in biases}) == 1
            assert found.tensor_name(layer, block, names) == expected.tensor_name(layer, block, names)
            for method in ("stored", "stored_bias", "switched_biases"):
                asked = (layer, block, names)
                assert outcome(getattr(found, method), *asked) == outcome(getattr(expected, method), *asked)
    for layer in range(expected.layers):
        for part in ("gates", "ups"):
            ours, theirs = getattr(found, part)[layer], getattr(expected, part)[layer]
            assert ours.weight.shape == theirs.weight.shape
            assert (getattr(ours, "bias", None) is None) == (getattr(theirs, "bias", None) is None)
        assert found.value(layer, 1).shape == (expected.residual,)
        assert found.input_rows(layer, [1, 3]).keys() == expected.input_rows(layer, [1, 3]).keys()
    for layer in (OUTSIDE, 0, expected.layers - 1):
        modules = found.outside if layer == OUTSIDE else dict(found.blocks[layer].named_modules())
        matrices = [path for path, module in modules.items() if hasattr(module, "weight")]
        assert len(matrices) >= (2 if layer == OUTSIDE else 4)
        for path in matrices:
            for method, asked in (("stored", (layer, path, names)), ("rows", (layer, path))):
                assert outcome(getattr(found, method), *asked) == outcome(getattr(expected, method), *asked)


@pytest.mark.parametrize("family", FAST)
def test_it_is_the_model_classs(checkpoint_of, family):
    checkpoint = checkpoint_of(family)
    found = fast(checkpoint)
    assert found is not None
    assert found.blocks[0].get_submodule(found.layout.outputs["mlp"]).weight.is_meta
    assert_the_same(found, slow(checkpoint), tensor_entries(checkpoint).keys())


@pytest.mark.parametrize("family", SLOW)
def test_a_mixture_is_left_to_transformers(checkpoint_of, family):
    assert fast(checkpoint_of(family)) is None
    assert open_model(str(checkpoint_of(family))).anatomy.mixed


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
        ("gemma3", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("cohere", {"attention_bias": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("opt", {"enable_bias": False}),
        ("falcon", {"bias": False, "ffn_hidden_size": None}),
        ("gpt2", {"n_inner": None}),
        ("gptj", {"n_inner": None}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("llama", {"head_dim": 48}),
    ],
)
def test_settings_change_it_as_they_change_the_model(tmp_path, family, config):
    models.build_checkpoint(tmp_path, family, **config)
    found = fast(tmp_path)
    assert found is not None
    assert_the_same(found, slow(tmp_path), tensor_entries(tmp_path).keys())


@pytest.mark.parametrize(
    ("family", "now", "then"),
    [
        ("gpt2", "transformer.", ""),
        ("llama", "model.", ""),
        ("gemma3", "language_model.model.", "model.language_model."),
    ],
)
def test_older_names_are_found(copy, family, now, then):
    checkpoint = copy(family)

    def rename(stored):
        for name in [name for name in stored if name.startswith(now)]:
            stored[then + name.removeprefix(now)] = stored.pop(name)

    changed_tensors(checkpoint, rename)
    assert_the_same(fast(checkpoint), slow(checkpoint), tensor_entries(checkpoint).keys())


def test_shards_and_links_are_read(tmp_path, checkpoint_of):
    """A hub cache is a directory of links."""
    sharded = tmp_path / "sharded"
    models.tiny_model().save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in sharded.iterdir():
        (linked / file.name).symlink_to(file)
    for checkpoint in (sharded, linked):
        assert_the_same(fast(checkpoint), slow(checkpoint_of()), tensor_entries(checkpoint_of()).keys())


def test_the_sizes_in_the_familys_own_or_transformers_names(checkpoint_of):
    settings, entries = settings_of(checkpoint_of("gpt2")), tensor_entries(checkpoint_of("gpt2"))
    renamed = {**settings, "hidden_size": settings["n_embd"], "num_hidden_layers": settings["n_layer"]}
    del renamed["n_embd"], renamed["n_layer"]
    assert stored_anatomy(renamed, entries).residual == 64
    assert stored_anatomy({**settings, "hidden_size": 64}, entries).residual == 64
    assert stored_anatomy({**settings, "hidden_size": 32}, entries) is None
    assert stored_anatomy({**settings, "hidden_size": 64, "n_embd": 32}, entries) is None


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        *(
            ("llama", name)
            for name in (
                "model_type",
                "hidden_size",
                "num_attention_heads",
                "num_hidden_layers",
                "intermediate_size",
                "hidden_act",
            )
        ),
        ("gemma2", "hidden_activation"),
        ("gemma3", "text_config"),
        ("qwen3", "attention_bias"),
        ("qwen3", "head_dim"),
        ("gpt2", "n_embd"),
        ("gpt2", "n_head"),
        ("gpt2", "n_layer"),
        ("opt", "do_layer_norm_before"),
        ("opt", "enable_bias"),
        ("opt", "ffn_dim"),
        ("bloom", "slow_but_exact"),
        ("bloom", "apply_residual_connection_post_layernorm"),
        ("falcon", "activation"),
        ("falcon", "bias"),
        ("gpt_neox", "attention_bias"),
    ],
)
def test_what_config_json_leaves_open_is_left_to_transformers(checkpoint_of, family, missing):
    settings, entries = settings_of(checkpoint_of(family)), tensor_entries(checkpoint_of(family))
    assert stored_anatomy(settings, entries) is not None
    del settings[missing]
    assert stored_anatomy(settings, entries) is None


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "hidden_activation"])
def test_so_it_is_in_a_wrappers_part(checkpoint_of, missing):
    settings, entries = settings_of(checkpoint_of("gemma3")), tensor_entries(checkpoint_of("gemma3"))
    settings[missing] = settings["text_config"].pop(missing)
    assert stored_anatomy(settings, entries) is None


def test_settings_that_old_files_lack(copy):
    """llama's head_dim and bias switches are younger than many of its checkpoints."""
    checkpoint = copy()
    settings = settings_of(checkpoint)
    for name in ("head_dim", "attention_bias", "mlp_bias"):
        del settings[name]
    (checkpoint / "config.json").write_text(json.dumps(settings))
    assert_the_same(fast(checkpoint), slow(checkpoint), tensor_entries(checkpoint).keys())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", [64]),
        ("hidden_size", -64),
        ("hidden_size", 10**30),
        ("hidden_size", 32),
        ("num_attention_heads", 0),
        ("num_attention_heads", {}),
        ("num_attention_heads", 3),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", True),
        ("intermediate_size", None),
        ("intermediate_size", "48"),
        ("hidden_act", 1),
        ("hidden_act", "sigmoid"),
        ("head_dim", "32"),
        ("head_dim", 0),
        ("attention_bias", "no"),
        ("attention_bias", None),
        ("model_type", ["llama"]),
        ("model_type", "nonsense"),
        ("text_config", {"hidden_size": 64}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", 3),
    ],
)
def test_what_is_no_config_is_refused_in_one_sentence(copy, name, value):
    checkpoint = copy()
    settings = {**settings_of(checkpoint), name: value}
    assert stored_anatomy(settings, tensor_entries(checkpoint)) is None
    (checkpoint / "config.json").write_text(json.dumps(settings))
    # Other sizes than the tensors' are found when a tensor is read.
    if (name, value) == ("hidden_size", 32):
        assert open_model(str(checkpoint)).anatomy.residual == 32
        return
    with pytest.raises(BrocaError) as refused:
        open_model(str(checkpoint))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["null", "[1]", '"llama"', "{", "", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_object_is_refused_in_one_sentence(copy, text):
    checkpoint = copy()
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(BrocaError, match=r"its config\.json cannot be read") as refused:
        open_model(str(checkpoint))
    assert "\n" not in str(refused.value)


def test_a_quantised_checkpoint_is_refused_as_ever(copy):
    checkpoint = copy()
    settings = {**settings_of(checkpoint), "quantization_config": {"quant_method": "mxfp4"}}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    stored = load_file(checkpoint / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 24, dtype=torch.uint8)
    save_file(stored, checkpoint / "model.safetensors")
    with pytest.raises(BrocaError) as refused:
        open_model(str(checkpoint))
    assert str(refused.value) == (
        f"{checkpoint}: a quantised checkpoint, whose weights cannot be edited: write it unquantised first, with "
        "`broca export MODEL --dequantise bf16 --out DIRECTORY`"
    )


def test_heads_that_do_not_share_the_width_are_left_to_transformers(checkpoint_of):
    settings, entries = settings_of(checkpoint_of("mistral")), tensor_entries(checkpoint_of("mistral"))
    assert stored_anatomy(settings, entries).width("attn_in") == 96
    assert stored_anatomy({**settings, "num_attention_heads": 3, "head_dim": 32}, entries) is None


def test_a_config_that_names_other_configs_is_left_to_transformers(checkpoint_of):
    settings = {**settings_of(checkpoint_of()), "configuration_files": ["config.json", "config.5.0.0.json"]}
    assert stored_anatomy(settings, tensor_entries(checkpoint_of())) is None


@pytest.mark.parametrize("shape", [(-1,), (1, 64, 48)])
def test_a_weight_that_is_no_matrix_is_left_to_transformers(copy, shape):
    checkpoint = copy("gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"
    changed_tensors(checkpoint, lambda stored: stored.update({name: stored[name].reshape(shape)}))
    assert fast(checkpoint) is None


def layer_lost(stored):
    del stored["model.layers.2.mlp.down_proj.weight"]


def gate_lost(stored):
    del stored["model.layers.1.mlp.gate_proj.weight"]


def bias_that_nothing_asks_for(stored):
    stored["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(64)


def under_both_names(stored):
    stored["layers.0.self_attn.o_proj.weight"] = stored["model.layers.0.self_attn.o_proj.weight"].clone()


def in_eighths(stored):
    name = "model.layers.0.mlp.down_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)


def gate_of_another_width(stored):
    name = "model.layers.2.mlp.gate_proj.weight"
    stored[name] = stored[name][:-1]


def all_of_another_width(stored):
    for name in stored:
        if ".mlp." in name:
            stored[name] = stored[name][:, :-1] if "down" in name else stored[name][:-1]


@pytest.mark.parametrize(
    "change",
    [
        layer_lost,
        gate_lost,
        bias_that_nothing_asks_for,
        under_both_names,
        in_eighths,
        gate_of_another_width,
        all_of_another_width,
    ],
)
def test_tensors_that_do_not_fit_the_config_are_left_to_transformers(copy, change):
    checkpoint = copy()
    changed_tensors(checkpoint, change)
    assert fast(checkpoint) is None
    # Which does not look at them: what it gives is what the config says.
    assert open_model(str(checkpoint)).anatomy.neurons == 48


def test_a_bias_that_the_config_asks_for_must_be_there(checkpoint_of):
    settings, entries = settings_of(checkpoint_of()), tensor_entries(checkpoint_of())
    assert stored_anatomy({**settings, "attention_bias": True}, entries) is None
    assert stored_anatomy({**settings, "mlp_bias": True}, entries) is None


def test_open_model_takes_it(monkeypatch, checkpoint_of):
    def from_pretrained(*_, **__):
        raise AssertionError("transformers is asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    assert open_model(str(checkpoint_of())).anatomy.neurons == 48
    with pytest.raises(BrocaError, match="transformers is asked"):
        open_model(str(checkpoint_of("mixtral")))


def test_an_export_needs_no_transformers(checkpoint_of):
    """In a fresh interpreter, for what other tests imported is in this one."""
    code = (
        "import sys, cli.main, cli.export, editing.checkpoints.export, editing.checkpoints.undo, editing.checkpoints.adapter, editing.checkpoints.dequantise\n"
        "from neurons.models.source import open_model\n"
        "assert open_model(sys.argv[1]).anatomy.layers == 3\n"
        "heavy = ('transformers', 'torch._dynamo', 'sympy', 'torch.distributed.fsdp')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint_of())],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
