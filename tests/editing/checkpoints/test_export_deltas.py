"""Plans of dense deltas, of any module: exports, live models, undo, differences and adapters, against base + delta."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.checkpoints.adapter import export_adapter, factors
from editing.checkpoints.difference import compare
from editing.checkpoints.export import export
from editing.checkpoints.undo import undo
from editing.plans.algebra import compose, restricted, with_norms
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, load_plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import OUTSIDE
from neurons.errors import BrocaError
from neurons.models.source import load_model, open_model

IDS = torch.tensor([[0, 5, 80, 33, 200, 7]])
NEURONS = (3, 7, 20)
# family -> module of its plan -> tensor; of a mixture's neurons, that of the expert that has them.
TENSORS = {
    "llama": {
        "mlp": "model.layers.1.mlp.down_proj.weight",
        "mlp.gate_proj": "model.layers.1.mlp.gate_proj.weight",
        "mlp.up_proj": "model.layers.1.mlp.up_proj.weight",
        "self_attn.q_proj": "model.layers.1.self_attn.q_proj.weight",
        "model.embed_tokens": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
    },
    "phi3": {
        "mlp": "model.layers.1.mlp.down_proj.weight",
        "mlp.gate_up_proj": "model.layers.1.mlp.gate_up_proj.weight",
    },
    "gpt2": {
        "mlp": "transformer.h.1.mlp.c_proj.weight",
        "mlp.c_fc": "transformer.h.1.mlp.c_fc.weight",
        "attn.c_attn": "transformer.h.1.attn.c_attn.weight",
        "transformer.wte": "transformer.wte.weight",
    },
    "qwen3_moe": {
        "mlp": "model.layers.1.mlp.experts.0.down_proj.weight",
        "mlp.gate": "model.layers.1.mlp.gate.weight",
        "self_attn.v_proj": "model.layers.1.self_attn.v_proj.weight",
    },
}


def delta_plan(source, family):
    """Deltas of neurons' weights, and of two rows of each other module; the naive deltas [outputs, inputs] by tensor."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return 0.05 * torch.randn(*shape, generator=generator)

    anatomy = source.anatomy
    edits, dense = [], {}
    for block, tensor in TENSORS[family].items():
        layer = OUTSIDE if block in ("lm_head", "model.embed_tokens", "transformer.wte") else 1
        if block == "mlp":
            neurons = torch.tensor(NEURONS)
            edit = ModuleEdit(
                layer, block, NEURONS, columns=neurons, column_deltas=random(len(NEURONS), anatomy.residual)
            )
        else:
            rows, components = torch.tensor([1, 6]) % anatomy.rows(layer, block), ()
            if layer == 1 and anatomy.computes_neurons(layer, block):
                rows, components = anatomy.input_rows(layer, NEURONS)[block], NEURONS
            rows = rows.sort().values
            inputs = anatomy.parts(layer, block)[0].width
            edit = ModuleEdit(layer, block, components, rows=rows, row_deltas=random(len(rows), inputs))
        edits.append(edit)
        inputs = anatomy.expert_width if block == "mlp" else anatomy.parts(layer, block)[0].width
        naive = torch.zeros(anatomy.rows(layer, block), inputs, dtype=torch.float64)
        for i, row in enumerate([] if edit.rows is None else edit.rows.tolist()):
            naive[row] = edit.row_deltas[i].double()
        for i, column in enumerate([] if edit.columns is None else edit.columns.tolist()):
            naive[:, column] = edit.column_deltas[i].double()
        dense[tensor] = naive
    about = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": "m",
        "languages": [],
        "settings": {"strength": 1.0},
    }
    return make_plan(with_norms(source, edits), about), dense


