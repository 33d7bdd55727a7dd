"""What in a directory makes engines see different models is refused, by open_model and load_model alike."""

import json
import shutil

import models
import pytest
from safetensors.torch import load_file, save_file

from editing.evaluation.asking import chat_tokens
from editing.evaluation.generation import generate
from neurons.errors import BrocaError, UsageError
from neurons.files.tensor_files import tensor_entries
from neurons.models.source import load_model, locate, open_model
from neurons.models.tokenizer import load_tokenizer

LOOKS = pytest.mark.parametrize("look", [open_model, load_model], ids=["open", "load"])
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint_of, tmp_path):
    return shutil.copytree(checkpoint_of(), tmp_path / "copy")


@pytest.fixture
def tied(checkpoint_of, tmp_path):
    return shutil.copytree(checkpoint_of("llama", True), tmp_path / "tied")


def change(path, **fields):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **fields}))


def add_tensor(checkpoint, name, values):
    save_file({**load_file(checkpoint / WEIGHTS), name: values}, checkpoint / WEIGHTS, {"format": "pt"})


def write_index(checkpoint, **weight_map):
    content = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))


@LOOKS
def test_an_adapter_beside_a_model(copy, look):
    change(copy / "adapter_config.json", base_model_name_or_path="someone/base")
    with pytest.raises(BrocaError, match=r"adapter_config\.json"):
        look(str(copy))


@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
@LOOKS
def test_an_adapter_alone_is_named_as_such(copy, look, config):
    change(copy / "adapter_config.json", base_model_name_or_path="someone/base")
    (copy / WEIGHTS).rename(copy / "adapter_model.safetensors")
    if not config:
        (copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"adapter of someone/base.*merge_and_unload"):
        look(str(copy))


@LOOKS
def test_weights_that_only_transformers_reads(copy, look):
    change(copy / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(BrocaError, match="transformers_weights 'other"):
        look(str(copy))


@LOOKS
def test_one_file_beside_an_index_of_shards(copy, tmp_path, look):
    shards = models.save_checkpoint(models.tiny_model(seed=1), tmp_path / "shards", max_shard_size="60KB")
    for path in shards.glob("model*"):
        shutil.copy(path, copy)
    with pytest.raises(BrocaError, match=r"model\.safetensors.*index"):
        look(str(copy))
    (copy / WEIGHTS).unlink()
    assert look(str(copy)).anatomy.layers == 3


def test_an_index_that_was_left_behind_and_one_of_the_one_file(copy):
    write_index(copy, **dict.fromkeys(tensor_entries(copy), WEIGHTS))
    assert open_model(str(copy)).anatomy.layers == 3
    write_index(copy, **dict.fromkeys(tensor_entries(copy), "model-00001-of-00001.safetensors"))
    with pytest.raises(BrocaError, match="index"):
        open_model(str(copy))


@LOOKS
@pytest.mark.parametrize("index", [False, True])
def test_weights_of_a_name_that_transformers_does_not_read(copy, look, index):
    (copy / "pytorch_model.bin").write_bytes(b"other weights")
    (copy / WEIGHTS).rename(copy / "weights.safetensors")
    name = "weights.safetensors"
    if index:
        write_index(copy, **dict.fromkeys(tensor_entries(copy), name))
        name = "consolidated.safetensors.index.json"
        (copy / "model.safetensors.index.json").rename(copy / name)
    with pytest.raises(BrocaError, match=rf"weights are in {name}, .*rename"):
        look(str(copy))


@LOOKS
def test_the_same_tensors_in_a_second_file(copy, look):
    shutil.copy(copy / WEIGHTS, copy / "old.safetensors")
    with pytest.raises(BrocaError, match=r"old\.safetensors"):
        look(str(copy))
    save_file({"value_head": models.torch.zeros(3)}, copy / "old.safetensors")
    assert look(str(copy)).anatomy.layers == 3


@LOOKS
def test_a_head_that_is_said_to_be_the_embedding(tied, look):
    embedding = load_file(tied / WEIGHTS)["model.embed_tokens.weight"]
    add_tensor(tied, "lm_head.weight", embedding.clone())
    assert look(str(tied)).anatomy.layers == 3
    other = embedding.clone()
    other[-1, -1] += 1
    add_tensor(tied, "lm_head.weight", other)
    with pytest.raises(BrocaError, match=r"lm_head\.weight.* model\.embed_tokens\.weight"):
        look(str(tied))
    change(tied / "config.json", tie_word_embeddings=False)
    assert look(str(tied)).anatomy.layers == 3


@LOOKS
def test_a_family_that_ties_unless_it_is_told_otherwise(checkpoint_of, tmp_path, look):
    tied = shutil.copytree(checkpoint_of("gemma2", True), tmp_path / "tied")
    settings = json.loads((tied / "config.json").read_text())
    settings.pop("tie_word_embeddings", None)
    (tied / "config.json").write_text(json.dumps(settings))
    add_tensor(tied, "lm_head.weight", load_file(tied / WEIGHTS)["model.embed_tokens.weight"] + 1)
    with pytest.raises(BrocaError, match=r"lm_head\.weight.* model\.embed_tokens\.weight"):
        look(str(tied))


def test_architectures_of_another_model_type(copy):
    change(copy / "config.json", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(BrocaError, match=r"'llama'.*'Qwen2ForCausalLM'"):
        load_model(str(copy), "cpu")
    for fine in (["LlamaForCausalLM"], ["OfAnotherTime"], [], None):
        change(copy / "config.json", architectures=fine)
        assert load_model(str(copy), "cpu").anatomy.layers == 3


QUANTISATION = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@LOOKS
def test_a_quantisation_that_the_weights_do_not_have(copy, look):
    change(copy / "config.json", **QUANTISATION)
    with pytest.raises(BrocaError, match="stored unquantised"):
        look(str(copy))


@LOOKS
def test_a_quantisation_of_the_language_model_of_a_wrapper(checkpoint_of, tmp_path, look):
    wrapper = shutil.copytree(checkpoint_of("gemma3"), tmp_path / "wrapper")
    text = json.loads((wrapper / "config.json").read_text())["text_config"]
    change(wrapper / "config.json", text_config={**text, **QUANTISATION})
    with pytest.raises(BrocaError, match="stored unquantised"):
        look(str(wrapper))
    modules = open_model(str(wrapper), quantised=True).anatomy.outputs["mlp"]
    assert {type(module) for module in modules} == {models.torch.nn.Linear}


@LOOKS
def test_a_quantisation_that_only_vllm_sees(copy, look):
    change(copy / "config.json", compression_config={"format": "int-quantized"})
    with pytest.raises(BrocaError, match="compression_config"):
        look(str(copy))
    settings = json.loads((copy / "config.json").read_text())
    del settings["compression_config"]
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "hf_quant_config.json").write_text("{}")
    with pytest.raises(BrocaError, match=r"hf_quant_config\.json"):
        look(str(copy))


@LOOKS
@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null, "a"]}']
)
def test_a_generation_config_that_engines_read_in_different_ways(copy, look, content):
    path = copy / "generation_config.json"
    path.write_text(content)
    with pytest.raises(BrocaError, match=r"generation_config\.json.*eos_token_id"):
        look(str(copy))
    for fine in ("{}", '{"eos_token_id": null}', '{"eos_token_id": [1, 5], "temperature": 0.6}'):
        path.write_text(fine)
        assert look(str(copy)).anatomy.layers == 3


