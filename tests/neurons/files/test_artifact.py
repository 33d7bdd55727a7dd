"""Broca's own files, and the fingerprint that ties them to a model."""

import json
import os
import shutil
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from neurons.errors import BrocaError
from neurons.files.artifact import (
    FORMAT_VERSION,
    artifact_bytes,
    load_artifact,
    save_artifact,
    write_atomically,
)
from neurons.models.fingerprint import fingerprint
from neurons.models.source import load_model

TENSORS = {
    "b": torch.arange(6, dtype=torch.int64).view(2, 3).T,  # not contiguous
    "a": torch.tensor([0.1, -2.5, 1e300], dtype=torch.float64),
    "empty": torch.zeros(0, 2, dtype=torch.int64),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
}
METADATA = {
    "languages": ["uk", "fa", "ünï", "a path \udce9"],
    "settings": {"rate": 0.1, "of": None},
    "fingerprint": "f" * 16,
}


@pytest.fixture
def saved(tmp_path):
    save_artifact(tmp_path / "file", "direction", TENSORS, METADATA)
    return tmp_path / "file"


def test_round_trip(saved):
    artifact = load_artifact(saved, "direction")
    assert artifact.kind == "direction"
    assert {key: artifact.metadata[key] for key in METADATA} == METADATA
    assert artifact.metadata["format_version"] == FORMAT_VERSION
    assert set(artifact.metadata["packages"]) == {"broca", "torch", "transformers", "numpy"}
    assert artifact.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert artifact.tensors[name].dtype == tensor.dtype
        assert artifact.tensors[name].shape == tensor.shape
        assert torch.equal(artifact.tensors[name], tensor)


def test_equal_content_gives_equal_bytes():
    backwards = dict(reversed(METADATA.items()))
    one = artifact_bytes("edit", TENSORS, METADATA)
    assert artifact_bytes("edit", dict(reversed(TENSORS.items())), backwards) == one
    assert artifact_bytes("edit", TENSORS, METADATA | {"fingerprint": "e"}) != one
    assert artifact_bytes("edit", TENSORS | {"a": TENSORS["a"] + 1}, METADATA) != one


def test_a_file_is_written_without_its_bytes_in_memory(tmp_path, monkeypatch):
    expected = artifact_bytes("edit", TENSORS, METADATA)
    monkeypatch.setattr("neurons.files.artifact.save", None)
    save_artifact(tmp_path / "file", "edit", TENSORS, METADATA)
    assert (tmp_path / "file").read_bytes() == expected


def test_another_kind_is_refused_by_name(saved):
    with pytest.raises(BrocaError, match="holds 'direction', but 'neurons' is needed"):
        load_artifact(saved, "neurons")
    assert load_artifact(saved).kind == "direction"


def test_an_unknown_kind_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="'weights' is not a kind"):
        save_artifact(tmp_path / "file", "weights", TENSORS, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_the_kind_asked_for_is_the_kind_written_whatever_the_metadata_says(tmp_path, saved):
    """Metadata read from one file may go into another; what describes the old file must not."""
    metadata = load_artifact(saved).metadata | {"format_version": FORMAT_VERSION + 7}
    save_artifact(tmp_path / "other", "edit", TENSORS, metadata)
    artifact = load_artifact(tmp_path / "other", "edit")
    assert artifact.metadata["format_version"] == FORMAT_VERSION


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    save_file({"a": torch.ones(2)}, tmp_path / "other", metadata={"format": "pt"})
    for name in ("plain", "other"):
        with pytest.raises(BrocaError, match=f"{name}: a safetensors file, but not one that Broca wrote"):
            load_artifact(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[]", "5", "null", '{"kind": "edit", "format_version": "one"}'])
def test_damaged_metadata_is_refused(tmp_path, text):
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata={"broca": text})
    with pytest.raises(BrocaError, match="file: "):
        load_artifact(tmp_path / "file", "edit")


def test_a_newer_version_is_refused(tmp_path):
    document = {"kind": "edit", "format_version": FORMAT_VERSION + 1}
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata={"broca": json.dumps(document)})
    with pytest.raises(BrocaError, match=rf"newer Broca \(format {FORMAT_VERSION + 1}.*update"):
        load_artifact(tmp_path / "file", "edit")


