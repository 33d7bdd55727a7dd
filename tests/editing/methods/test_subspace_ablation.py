"""Subspace ablation against plain loops, and on models against hooks on the outputs of modules."""

import math

import models
import pytest
import torch

from editing.directions.direction import Direction
from editing.methods.directional_ablation import directional_ablation_plan
from editing.methods.material import Material
from editing.methods.subspace_ablation import AblateSubspace, orthonormal, subspace_ablation
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])
OUTPUTS = ("attn_out", "mlp_out", "block_out")


def random_numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_schmidt(vectors):
    """Orthonormal columns with the same span, column by column."""
    result = []
    for column in vectors.T.tolist():
        for other in result:
            along = sum(a * b for a, b in zip(column, other, strict=True))
            column = [a - along * b for a, b in zip(column, other, strict=True)]
        size = math.sqrt(sum(a * a for a in column))
        result.append([a / size for a in column])
    return torch.tensor(result, dtype=torch.float64).T


def naive(weight, basis, strength):
    """W' by loops."""
    weight, basis = weight.tolist(), basis.tolist()
    rows, columns, dimensions = range(len(weight)), range(len(weight[0])), range(len(basis[0]))
    edited = [list(row) for row in weight]
    for j in columns:
        for i in dimensions:
            along = sum(basis[r][i] * weight[r][j] for r in rows)
            for r in rows:
                edited[r][j] -= strength * along * basis[r][i]
    return torch.tensor(edited, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.7])
def test_equals_the_formula(strength, rank):
    weight, basis = random_numbers(7, 12), gram_schmidt(random_numbers(7, rank, seed=1))
    left, right = subspace_ablation(weight, basis, strength)
    assert left.shape == (7, rank) and right.shape == (12, rank)
    edited = weight + left @ right.T
    torch.testing.assert_close(edited, naive(weight, basis, strength), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(basis.T @ edited, (1 - strength) * basis.T @ weight, rtol=1e-10, atol=1e-12)


def test_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    left, right = subspace_ablation(weight, torch.eye(3)[:, [2, 0]], 1.0)
    assert (weight + left @ right.T).tolist() == [[0, 0], [3, 4], [0, 0]]
    left, right = subspace_ablation(weight, torch.eye(3)[:, [1]], -1.0)
    assert (weight + left @ right.T).tolist() == [[1, 2], [6, 8], [5, 6]]


def test_orthonormal_has_the_same_span_and_marks_dependent_columns():
    vectors = random_numbers(7, 4, seed=2) * torch.tensor([1e3, 1.0, 1e-3, 1.0])
    basis, dependent = orthonormal(vectors)
    assert dependent.tolist() == [False] * 4
    expected = gram_schmidt(vectors)
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    vectors[:, 2] = 3 * vectors[:, 0] - vectors[:, 1]
    assert orthonormal(vectors)[1].tolist() == [False, False, True, False]
    vectors[:, 0] = 0
    assert orthonormal(vectors)[1].tolist() == [True, False, False, False]
    assert orthonormal(random_numbers(2, 3))[1].tolist() == [False, False, True]


def test_refuses_a_basis_that_is_not_orthonormal_and_a_strength_of_0():
    weight = random_numbers(7, 12)
    with pytest.raises(BrocaError, match="orthonormal"):
        subspace_ablation(weight, random_numbers(7, 2))
    for strength in (0.0, math.nan, -math.inf):
        with pytest.raises(UsageError, match="strength"):
            subspace_ablation(weight, torch.eye(7)[:, :2], strength)


def direction_of(seed, source="qaa", target="qab", rank=None):
    """Random vectors and, with a rank, random subspaces of a model of 3 layers and width 64."""
    vectors = {site: random_numbers(3, 64, seed=seed + i) for i, site in enumerate(OUTPUTS)}
    subspaces = {}
    if rank is not None:
        for i, site in enumerate(OUTPUTS):
            bases = [gram_schmidt(random_numbers(64, rank, seed=seed + 10 * i + layer)) for layer in range(3)]
            subspaces[site] = torch.stack(bases)
    return Direction(source, target, vectors, {}, {"method": "test"}, subspaces)


def plan_of(loaded, *directions, layers=None, blocks=None, **settings):
    return AblateSubspace(**settings).plan_for(
        Material(loaded, directions=directions, layers=layers, blocks=blocks)
    )


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


def logits_without(loaded, bases, strength):
    """Logits with hooks that remove (layer, module)'s subspace from the module's output."""

    def reader_of(basis):
        def read(values, _):
            return values - strength * values @ (basis @ basis.T).float()

        return read

    readers = {(f"{block}_out", layer): reader_of(basis) for (layer, block), basis in bases.items()}
    with site_hooks(loaded.anatomy, readers):
        return logits(loaded)


@pytest.fixture(scope="module")
def loaded_of(checkpoint_of):
    made = {}

    def load(model_type):
        if model_type not in made:
            made[model_type] = load_model(str(checkpoint_of(model_type)), device="cpu")
        return made[model_type]

    return load


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize(
    ("model_type", "site"), [("llama", "block_out"), ("gpt2", "own"), ("mixtral", "own")]
)
def test_equals_a_hook_that_removes_the_subspace(loaded_of, model_type, site, strength):
    loaded, direction = loaded_of(model_type), direction_of(3, rank=4)
    plan = plan_of(loaded, direction, layers=[0, 2], site=site, strength=strength)
    bases = {
        (layer, block): direction.subspaces["block_out" if site == "block_out" else f"{block}_out"][layer]
        for layer in (0, 2)
        for block in ("attn", "mlp")
    }
    expected = logits_without(loaded, bases, strength)
    with applied(loaded, plan):
        result = logits(loaded)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-4)
    assert (result - logits(loaded)).abs().max() > 0.01
    assert any(edit.bias is not None for edit in plan.edits) == (model_type == "gpt2")


