"""The edit plan: W' = diag(r) W diag(c) + U K^T, its file, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from editing.plans.plan import ModuleEdit, Plan, load_plan, make_plan
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import load_artifact, save_artifact
from neurons.scorers.selection import parse_layers

ROWS, COLUMNS = 5, 7
PARTS = ("row_scale", "column_scale", "left", "right", "bias")


def random_edit(layer=0, block="mlp", wanted=PARTS, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "row_scale": (ROWS,),
        "column_scale": (COLUMNS,),
        "left": (ROWS, rank),
        "right": (COLUMNS, rank),
        "bias": (ROWS,),
    }
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return ModuleEdit(
        layer=layer,
        block=block,
        components=(1, 4),
        details={"g": torch.tensor([0.1, -0.2], dtype=torch.float64)},
        notes={"change_norm": 0.5, "weight_norm": 2.0},
        **{name: parts[name] for name in wanted},
    )


def naive(edit, weight):
    """W' number by number, in Python floats."""
    rows, columns = weight.shape
    edited = [[0.0] * columns for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            value = float(weight[r, c])
            value *= 1.0 if edit.row_scale is None else float(edit.row_scale[r])
            value *= 1.0 if edit.column_scale is None else float(edit.column_scale[c])
            if edit.left is not None:
                value += sum(float(u) * float(k) for u, k in zip(edit.left[r], edit.right[c], strict=True))
            edited[r][c] = value
    return torch.tensor(edited, dtype=torch.float64)


SOME = pytest.mark.parametrize(
    "wanted", [PARTS, ("row_scale",), ("column_scale",), ("left", "right"), ()], ids=", ".join
)


def random_weight(dtype=torch.float32):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8)).to(dtype)


@SOME
def test_apply_is_the_formula(wanted):
    edit, weight = random_edit(wanted=wanted), random_weight()
    found = edit.apply(weight)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive(edit, weight), rtol=1e-13, atol=1e-13)
    assert torch.equal(weight, random_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_edited_in_float64(dtype):
    edit, weight = random_edit(), random_weight(dtype)
    found = edit.apply(weight)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive(edit, weight), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_of_rows_equal_the_whole(dtype):
    edit, weight = random_edit(), random_weight(dtype)
    pieces = [edit.apply(weight[first : first + 2], first) for first in range(0, ROWS, 2)]
    torch.testing.assert_close(torch.cat(pieces), edit.apply(weight), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(edit.apply(weight[2:4], 2), edit.apply(weight[2:4], 0))


@pytest.mark.parametrize("wanted", [("row_scale",), ("column_scale", "left", "right")], ids=", ".join)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
def test_scaled_multiplies_the_change(wanted, strength):
    edit, weight = random_edit(wanted=wanted), random_weight()
    change = naive(edit, weight) - weight.double()
    found = edit.scaled(strength).apply(weight) - weight.double()
    torch.testing.assert_close(found, strength * change, rtol=1e-6, atol=1e-6)


def test_scaled_plan_says_so():
    plan = make_plan(
        [random_edit(0, wanted=("left", "right")), random_edit(1, wanted=("row_scale",))],
        {"settings": {"strength": 2.0}, "method": "m"},
    )
    found = plan.scaled(0.25)
    assert found.relative_change() == pytest.approx(0.25 * plan.relative_change())
    assert found.metadata["settings"]["strength"] == 0.5
    assert plan.metadata["settings"]["strength"] == 2.0
    assert plan.scaled(-1).relative_change() == pytest.approx(plan.relative_change())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("language-arithmetic", {"strength": 2.0, "fill": 0.0}),
        ("ablate", {"strength": 2.0, "form": "norm-preserving-biprojected"}),
        ("keyed", {"strength": 2.0, "jointly": True}),
        ("bake", {"strength": 2.0, "corrections": 1}),
    ],
)
def test_a_strength_of_a_part_of_the_edit_stays_and_the_multiple_stands_beside_it(method, settings):
    edit = random_edit(0, wanted=("column_scale", "left", "right"))
    found = make_plan([edit], {"method": method, "settings": settings}).scaled(0.5).scaled(0.5)
    assert found.metadata["settings"] == {**settings, "scaled_by": 0.25}


def test_what_was_measured_at_a_strength_is_not_said_of_another():
    edit = random_edit(0, wanted=("left", "right"))
    edit = replace(edit, notes={**edit.notes, "worst_in_spacings": 0.5})
    plan = make_plan([edit], {"method": "keyed", "settings": {}, "learning": {"held_out": [3.0, 2.0]}})
    assert plan.scaled(1) is plan
    found = plan.scaled(2)
    assert "learning" not in found.metadata and "worst_in_spacings" not in found.edits[0].notes


def test_refuses_to_scale_beyond_float32():
    with pytest.raises(BrocaError, match="not finite"):
        make_plan([random_edit(0, wanted=("bias",))], {"method": "m", "settings": {}}).scaled(1e39)


def test_relative_change_is_over_all_modules():
    one = random_edit(0)
    other = ModuleEdit(
        1, "mlp", (0, 1, 2), bias=torch.ones(ROWS), notes={"change_norm": 4.0, "weight_norm": 3.0}
    )
    plan = make_plan([one, other], {})
    assert plan.relative_change() == pytest.approx(math.sqrt((0.5**2 + 4**2) / (2**2 + 3**2)))
    assert plan.components == 5


def full_plan():
    # 1 and 11: the name of one begins the name of the other.
    edits = [
        random_edit(11, "mlp", ("column_scale",), seed=1),
        random_edit(1, "mlp", ("left", "right"), rank=1, seed=2),
        random_edit(1, "attn", PARTS, seed=3),
        random_edit(2, "attn", ("row_scale",), seed=4),
        random_edit(3, "mlp", ("bias",), seed=5),
    ]
    return make_plan(
        edits, {"method": "m", "settings": {"rho": 0.1}, "fingerprint": "f", "languages": ["qaa"]}
    )


