"""An exported checkpoint: edited tensors from the formula in float64, all else byte for byte, the card."""

import json
import math
from dataclasses import replace

import models
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import save

from editing.checkpoints.export import export, read_exported_plan
from editing.checkpoints.undo import undo
from editing.methods.scale import scale_plan
from editing.plans.plan import ModuleEdit, load_plan, make_plan
from neurons.errors import BrocaError
from neurons.models.fingerprint import fingerprint
from neurons.models.source import open_model
from neurons.neuron_sets.neuron_set import neuron_set

# dtype -> bits of the fraction, smallest exponent
FORMATS = {"float32": (23, -126), "float16": (10, -14), "bfloat16": (7, -126)}
KINDS = ["float32", "float16", "bfloat16", "bfloat16 sharded"]
CARD = """---
language:
- en
- zh
license: apache-2.0
library_name: transformers
tags:
- chat
- broca
pipeline_tag: text-generation
model-index:
- name: small
  results: []
widget:
- text: Hello
---

# Small model

A card with a | table | and a rule.

---

The end.
"""


def build_base(directory, dtype="float32", sharded=False, card=CARD):
    model = models.tiny_model(dtype=dtype, seed=1)
    models.save_checkpoint(model, directory, **({"max_shard_size": "60KB"} if sharded else {}))
    (directory / "extra" / "deep").mkdir(parents=True)
    (directory / "extra" / "deep" / "notes.bytes").write_bytes(bytes(range(256)))
    (directory / "chat_template.jinja").write_text("{{ messages }}\n")
    (directory / "LICENSE").write_text("free\n")
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    dtype, _, sharded = request.param.partition(" ")
    return open_model(str(build_base(tmp_path_factory.mktemp("base"), dtype, bool(sharded))))


@pytest.fixture(scope="module")
def float_base(tmp_path_factory):
    return open_model(str(build_base(tmp_path_factory.mktemp("base"))))


def low_rank_edit(layer, block, size=0.05, seed=0, rank=1):
    generator = torch.Generator().manual_seed(seed)
    width = 64 if block == "attn" else 48
    left = size * torch.randn(64, rank, generator=generator)
    right = torch.randn(width, rank, generator=generator)
    notes = {"change_norm": float((left @ right.T).norm()), "weight_norm": 5.0}
    return ModuleEdit(layer, block, (0, 1), left=left, right=right, notes=notes)


def scale_edit(layer, name, width):
    scale = 1 + torch.randn(width, generator=torch.Generator().manual_seed(3))
    return ModuleEdit(layer, "mlp", (2,), **{name: scale}, notes={"change_norm": 1.0, "weight_norm": 5.0})


def plan_for(source, edits, **metadata):
    about = {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "method": "steer2edit",
        "source": "qaa",
        "target": "qab",
        "settings": {"alpha": 0.25, "layers": [0, 2]},
    }
    return make_plan(edits, about | metadata)


def mixed_plan(source):
    return plan_for(
        source,
        [
            low_rank_edit(0, "attn", seed=1, rank=2),
            scale_edit(0, "column_scale", 48),
            scale_edit(1, "row_scale", 64),
            low_rank_edit(2, "mlp", size=1.0, seed=2),
        ],
    )