def nearest(exact, dtype):
    """float64 rounded to the nearest number of a dtype, ties to even, from the two candidates around it."""
    near = exact.to(dtype)
    up, down = (torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, -torch.inf))
    candidates = torch.stack([near, up, down])
    distances = (candidates.double() - exact).abs()
    best = distances.amin(0)
    even = (candidates.view(torch.int16 if dtype.itemsize == 2 else torch.int32) & 1) == 0
    return candidates.gather(0, (distances - 1e-300 * even.double() * (distances == best)).argmin(0)[None])[0]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("llama", "float32"),
        ("phi3", "float16"),
        ("gpt2", "bfloat16"),
        ("qwen3_moe", "float32"),
    ],
)
def test_exported_weights_are_base_plus_delta_and_all_else_is_the_same_bytes(
    checkpoint_of, tmp_path, family, dtype
):
    source = open_model(str(checkpoint_of(family, False, dtype)))
    plan, dense = delta_plan(source, family)
    plan.save(tmp_path / "plan.safetensors")
    assert load_plan(tmp_path / "plan.safetensors").to_bytes() == plan.to_bytes()
    exported = export(source, plan, tmp_path / "out", verified=True, undoable=True)
    assert exported.components == len(NEURONS)
    before, after = (load_file(path / "model.safetensors") for path in (source.checkpoint, tmp_path / "out"))
    flipped = family == "gpt2"
    for name, base in before.items():
        if name not in dense:
            assert torch.equal(after[name].view(torch.uint8), base.view(torch.uint8)), name
            continue
        naive = dense[name].T if flipped and "wte" not in name else dense[name]
        untouched = naive == 0
        assert 0 < untouched.sum() < untouched.numel()
        assert torch.equal(after[name][untouched], base[untouched])
        assert torch.equal(after[name], nearest(base.double() + naive, base.dtype))
    loaded = load_model(str(source.checkpoint), device="cpu")
    with torch.no_grad(), applied(loaded, plan):
        live = loaded.model(IDS).logits
    with torch.no_grad():
        assert torch.equal(live, load_model(str(tmp_path / "out"), device="cpu").model(IDS).logits)
        assert not torch.equal(live, loaded.model(IDS).logits)
    undone = undo(open_model(str(tmp_path / "out")), tmp_path / "base")
    assert undone.fingerprint == source.fingerprint
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (
        source.checkpoint / "model.safetensors"
    ).read_bytes()


def test_composed_scaled_and_restricted(llama):
    plan, _ = delta_plan(llama, "llama")
    weights = Weights(llama)
    twice = {(e.layer, e.block): e for e in compose([plan, plan.scaled(0.5)], llama).edits}
    few = {(e.layer, e.block): e for e in restricted(llama, plan, components={"mlp": [7, 9]}).edits}
    for edit in plan.edits:
        place = edit.layer, edit.block
        W = weights.read(*place)
        change = edit.apply(W) - W
        assert float(change.norm()) == pytest.approx(edit.notes["change_norm"])
        torch.testing.assert_close(twice[place].apply(W) - W, 1.5 * change)
        kept = change.clone()
        if edit.components:
            other = torch.ones(48, dtype=torch.bool)
            other[7] = False
            kept[(slice(None), other) if edit.block == "mlp" else other] = 0
            assert few[place].components == (7,)
        torch.testing.assert_close(few[place].apply(W) - W, kept)