def test_modules_are_in_order():
    places = [(edit.layer, edit.block) for edit in full_plan().edits]
    assert places == [(1, "attn"), (1, "mlp"), (2, "attn"), (3, "mlp"), (11, "mlp")]


def test_save_and_load(tmp_path):
    plan = full_plan()
    plan.save(tmp_path / "a.safetensors")
    read = load_plan(tmp_path / "a.safetensors")
    assert len(read.edits) == len(plan.edits)
    for made, found in zip(plan.edits, read.edits, strict=True):
        assert (found.layer, found.block, found.components) == (made.layer, made.block, made.components)
        for name in PARTS:
            expected = getattr(made, name)
            if expected is None:
                assert getattr(found, name) is None
            else:
                assert torch.equal(getattr(found, name), expected)
                assert getattr(found, name).dtype == torch.float32
        assert found.details.keys() == made.details.keys() == {"g"}
        assert torch.equal(found.details["g"], made.details["g"])
        assert found.notes == made.notes
    for name, value in plan.metadata.items():
        assert read.metadata[name] == value


def test_equal_plans_have_equal_bytes(tmp_path):
    assert full_plan().to_bytes() == full_plan().to_bytes()
    full_plan().save(tmp_path / "a.safetensors")
    load_plan(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == full_plan().to_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == full_plan().to_bytes()
    assert full_plan().to_bytes() != make_plan(list(full_plan().edits[1:]), {}).to_bytes()


def test_refuses_a_strength_between_rows_and_columns():
    with pytest.raises(BrocaError, match=r"layer 0, mlp.*rows and columns"):
        random_edit(wanted=("row_scale", "column_scale")).scaled(0.5)


def test_refuses_an_edit_without_a_factor():
    with pytest.raises(BrocaError, match="layer 0, mlp"):
        make_plan([random_edit(wanted=())], {})


def test_tensors_may_share_memory():
    shared = torch.ones(ROWS, 1)
    edits = [ModuleEdit(layer, "mlp", (0,), left=shared, right=torch.ones(COLUMNS, 1)) for layer in (0, 1)]
    assert make_plan(edits, {"method": "m"}).to_bytes()


def test_refuses_an_empty_plan():
    with pytest.raises(BrocaError, match="nothing"):
        make_plan([], {})


def test_refuses_a_module_named_twice():
    with pytest.raises(BrocaError, match="twice"):
        make_plan([random_edit(2), random_edit(1), random_edit(2)], {})
    make_plan([random_edit(2, "attn"), random_edit(2, "mlp")], {})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_numbers_that_are_not_finite(part, value):
    edit = random_edit(3)
    getattr(edit, part).view(-1)[2] = value
    with pytest.raises(BrocaError, match=rf"layer 3, mlp.*{part}"):
        make_plan([edit], {})


def test_load_refuses_what_is_no_plan(tmp_path):
    with pytest.raises(BrocaError, match="no such file"):
        load_plan(tmp_path / "none.safetensors")
    save_artifact(tmp_path / "d.safetensors", "direction", {"x": torch.zeros(1)}, {})
    with pytest.raises(BrocaError, match="'direction'"):
        load_plan(tmp_path / "d.safetensors")
    broken = random_edit()
    broken.left[0, 0] = math.nan
    Plan((broken,), {"method": "m", "settings": {}}).save(tmp_path / "nan.safetensors")
    with pytest.raises(BrocaError, match="not finite"):
        load_plan(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", (4,)),
        ("1-3", (1, 2, 3)),
        ("5, 1-3,2", (1, 2, 3, 5)),
        ("0,7", (0, 7)),
        ("3-3", (3,)),
    ],
)
def test_parse_layers(text, expected):
    assert parse_layers(text, 8) == expected


@pytest.mark.parametrize("text", ["8", "6-8", "-1", "", "a", "1-", "1--2", "1,,2", "1.5", "1-2-3"])
def test_parse_layers_refuses(text):
    with pytest.raises(UsageError):
        parse_layers(text, 8)


@pytest.mark.parametrize("text", ["3-1", "3-1,2", "²"])
def test_parse_layers_refuses_reversed_ranges_and_odd_digits(text):
    with pytest.raises(UsageError):
        parse_layers(text, 8)


def test_a_tensor_that_this_version_does_not_know_is_refused(tmp_path):
    """A change that is not understood must not be left out in silence."""
    edit = ModuleEdit(1, "mlp", (0,), left=torch.ones(4, 1), right=torch.ones(3, 1))
    plan = make_plan([edit], {"method": "test", "settings": {}})
    path = tmp_path / "edit.safetensors"
    plan.save(path)
    artifact = load_artifact(path, "edit")
    for name, fault in (
        ("1.mlp.rotation", "rotation, which this version of Broca does not know"),
        ("2.mlp.left", r"no module of 2\.mlp\.left"),
    ):
        save_artifact(path, "edit", {**artifact.tensors, name: torch.ones(2)}, artifact.metadata)
        with pytest.raises(BrocaError, match=fault):
            load_plan(path)


def test_modules_whose_names_begin_alike(tmp_path):
    gate = ModuleEdit(1, "mlp.gate_proj", (2,), rows=torch.tensor([2]), row_deltas=torch.ones(1, 4))
    down = ModuleEdit(1, "mlp", (2,), columns=torch.tensor([2]), column_deltas=torch.ones(1, 4))
    plan = make_plan([gate, down], {"method": "test", "settings": {}})
    plan.save(tmp_path / "edit.safetensors")
    assert load_plan(tmp_path / "edit.safetensors").to_bytes() == plan.to_bytes()
