"""Directional ablation against plain loops, and on models against hooks on the outputs of modules."""

import math

import models
import pytest
import torch

from editing.checkpoints.export import export
from editing.directions.direction import Direction
from editing.methods.directional_ablation import (
    FORMS,
    MIN_REMAINDER,
    directional_ablation,
    directional_ablation_plan,
    without,
)
from editing.plans.applied import applied
from editing.plans.weights import Weights
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])
OUTPUTS = ("attn_out", "mlp_out", "block_out")


def length(values):
    return math.sqrt(sum(value * value for value in values))


def naive(weight, direction, strength, norm_preserving):
    """W' by loops."""
    weight, direction = weight.tolist(), direction.tolist()
    rows, columns = range(len(weight)), range(len(weight[0]))
    unit = [value / length(direction) for value in direction]
    edited = [[0.0 for _ in columns] for _ in rows]
    for j in columns:
        column = [weight[r][j] for r in rows]
        along = sum(unit[r] * column[r] for r in rows)
        rest = [column[r] - strength * along * unit[r] for r in rows]
        scale = length(column) / length(rest) if norm_preserving and length(rest) > 1e-6 else 1.0
        for r in rows:
            edited[r][j] = scale * rest[r]
    return torch.tensor(edited, dtype=torch.float64)


def edited_weight(weight, result):
    scale = 1.0 if result.column_scale is None else result.column_scale
    return weight * scale + torch.outer(result.left, result.right)


def random_case(seed=0, rows=7, columns=12):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, 5 * torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm_preserving", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3, 2.0, -1.5])
def test_equals_the_formula(strength, norm_preserving):
    weight, direction = random_case()
    weight[:, 3] = 0
    result = edited_weight(weight, directional_ablation(weight, direction, strength, norm_preserving))
    expected = naive(weight, direction, strength, norm_preserving)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert (result - weight).abs().max() > 0.01


@pytest.mark.parametrize("norm_preserving", [False, True])
def test_the_direction_is_removed(norm_preserving):
    weight, direction = random_case(1)
    edited = edited_weight(weight, directional_ablation(weight, direction, 1.0, norm_preserving))
    assert (direction @ edited).abs().max() < 1e-13
    assert (direction @ weight).abs().max() > 1


@pytest.mark.parametrize("strength", [1.0, 0.4, -2.0])
def test_columns_keep_their_lengths_and_rows_do_not(strength):
    weight, direction = random_case(2)
    edited = edited_weight(weight, directional_ablation(weight, direction, strength, norm_preserving=True))
    torch.testing.assert_close(edited.norm(dim=0), weight.norm(dim=0))
    assert (edited.norm(dim=1) - weight.norm(dim=1)).abs().max() > 0.1
    plain = edited_weight(weight, directional_ablation(weight, direction, strength))
    assert (plain.norm(dim=0) - weight.norm(dim=0)).abs().max() > 0.1


def test_renormalised_rows_would_restore_the_direction():
    weight, direction = random_case(3)
    plain = edited_weight(weight, directional_ablation(weight, direction))
    by_row = plain * (weight.norm(dim=1) / plain.norm(dim=1))[:, None]
    assert (direction @ by_row).norm() > 0.1 * (direction @ weight).norm()


def test_a_column_parallel_to_the_direction_is_not_renormalised():
    weight, direction = random_case(4)
    unit = direction / direction.norm()
    across = torch.linalg.qr(torch.stack([unit, weight[:, 0]], dim=1)).Q[:, 1]
    weight[:, 2] = -3 * unit
    weight[:, 5] = 4 * unit + 4 * 0.9 * MIN_REMAINDER * across
    weight[:, 6] = 4 * unit + 4 * 1.1 * MIN_REMAINDER * across
    result = directional_ablation(weight, direction, 1.0, norm_preserving=True)
    edited = edited_weight(weight, result)
    assert result.column_scale[[2, 5]].tolist() == [1, 1]
    assert edited[:, 2].norm() < 1e-14
    assert float(edited[:, 5].norm()) == pytest.approx(4 * 0.9 * MIN_REMAINDER)
    assert float(edited[:, 6].norm()) == pytest.approx(float(weight[:, 6].norm()))
    assert float(result.column_scale.max()) < 1 / MIN_REMAINDER
    assert (unit @ edited).abs().max() < 1e-13


def test_is_the_amplification_of_the_direction():
    # By hand: v^ = (0, 1); s = -2 triples the second row.
    weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    result = directional_ablation(weight, torch.tensor([0.0, 7.0]), -2.0)
    assert edited_weight(weight.double(), result).tolist() == [[1, 2], [9, -12]]