@pytest.mark.parametrize("left", [0, 4, 60, -30, -1])
def test_a_truncated_file_is_refused(saved, left):
    content = saved.read_bytes()
    saved.write_bytes(content[:left])
    with pytest.raises(BrocaError, match="file: not a file that Broca wrote"):
        load_artifact(saved)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path, said in ((tmp_path / "nothing", "there is no such file"), (tmp_path, "is a directory")):
        with pytest.raises(BrocaError, match=said):
            load_artifact(path)


def test_writing_makes_parent_directories_and_an_ordinary_file(tmp_path):
    write_atomically(tmp_path / "new" / "deep" / "file", b"content")
    (tmp_path / "ordinary").touch()
    written = tmp_path / "new" / "deep" / "file"
    assert written.read_bytes() == b"content"
    assert written.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(saved, monkeypatch, step):
    before = saved.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="no space"):
        save_artifact(saved, "direction", {"a": torch.zeros(9)}, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# --- fingerprints --------------------------------------------------------------------------------


@pytest.fixture
def copied(checkpoint_of, tmp_path):
    return Path(shutil.copytree(checkpoint_of(), tmp_path / "copy"))


def test_a_copied_checkpoint_has_the_same_fingerprint(checkpoint_of, copied):
    found = fingerprint(copied)
    assert found == fingerprint(checkpoint_of())
    assert len(found) == 16
    assert int(found, 16) >= 0


def test_a_relative_path_has_the_same_fingerprint(checkpoint_of, copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    assert fingerprint(Path(copied.name)) == fingerprint(checkpoint_of())
    assert load_model(copied.name, device="cpu").fingerprint == fingerprint(checkpoint_of())


def test_any_one_changed_tensor_gives_another_fingerprint(copied):
    tensors = load_file(copied / "model.safetensors")
    seen = {fingerprint(copied)}
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1e-3}
        save_file(changed, copied / "model.safetensors", metadata={"format": "pt"})
        seen.add(fingerprint(copied))
    assert len(seen) == len(tensors) + 1


def test_a_renamed_or_reshaped_tensor_gives_another_fingerprint(copied):
    tensors = load_file(copied / "model.safetensors")
    before = fingerprint(copied)
    weight = tensors.pop("lm_head.weight")
    for change in ({"lm_head2.weight": weight}, {"lm_head.weight": weight.T.contiguous().T.reshape(64, 300)}):
        save_file(tensors | change, copied / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(copied) != before


def test_another_config_gives_another_fingerprint_unless_it_says_nothing_of_the_model(copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    before = fingerprint(copied)
    path.write_text(json.dumps(config | {"transformers_version": "9.9", "_name_or_path": "x"}))
    assert fingerprint(copied) == before
    for change in ({"rms_norm_eps": 1e-4}, {"hidden_act": "gelu"}, {"new": 1}):
        path.write_text(json.dumps(config | change))
        assert fingerprint(copied) != before


def test_another_dtype_gives_another_fingerprint(copied, tmp_path):
    model = models.tiny_model()
    one = models.save_checkpoint(model, tmp_path / "one")
    assert fingerprint(one) == fingerprint(copied)
    two = models.save_checkpoint(model.to(torch.bfloat16), tmp_path / "two")
    assert fingerprint(two) != fingerprint(one)
    three = models.save_checkpoint(model.to(torch.float32), tmp_path / "three")
    assert fingerprint(three) not in (fingerprint(one), fingerprint(two))


def test_an_edit_inside_a_checkpoint_gives_another_fingerprint(copied):
    before = fingerprint(copied)
    (copied / "broca").mkdir()
    (copied / "broca" / "edit.safetensors").write_bytes(b"a plan")
    after = fingerprint(copied)
    (copied / "broca" / "edit.safetensors").write_bytes(b"b plan")
    assert len({before, after, fingerprint(copied)}) == 3


def test_a_sharded_checkpoint_has_a_fingerprint_too(tmp_path):
    model = models.tiny_model()
    models.save_checkpoint(model, tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    before = fingerprint(tmp_path / "shards")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight += 1e-3
    models.save_checkpoint(model, tmp_path / "other", max_shard_size="100KB")
    assert fingerprint(tmp_path / "other") != before


def test_a_file_made_from_another_model_is_refused(llama):
    llama.require_fingerprint({"fingerprint": llama.fingerprint}, "neurons.safetensors")
    for metadata in ({"fingerprint": "0" * 16, "model": "another"}, {}):
        with pytest.raises(BrocaError, match=r"neurons\.safetensors: made for the model"):
            llama.require_fingerprint(metadata, "neurons.safetensors")