def test_the_plan_lists_its_changes(loaded_of):
    loaded, direction = loaded_of("llama"), direction_of(3, rank=4)
    plan = plan_of(loaded, direction, layers=[2, 1], strength=0.6, rank=3)
    assert [(edit.layer, edit.block) for edit in plan.edits] == [
        (1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")
    ]  # fmt: skip
    for edit in plan.edits:
        layer = loaded.model.model.layers[edit.layer]
        module = layer.self_attn.o_proj if edit.block == "attn" else layer.mlp.down_proj
        weight, basis = module.weight.double(), direction.subspaces["block_out"][edit.layer][:, :3]
        expected = naive(weight, basis, 0.6)
        torch.testing.assert_close(edit.apply(weight), expected, rtol=1e-5, atol=1e-6)
        assert edit.rank == 3
        assert edit.notes["change_norm"] == pytest.approx(float((expected - weight).norm()), rel=1e-9)
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
        width = 1 if edit.block == "mlp" else loaded.anatomy.head_dim
        assert edit.components == tuple(range(weight.shape[1] // width))
        fractions = [float((basis.T @ part).norm() / part.norm()) for part in weight.split(width, dim=1)]
        assert edit.details["share"].tolist() == pytest.approx(fractions)
        assert edit.details["c"].tolist() == [-0.6] * len(fractions)
    assert plan.metadata["settings"]["ranks"] == {"block_out 1": 3, "block_out 2": 3}
    assert plan.metadata["languages"] == ["qaa", "qab"]


def test_columns_beyond_the_rank_of_a_layer_are_ignored(loaded_of):
    loaded, direction = loaded_of("llama"), direction_of(3, rank=4)
    direction.subspaces["block_out"][1, :, 2:] = 0
    plan = plan_of(loaded, direction, blocks=["mlp"])
    assert [edit.rank for edit in plan.edits] == [4, 2, 4]
    with pytest.raises(UsageError, match="rank 3: the subspace at block_out of layer 1 has 2"):
        plan_of(loaded, direction, blocks=["mlp"], rank=3)
    direction.subspaces["block_out"][1] = 0
    with pytest.raises(BrocaError, match="block_out of layer 1 is empty"):
        plan_of(loaded, direction)


def test_several_directions_span_a_subspace(loaded_of):
    loaded = loaded_of("llama")
    several = [direction_of(20), direction_of(30, target="qac"), direction_of(40, "qab", "qac")]
    plan = plan_of(loaded, *several, from_layer=1)
    vectors = torch.stack([direction.vectors["block_out"][1] for direction in several], dim=1)
    basis = gram_schmidt(vectors)
    for edit in plan.edits:
        left = edit.left.double()
        torch.testing.assert_close(left @ left.T, basis @ basis.T, rtol=1e-5, atol=1e-6)
        layer = loaded.model.model.layers[edit.layer]
        module = layer.self_attn.o_proj if edit.block == "attn" else layer.mlp.down_proj
        weight = module.weight.double()
        assert (vectors.T @ edit.apply(weight)).abs().max() < 1e-4
        assert (vectors.T @ weight).abs().max() > 1
    assert plan.metadata["languages"] == ["qaa", "qab", "qac"]
    assert "source" not in plan.metadata and "target" not in plan.metadata
    assert plan.metadata["settings"]["directions"] == [
        "qaa to qab (test)", "qaa to qac (test)", "qab to qac (test)"
    ]  # fmt: skip


def test_one_dimension_is_directional_ablation(loaded_of):
    loaded, direction = loaded_of("gpt2"), direction_of(3)
    vectors = direction.vectors["block_out"]
    direction.subspaces["block_out"] = (vectors / vectors.norm(dim=1, keepdim=True))[..., None]
    a = plan_of(loaded, direction, strength=0.7)
    b = directional_ablation_plan(loaded, direction, strength=0.7)
    for edit, other in zip(a.edits, b.edits, strict=True):
        torch.testing.assert_close(edit.left @ edit.right.T, other.left @ other.right.T)
        torch.testing.assert_close(edit.bias, other.bias)
        assert edit.components == other.components and edit.notes == pytest.approx(other.notes)
        for name in ("c", "share"):
            torch.testing.assert_close(edit.details[name], other.details[name])


def test_a_scaled_plan_is_the_plan_of_that_strength(loaded_of):
    loaded, direction = loaded_of("gpt2"), direction_of(3, rank=2)
    scaled = plan_of(loaded, direction, layers=[1]).scaled(-0.5)
    expected = plan_of(loaded, direction, layers=[1], strength=-0.5)
    assert scaled.metadata == expected.metadata
    for a, b in zip(scaled.edits, expected.edits, strict=True):
        torch.testing.assert_close(a.left @ a.right.T, b.left @ b.right.T)
        torch.testing.assert_close(a.bias, b.bias)
        assert a.notes == pytest.approx(b.notes)


def test_refuses_bad_input(loaded_of, tmp_path):
    llama, direction = loaded_of("llama"), direction_of(3, rank=4)
    for wrong, message in (
        ({"site": "attn_in"}, "site 'attn_in'"),
        ({"blocks": ["gate"]}, "gate"),
        ({"layers": [-1]}, "layer -1"),
        ({"from_layer": 3}, "layer 3"),
        ({"strength": 0.0}, "strength 0"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 5}, "rank 5"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_of(llama, direction, **wrong)
    with pytest.raises(UsageError, match="at least one direction"):
        plan_of(llama)
    with pytest.raises(UsageError, match="rank"):
        plan_of(llama, direction, direction_of(9), rank=1)
    with pytest.raises(BrocaError, match="no subspace at block_out"):
        plan_of(llama, direction_of(3))
    twin = Direction("qaa", "qac", {k: -2 * v for k, v in direction.vectors.items()}, {}, {})
    with pytest.raises(BrocaError, match=r"qaa to qac .*block_out of layer 0"):
        plan_of(llama, direction, direction_of(9), twin)
    twin.vectors["block_out"][0] = 0
    with pytest.raises(BrocaError, match=r"qaa to qac .*length 0"):
        plan_of(llama, twin, direction)
    other = Direction("qaa", "qab", {}, {}, {"fingerprint": "0123"}, direction.subspaces)
    with pytest.raises(BrocaError, match="0123"):
        plan_of(llama, other)
    with pytest.raises(BrocaError, match="'own'"):
        plan_of(loaded_of("gemma2"), direction)
    model = models.tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7:9] = 0
    silent = load_model(str(models.save_checkpoint(model, tmp_path / "model")), device="cpu")
    axes = torch.eye(64, dtype=torch.float64)[:, 7:9].repeat(3, 1, 1)
    with pytest.raises(BrocaError, match="layer 1, mlp"):
        plan_of(silent, Direction("qaa", "qab", {}, {}, {}, {"block_out": axes}))


def test_a_study_of_a_model_with_norms_takes_the_outputs_own_subspaces(checkpoint_of, corpus):
    study = Material(load_model(str(checkpoint_of("gemma2")), device="cpu"), corpus, "qaa", "qab")
    plan = AblateSubspace.of(study, {"strength": 0.7}).plan_for(study)
    assert plan.metadata["settings"]["site"] == "own" and len(plan.edits) == 6