EDITED = {
    (0, "attn"): "model.layers.0.self_attn.o_proj.weight",
    (0, "mlp"): "model.layers.0.mlp.down_proj.weight",
    (1, "mlp"): "model.layers.1.mlp.down_proj.weight",
    (2, "mlp"): "model.layers.2.mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "steered"
    return export(base, mixed_plan(base), out)


def read_all(checkpoint):
    """Every tensor of a checkpoint, by the safetensors library."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def exact(edit, weight):
    """diag(r) W diag(c) + U K^T in float64."""
    edited = weight.double()
    if edit.row_scale is not None:
        edited = torch.diag(edit.row_scale.double()) @ edited
    if edit.column_scale is not None:
        edited = edited @ torch.diag(edit.column_scale.double())
    if edit.left is not None:
        for u, k in zip(edit.left.T.double(), edit.right.T.double(), strict=True):
            edited = edited + torch.outer(u, k)
    return edited


def half_a_unit(values, dtype):
    """Half the distance between neighbours in a format, at each value."""
    fraction, smallest = FORMATS[dtype]
    sizes = [max(math.frexp(abs(float(value)))[1] - 1, smallest) for value in values.flatten()]
    return torch.tensor([2.0 ** (size - fraction) / 2 for size in sizes], dtype=torch.float64).view_as(values)


def test_edited_tensors_are_rounded_once(base, exported):
    before, after = read_all(base.checkpoint), read_all(exported.path)
    assert set(exported.tensors) == set(EDITED.values())
    for edit in mixed_plan(base).edits:
        name = EDITED[edit.layer, edit.block]
        assert after[name].dtype == before[name].dtype
        wanted = exact(edit, before[name])
        dtype = str(after[name].dtype).removeprefix("torch.")
        allowed = half_a_unit(wanted, dtype) * (1 + 1e-9)
        if dtype != "float32":  # computed in float32 first
            change = (wanted - before[name].double()).abs()
            allowed = allowed + 4 * 2.0**-24 * (before[name].double().abs() + change + wanted.abs())
        assert ((after[name].double() - wanted).abs() <= allowed).all(), name
        assert not torch.equal(after[name], before[name])


def tensor_bytes(checkpoint):
    """Name -> (dtype, shape, bytes), from the files themselves."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in read_all(checkpoint).items()
    }


def test_all_other_tensors_are_byte_identical(base, exported):
    before, after = tensor_bytes(base.checkpoint), tensor_bytes(exported.path)
    assert before.keys() == after.keys()
    differ = {name for name in before if before[name] != after[name]}
    assert differ == set(EDITED.values())


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_side_files_are_identical(base, exported):
    before, after = files_of(base.checkpoint), files_of(exported.path)
    assert after.keys() - before.keys() == {"broca/edit.safetensors"}
    assert not before.keys() - after.keys()
    differ = {name for name in before if before[name] != after[name]}
    assert {name for name in differ if not name.endswith(".safetensors")} == {"README.md"}
    expected = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "extra/deep/notes.bytes",
    }  # fmt: skip
    assert expected <= before.keys()
    assert ("model.safetensors.index.json" in before) == (
        len(list(base.checkpoint.glob("*.safetensors"))) > 1
    )


def test_loads_as_any_checkpoint(base, exported):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    stored = read_all(exported.path)
    state = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.path)
    assert tokenizer("beef stop")["input_ids"] == models.tiny_tokenizer()("beef stop")["input_ids"]


def test_the_plan_travels_with_the_checkpoint(base, exported):
    path = read_exported_plan(exported.path)
    assert path == exported.path / "broca" / "edit.safetensors"
    assert path.read_bytes() == mixed_plan(base).to_bytes()
    assert load_plan(path).metadata["fingerprint"] == base.fingerprint
    assert read_exported_plan(base.checkpoint) is None


def test_twice_gives_the_same_bytes(base, exported, tmp_path):
    again = export(base, mixed_plan(base), tmp_path / "again")
    assert files_of(again.path) == files_of(exported.path)


def test_what_it_reports(base, exported):
    plan = mixed_plan(base)
    before, after = read_all(base.checkpoint), read_all(exported.path)
    assert exported.components == 6
    change = sum(edit.notes["change_norm"] ** 2 for edit in plan.edits)
    assert exported.relative_change == pytest.approx(math.sqrt(change / (4 * 5.0**2)))
    assert set(exported.survived) == set(EDITED.values())
    for edit in plan.edits:
        name = EDITED[edit.layer, edit.block]
        meant = exact(edit, before[name]) - before[name].double()
        stored = after[name].double() - before[name].double()
        ratio, cosine = exported.survived[name]
        assert ratio == pytest.approx(float(stored.norm() / meant.norm()), rel=1e-4)
        expected = torch.cosine_similarity(stored.flatten(), meant.flatten(), dim=0)
        assert cosine == pytest.approx(float(expected), rel=1e-4)