def test_without_removes_the_component_along_the_mean():
    # By hand: (3, 4) minus its component along (0, -2) is (3, 0).
    assert without(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0])).tolist() == [3, 0]
    assert without(torch.tensor([3.0, 4.0]), torch.zeros(2)).tolist() == [3, 4]
    with pytest.raises(BrocaError, match="neutral mean"):
        without(torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0]))


@pytest.mark.parametrize("strength", [0.0, math.nan, math.inf])
def test_refuses_a_strength_that_changes_nothing_or_all(strength):
    weight, direction = random_case()
    with pytest.raises(UsageError, match="strength"):
        directional_ablation(weight, direction, strength)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_refuses_a_direction_of_length_0_or_not_finite(factor):
    weight, direction = random_case()
    with pytest.raises(BrocaError, match="length"):
        directional_ablation(weight, direction * factor)


def random_direction(loaded, seed=5):
    generator = torch.Generator().manual_seed(seed)
    sites = (*OUTPUTS, "attn_in", "mlp_in")
    made = {
        site: torch.randn(
            loaded.anatomy.layers, loaded.anatomy.width(site), generator=generator, dtype=torch.float64
        )
        for site in sites
    }
    return Direction(
        "qaa",
        "qab",
        {site: made[site] for site in OUTPUTS},
        {site: made[site] for site in ("attn_in", "mlp_in")},
        {"method": "diffmean"},
    )


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


def logits_without(loaded, vectors, strength=1.0):
    """Logits with hooks that remove (layer, module)'s vector from the module's output."""

    def reader_of(vector):
        unit = (vector / vector.norm()).float()

        def read(values, _):
            return values - strength * (values @ unit)[..., None] * unit

        return read

    readers = {(f"{block}_out", layer): reader_of(vector) for (layer, block), vector in vectors.items()}
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


# gpt2 (transposed) and phi have biases, mixtral experts, gemma2 norms after the modules.
@pytest.mark.parametrize(
    ("model_type", "site"),
    [
        *(
            (model_type, site)
            for model_type in ("llama", "gpt2", "phi", "mixtral")
            for site in ("block_out", "own")
        ),
        ("gemma2", "own"),
    ],
)
def test_equals_a_hook_that_removes_the_direction(loaded_of, model_type, site):
    loaded = loaded_of(model_type)
    direction = random_direction(loaded)
    plan = directional_ablation_plan(loaded, direction, [0, 2], site=site, strength=0.8)
    places = [(layer, block) for layer in (0, 2) for block in ("attn", "mlp")]
    vectors = {
        (layer, block): direction.vectors["block_out" if site == "block_out" else f"{block}_out"][layer]
        for layer, block in places
    }
    expected = logits_without(loaded, vectors, 0.8)
    with applied(loaded, plan):
        result = logits(loaded)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-4)
    assert (result - logits(loaded)).abs().max() > 0.01
    assert any(edit.bias is not None for edit in plan.edits) == (model_type in ("gpt2", "phi"))


def test_only_the_embeddings_write_along_the_direction(loaded_of):
    loaded = loaded_of("llama")
    direction = random_direction(loaded)
    unit = direction.vectors["block_out"][1] / direction.vectors["block_out"][1].norm()
    seen = {}

    def reader_of(layer):
        def read(values, _):
            seen[layer] = values.double() @ unit

        return read

    for form in ("plain", "norm-preserving"):
        plan = directional_ablation_plan(loaded, direction, form=form, from_layer=1)
        with (
            applied(loaded, plan),
            site_hooks(loaded.anatomy, {("block_out", at): reader_of(at) for at in range(3)}),
        ):
            logits(loaded)
        embedded = loaded.model.model.embed_tokens.weight[IDS].double() @ unit
        for layer in range(3):
            torch.testing.assert_close(seen[layer], embedded, rtol=1e-4, atol=1e-4)