def test_a_difference_is_the_plan(checkpoint_of, tmp_path):
    source = open_model(str(checkpoint_of("llama", False, "bfloat16")))
    plan, dense = delta_plan(source, "llama")
    out = export(source, plan, tmp_path / "out").path
    found = compare(source, out)
    assert found.not_covered == () and {t.name for t in found.tensors} == set(dense)
    again = found.plan(source)
    assert [(e.layer, e.block) for e in again.edits] == [(e.layer, e.block) for e in plan.edits]
    export(source, again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_adapter_is_exact_or_refused(llama, tmp_path):
    plan, _ = delta_plan(llama, "llama")
    with pytest.raises(BrocaError, match=r"model\.embed_tokens.*export a checkpoint|lm_head"):
        export_adapter(llama, plan, tmp_path / "no")
    inside = make_plan([edit for edit in plan.edits if edit.layer != OUTSIDE], plan.metadata)
    made = export_adapter(llama, inside, tmp_path / "adapter")
    assert made.modules["model.layers.1.mlp.gate_proj"] == len(NEURONS)
    weights = Weights(llama)
    for edit in inside.edits:
        W = weights.read(edit.layer, edit.block)
        B, A = factors(edit, W)
        assert B.shape[1] == edit.dense
        torch.testing.assert_close(B @ A, edit.apply(W) - W, rtol=0, atol=1e-14)
    from peft import PeftModel

    loaded = load_model(str(llama.checkpoint), device="cpu")
    with torch.no_grad():
        with applied(loaded, inside):
            live = loaded.model(IDS).logits
        adapted = PeftModel.from_pretrained(loaded.model, tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(adapted, live, rtol=1e-4, atol=1e-4)


def edit_of(layer, block, **factors):
    return ModuleEdit(layer, block, (), **factors)


@pytest.mark.parametrize(
    ("family", "layer", "block", "named"),
    [
        ("llama", 1, "mlp.nothing", "mlp.nothing"),
        ("llama", 9, "mlp.gate_proj", "layer 9"),
        ("llama", 1, "mlp.down_proj", "'mlp'"),
        ("mixtral", 1, "mlp.experts", "mlp.experts"),
        ("llama", OUTSIDE, "model.norm", "model.norm"),
    ],
)
def test_modules_that_a_plan_cannot_edit(checkpoint_of, tmp_path, family, layer, block, named):
    source = open_model(str(checkpoint_of(family)))
    plan, _ = delta_plan(open_model(str(checkpoint_of("llama"))), "llama")
    edit = edit_of(layer, block, rows=torch.tensor([0]), row_deltas=torch.ones(1, 64))
    wrong = make_plan([edit], {**plan.metadata, "fingerprint": source.fingerprint})
    with pytest.raises(BrocaError, match=named):
        export(source, wrong, tmp_path / "out")


def test_tied_embeddings(checkpoint_of, tmp_path):
    """The head follows the embeddings; it cannot be edited alone, and neither can one of two stored copies."""
    source = open_model(str(checkpoint_of("llama", True)))
    plan, _ = delta_plan(open_model(str(checkpoint_of("llama"))), "llama")
    by_block = {edit.block: edit for edit in plan.edits}

    def of(block, at):
        return make_plan([by_block[block]], {**plan.metadata, "fingerprint": at.fingerprint})

    export(source, of("model.embed_tokens", source), tmp_path / "out")
    loaded = load_model(str(source.checkpoint), device="cpu")
    with torch.no_grad(), applied(loaded, of("model.embed_tokens", loaded)):
        live = loaded.model(IDS).logits
    with torch.no_grad():
        assert torch.equal(live, load_model(str(tmp_path / "out"), device="cpu").model(IDS).logits)
    with pytest.raises(BrocaError, match="lm_head"):
        export(source, of("lm_head", source), tmp_path / "no")
    twice = tmp_path / "twice"
    twice.mkdir()
    for file in source.checkpoint.iterdir():
        (twice / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source.checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    stored = open_model(str(twice))
    with pytest.raises(BrocaError, match="tied and both stored"):
        export(stored, of("model.embed_tokens", stored), tmp_path / "no")


def test_two_copies_of_a_family_that_ties_by_default(checkpoint_of, tmp_path):
    twice = tmp_path / "twice"
    shutil.copytree(checkpoint_of("gemma", True), twice)
    settings = json.loads((twice / "config.json").read_text())
    settings.pop("tie_word_embeddings")
    (twice / "config.json").write_text(json.dumps(settings))
    assert Weights(open_model(str(twice))).pieces(OUTSIDE, "model.embed_tokens")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrocaError, match="tied and both stored"):
        Weights(open_model(str(twice))).pieces(OUTSIDE, "model.embed_tokens")


def test_a_damaged_file_is_refused(llama, tmp_path):
    plan, _ = delta_plan(llama, "llama")
    edit = next(edit for edit in plan.edits if edit.block == "mlp.gate_proj")
    for damaged in (
        replace(edit, rows=edit.rows.flip(0)),
        replace(edit, rows=edit.rows[1:]),
        replace(edit, row_deltas=None),
    ):
        make_plan([replace(edit, left=torch.ones(48, 1), right=torch.ones(64, 1))], plan.metadata)
        from editing.plans.plan import Plan

        Plan((damaged,), plan.metadata).save(tmp_path / "plan.safetensors")
        with pytest.raises(BrocaError, match=r"layer 1, mlp\.gate_proj"):
            load_plan(tmp_path / "plan.safetensors")


def test_of_an_examined_architecture_only_the_outputs_are_edited(llama, tmp_path):
    layout = replace(llama.anatomy.layout, examined=True)
    examined = replace(llama, anatomy=replace(llama.anatomy, layout=layout))
    plan, _ = delta_plan(llama, "llama")
    with pytest.raises(BrocaError, match="not in the table"):
        export(examined, plan, tmp_path / "no")
    export(
        examined,
        make_plan([edit for edit in plan.edits if edit.block == "mlp"], plan.metadata),
        tmp_path / "out",
    )
