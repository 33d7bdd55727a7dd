"""``broca export``: verification, undo, adapters, uploads and invalid combinations."""

import json
import shlex

import huggingface_hub
import pytest
import torch

from editing.plans.plan import ModuleEdit, make_plan
from neurons.errors import BrocaError
from neurons.files.tensor_files import read_tensor, tensor_entries
from neurons.models.fingerprint import fingerprint
from neurons.models.source import open_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of("llama", True, "bfloat16")


@pytest.fixture(scope="module")
def edit(model, tmp_path_factory):
    source = open_model(str(model))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 1, generator=generator) for size in (64, 48))
    notes = {"change_norm": 1.0, "weight_norm": 5.0}
    low_rank = ModuleEdit(1, "mlp", (0,), left=0.1 * left, right=right, notes=notes)
    about = {"model": source.label, "fingerprint": source.fingerprint, "method": "m", "languages": ["qaa"]}
    path = tmp_path_factory.mktemp("plans") / "edit.safetensors"
    make_plan([low_rank], {**about, "settings": {}}).save(path)
    return path


def value(checkpoint, name=DOWN):
    return read_tensor(tensor_entries(checkpoint)[name]).double()


def test_there_and_back(broca, model, edit, tmp_path):
    steered, base = tmp_path / "steered", tmp_path / "base"
    status, out, err = broca("export", model, "--edit", edit, "--verify", "--undoable", "--out", steered)
    assert status == 0, err
    assert DOWN in out and "verified: 1 tensors" in out and "undoable: " in out
    assert out.strip().splitlines()[-1] == str(steered)
    status, out, err = broca("export", steered, "--undo", "--out", base)
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(base)
    assert fingerprint(base) == fingerprint(model)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_json_is_all_that_is_printed(broca, model, edit, tmp_path):
    status, out, err = broca(
        "export", model, "--edit", edit, "--verify", "--undoable", "--out", tmp_path / "out", "--json"
    )
    assert status == 0, err
    result = json.loads(out)
    assert result["tensors"] == [DOWN] and result["verified"]["edited"] == 1 and result["remainder_bytes"] > 0
    assert set(result["survived"][DOWN]) == {"norm_ratio", "cosine"}


def test_strength_multiplies_the_edit(broca, model, edit, tmp_path):
    for strength in ("1", "2"):
        strong = ["--strength", strength, "--out", tmp_path / strength]
        assert broca("export", model, "--edit", edit, *strong)[0] == 0
    once, twice = (value(tmp_path / strength) - value(model) for strength in ("1", "2"))
    assert float((twice - 2 * once).norm()) < 0.05 * float(twice.norm())


def test_an_adapter(broca, model, edit, tmp_path):
    status, out, err = broca(
        "export", model, "--edit", edit, "--format", "lora", "--out", tmp_path / "adapter"
    )
    assert status == 0, err
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert "layers.1.mlp.down_proj" in out


def test_what_is_pushed(broca, model, edit, tmp_path, monkeypatch):
    from editing.checkpoints import hub

    calls = []
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(hub, "push", lambda path, repo: calls.append((path, repo)) or "https://hub/x")
    out = tmp_path / "out"
    status, printed, err = broca("export", model, "--edit", edit, "--push-to-hub", "me/x", "--out", out)
    assert status == 0, err
    assert calls == [(out, "me/x")] and "https://hub/x" in printed


def test_what_failed_to_upload_is_kept_and_the_command_told_that_replaces_as_a_push(
    broca, model, edit, tmp_path, monkeypatch
):
    from editing.checkpoints import hub

    def fail(path, repo):
        raise BrocaError(f"{repo}: try again")

    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(hub, "push", fail)
    out = tmp_path / "an out"
    status, _, err = broca("export", model, "--edit", edit, "--push-to-hub", "me/x", "--out", out)
    assert status == 1 and (out / "config.json").exists() and err.count("\n") == 1
    removed = [word for pattern in hub.REPLACED for word in ("--delete", pattern)]
    assert shlex.split(err.split("`")[1]) == ["hf", "upload", "me/x", str(out), ".", *removed]


def test_what_could_not_be_pushed_is_refused_before_any_work(broca, model, edit, tmp_path, monkeypatch):
    for token, repo, expected_status, value in (
        ("hf_none", "me/x/y", 2, "me/x/y"),
        ("hf_none", "--", 2, "--"),
        ("", "me/x", 1, "me/x"),
    ):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda token=token: token or None)
        out = tmp_path / "out"
        status, printed, err = broca("export", model, "--edit", edit, f"--push-to-hub={repo}", "--out", out)
        assert (status, printed) == (expected_status, "") and value in err and err.count("\n") == 1, err
        assert not out.exists()


# name -> (options, the values in the message)
COMBINATIONS = {
    "nothing": ([], ("--edit", "--undo", "--dequantise")),
    "two tasks": (["--edit", "EDIT", "--undo"], ("--edit and --undo",)),
    "other two": (["--undo", "--dequantise", "bf16"], ("--undo and --dequantise",)),
    "undo and lora": (["--undo", "--format", "lora"], ("--format lora", "--undo")),
    "undo and verify": (["--undo", "--verify"], ("--verify", "--undo")),
    "undo and undoable": (["--undo", "--undoable"], ("--undoable", "--undo")),
    "strength": (["--dequantise", "bf16", "--strength", "2"], ("--strength", "--dequantise")),
    "lora and verify": (["--edit", "EDIT", "--format", "lora", "--verify"], ("--verify", "--format lora")),
    "lora and undoable": (["--edit", "EDIT", "--format=lora", "--undoable"], ("--undoable", "--format lora")),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_invalid_combinations_are_rejected(broca, model, edit, tmp_path, name):
    options, values = COMBINATIONS[name]
    options = [str(edit) if option == "EDIT" else option for option in options]
    status, out, err = broca("export", model, *options, "--out", tmp_path / "out")
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and all(value in err for value in values)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_looked_at(broca, edit, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = broca("export", tmp_path / "none", "--edit", edit, "--out", tmp_path / "file" / "out")
    assert status == 2 and "is a file, so" in err


def test_undo_of_what_cannot_be_undone(broca, model, edit, tmp_path):
    assert broca("export", model, "--edit", edit, "--out", tmp_path / "steered")[0] == 0
    status, _, err = broca("export", tmp_path / "steered", "--undo", "--out", tmp_path / "base")
    assert status == 1 and "without --undoable" in err
    assert f"its base model, {model.name} (fingerprint {fingerprint(model)})" in err
    status, _, err = broca("export", model, "--undo", "--out", tmp_path / "base")
    assert status == 1 and "nothing to undo" in err and "export --undoable" in err
    assert broca("export", model, "--edit", edit, "--format", "lora", "--out", tmp_path / "adapter")[0] == 0
    status, _, err = broca("export", tmp_path / "adapter", "--undo", "--out", tmp_path / "base")
    assert status == 1 and err.count("\n") == 1
    assert "adapter: an adapter" in err and "nothing to undo" in err
    assert not (tmp_path / "base").exists()


def test_dequantise_what_is_not_quantised(broca, model, tmp_path):
    status, _, err = broca("export", model, "--dequantise", "bf16", "--out", tmp_path / "out")
    assert status == 1 and "is not quantised" in err
