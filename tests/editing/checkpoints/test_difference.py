"""Plans recovered from two checkpoints: edits of Broca's, of other tools, and what is no edit."""

import json

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.checkpoints.difference import compare, low_rank, noise, proportional, recovered, spacings
from editing.checkpoints.export import export
from editing.plans.plan import ModuleEdit, load_plan, make_plan
from editing.plans.rounding import round_once
from editing.plans.weights import Weights
from neurons.errors import BrocaError, NothingToChangeError
from neurons.files.tensor_files import tensor_entries
from neurons.models.source import open_model

NOTES = {"change_norm": 1.0, "weight_norm": 5.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plan_for(source, edits):
    about = {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "method": "m",
        "languages": [],
        "settings": {},
    }
    return make_plan(edits, about)


def base_at(directory, family="llama", dtype="float32", sharded=False):
    model = models.tiny_model(family, dtype=dtype, seed=1)
    models.save_checkpoint(model, directory, **({"max_shard_size": "60KB"} if sharded else {}))
    return open_model(str(directory))


def four_edits(anatomy):
    d, heads, neurons = anatomy.residual, anatomy.width("attn_in"), anatomy.neurons
    columns = torch.ones(neurons)
    columns[[3, 7, 11]] = torch.tensor([0.0, 1.37, -2.5])
    few = torch.zeros(neurons, 2)
    few[[2, 9, 20]] = random(3, 2, seed=8)
    return [
        ModuleEdit(
            0, "attn", (0, 1), left=0.3 * random(d, 3, seed=1), right=random(heads, 3, seed=2), notes=NOTES
        ),
        ModuleEdit(0, "mlp", (3, 7, 11), column_scale=columns, notes=NOTES),
        ModuleEdit(1, "mlp", (0,), row_scale=1 + 0.3 * random(d, seed=5), notes=NOTES),
        ModuleEdit(2, "mlp", (2, 9, 20), left=random(d, 2, seed=6), right=few, notes=NOTES),
    ]


def neighbour_distance(value, dtype):
    """From the definition: the next number of the format, away from 0."""
    low = torch.tensor(abs(value), dtype=torch.float64).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return float((low.view(bits) + 1).view(dtype).double() - low.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_spacings_are_those_of_the_format(dtype):
    numbers = [
        0.0,
        1.0,
        -1.0,
        0.999,
        3.7,
        -(2.0**-10),
        torch.finfo(dtype).tiny,
        torch.finfo(dtype).tiny / 2,
        1e-3,
    ]
    stored = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    expected = [neighbour_distance(value, dtype) for value in stored.double().tolist()]
    assert spacings(stored.double(), dtype).tolist() == expected


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_proportional_columns_reproduce_themselves(dtype):
    weight = random(64, 9).to(dtype).double()
    scale = torch.tensor([1.0, 0.0, 1.01, -3.3, 1e-3, 7.0, 0.5, 1.0, 1.0])
    changed = round_once(weight * scale.double(), dtype).double()
    changed[:, 7] = round_once(changed[:, 7] + 0.1 * random(64, seed=3, dtype=torch.float64), dtype).double()
    weight[:, 8] = changed[:, 8] = 0
    found, fits = proportional(weight, changed, dtype)
    assert fits.tolist() == [True] * 7 + [False, False]
    assert found[1] == 0
    again = round_once(weight * found.float().double(), dtype).double()
    assert torch.equal(again[:, fits], changed[:, fits])
    if dtype == torch.float32:
        assert torch.allclose(found[fits], scale.double()[fits], rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_found_where_float32_rounds_twice(dtype):
    """Two equal weights to neighbouring numbers: a tie between them, which float32 takes for both."""
    stored = torch.tensor(1.05).to(dtype)
    above = torch.nextafter(stored, torch.tensor(2.0, dtype=dtype))
    changed = torch.stack([stored, above]).double()[:, None]
    for apart, expected in ((2.0**-25, True), (2.0**-18, False)):
        weight = torch.tensor([[1.0], [1 - apart]], dtype=torch.float64)
        found, fits = proportional(weight, changed, dtype)
        assert fits.tolist() == [expected]
        if expected:
            assert float(found) == pytest.approx(float(changed.mean()), rel=1e-6)
    # Numbers of more bits were computed in float64.
    assert not bool(proportional(torch.tensor([[1.0], [1 - 2.0**-25]]).double(), changed, torch.float32)[1])


def test_columns_in_groups_fit_as_all_at_once(monkeypatch):
    import editing.checkpoints.difference as module

    weight = random(64, 9).double()
    changed = round_once(weight * random(9, seed=1).double(), torch.bfloat16).double()
    whole = proportional(weight, changed, torch.bfloat16)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 130)
    for one, other in zip(proportional(weight, changed, torch.bfloat16), whole, strict=True):
        assert torch.equal(one, other)


def test_noise_is_above_the_norm_of_rounding_errors_and_not_far():
    for seed in range(5):
        values = random(80, 120, seed=seed, dtype=torch.float64) * torch.linspace(
            0.1, 5, 120, dtype=torch.float64
        )
        errors = round_once(values, torch.bfloat16).double() - values
        largest = float(torch.linalg.matrix_norm(errors, 2))
        assert largest < noise(spacings(values, torch.bfloat16)) < 3 * largest


@pytest.mark.parametrize("shape", [(30, 40), (200, 90)])
def test_low_rank_is_the_truncated_decomposition(shape):
    signal = random(shape[0], 5, dtype=torch.float64) @ random(5, shape[1], seed=1, dtype=torch.float64)
    whole = signal + 1e-3 * random(*shape, seed=2, dtype=torch.float64)
    left, right = low_rank(whole, 0.5, 20)
    assert left.shape[1] == 5
    U, s, V = torch.linalg.svd(whole)
    best = sum(s[i] * torch.outer(U[:, i], V[i]) for i in range(5))
    torch.testing.assert_close(left @ right.T, best, rtol=0, atol=1e-6)
    assert low_rank(whole, 0.5, 4) is None
    assert low_rank(random(*shape, seed=3, dtype=torch.float64), 1e-3, 20) is None


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("family", "sharded"),
    [("llama", True), ("gpt2", False), ("mixtral", False), ("qwen3_moe", False), ("gpt_oss", False)],
)
def test_what_broca_edited_is_found_again(tmp_path, family, sharded, dtype):
    source = base_at(tmp_path / "base", family, dtype, sharded)
    plan = plan_for(source, four_edits(source.anatomy))
    steered = export(source, plan, tmp_path / "steered")
    found = compare(source, steered.path)
    assert found.not_covered == ()
    again = found.plan(source)
    assert [(e.layer, e.block) for e in again.edits] == [(e.layer, e.block) for e in plan.edits]
    weights = Weights(source)
    forms = [("left", "right"), ("column_scale",), ("row_scale",), ("left", "right")]
    stored = DTYPES[dtype]
    for old, new, form in zip(plan.edits, again.edits, forms, strict=True):
        names = ("row_scale", "column_scale", "left", "right", "bias")
        assert tuple(sorted(n for n in names if getattr(new, n) is not None)) == tuple(sorted(form))
        assert new.rank == old.rank
        W = weights.read(old.layer, old.block)
        wanted = old.rounded(W.to(stored)).stored.double()
        spacing = spacings(wanted, stored)
        largest = torch.maximum(W.abs(), wanted.abs())
        if new.rank:
            terms = [torch.outer(u, k).abs().double() for u, k in zip(new.left.T, new.right.T, strict=True)]
            largest = torch.maximum(largest, sum(terms))
        worst = float(((new.apply(W) - wanted).abs() / spacings(largest, stored)).max())
        assert worst == pytest.approx(new.notes["worst_in_spacings"])
        if old.rank == 0:
            assert torch.equal(new.rounded(W.to(stored)).stored.double(), wanted)
        elif dtype == "float32":
            # Two float32 factors a term, and what larger numbers' rounding puts into the factors.
            assert worst <= 4
        error = float((new.apply(W) - wanted).norm())
        # Rounding errors are uniform, of spacing^2 / 12; float32 factors are rounded as much themselves.
        allowed = 2.0 if dtype == "float32" else 1.2
        assert error < allowed * float((spacing.square() / 12).sum().sqrt())
    assert again.edits[1].components == (3, 7, 11)
    assert again.edits[3].components == (2, 9, 20)
    assert again.edits[1].column_scale[3] == 0
    scale = four_edits(source.anatomy)[1].column_scale
    assert bool((again.edits[1].column_scale[scale == 1] == 1).all())
    again.save(tmp_path / "again.safetensors")
    assert load_plan(tmp_path / "again.safetensors").metadata["fingerprint"] == source.fingerprint


def test_zeroed_columns_beside_a_low_rank_change():
    W = random(64, 48).double()
    silenced = torch.zeros(48, dtype=torch.bool)
    silenced[[1, 5]] = True
    K = random(48, 1, seed=2).double().masked_fill(silenced[:, None], 0)
    changed = round_once((W + random(64, 1, seed=1).double() @ K.T) * ~silenced, torch.float32).double()
    found = recovered(W, changed, torch.float32)
    assert found["left"].shape[1] == 1
    assert found["column_scale"].tolist() == (~silenced).float().tolist()
    edit = ModuleEdit(0, "mlp", (), **found)
    assert float((edit.apply(W) - changed).abs().max()) < 1e-5


def saved_by_another_tool(source, out, change, shards=1, dtype=None):
    """The checkpoint rewritten whole, with other shard names, by the safetensors library."""
    tensors = {}
    for file in sorted(source.checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    out.mkdir()
    (out / "config.json").write_bytes((source.checkpoint / "config.json").read_bytes())
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, out / "model.safetensors")
        return out
    weight_map = {name: f"part{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out


DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_other_tools_shards(tmp_path, sharded, shards):
    source = base_at(tmp_path / "base", dtype="bfloat16", sharded=sharded)

    def ablate(tensors):
        r = random(64, seed=9)
        r = r / r.norm()
        W = tensors[DOWN].float()
        tensors[DOWN] = (W - torch.outer(r, r @ W)).bfloat16()

    other = saved_by_another_tool(source, tmp_path / "other", ablate, shards)
    found = compare(source, other)
    assert [t.name for t in found.tensors] == [DOWN]
    assert found.tensors[0].what == "rank 1"
    assert found.equal == len(tensor_entries(source.checkpoint)) - 1
    (edit,) = found.plan(source).edits
    W = Weights(source).read(1, "mlp")
    r = random(64, seed=9).double()
    r = r / r.norm()
    assert abs(float(edit.left[:, 0].double() @ r)) / float(edit.left.norm()) > 0.999
    assert float((edit.apply(W).T @ r).norm()) < 0.02 * float((W.T @ r).norm())


def test_a_checkpoint_saved_in_another_dtype(tmp_path):
    source = base_at(tmp_path / "base")

    def halve(tensors):
        tensors[DOWN][:, 4] *= 0.5

    found = compare(source, saved_by_another_tool(source, tmp_path / "other", halve, dtype=torch.bfloat16))
    assert [t.name for t in found.tensors] == [DOWN]
    (edit,) = found.plan(source).edits
    assert edit.components == (4,) and edit.column_scale[4] == pytest.approx(0.5, rel=2e-3)


def test_what_is_no_edit_is_named_and_refused(tmp_path):
    source = base_at(tmp_path / "base")

    def tune(tensors):
        tensors[DOWN][:, 4] = 0
        tensors[UP] += 0.1
        tensors["model.norm.weight"][3] += 1
        tensors["model.layers.2.self_attn.o_proj.weight"] += 0.1 * random(64, 64)

    other = saved_by_another_tool(source, tmp_path / "other", tune)
    before = load_file(source.checkpoint / "model.safetensors")
    found = compare(source, other)
    names = {UP, "model.norm.weight", "model.layers.2.self_attn.o_proj.weight"}
    assert set(found.not_covered) == names
    by_name = {t.name: t for t in found.tensors}
    for name, tensor in load_file(other / "model.safetensors").items():
        if name in by_name:
            change = float((tensor.double() - before[name].double()).norm() / before[name].double().norm())
            assert by_name[name].relative == pytest.approx(change)
    assert "full rank" in by_name["model.layers.2.self_attn.o_proj.weight"].what
    with pytest.raises(BrocaError, match=r"o_proj\.weight, .* --allow-others"):
        found.plan(source)
    plan = found.plan(source, allow_others=True)
    assert set(plan.metadata["not_covered"]) == names
    assert [(e.layer, e.block, e.components) for e in plan.edits] == [(1, "mlp", (4,))]


def test_tensors_that_only_one_has(tmp_path):
    source = base_at(tmp_path / "base")

    def swap(tensors):
        tensors["model.layers.0.extra"] = torch.ones(3)
        del tensors["lm_head.weight"]

    found = compare(source, saved_by_another_tool(source, tmp_path / "other", swap))
    assert {(t.name, t.what) for t in found.tensors} == {
        ("lm_head.weight", "only in the base"),
        ("model.layers.0.extra", "only in the edited checkpoint"),
    }


def test_biases_that_were_added_and_changed(tmp_path):
    source = base_at(tmp_path / "base")
    shift = random(64, seed=4)
    edit = ModuleEdit(1, "mlp", (), bias=shift, notes=NOTES)
    found = compare(source, export(source, plan_for(source, [edit]), tmp_path / "out").path)
    assert found.not_covered == ()
    (again,) = found.plan(source).edits
    assert torch.equal(again.bias, shift) and not again.changes_weight and again.components == ()
    source = base_at(tmp_path / "gpt2", "gpt2")
    found = compare(source, export(source, plan_for(source, [edit]), tmp_path / "gpt2 out").path)
    (again,) = found.plan(source).edits
    torch.testing.assert_close(again.bias, shift, rtol=0, atol=1e-6)


def test_the_same_checkpoint(tmp_path):
    source = base_at(tmp_path / "base")
    found = compare(source, source.checkpoint)
    assert found.tensors == () and found.equal == len(tensor_entries(source.checkpoint))
    with pytest.raises(NothingToChangeError, match="no edit between them"):
        found.plan(source)


def test_another_architecture(tmp_path):
    source = base_at(tmp_path / "base")
    base_at(tmp_path / "gpt2", "gpt2")
    with pytest.raises(BrocaError, match="no tensor"):
        compare(source, tmp_path / "gpt2")