def test_a_small_edit_is_lost_in_bfloat16_and_not_in_float32(tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        source = open_model(str(build_base(tmp_path / dtype, dtype)))
        plan = plan_for(source, [low_rank_edit(1, "mlp", size=1e-5)])
        found[dtype] = export(source, plan, tmp_path / f"{dtype}-out")
    name = EDITED[1, "mlp"]
    assert found["float32"].survived[name] == pytest.approx((1, 1), abs=1e-3)
    ratio, cosine = found["bfloat16"].survived[name]
    before, after = read_all(tmp_path / "bfloat16"), read_all(tmp_path / "bfloat16-out")
    edit = low_rank_edit(1, "mlp", size=1e-5)
    meant, stored = edit.left.double() @ edit.right.double().T, (after[name].double() - before[name].double())
    assert ratio == pytest.approx(float(stored.norm() / meant.norm()), rel=1e-2)
    assert cosine == pytest.approx(float((stored * meant).sum() / stored.norm() / meant.norm()), rel=1e-2)
    assert ratio < 0.5 and cosine < 0.5
    assert (stored != 0).double().mean() < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_edit_below_float32_precision_has_not_survived(tmp_path, dtype):
    source = open_model(str(build_base(tmp_path / "base", dtype)))
    edit = low_rank_edit(1, "mlp", size=1e-12)
    found = export(source, plan_for(source, [edit]), tmp_path / "out")
    name = EDITED[1, "mlp"]
    before, after = read_all(source.checkpoint)[name], read_all(found.path)[name]
    assert torch.equal(before, after) and float((edit.left @ edit.right.T).abs().min()) > 0
    assert found.survived[name][0] == 0


def test_an_edit_of_nothing_has_survived(float_base, tmp_path):
    same = ModuleEdit(
        0, "mlp", (), column_scale=torch.ones(48), notes={"change_norm": 0.0, "weight_norm": 5.0}
    )
    found = export(float_base, plan_for(float_base, [same]), tmp_path / "out")
    assert found.survived[EDITED[0, "mlp"]] == (1, 1)


def test_one_neuron_makes_another_fingerprint(base, tmp_path):
    rows = {"qaa": torch.tensor([[1, 17]])}
    chosen = neuron_set(rows, {"qaa": torch.zeros(1)}, 3, 48, {"method": "lape"})
    found = export(base, scale_plan(base, chosen, ["qaa"], 0.99), tmp_path / "out")
    assert fingerprint(found.path) != base.fingerprint
    assert found.tensors == (EDITED[1, "mlp"],)
    card = (found.path / "README.md").read_text()
    assert "the neurons of `qaa`" in card


def test_a_neuron_between_the_sampled_bytes_makes_another_fingerprint(tmp_path):
    # Rows of 8000 bytes are sampled about every 8126 bytes: neuron 20 is never looked at.
    base = models.build_checkpoint(tmp_path / "base", intermediate_size=2000, num_hidden_layers=1)
    source = open_model(str(base))
    chosen = neuron_set({"qaa": torch.tensor([[0, 20]])}, {"qaa": torch.zeros(1)}, 1, 2000, {})
    out = export(source, scale_plan(source, chosen, ["qaa"], 0.0), tmp_path / "out").path
    assert fingerprint(out) != source.fingerprint
    (out / "broca" / "edit.safetensors").unlink()
    assert fingerprint(out) == source.fingerprint
    assert tensor_bytes(out) != tensor_bytes(base)


def test_refuses_what_was_edited_before(float_base, tmp_path):
    export(float_base, mixed_plan(float_base), tmp_path / "once")
    edited = open_model(str(tmp_path / "once"))
    with pytest.raises(BrocaError, match="already"):
        export(edited, mixed_plan(edited), tmp_path / "twice")
    with pytest.raises(BrocaError, match="fingerprint"):
        export(edited, mixed_plan(float_base), tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_refuses_plans_that_do_not_fit(float_base, tmp_path):
    wide = ModuleEdit(
        1, "mlp", (0,), column_scale=torch.ones(64), notes={"change_norm": 1.0, "weight_norm": 1.0}
    )
    with pytest.raises(BrocaError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*64.*48"):
        export(float_base, plan_for(float_base, [wide]), tmp_path / "out")
    with pytest.raises(BrocaError, match=r"layer 3.*layers 0 to 2"):
        export(float_base, plan_for(float_base, [low_rank_edit(3, "mlp")]), tmp_path / "out")
    other = plan_for(float_base, [low_rank_edit(1, "mlp")], fingerprint="0123456789abcdef")
    with pytest.raises(BrocaError, match="0123456789abcdef"):
        export(float_base, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_to_overwrite_unless_told(float_base, tmp_path):
    out = tmp_path / "out"
    export(float_base, mixed_plan(float_base), out)
    before = files_of(out)
    one = plan_for(float_base, [low_rank_edit(1, "mlp")])
    with pytest.raises(BrocaError):
        export(float_base, one, out)
    assert files_of(out) == before
    export(float_base, one, out, overwrite=True)
    assert (out / "broca/edit.safetensors").read_bytes() == one.to_bytes()


def test_names_copies_of_the_weights_that_it_did_not_edit(tmp_path):
    directory = build_base(tmp_path / "base", "bfloat16", sharded=True)
    (directory / "pytorch_model.bin").write_bytes(b"old")
    (directory / "original").mkdir()
    (directory / "original" / "consolidated.00.pth").write_bytes(b"old")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "original/scaler.pt",
    ):
        (directory / name).write_bytes(b"of training")
    source = open_model(str(directory))
    found = export(source, mixed_plan(source), tmp_path / "out")
    assert found.unedited_copies == ("original/consolidated.00.pth", "pytorch_model.bin")


def test_leaves_out_weights_that_vllm_would_serve_instead(tmp_path):
    directory = build_base(tmp_path / "base", "bfloat16", sharded=True)
    kept = {"params.json", "tekken.json", "original/params.json"}
    unedited = {
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "original/consolidated.00.safetensors",
        "own/consolidated.safetensors",
    }
    for name in kept | unedited:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(save({"tok_embeddings.weight": torch.ones(2, 2)}))
    source = open_model(str(directory))
    found = export(source, mixed_plan(source), tmp_path / "out", verified=True, undoable=True)
    assert set(found.left_out) == unedited and found.unedited_copies == ()
    assert len(found.warnings) == 4 and all("vLLM" in warning for warning in found.warnings)
    left = files_of(found.path)
    assert kept <= left.keys() and not [name for name in left if "consolidated" in name]
    assert not (found.path / "own").exists()
    undone = undo(open_model(str(found.path)), tmp_path / "undone")
    assert undone.fingerprint == source.fingerprint
    before = files_of(directory)
    assert files_of(undone.path) == {name: before[name] for name in before.keys() - unedited}


def test_without_copies_it_names_none(exported):
    assert exported.unedited_copies == exported.left_out == exported.warnings == ()


def bias_edit(layer, block, seed=5):
    shift = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return ModuleEdit(layer, block, (), bias=shift, notes={"change_norm": 0.0, "weight_norm": 5.0})


def test_biases_that_the_source_has_no_place_for(base, tmp_path):
    plan = plan_for(
        base, [bias_edit(1, "mlp"), replace(low_rank_edit(2, "attn"), bias=bias_edit(2, "attn").bias)]
    )
    found = export(base, plan, tmp_path / "out")
    own = "model.layers.2.self_attn.o_proj.weight"
    assert found.tensors == (own,)
    stored, before = read_all(found.path), read_all(base.checkpoint)
    dtype = before[own].dtype
    wanted = {f"model.layers.{i}.mlp.{name}_proj.bias": 48 for i in range(3) for name in ("gate", "up")}
    wanted |= {f"model.layers.{i}.mlp.down_proj.bias": 64 for i in range(3)}
    wanted |= {f"model.layers.{i}.self_attn.{name}_proj.bias": 64 for i in range(3) for name in "qo"}
    wanted |= {f"model.layers.{i}.self_attn.{name}_proj.bias": 32 for i in range(3) for name in "kv"}
    assert {name: len(stored[name]) for name in stored.keys() - before.keys()} == wanted
    assert set(found.added) == wanted.keys()
    shifts = {
        "model.layers.1.mlp.down_proj.bias": plan.edits[0].bias,
        own.replace("weight", "bias"): plan.edits[1].bias,
    }
    for name in wanted:
        assert torch.equal(stored[name], shifts.get(name, torch.zeros(wanted[name])).to(dtype))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        found.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor)
    old, new = (json.loads((place / "config.json").read_text()) for place in (base.checkpoint, found.path))
    assert {key for key in new if old.get(key) != new[key]} == {"attention_bias", "mlp_bias"}


def test_biases_that_are_there_are_shifted(tmp_path):
    source = open_model(str(models.build_checkpoint(tmp_path / "base", "gpt2")))
    found = export(source, plan_for(source, [bias_edit(1, "mlp")]), tmp_path / "out")
    name = "transformer.h.1.mlp.c_proj.bias"
    assert found.tensors == (name,) and found.added == ()
    before, after = read_all(source.checkpoint), read_all(found.path)
    wanted = (before[name].double() + bias_edit(1, "mlp").bias.double()).float()
    assert torch.equal(after[name], wanted)
    assert [other for other in before if not torch.equal(before[other], after[other])] == [name]


def test_biases_that_have_no_place_are_refused(tmp_path):
    source = open_model(str(models.build_checkpoint(tmp_path / "base", "mistral")))
    with pytest.raises(BrocaError, match="has no bias"):
        export(source, plan_for(source, [bias_edit(1, "mlp")]), tmp_path / "out")
    llama = open_model(str(models.build_checkpoint(tmp_path / "llama")))
    short = replace(bias_edit(1, "mlp"), bias=torch.ones(3))
    with pytest.raises(BrocaError, match=r"down_proj\.bias.*3 entries where 64"):
        export(llama, plan_for(llama, [short]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def card_of(checkpoint):
    """(front matter as YAML text, body) of a model card."""
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    return front, body


def export_with_card(directory, card):
    source = open_model(str(build_base(directory / "base", card=card)))
    return export(source, mixed_plan(source), directory / "out").path


def test_card_keeps_front_matter_and_text(exported):
    front, body = card_of(exported.path)
    old = yaml.safe_load(CARD.split("---\n")[1])
    new = yaml.safe_load(front)
    assert {key: new[key] for key in old if key != "tags"} == {k: v for k, v in old.items() if k != "tags"}
    assert sorted(new["tags"]) == ["broca", "chat"]
    assert "base_model" not in new  # a path on this machine means nothing elsewhere
    assert CARD.split("---\n", 2)[2].strip() in body


def test_card_says_what_was_edited(base, exported):
    _, body = card_of(exported.path)
    own = body.partition("# Small model")[0]
    assert "`steer2edit`" in own and "`qaa`" in own and "`qab`" in own and base.fingerprint in own
    assert "alpha 0.25" in own and "broca/edit.safetensors" in own
    for edit in mixed_plan(base).edits:
        (row,) = [line for line in own.splitlines() if f"`{EDITED[edit.layer, edit.block]}`" in line]
        kind = "heads" if edit.block == "attn" else "neurons"
        share = edit.notes["change_norm"] / edit.notes["weight_norm"]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:] == [f"{len(edit.components)} {kind}", str(edit.rank), f"{share:.3g}"]


def test_card_names_the_base_model_on_the_hub(float_base, tmp_path):
    source = replace(float_base, name="someone/small")
    front, body = card_of(export(source, mixed_plan(source), tmp_path / "out").path)
    assert yaml.safe_load(front)["base_model"] == "someone/small"
    assert body.lstrip().startswith("# small, steered by Broca")


def test_a_path_that_is_not_utf8_is_escaped(float_base, tmp_path):
    source = replace(float_base, name="small\udce9")
    out = export(source, mixed_plan(source), tmp_path / "out", recipe="model = 'small\udce9'").path
    assert r"small\udce9" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "broca" / "recipe.toml").read_text(encoding="utf-8") == r"model = 'small\udce9'"


def test_a_base_without_a_card_gets_one(tmp_path):
    front, body = card_of(export_with_card(tmp_path, None))
    assert yaml.safe_load(front)["tags"] == ["broca"]
    assert "`steer2edit`" in body and "base model\n\n" not in body


def test_a_card_without_front_matter_is_kept(tmp_path):
    _, body = card_of(export_with_card(tmp_path, "# Plain\n\ntext | and\n"))
    assert "# Plain\n\ntext | and" in body


@pytest.mark.parametrize(
    "card",
    ["---\ntitle: a: b\n---\n# Odd\n", "---\njust text\n---\n# Odd\n", "---\n- a\n- b\n---\n# Odd\n"],
    ids=["bad yaml", "text", "list"],
)
def test_odd_front_matter_does_not_stop_the_export(tmp_path, card):
    _, body = card_of(export_with_card(tmp_path, card))
    assert "# Odd" in body


def test_norwegian_stays_norwegian(tmp_path):
    # YAML 1.1, which Python's libraries read, takes a bare `no` for false; the hub does not.
    front, _ = card_of(export_with_card(tmp_path, "---\nlanguage:\n- en\n- no\n---\n# Card\n"))
    assert "false" not in front
    assert {line.strip("- '\"") for line in front.splitlines()} >= {"en", "no"}
