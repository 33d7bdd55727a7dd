"""Checkpoints read back: what is right passes, and a single wrong bit anywhere is named."""

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import editing.checkpoints.export as export_module
from editing.checkpoints.export import export
from editing.checkpoints.verification import verify
from editing.plans.plan import ModuleEdit, make_plan
from neurons.errors import BrocaError
from neurons.files.tensor_files import tensor_entries
from neurons.models.source import open_model

NOTES = {"change_norm": 1.0, "weight_norm": 5.0}
DOWN = "model.layers.1.mlp.down_proj.weight"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_for(source, bias=False):
    d, n = source.anatomy.residual, source.anatomy.neurons
    edits = [
        ModuleEdit(
            1,
            "mlp",
            (0,),
            left=0.1 * random(d, 2),
            right=random(n, 2, seed=1),
            bias=random(d, seed=2) if bias else None,
            notes=NOTES,
        ),
        ModuleEdit(0, "attn", (0,), row_scale=1 + 0.1 * random(d, seed=3), notes=NOTES),
    ]
    about = {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "method": "m",
        "languages": [],
        "settings": {},
    }
    return make_plan(edits, about)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_exported_is_right(tmp_path, family, dtype):
    source = open_model(str(models.build_checkpoint(tmp_path / "base", family, dtype=dtype)))
    done = export(source, plan_for(source), tmp_path / "out", verified=True)
    found = verify(source, plan_for(source), tmp_path / "out")
    assert found == done.verified
    assert set(found.edited) == set(done.tensors)
    assert found.unchanged == len(tensor_entries(source.checkpoint)) - len(done.tensors)
    assert found.bytes == sum(entry.end - entry.begin for entry in tensor_entries(tmp_path / "out").values())


def test_added_biases_are_right(tmp_path):
    source = open_model(str(models.build_checkpoint(tmp_path / "base", dtype="bfloat16")))
    done = export(source, plan_for(source, bias=True), tmp_path / "out", verified=True)
    assert set(done.added) <= set(done.verified.edited) and len(done.added) == 9
    changed = len(done.verified.edited) - len(done.added)
    assert done.verified.unchanged == len(tensor_entries(source.checkpoint)) - changed
    flip(tmp_path / "out", "model.layers.0.mlp.gate_proj.bias")
    with pytest.raises(BrocaError, match=r"new tensor model\.layers\.0\.mlp\.gate_proj\.bias"):
        verify(source, plan_for(source, bias=True), tmp_path / "out")


def flip(checkpoint, name, last=False):
    entry = tensor_entries(checkpoint)[name]
    with entry.file.open("r+b") as stream:
        place = entry.end - 1 if last else entry.begin
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture
def exported(tmp_path):
    source = open_model(str(models.build_checkpoint(tmp_path / "base", dtype="bfloat16")))
    export(source, plan_for(source), tmp_path / "out")
    return source, tmp_path / "out"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [(DOWN, "is not what source and plan give"), ("model.norm.weight", "is not the source's")],
)
def test_one_bit(exported, name, message, last):
    source, out = exported
    flip(out, name, last)
    with pytest.raises(BrocaError, match=rf"{name.replace('.', '[.]')}.*{message}"):
        verify(source, plan_for(source), out)


def test_tensors_that_are_missing_too_many_or_others(exported, tmp_path):
    source, out = exported
    path = out / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, path)
    with pytest.raises(BrocaError, match=r"model\.norm\.weight is missing"):
        verify(source, plan_for(source), out)
    save_file({**tensors, "more": torch.ones(2)}, path)
    with pytest.raises(BrocaError, match="more is"):
        verify(source, plan_for(source), out)
    save_file({**tensors, DOWN: tensors[DOWN].float()}, path)
    with pytest.raises(BrocaError, match=r"down_proj\.weight is F32"):
        verify(source, plan_for(source), out)


def test_a_disk_that_lies_leaves_no_checkpoint(tmp_path, monkeypatch):
    source = open_model(str(models.build_checkpoint(tmp_path / "base")))
    real = export_module.verify

    def after_damage(source, plan, staged):
        flip(staged, "model.norm.weight")
        return real(source, plan, staged)

    monkeypatch.setattr(export_module, "verify", after_damage)
    with pytest.raises(BrocaError, match=r"model\.norm\.weight"):
        export(source, plan_for(source), tmp_path / "out", verified=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
