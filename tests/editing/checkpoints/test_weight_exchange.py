"""One model with another checkpoint's weights: the other's logits, its own bits after, and one model in memory."""

import gc
import json
import tempfile

import models
import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from safetensors.torch import load_file, save_file
from test_anatomy import logits_of, silencing_plan
from test_applied import assert_untouched, state
from test_biases import bias_plan
from torch.multiprocessing.reductions import StorageWeakRef

from editing.checkpoints.export import export
from editing.checkpoints.weight_exchange import Exchange
from editing.evaluation.likelihood import mean_kl
from neurons.errors import BrocaError
from neurons.models.source import load_model
from neurons.text.batches import text_batches

# Dense, with names that differ on disk, tied, and mixtures whose experts are fused in memory.
CASES = [
    ("llama", False, "bfloat16"),
    ("gpt2", True, "float32"),
    ("gemma3", True, "float32"),
    ("mixtral", False, "bfloat16"),
    ("qwen3_moe", False, "float32"),
    ("gpt_oss", False, "float32"),
]


def on_disk(path):
    other = load_model(str(path), max_memory=0)
    assert all(parameter.is_meta for parameter in other.model.parameters())
    return other


def edited(loaded, directory):
    """A checkpoint of the model with an edit of three of its weights."""
    plan, _ = silencing_plan(loaded)
    return export(loaded, plan, directory).path


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_an_export_is_exchanged_and_taken_back(checkpoint_of, tmp_path, monkeypatch, family, tied, dtype):
    loaded = load_model(str(checkpoint_of(family, tied, dtype)), device="cpu")
    path = edited(loaded, tmp_path / "out")
    before, plain = state(loaded), logits_of(loaded)
    expected = logits_of(load_model(str(path), device="cpu"))
    steering = Exchange(loaded, on_disk(path))
    read, own = [], OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda *at: read.append(at[1]) or own(*at))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), steering():
            assert torch.equal(logits_of(loaded), expected)
            raise ZeroDivisionError
        assert_untouched(loaded, before)
        assert torch.equal(logits_of(loaded), plain)
    assert not torch.equal(plain, expected)
    # Nothing but the three modules' weights came into memory.
    assert len(set(read)) == 3 and len(read) == 6


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_a_fine_tune_that_differs_everywhere(checkpoint_of, tmp_path, family, tied, dtype):
    loaded = load_model(str(checkpoint_of(family, tied, dtype)), device="cpu")
    path = models.build_checkpoint(tmp_path / "tuned", family, tied, dtype, seed=9)
    before = state(loaded)
    with Exchange(loaded, on_disk(path))():
        assert torch.equal(logits_of(loaded), logits_of(load_model(str(path), device="cpu")))
    assert_untouched(loaded, before)


def test_a_model_that_is_partly_on_disk_itself(checkpoint_of, tmp_path):
    whole = load_model(str(checkpoint_of("gpt2", True)), device="cpu")
    size = sum(parameter.nbytes for parameter in whole.model.parameters())
    path = models.build_checkpoint(tmp_path / "tuned", "gpt2", True, seed=9)
    expected = logits_of(load_model(str(path), device="cpu"))
    for allowed in (0, size // 2):
        loaded = load_model(whole.name, max_memory=allowed)
        with Exchange(loaded, on_disk(path))():
            assert torch.equal(logits_of(loaded), expected)
        assert torch.equal(logits_of(loaded), logits_of(whole))


def test_a_bias_that_the_other_alone_has(llama, tmp_path):
    export(llama, bias_plan(llama), tmp_path / "out")
    expected = logits_of(load_model(str(tmp_path / "out"), device="cpu"))
    before = state(llama)
    with Exchange(llama, on_disk(tmp_path / "out"))():
        assert torch.equal(logits_of(llama), expected)
    assert not torch.equal(logits_of(llama), expected)
    assert state(llama).keys() == before.keys()
    assert_untouched(llama, before)


def test_a_bias_that_the_other_lacks_is_refused(llama, tmp_path):
    export(llama, bias_plan(llama), tmp_path / "out")
    with pytest.raises(BrocaError, match="_bias"):
        Exchange(load_model(str(tmp_path / "out"), device="cpu"), on_disk(llama.checkpoint))


@pytest.mark.parametrize(("name", "size"), [("num_hidden_layers", 2), ("intermediate_size", 40)])
def test_other_sizes_are_refused(llama, tmp_path, name, size):
    other = models.build_checkpoint(tmp_path / "other", **{name: size})
    with pytest.raises(BrocaError, match=f"{name} is {size}"):
        Exchange(llama, on_disk(other))


def test_tied_weights_that_the_other_stores_twice_and_different_are_refused(checkpoint_of, tmp_path):
    tied = load_model(str(checkpoint_of("llama", True)), device="cpu")
    path = models.build_checkpoint(tmp_path / "apart", "llama", tied=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrocaError, match=r"lm_head\.weight"):
        Exchange(tied, on_disk(path))


def test_the_head_is_exchanged_where_the_embeddings_stay(checkpoint_of, tmp_path):
    loaded = load_model(str(checkpoint_of("llama")), device="cpu")
    path = models.build_checkpoint(tmp_path / "other")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    with Exchange(loaded, on_disk(path))():
        doubled = logits_of(loaded)
    assert torch.equal(doubled, 2 * logits_of(loaded))


def test_a_divergence_is_taken_from_the_unedited_head(checkpoint_of, tmp_path, corpus):
    """The head's weight differs too, and is needed beside the other's."""
    loaded = load_model(str(checkpoint_of("gemma", True)), device="cpu")
    path = models.build_checkpoint(tmp_path / "tuned", "gemma", True, seed=9)
    batches = text_batches(corpus.texts["qaa"][:4], loaded.tokenizer, 64)
    found = mean_kl(loaded, batches, Exchange(loaded, on_disk(path)))
    other = load_model(str(path), device="cpu")
    total = tokens = 0
    for batch in batches:
        with torch.no_grad():
            given = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
            p, q = (one.model(**given).logits.log_softmax(-1) for one in (loaded, other))
        kl = (p.exp() * (p - q)).sum(-1)[:, :-1][batch.counted[:, 1:]]
        total, tokens = total + float(kl.sum()), tokens + len(kl)
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_memory_holds_one_model(checkpoint_of, tmp_path, monkeypatch):
    """Of a fine-tune that differs everywhere, no tensor of either model is held beside the live ones."""
    loaded = load_model(str(checkpoint_of("llama", dtype="bfloat16")), device="cpu")
    path = models.build_checkpoint(tmp_path / "tuned", dtype="bfloat16", seed=9)
    steering = Exchange(loaded, on_disk(path))
    read, own = [], OffloadedWeightsLoader.__getitem__

    def noted(*at):
        values = own(*at)
        read.append((at[1], StorageWeakRef(values.untyped_storage())))
        return values

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with steering():
        gc.collect()
        assert len(read) > 20
        assert [name for name, storage in read if not storage.expired()] == ["lm_head.weight"]


def test_nothing_temporary_is_left(llama, tmp_path, monkeypatch):
    path = models.build_checkpoint(tmp_path / "tuned", seed=9)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folder"))
    (tmp_path / "folder").mkdir()
    steering = Exchange(llama, on_disk(path))
    with steering():
        assert list((tmp_path / "folder").iterdir())
    del steering
    gc.collect()
    assert not list((tmp_path / "folder").iterdir())
