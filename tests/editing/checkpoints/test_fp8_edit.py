"""Edits of FP8 tiles in place, against plain loops in float64; all other bytes are those of the source."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_dequantise import quantise

from editing.checkpoints.dequantise import dequantise, open_for_export
from editing.checkpoints.difference import compare
from editing.checkpoints.export import export
from editing.checkpoints.fp8_edit import TileEdit
from editing.checkpoints.verification import verify
from editing.plans.plan import ModuleEdit, make_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.source import open_model

TILE = (32, 16)
O_PROJ, DOWN = (
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
)  # [72, 64], [72, 50]


@pytest.fixture(scope="module", params=[1, 2], ids=["one file", "shards"])
def quantised(request, tmp_path_factory):
    """A checkpoint of FP8 tiles, and its copy in bfloat16."""
    directory = tmp_path_factory.mktemp("fp8")
    quantise(directory / "fp8", shards=request.param)
    dequantise(directory / "fp8", directory / "bf16")
    return directory / "fp8", directory / "bf16"


def plan_for(source, *edits):
    return make_plan(
        edits, {"model": "fp8", "fingerprint": source.fingerprint, "method": "test", "settings": {}}
    )


def rank_one(size=0.3):
    """Changes rows 35 to 71 of o_proj in the columns 20 to 30: tiles (1, 1) and (2, 1)."""
    generator = torch.Generator().manual_seed(5)
    left, right = torch.zeros(72, 1), torch.zeros(64, 1)
    left[35:] = torch.randn(37, 1, generator=generator)
    right[20:31] = torch.randn(11, 1, generator=generator) * size
    return ModuleEdit(1, "attn", (0,), left=left, right=right)


def scaling(factor):
    """Neuron 17 of layer 2 times a factor: the tiles (0 to 2, 1)."""
    scale = torch.ones(50)
    scale[17] = factor
    return ModuleEdit(2, "mlp", (17,), column_scale=scale)


def tensors_of(checkpoint):
    return {
        name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def naive(quantised, scales, planned):
    """Q' and S' by loops, from the planned change [d, n] in float64."""
    new, of_tiles = quantised.clone(), scales.clone()
    rows, columns = quantised.shape
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            places = [
                (r, c)
                for r in range(i * TILE[0], min((i + 1) * TILE[0], rows))
                for c in range(j * TILE[1], min((j + 1) * TILE[1], columns))
            ]
            if not any(planned[place] for place in places):
                continue
            scale = float(scales[i, j])
            wanted = {place: float(quantised[place]) * scale + planned[place] for place in places}
            while max(map(abs, wanted.values())) > 464 * scale:
                scale *= 2
            of_tiles[i, j] = scale
            for place, value in wanted.items():
                new[place] = torch.tensor(value / scale).to(torch.float8_e4m3fn)
    return new, of_tiles


def test_deltas_of_another_expert_change_no_tile():
    """An expert's tensor has the columns 16 to 31 of W."""
    edit = ModuleEdit(0, "mlp", (), columns=torch.tensor([2, 20]), column_deltas=torch.ones(2, 64))
    part = SimpleNamespace(
        edit=edit, pieces=[SimpleNamespace(columns=slice(16, 32))], entry=SimpleNamespace(shape=(64, 16))
    )
    assert TileEdit(part, None, (32, 8)).changed().tolist() == [[True, False], [True, False]]


