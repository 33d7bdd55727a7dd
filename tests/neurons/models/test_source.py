"""MODEL to a loaded model: what is loaded is what the checkpoint holds, or one sentence says why not."""

import json
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file

from neurons.errors import BrocaError, UsageError
from neurons.models.own_dtype import own_dtype
from neurons.models.source import load_model, locate, open_model


@pytest.fixture
def copy(checkpoint_of, tmp_path):
    return shutil.copytree(checkpoint_of(), tmp_path / "copy")


def change_config(checkpoint, **fields):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_loads_what_is_there(copy):
    loaded = load_model(str(copy), "cpu")
    assert loaded.label == "copy"
    assert loaded.fingerprint == open_model(str(copy)).fingerprint
    stored = load_file(copy / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert (parameter == stored[name]).all()


@pytest.mark.parametrize("limited", [{"device": "cpu"}, {"max_memory": 0}])
def test_a_mac_computes_on_its_cpu(copy, monkeypatch, limited):
    """accelerate knows no main memory beside the memory of Apple's GPU, and torch has no oneDNN there."""
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda *_: {"mps": 10**9})
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.setattr("neurons.models.own_dtype.torch.ops.mkldnn", None)
    change_config(copy, dtype="bfloat16")
    dtype = own_dtype(str(copy))
    assert dtype == "auto"
    assert load_model(str(copy), dtype=dtype, **limited).device.type == "cpu"


def test_a_missing_weight_is_named_and_not_made_up(copy):
    stored = load_file(copy / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrocaError, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        load_model(str(copy), "cpu")


def test_a_weight_of_another_shape_is_refused(copy):
    stored = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name][:-1].contiguous()
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    width, d = (len(stored[name]), stored[name].shape[1])
    with pytest.raises(BrocaError) as caught:
        load_model(str(copy), "cpu")
    for named in (name, str([width, d]), str([width + 1, d])):
        assert named in str(caught.value)


@pytest.mark.parametrize("bare", [False, True])
def test_a_missing_head_gets_its_own_remedy_and_that_remedy_works(copy, bare):
    """A fine-tune of a tied model, saved as if it were not; ``bare`` without the prefix, as AutoModel saves."""
    change_config(copy, tie_word_embeddings=False)
    stored = load_file(copy / "model.safetensors")
    stored.pop("lm_head.weight", None)
    names = {name: name.removeprefix("model.") if bare else name for name in stored}
    save_file(
        {names[name]: tensor for name, tensor in stored.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BrocaError, match=r"lm_head\.weight.*tie_word_embeddings") as caught:
        load_model(str(copy), "cpu")
    assert "download" not in str(caught.value)
    change_config(copy, tie_word_embeddings=True)
    loaded = load_model(str(copy), "cpu").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_wrapper_around_every_name_is_named(copy):
    stored = load_file(copy / "model.safetensors")
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in stored.items()}
    save_file(wrapped, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrocaError, match=r"'base_model\.model\.'"):
        load_model(str(copy), "cpu")


@pytest.mark.parametrize("config", [transformers.T5Config(), transformers.MambaConfig()])
def test_unknown_architectures_are_refused_before_any_weight_is_read(copy, config):
    config.save_pretrained(copy)
    for look in (open_model, load_model):
        with pytest.raises(BrocaError, match=f"'{config.model_type}'"):
            look(str(copy))


def test_quantised_models_are_refused(copy):
    change_config(copy, quantization_config={"quant_method": "fp8"})
    for look in (open_model, load_model):
        with pytest.raises(BrocaError, match="quantised"):
            look(str(copy))


def test_what_is_not_a_model(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(UsageError, match="model"):
            locate(name)


def test_devices_that_are_not_there(copy):
    with pytest.raises(UsageError, match="'nonsense'"):
        load_model(str(copy), "nonsense")
    with pytest.raises(UsageError, match="int3"):
        load_model(str(copy), "cpu", "int3")


def test_a_hub_id_goes_to_the_hub(monkeypatch, copy):
    """The same call: the id is asked for, second copies of the weights are left out."""
    asked = {}

    def snapshot_download(model, **options):
        asked.update(options, model=model)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = open_model("someone/model")
    assert asked["model"] == "someone/model"
    assert "*.bin" in asked["ignore_patterns"] and "allow_patterns" not in asked
    assert (found.checkpoint, found.label) == (copy, "someone/model")


@pytest.mark.parametrize("broken", ['{"model_type": "nothing"}', '{"vocab_size": 3}', "{"])
def test_the_dtype_of_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path, broken):
    (tmp_path / "config.json").write_text(broken)
    with pytest.raises(BrocaError, match=r"config\.json cannot be read"):
        own_dtype(str(tmp_path), "cpu")
    assert own_dtype(str(tmp_path), "cpu", "float16") == "float16"  # the config is not needed