@LOOKS
@pytest.mark.parametrize("model_type", ["nobodys", "t5"])
def test_a_checkpoints_own_code_is_not_run_and_nobody_is_asked(copy, look, model_type, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (copy / "own.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(copy / "config.json", model_type=model_type, auto_map=classes)
    with pytest.raises(BrocaError, match="runs no code from checkpoints"):
        look(str(copy))


def test_own_code_beside_a_known_model_is_left_alone(copy):
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(copy / "config.json", auto_map=classes)
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    (copy / "custom_generate").mkdir()
    for name in ("own.py", "custom_generate/generate.py"):
        (copy / name).write_text("raise SystemExit('code of the checkpoint was run')\n")
    loaded = load_model(str(copy), "cpu")
    assert type(loaded.model).__module__.startswith("transformers.")
    assert len(generate(loaded, ["beef"], 2, temperature=0)) == 1


def test_the_template_file_comes_before_the_config(copy):
    change(copy / "tokenizer_config.json", chat_template="of the config {{ messages[0].content }}")
    (copy / "chat_template.jinja").write_text("of the file {{ messages[0].content }}")
    tokenizer = load_model(str(copy), "cpu").tokenizer
    assert tokenizer.decode(chat_tokens(tokenizer, "beef")) == "of the file beef"


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ([], "chat_template.jinja"),
        (["preprocessor_config.json"], "chat_template.json"),
        (["preprocessor_config.json", "processor_config.json"], "processor_config.json"),
    ],
)
def test_the_template_of_a_processor_comes_before_the_tokenizers(copy, files, used):
    (copy / "chat_template.jinja").write_text("chat_template.jinja")
    for name in ("chat_template.json", *files):
        change(copy / name, chat_template=name)
    assert load_tokenizer(copy).chat_template == used


def test_a_tokenizers_own_code_is_not_run(copy, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (copy / "own.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    (copy / "tokenizer.json").unlink()
    change(
        copy / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )
    with pytest.raises(BrocaError, match="runs no code from checkpoints"):
        load_model(str(copy), "cpu")


def test_hub_ids_are_looked_at_alike(copy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: str(copy))
    change(copy / "adapter_config.json")
    with pytest.raises(BrocaError, match="someone/model"):
        locate("someone/model")