def test_deltas_change_the_tiles_of_their_rows_and_columns(quantised, tmp_path):
    """Also of the gate, which no other form of an edit changes."""
    generator = torch.Generator().manual_seed(8)
    gate = "model.layers.2.mlp.gate_proj.weight"
    before = tensors_of(quantised[0])
    row_deltas = torch.randn(2, before[gate].shape[1], generator=generator) / 10
    column_deltas = torch.randn(1, 72, generator=generator) / 10
    source = open_for_export(str(quantised[0]))
    plan = plan_for(
        source,
        ModuleEdit(2, "mlp.gate_proj", (3, 40), rows=torch.tensor([3, 40]), row_deltas=row_deltas),
        ModuleEdit(2, "mlp", (17,), columns=torch.tensor([17]), column_deltas=column_deltas),
    )
    export(source, plan, tmp_path / "out", verified=True)
    after = tensors_of(tmp_path / "out")
    changes = {
        gate: {
            (r, c): float(row_deltas[i, c]) for i, r in enumerate((3, 40)) for c in range(row_deltas.shape[1])
        },
        DOWN: {(r, 17): float(column_deltas[0, r]) for r in range(72)},
    }
    for name, given in changes.items():
        rows, columns = before[name].shape
        change = {(r, c): given.get((r, c), 0.0) for r in range(rows) for c in range(columns)}
        expected, scales = naive(before[name], before[f"{name}_scale_inv"], change)
        assert torch.equal(after[name].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(after[f"{name}_scale_inv"], scales)
        assert not torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("size", [0.002, 0.3, 40.0])
def test_only_changed_tiles_change_as_the_loops_say(quantised, tmp_path, size):
    source = open_for_export(str(quantised[0]))
    plan = plan_for(source, rank_one(size), scaling(2.5))
    exported = export(source, plan, tmp_path / "out", verified=True)
    before, after = tensors_of(quantised[0]), tensors_of(tmp_path / "out")
    assert set(exported.tensors) == {O_PROJ, DOWN}
    edit = plan.edits[0]
    planned = {O_PROJ: (edit.left.double() @ edit.right.double().T).tolist()}
    weight = (
        before[DOWN].float().double()
        * before[f"{DOWN}_scale_inv"].double().repeat_interleave(32, 0)[:72].repeat_interleave(16, 1)[:, :50]
    )
    planned[DOWN] = (weight * (plan.edits[1].column_scale.double() - 1)).tolist()
    for name, of_tensor in planned.items():
        change = {(r, c): value for r, row in enumerate(of_tensor) for c, value in enumerate(row)}
        expected, scales = naive(before[name], before[f"{name}_scale_inv"], change)
        assert torch.equal(after[name].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(after[f"{name}_scale_inv"], scales)
        different = before[name].view(torch.uint8) != after[name].view(torch.uint8)
        assert bool(different.any())
        touched = torch.zeros_like(different)
        touched[32:, 16:32] = name == O_PROJ
        touched[:, 16:32] |= name == DOWN
        assert not bool((different & ~touched).any())
        ratio, cosine = exported.survived[name]
        if size > 0.1:
            assert ratio == pytest.approx(1, abs=0.1) and cosine > 0.95
    for name in before.keys() - {*planned, *(f"{name}_scale_inv" for name in planned)}:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    # Larger numbers than a tile's scale can hold make only that tile's scale grow, by a power of two.
    grown = after[f"{O_PROJ}_scale_inv"] / before[f"{O_PROJ}_scale_inv"]
    assert bool((grown.log2() == grown.log2().round()).all()) and bool((grown > 1).any()) == (size > 0.1)
    assert (tmp_path / "out" / "config.json").read_bytes() == (quantised[0] / "config.json").read_bytes()


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_a_planted_neuron_is_scaled_exactly(quantised, tmp_path, factor):
    """The plan is made for the bfloat16 copy; both exports are then the same model."""
    copy = open_model(str(quantised[1]))
    plan = plan_for(copy, scaling(factor))
    export(open_for_export(str(quantised[0])), plan, tmp_path / "fp8")
    export(copy, plan, tmp_path / "bf16")
    dequantise(tmp_path / "fp8", tmp_path / "back")
    back, expected = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "bf16")
    assert torch.equal(back[DOWN][:, 17], expected[DOWN][:, 17])
    for name, tensor in expected.items():
        if name in back:
            # Numbers below 2^-6 of FP8 lose a bit if their tile's scale doubles.
            torch.testing.assert_close(
                back[name], tensor, rtol=0, atol=2.0**-9 * float(tensor.abs().max()) / 100
            )
    ids = torch.arange(12)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
        for name in ("back", "bf16")
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_tile_of_zeros(tmp_path, scale):
    tensors = quantise(tmp_path / "fp8")
    tensors[DOWN][:, 16:32] = 0
    tensors[f"{DOWN}_scale_inv"][:, 1] = scale
    left, right = torch.zeros(72, 1), torch.zeros(64, 1)
    tensors[O_PROJ][:32, :16] = 0
    tensors[f"{O_PROJ}_scale_inv"][0, 0] = scale
    left[3], right[5] = 0.002, 0.03
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    source = open_for_export(str(tmp_path / "fp8"))
    plan = plan_for(source, scaling(2.0), ModuleEdit(1, "attn", (0,), left=left, right=right))
    export(source, plan, tmp_path / "out", verified=True)
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after[DOWN].view(torch.uint8), tensors[DOWN].view(torch.uint8))
    assert torch.equal(after[f"{DOWN}_scale_inv"], tensors[f"{DOWN}_scale_inv"])
    tile = after[O_PROJ][:32, :16].float() * after[f"{O_PROJ}_scale_inv"][0, 0]
    assert float(tile[3, 5]) == pytest.approx(6e-5, rel=1 / 16) and int(tile.count_nonzero()) == 1


def test_a_damaged_result_fails_the_verification(quantised, tmp_path):
    source = open_for_export(str(quantised[0]))
    plan = plan_for(source, rank_one())
    export(source, plan, tmp_path / "out")
    assert {O_PROJ, f"{O_PROJ}_scale_inv"} == set(verify(source, plan, tmp_path / "out").edited)
    for name in (O_PROJ, f"{O_PROJ}_scale_inv"):
        for file in (tmp_path / "out").glob("*.safetensors"):
            kept = file.read_bytes()
            tensors = load_file(file)
            if name in tensors:
                tensors[name].view(torch.uint8)[0, 0] ^= 1
                save_file(tensors, file)
                with pytest.raises(BrocaError, match=name):
                    verify(source, plan, tmp_path / "out")
                file.write_bytes(kept)


def test_what_is_refused(quantised, tmp_path, broca):
    source = open_for_export(str(quantised[0]))
    plan = plan_for(source, rank_one())
    with pytest.raises(UsageError, match="undone"):
        export(source, plan, tmp_path / "out", undoable=True)
    with pytest.raises(UsageError, match="bias"):
        export(source, plan_for(source, ModuleEdit(1, "attn", (), bias=torch.ones(72))), tmp_path / "out")
    with pytest.raises(BrocaError, match="not all finite"):
        huge = rank_one(1e30)
        export(source, plan_for(source, replace(huge, left=huge.left * 1e30)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = shutil.copytree(quantised[0], tmp_path / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"rms_norm_eps"', '"other_eps"')
    )
    with pytest.raises(BrocaError, match="fingerprint"):
        export(open_for_export(str(other)), plan, tmp_path / "out")
    plan.save(tmp_path / "edit.safetensors")
    status, printed, _ = broca(
        "export", quantised[0], "--edit", tmp_path / "edit.safetensors", "--out", tmp_path / "out"
    )
    assert status == 0 and "o_proj" in printed
    status, _, err = broca(
        "export", tmp_path / "out", "--edit", tmp_path / "edit.safetensors", "--out", tmp_path / "again"
    )
    assert status == 1 and "fingerprint" in err


def test_no_plan_is_recovered_from_stored_numbers_that_are_no_weights(quantised):
    with pytest.raises(BrocaError, match="--dequantise"):
        compare(open_model(str(quantised[1])), quantised[0])
