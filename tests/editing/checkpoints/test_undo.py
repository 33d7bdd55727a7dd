"""Edits undone: every byte of the base again, and every reason to refuse."""

import json
import shutil

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editing.checkpoints import undo as undo_module
from editing.checkpoints.checkpoint import write_checkpoint
from editing.checkpoints.export import export
from editing.checkpoints.undo import undo
from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.tensor_edits import undone
from neurons.errors import BrocaError
from neurons.files.tensor_files import tensor_entries
from neurons.models.fingerprint import fingerprint
from neurons.models.source import open_model

NOTES = {"change_norm": 1.0, "weight_norm": 5.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_for(source, edits):
    about = {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "method": "m",
        "source": "qaa",
        "target": "qab",
        "settings": {},
    }
    return make_plan(edits, about)


def varied_edits(anatomy, size=0.05):
    """Low rank, scales of both kinds with a zero among the columns, and all at once."""
    d, heads, neurons = anatomy.residual, anatomy.width("attn_in"), anatomy.neurons
    columns = 1 + 0.2 * random(neurons, seed=4)
    columns[[3, 17]] = 0.0
    rows = 1 + 0.2 * random(d, seed=5)
    return [
        ModuleEdit(
            0, "attn", (0,), left=size * random(d, 3, seed=1), right=random(heads, 3, seed=2), notes=NOTES
        ),
        ModuleEdit(0, "mlp", (3, 17), column_scale=columns, notes=NOTES),
        ModuleEdit(
            1,
            "mlp",
            (0,),
            row_scale=rows,
            column_scale=columns,
            left=size * random(d, 2, seed=6),
            right=random(neurons, 2, seed=7),
            notes=NOTES,
        ),
        ModuleEdit(
            2, "attn", (1,), row_scale=rows.clone().index_fill_(0, torch.tensor([5]), 0.0), notes=NOTES
        ),
    ]


def base_at(directory, family="llama", dtype="float32", sharded=False, readme=True):
    model = models.tiny_model(family, dtype=dtype, seed=1)
    models.save_checkpoint(model, directory, **({"max_shard_size": "60KB"} if sharded else {}))
    if readme:
        (directory / "README.md").write_text("---\ntags: [chat]\n---\n# The base\n")
    return open_model(str(directory))


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize(
    ("family", "dtype", "sharded"),
    [
        ("llama", "float32", False),
        ("llama", "bfloat16", True),
        ("llama", "float16", False),
        ("llama", "float64", False),
        ("gpt2", "float32", False),
        ("gpt2", "bfloat16", False),
        ("mixtral", "bfloat16", False),
        ("qwen3_moe", "float32", False),
        ("gpt_oss", "bfloat16", False),
    ],
)
@pytest.mark.parametrize("size", [1e-4, 0.05, 10.0])
def test_the_base_comes_back_byte_for_byte(tmp_path, family, dtype, sharded, size):
    source = base_at(tmp_path / "base", family, dtype, sharded)
    done = export(
        source, plan_for(source, varied_edits(source.anatomy, size)), tmp_path / "edited", undoable=True
    )
    before, edited = files_of(source.checkpoint), files_of(done.path)
    assert edited["broca/remainder.safetensors"] is not None
    assert {name for name in before if before[name] != edited[name]} >= {"README.md"}
    found = undo(open_model(str(done.path)), tmp_path / "back")
    assert files_of(tmp_path / "back") == before
    assert found.fingerprint == source.fingerprint == fingerprint(tmp_path / "back")
    assert set(found.tensors) == set(done.tensors)
    assert not list(tmp_path.glob(".*"))


def test_blocks_of_a_few_rows_give_the_same(tmp_path, monkeypatch):
    import editing.checkpoints.export as module

    source = base_at(tmp_path / "base", dtype="bfloat16")
    write, keep = module.write_checkpoint, module.write_remainder
    monkeypatch.setattr(module, "write_checkpoint", lambda *a, **k: write(*a, **k, chunk_bytes=700))
    monkeypatch.setattr(module, "write_remainder", lambda *a: keep(*a, chunk_bytes=700))
    export(source, plan_for(source, varied_edits(source.anatomy)), tmp_path / "edited", undoable=True)
    undo(open_model(str(tmp_path / "edited")), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source.checkpoint)


@pytest.mark.parametrize(("dtype", "sharded"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("readme", [True, False])
def test_biases_that_were_added_go_again(tmp_path, dtype, sharded, readme):
    source = base_at(tmp_path / "base", dtype=dtype, sharded=sharded, readme=readme)
    edits = [
        ModuleEdit(1, "mlp", (), bias=random(64), notes=NOTES),
        ModuleEdit(
            2, "attn", (0,), left=random(64, 1), right=random(64, 1, seed=2), bias=random(64), notes=NOTES
        ),
    ]
    done = export(source, plan_for(source, edits), tmp_path / "edited", verified=True, undoable=True)
    assert json.loads((done.path / "config.json").read_text())["mlp_bias"] is True
    assert len(done.added) == 3 * 3 + 3 * 4
    undo(open_model(str(done.path)), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source.checkpoint)


def test_biases_that_were_there_come_back(tmp_path):
    source = base_at(tmp_path / "base", "gpt2", "bfloat16")
    done = export(
        source,
        plan_for(source, [ModuleEdit(1, "mlp", (), bias=random(64), notes=NOTES)]),
        tmp_path / "edited",
        undoable=True,
    )
    assert done.tensors == ("transformer.h.1.mlp.c_proj.bias",)
    undo(open_model(str(done.path)), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source.checkpoint)


def test_taking_back_is_the_inverse_and_the_same_in_any_block():
    r, c = 1.5 + torch.rand(20, generator=torch.Generator().manual_seed(1)), 0.5 + random(30, seed=2).abs()
    edit = ModuleEdit(
        0, "mlp", (), row_scale=r, column_scale=c, left=random(20, 5, seed=3), right=random(30, 5, seed=4)
    )
    W = random(20, 30).double()
    changed = edit.apply(W)
    found = undone(edit, changed)
    for i in range(20):
        for j in range(30):
            low_rank = sum(float(edit.left[i, k]) * float(edit.right[j, k]) for k in range(5))
            naive = (float(changed[i, j]) - low_rank) / (float(r[i]) * float(c[j]))
            assert float(found[i, j]) == pytest.approx(naive, rel=1e-12)
    torch.testing.assert_close(found, W, rtol=1e-9, atol=1e-9)
    for rows, columns in (
        (slice(3, 4), slice(0, 30)),
        (slice(0, 20), slice(7, 9)),
        (slice(5, 18), slice(1, 28)),
    ):
        part = undone(edit, changed[rows, columns].clone(), rows.start, columns.start)
        assert torch.equal(part, found[rows, columns])


@pytest.fixture
def edited(tmp_path):
    source = base_at(tmp_path / "base", dtype="bfloat16")
    export(source, plan_for(source, varied_edits(source.anatomy)), tmp_path / "edited", undoable=True)
    return tmp_path / "edited"


def refused(edited, message):
    out = edited.parent / "back"
    with pytest.raises(BrocaError, match=message):
        undo(open_model(str(edited)), out)
    assert not out.exists() and not list(edited.parent.glob(".*"))


def flip(checkpoint, name):
    entry = tensor_entries(checkpoint)[name]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.begin)
        first = stream.read(1)
        stream.seek(entry.begin)
        stream.write(bytes([first[0] ^ 1]))


def test_an_edited_tensor_that_was_changed(edited):
    flip(edited, "model.layers.0.mlp.down_proj.weight")
    refused(edited, r"model\.layers\.0\.mlp\.down_proj\.weight was changed after the export")


def test_another_tensor_that_was_changed(edited):
    flip(edited, "model.embed_tokens.weight")
    refused(edited, "without the edit it is not the base")


def test_a_config_that_was_changed(edited):
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    refused(edited, "without the edit it is not the base")


def test_no_remainder_and_no_edit(edited, tmp_path):
    refused(tmp_path / "base", "nothing to undo")
    (edited / "broca" / "remainder.safetensors").unlink()
    refused(edited, "without --undoable")


def test_a_remainder_of_another_export(edited, tmp_path):
    source = base_at(tmp_path / "other base", dtype="bfloat16", readme=False)
    (tmp_path / "other base" / "config.json").write_text(
        (tmp_path / "other base" / "config.json").read_text().replace("128", "256")
    )
    source = open_model(str(tmp_path / "other base"))
    export(source, plan_for(source, varied_edits(source.anatomy)), tmp_path / "other", undoable=True)
    remainder = "broca/remainder.safetensors"
    shutil.copyfile(tmp_path / "other" / remainder, edited / remainder)
    refused(edited, "different exports")


def test_the_remainders_header_is_read_once(edited, tmp_path, monkeypatch):
    """It has an entry for each chunk, so reading it for each would take the square of their number."""
    opened, safe_open = [], undo_module.safe_open
    monkeypatch.setattr(undo_module, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    undo(open_model(str(edited)), tmp_path / "back")
    assert len(opened) == 1


def test_a_damaged_remainder(edited):
    path = edited / "broca" / "remainder.safetensors"
    content = bytearray(path.read_bytes())
    content[-40:] = bytes(40)
    path.write_bytes(content)
    refused(edited, "damaged|does not fit|is not restored")
    path.write_bytes(b"not a file")
    refused(edited, "cannot be read")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"renamed": {"../x": "tokenizer.json"}}, "'../x' is not a path inside the checkpoint"),
        ({"replaced": ["../x"]}, "'../x' is not a path inside the checkpoint"),
        ({"replaced": [f"{i}.txt" for i in range(9)]}, "it lacks file"),
        ({"fingerprint": None}, "fingerprint"),
        ({"tensors": [{"name": "x"}]}, "tensors.0.base is missing"),
        ({"block_bytes": "many"}, "block_bytes"),
        ({"format_version": "1"}, "update broca"),
        ([], "update broca"),
    ],
)
def test_a_remainder_that_was_changed(edited, change, message):
    path = edited / "broca" / "remainder.safetensors"
    with safe_open(str(path), framework="pt") as stream:
        about = json.loads(stream.metadata()["broca"])
    tensors = load_file(path)
    (edited / "tokenizer.json").write_text("{}")
    save_file(tensors, path, {"broca": json.dumps({**about, **change} if change else change)})
    before = set(edited.parent.iterdir())
    refused(edited, message)
    assert set(edited.parent.iterdir()) == before


def test_a_target_that_is_there_is_kept_unless_told(edited, tmp_path):
    write_checkpoint(tmp_path / "base", tmp_path / "back", {}, {})
    with pytest.raises(BrocaError, match="add --overwrite"):
        undo(open_model(str(edited)), tmp_path / "back")
    undo(open_model(str(edited)), tmp_path / "back", overwrite=True)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")


def test_a_remainder_is_small_where_the_edit_is(tmp_path):
    source = base_at(tmp_path / "base", dtype="bfloat16")
    edit = ModuleEdit(1, "mlp", (0,), left=0.002 * random(64, 1), right=random(48, 1, seed=2), notes=NOTES)
    done = export(source, plan_for(source, [edit]), tmp_path / "edited", undoable=True)
    entry = tensor_entries(source.checkpoint)["model.layers.1.mlp.down_proj.weight"]
    with safe_open(str(done.path / "broca" / "remainder.safetensors"), framework="pt") as stream:
        kept = len(stream.get_tensor("0.0.small")) + len(stream.get_tensor("0.0.own"))
    assert kept < 0.4 * (entry.end - entry.begin)