def test_models_that_differ_along_the_direction_only_become_one(tmp_path, loaded_of):
    model, direction = models.tiny_model(), random_direction(loaded_of("llama"))
    plain = load_model(str(models.save_checkpoint(model, tmp_path / "plain")), device="cpu")
    unit = direction.vectors["block_out"][0].float()
    unit = unit / unit.norm()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight += torch.outer(unit, torch.linspace(-1, 1, weight.shape[1]))
    planted = load_model(str(models.save_checkpoint(model, tmp_path / "planted")), device="cpu")
    assert (logits(planted) - logits(plain)).abs().max() > 0.1
    result = []
    for loaded in (plain, planted):
        with applied(loaded, directional_ablation_plan(loaded, direction, from_layer=0)):
            result.append(logits(loaded))
    torch.testing.assert_close(*result, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_plan_of_a_model_equals_the_formula(loaded_of, model_type, form):
    loaded = loaded_of(model_type)
    direction = random_direction(loaded)
    plan = directional_ablation_plan(loaded, direction, [2, 1], form=form, site="own", strength=0.6)
    assert [(edit.layer, edit.block) for edit in plan.edits] == [
        (1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")
    ]  # fmt: skip
    for edit in plan.edits:
        layer = loaded.anatomy.blocks[edit.layer]
        if model_type == "gpt2":
            module = layer.attn.c_proj if edit.block == "attn" else layer.mlp.c_proj
            weight, bias = module.weight.T.double(), module.bias.double()
        else:
            module = layer.self_attn.o_proj if edit.block == "attn" else layer.mlp.down_proj
            weight, bias = module.weight.double(), torch.zeros(64).double()
        vector = direction.vectors[f"{edit.block}_out"][edit.layer].clone()
        if "biprojected" in form:
            mean = weight @ direction.input_means[f"{edit.block}_in"][edit.layer] + bias
            vector -= (vector @ mean) / (mean @ mean) * mean
            after = edit.apply(weight)
            if form == "biprojected":
                torch.testing.assert_close(mean @ after, mean @ weight, rtol=1e-5, atol=1e-5)
        expected = naive(weight, vector, 0.6, "norm-preserving" in form)
        torch.testing.assert_close(edit.apply(weight), expected, rtol=1e-5, atol=1e-6)
        assert edit.notes["change_norm"] == pytest.approx(float((expected - weight).norm()), rel=1e-9)
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
        unit = vector / vector.norm()
        width = 1 if edit.block == "mlp" else loaded.anatomy.head_dim
        assert edit.components == tuple(range(weight.shape[1] // width))
        fractions = [
            float((unit @ part).norm() / part.norm()) for part in weight.split(width, dim=1)
        ]  # fmt: skip
        assert edit.details["share"].tolist() == pytest.approx(fractions)
        assert edit.details["c"].tolist() == [-0.6] * len(fractions)
        if model_type == "gpt2":
            torch.testing.assert_close(edit.bias.double(), -0.6 * (unit @ bias) * unit, atol=1e-7, rtol=1e-5)
        else:
            assert edit.bias is None
    settings = plan.metadata["settings"]
    assert (settings["form"], settings["site"], settings["strength"]) == (form, "own", 0.6)
    assert plan.metadata["fingerprint"] == loaded.fingerprint
    assert (plan.metadata["source"], plan.metadata["target"]) == ("qaa", "qab")


def test_the_direction_of_one_layer_in_all_layers(loaded_of):
    loaded = loaded_of("llama")
    direction = random_direction(loaded)
    plan = directional_ablation_plan(loaded, direction, blocks=["mlp"], from_layer=2)
    unit = direction.vectors["block_out"][2] / direction.vectors["block_out"][2].norm()
    assert [(edit.layer, edit.block) for edit in plan.edits] == [(0, "mlp"), (1, "mlp"), (2, "mlp")]
    for edit in plan.edits:
        torch.testing.assert_close(edit.left[:, 0].double(), unit, rtol=1e-6, atol=1e-7)
    by_layer = directional_ablation_plan(loaded, direction, blocks=["mlp"])
    assert not torch.allclose(by_layer.edits[0].left, plan.edits[0].left)


def test_biprojected_preserves_the_given_means_of_both_layers(loaded_of):
    loaded = loaded_of("llama")
    direction = random_direction(loaded)
    neutral = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = directional_ablation_plan(
        loaded, direction, form="biprojected", from_layer=2, neutral={"block_out": neutral}
    )
    for edit in plan.edits:
        vector = direction.vectors["block_out"][2].clone()
        for mean in neutral[[2, edit.layer]]:
            vector -= (vector @ mean) / (mean @ mean) * mean
        result = edit.left[:, 0].double()
        torch.testing.assert_close(result, vector / vector.norm(), rtol=1e-5, atol=1e-6)
        assert abs(float(result @ neutral[edit.layer])) < 1e-5
    held = Direction("qaa", "qab", direction.vectors, {"block_out": neutral}, {})
    same = directional_ablation_plan(loaded, held, form="biprojected", from_layer=2)
    assert torch.equal(same.edits[0].right, plan.edits[0].right)


def test_biprojected_preserves_the_mean_output_of_the_module(loaded_of):
    # W mu + b, against the mean output of the module.
    loaded = loaded_of("gpt2")
    sums = {}

    def reader_of(site):
        def read(values, _):
            sums[site] = values.double().flatten(0, 1).mean(0)

        return read

    sites = ("attn_in", "attn_out", "mlp_in", "mlp_out")
    with site_hooks(loaded.anatomy, {(site, 1): reader_of(site) for site in sites}):
        logits(loaded)
    direction = random_direction(loaded)
    for site in ("attn_in", "mlp_in"):
        direction.input_means[site][1] = sums[site]
    for edit in directional_ablation_plan(loaded, direction, [1], form="biprojected", site="own").edits:
        mean = sums[f"{edit.block}_out"]
        assert abs(float(edit.left[:, 0].double() @ (mean / mean.norm()))) < 1e-5
        plain = direction.vectors[f"{edit.block}_out"][1]
        assert abs(float(plain @ mean / plain.norm() / mean.norm())) > 1e-3


def test_a_scaled_plan_is_the_plan_of_that_strength(loaded_of):
    loaded = loaded_of("gpt2")
    direction = random_direction(loaded)
    scaled = directional_ablation_plan(loaded, direction, [1]).scaled(-0.5)
    expected = directional_ablation_plan(loaded, direction, [1], strength=-0.5)
    assert scaled.metadata == expected.metadata
    for a, b in zip(scaled.edits, expected.edits, strict=True):
        torch.testing.assert_close(a.left @ a.right.T, b.left @ b.right.T)
        torch.testing.assert_close(a.bias, b.bias)
        assert a.notes == pytest.approx(b.notes)
        for name in ("c", "share"):
            torch.testing.assert_close(a.details[name], b.details[name])


def test_exported_weights_are_orthogonal_to_the_direction(loaded_of, tmp_path):
    loaded = loaded_of("llama")
    direction = random_direction(loaded)
    plan = directional_ablation_plan(loaded, direction, form="norm-preserving")
    export(loaded, plan, tmp_path / "out")
    exported = load_model(str(tmp_path / "out"), device="cpu")
    before, after = Weights(loaded), Weights(exported)
    for layer in range(3):
        unit = direction.vectors["block_out"][layer] / direction.vectors["block_out"][layer].norm()
        for block in ("attn", "mlp"):
            old, new = before.read(layer, block), after.read(layer, block)
            assert (unit @ new).norm() < 1e-6 * (unit @ old).norm()
            torch.testing.assert_close(new.norm(dim=0), old.norm(dim=0), rtol=1e-6, atol=1e-6)


def test_refuses_bad_input(loaded_of):
    llama, gemma = loaded_of("llama"), loaded_of("gemma2")
    direction = random_direction(llama)
    for wrong, message in (
        ({"form": "round"}, "form 'round'"),
        ({"site": "mlp_in"}, "site 'mlp_in'"),
        ({"blocks": ["mlp", "gate"]}, "gate"),
        ({"blocks": []}, "blocks"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 3]}, "layer 3"),
        ({"from_layer": -1}, "layer -1"),
        ({"strength": 0}, "strength 0"),
        ({"form": "biprojected"}, "neutral mean at block_out"),
    ):
        with pytest.raises(UsageError, match=message):
            directional_ablation_plan(llama, direction, **wrong)
    bare = Direction("qaa", "qab", {"mlp_out": direction.vectors["mlp_out"]}, {}, {})
    with pytest.raises(UsageError, match="no vectors at block_out: it has mlp_out"):
        directional_ablation_plan(llama, bare)
    with pytest.raises(UsageError, match="neutral mean at mlp_out"):
        directional_ablation_plan(llama, bare, blocks=["mlp"], site="own", form="biprojected")
    with pytest.raises(BrocaError, match="'own'"):
        directional_ablation_plan(gemma, random_direction(gemma))
    other = Direction("qaa", "qab", direction.vectors, {}, {"fingerprint": "0123"})
    with pytest.raises(BrocaError, match="0123"):
        directional_ablation_plan(llama, other)
    direction.vectors["block_out"][1] = 0
    with pytest.raises(BrocaError, match="length 0 at block_out of layer 1"):
        directional_ablation_plan(llama, direction)


def test_refuses_a_module_without_output_along_the_direction(tmp_path):
    model = models.tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7] = 0
    loaded = load_model(str(models.save_checkpoint(model, tmp_path / "model")), device="cpu")
    direction = Direction("qaa", "qab", {"block_out": torch.eye(64)[7].double().repeat(3, 1)}, {}, {})
    with pytest.raises(BrocaError, match="layer 1, mlp"):
        directional_ablation_plan(loaded, direction)
    assert len(directional_ablation_plan(loaded, direction, blocks=["attn"]).edits) == 3


def test_refuses_experts_with_biases(loaded_of):
    loaded = loaded_of("gpt_oss")
    direction = random_direction(loaded)
    with pytest.raises(BrocaError, match="choose --blocks attn"):
        directional_ablation_plan(loaded, direction)
    assert {edit.block for edit in directional_ablation_plan(loaded, direction, blocks=["attn"]).edits} == {
        "attn"
    }


def test_refuses_to_guess_a_mixtures_mean(loaded_of):
    loaded = loaded_of("mixtral")
    direction = random_direction(loaded)
    with pytest.raises(UsageError, match="neutral mean at mlp_out"):
        directional_ablation_plan(loaded, direction, site="own", form="biprojected")
