"""Steer2Edit against its formula in plain loops, and DiffMean against loops over tokens."""

import math

import models
import pytest
import torch
from safetensors.torch import load_file

from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction, load_direction
from editing.methods.steer2edit import components_of, elastic_net, relative_activity, steer2edit_plan
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model, open_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.text.corpus import Corpus

NAMES = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def length(values):
    return math.sqrt(sum(value * value for value in values))


def naive(weight, direction, mean, width, rho, alpha, activity=False):
    """g, lambda, c of each component and the edited weight, by loops."""
    weight, direction, mean = weight.tolist(), direction.tolist(), mean.tolist()
    rows, columns = range(len(weight)), range(len(weight[0]))
    unit = [value / length(direction) for value in direction]
    edited = [list(row) for row in weight]
    result = {"g": [], "lambda": [], "c": []}
    for first in range(0, len(columns), width):
        inputs = range(first, first + width)
        output = [sum(weight[r][i] * mean[i] for i in inputs) for r in rows]
        g = sum(unit[r] * output[r] for r in rows) / length(output) if length(output) else 0.0
        if activity:
            g *= min(1.0, abs(mean[first]) / (length(mean) / math.sqrt(len(mean))))
        magnitude = math.copysign(max(abs(g) - rho * alpha, 0.0) / (rho * (1 - alpha)), g)
        key = {i: sum(weight[r][i] * unit[r] for r in rows) for i in inputs}
        for r in rows:
            for i in inputs:
                if magnitude:
                    edited[r][i] += magnitude * unit[r] * key[i] / length(key.values())
        result["g"].append(g)
        result["lambda"].append(magnitude)
        result["c"].append(magnitude / length(key.values()) if magnitude else 0.0)
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in result.items()}
    return numbers, torch.tensor(edited, dtype=torch.float64)


def steer2edit(weight, direction, mean, width, rho, alpha, *weigh):
    return elastic_net(components_of(weight, direction, mean, width, *weigh), rho, alpha)


def random_case(seed=0, rows=7, columns=12):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator).double() for shape in ((rows, columns), (rows,))]
    return *draw, torch.randn(columns, generator=generator).double()


@pytest.mark.parametrize("width", [1, 3], ids=["neurons", "heads"])
def test_equals_the_formula(width):
    weight, direction, mean = random_case(columns=24)
    mean[6:9] = 0  # W mu = 0
    weight[:, 3:6] = 0
    rho, alpha = 0.4, 0.5
    result = steer2edit(weight, direction, mean, width, rho, alpha)
    expected, edited = naive(weight, direction, mean, width, rho, alpha)
    assert {int(sign) for sign in expected["lambda"].sign()} == {-1, 0, 1}
    assert ((expected["lambda"] == 0) & (expected["g"] != 0)).any()  # below the threshold
    torch.testing.assert_close(result.importance, expected["g"])
    torch.testing.assert_close(result.magnitude, expected["lambda"])
    torch.testing.assert_close(result.amplification, expected["c"])
    torch.testing.assert_close(weight + torch.outer(result.left, result.right), edited)


@pytest.mark.parametrize("width", [1, 4])
def test_is_an_amplification_along_the_direction(width):
    weight, direction, mean = random_case(1)
    result = steer2edit(weight, direction, mean, width, 0.3, 0.2)
    unit = direction / direction.norm()
    edited = weight + torch.outer(result.left, result.right)
    for i, c in enumerate(result.amplification.tolist()):
        columns = slice(i * width, (i + 1) * width)
        expected = (torch.eye(7).double() + c * torch.outer(unit, unit)) @ weight[:, columns]
        torch.testing.assert_close(edited[:, columns], expected)
    assert result.amplification.abs().min() < result.amplification.abs().max()


def test_a_neuron_is_scored_by_the_sign_of_its_mean():
    weight, direction, mean = random_case(2)
    result = steer2edit(weight, direction, mean, 1, 0.5, 0.1)
    cosine = torch.stack([torch.cosine_similarity(weight[:, j], direction, dim=0) for j in range(12)])
    torch.testing.assert_close(result.importance, mean.sign() * cosine)
    torch.testing.assert_close(result.right, result.magnitude * (weight.T @ direction).sign())


def test_finds_the_planted_components():
    # Column 1 writes v, column 3 writes -v, all others are orthogonal to it.
    direction = torch.tensor([0.0, 0.0, 5.0])
    weight = torch.tensor([[1.0, 0.0, -2.0, 0.0], [3.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, -4.0]])
    result = steer2edit(weight, direction, torch.ones(4), 1, 0.5, 0.2)
    # |g| = 1: lambda = (1 - .1) / (.5 * .8) = 2.25; k is the sign of the entry.
    assert result.importance.tolist() == [0, 1, 0, -1]
    assert result.magnitude.tolist() == pytest.approx([0, 2.25, 0, -2.25])
    assert result.right.tolist() == pytest.approx([0, 2.25, 0, 2.25])
    assert result.amplification.tolist() == pytest.approx([0, 2.25 / 2, 0, -2.25 / 4])
    assert result.left.tolist() == [0, 0, 1]


def test_components_orthogonal_to_the_direction_do_not_change():
    weight, direction, mean = random_case(3)
    weight[0], direction[1:] = 0, 0  # v lies where nothing writes
    result = steer2edit(weight, direction, mean, 3, 0.01, 0.0)
    assert not result.magnitude.any() and not result.right.any() and not result.amplification.any()


@pytest.mark.parametrize(
    ("rho", "alpha"), [(0, 0.2), (-0.5, 0.2), (math.nan, 0.2), (0.5, 1.0), (0.5, -0.1), (0.5, math.nan)]
)
def test_refuses_settings_out_of_range(rho, alpha):
    weight, direction, mean = random_case()
    with pytest.raises(UsageError):
        steer2edit(weight, direction, mean, 1, rho, alpha)


def test_refuses_a_direction_of_length_0():
    weight, direction, mean = random_case()
    with pytest.raises(BrocaError, match="length 0"):
        steer2edit(weight, direction * 0, mean, 1, 0.5, 0.2)


def test_activity_weights_the_importance():
    weight, direction, mean = random_case(4, columns=24)
    loudest, quietest = torch.cosine_similarity(weight, direction[:, None], dim=0).abs().topk(2).indices
    mean[3], mean[loudest], mean[quietest] = 0, 40, 0.001
    result = steer2edit(weight, direction, mean, 1, 0.4, 0.3, "activity")
    expected, edited = naive(weight, direction, mean, 1, 0.4, 0.3, activity=True)
    torch.testing.assert_close(result.importance, expected["g"])
    torch.testing.assert_close(result.magnitude, expected["lambda"])
    torch.testing.assert_close(result.amplification, expected["c"])
    torch.testing.assert_close(weight + torch.outer(result.left, result.right), edited)
    by_sign = steer2edit(weight, direction, mean, 1, 0.4, 0.3)
    assert (result.importance.abs() <= by_sign.importance.abs()).all()
    assert result.magnitude[loudest] == by_sign.magnitude[loudest] != 0
    assert result.magnitude[quietest] == 0 != by_sign.magnitude[quietest]


def test_of_two_equal_neurons_the_inactive_one_is_not_edited():
    # Both columns write v; the root mean square of mu is 1, that of the inactive one .1.
    direction, weight = torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    mean = torch.tensor([-math.sqrt(3 - 0.01 - 1), 0.1, 1.0], dtype=torch.float64)
    result = steer2edit(weight, direction, mean, 1, 0.5, 0.4, "activity")
    assert result.importance.tolist() == pytest.approx([-1, 0.1, 0])
    assert result.magnitude.tolist() == pytest.approx([-0.8 / 0.3, 0, 0])
    assert steer2edit(weight, direction, mean, 1, 0.5, 0.4).magnitude[1] == pytest.approx(0.8 / 0.3)


def test_a_layer_without_activity_has_no_weight():
    assert relative_activity(torch.zeros(4)).tolist() == [0] * 4
    assert relative_activity(torch.tensor([3.0, -4.0, 0.0, 0.0])).tolist() == [1, 1, 0, 0]


def test_sign_is_the_published_weighting():
    weight, direction, mean = random_case(5)
    published, named = (steer2edit(weight, direction, mean, 1, 0.4, 0.3, *w) for w in ((), ("sign",)))
    for name in ("importance", "magnitude", "amplification", "left", "right"):
        assert torch.equal(getattr(published, name), getattr(named, name))
    with pytest.raises(UsageError, match="weighting 'size'"):
        steer2edit(weight, direction, mean, 1, 0.4, 0.3, "size")
    with pytest.raises(UsageError, match="neurons"):
        steer2edit(weight, direction, mean, 3, 0.4, 0.3, "activity")


@pytest.fixture(scope="module")
def qwen(checkpoint_of):
    """Grouped-query attention whose head_dim (48) is not hidden / heads (32)."""
    return open_model(str(checkpoint_of("qwen3")))


@pytest.fixture(scope="module")
def direction():
    generator = torch.Generator().manual_seed(5)
    widths = {"attn_in": 96, "mlp_in": 48, "attn_out": 64, "mlp_out": 64, "block_out": 64}
    made = {
        site: torch.randn(3, width, generator=generator, dtype=torch.float64)
        for site, width in widths.items()
    }
    return Direction(
        "qaa",
        "qab",
        {site: value for site, value in made.items() if site.endswith("out")},
        {site: value for site, value in made.items() if site.endswith("in")},
        {"method": "diffmean"},
    )


def changes(plan):
    return {(edit.layer, edit.block): edit.left.double() @ edit.right.double().T for edit in plan.edits}


def test_the_plan_of_a_model_equals_the_formula(qwen, direction):
    settings = {"attn": (0.05, 48), "mlp": (0.3, 1)}
    plan = steer2edit_plan(qwen, direction, [0, 2], settings["attn"][0], settings["mlp"][0], 0.3)
    stored = load_file(qwen.checkpoint / "model.safetensors")
    assert [(edit.layer, edit.block) for edit in plan.edits] == [
        (0, "attn"), (0, "mlp"), (2, "attn"), (2, "mlp")
    ]  # fmt: skip
    for edit in plan.edits:
        rho, width = settings[edit.block]
        weight = stored[f"model.layers.{edit.layer}.{NAMES[edit.block]}.weight"].double()
        expected, edited = naive(
            weight,
            direction.vectors[f"{edit.block}_out"][edit.layer],
            direction.input_means[f"{edit.block}_in"][edit.layer],
            width,
            rho,
            0.3,
        )
        chosen = expected["lambda"].nonzero()[:, 0]
        assert edit.components == tuple(chosen.tolist())
        for name, values in expected.items():
            torch.testing.assert_close(edit.details[name], values[chosen])
        torch.testing.assert_close(edit.apply(weight), edited, rtol=1e-6, atol=1e-6)
        assert edit.rank == 1
        assert edit.notes["change_norm"] == pytest.approx(float((edited - weight).norm()), rel=1e-5)
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
    assert any(0 < len(edit.components) < 48 for edit in plan.edits if edit.block == "mlp")
    assert plan.metadata["fingerprint"] == qwen.fingerprint
    assert (plan.metadata["source"], plan.metadata["target"]) == ("qaa", "qab")


def test_only_neurons_of_the_set_change(qwen, direction):
    rows = {
        "qaa": torch.tensor([[0, 3], [1, 4]]),
        "qab": torch.tensor([[1, 4], [1, 40]]),
        "qac": torch.zeros(0, 2, dtype=torch.int64),
    }
    chosen = neuron_set(rows, {k: torch.zeros(len(v)) for k, v in rows.items()}, 3, 48, {"method": "lape"})
    free = changes(steer2edit_plan(qwen, direction, range(3), 0.01, 0.01, 0.0))
    bound = steer2edit_plan(qwen, direction, range(3), 0.01, 0.01, 0.0, neurons=chosen)
    result = changes(bound)
    allowed = {0: [3], 1: [4, 40]}
    assert set(result) == {(0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp"), (2, "attn")}
    for edit in bound.edits:
        expected = free[edit.layer, edit.block].clone()
        if edit.block == "mlp":
            others = [j for j in range(48) if j not in allowed[edit.layer]]
            expected[:, others] = 0
            assert edit.components == tuple(allowed[edit.layer])
            assert len(edit.details["g"]) == len(edit.details["c"]) == len(allowed[edit.layer])
            assert edit.notes["change_norm"] == pytest.approx(float(expected.norm()), rel=1e-6)
        torch.testing.assert_close(result[edit.layer, edit.block], expected)


def test_only_neurons_of_the_named_languages_change(qwen, direction):
    rows = {
        "qaa": torch.tensor([[0, 3], [1, 4]]),
        "qab": torch.tensor([[1, 4], [1, 40]]),
        "qac": torch.zeros(0, 2, dtype=torch.int64),
    }
    chosen = neuron_set(rows, {k: torch.zeros(len(v)) for k, v in rows.items()}, 3, 48, {"method": "lape"})

    def neurons_of(languages, layers=(0, 1, 2), heads=None):
        plan = steer2edit_plan(qwen, direction, layers, heads, 0.01, 0.0, 1.0, chosen, languages)
        assert plan.metadata["settings"].get("languages") == languages
        return {(edit.layer, j) for edit in plan.edits for j in edit.components if edit.block == "mlp"}

    assert neurons_of(None) == {(0, 3), (1, 4), (1, 40)}
    assert neurons_of(["qab"]) == {(1, 4), (1, 40)}
    assert neurons_of(["qab"], heads=0.01) == {(1, 4), (1, 40)}
    assert neurons_of(["qaa"]) == {(0, 3), (1, 4)}
    assert neurons_of(["qaa"], [1]) == {(1, 4)}
    for languages, layers, message in (
        (["qac"], [0], "no neuron for qac in these layers"),
        (["qab"], [0, 2], "no neuron for qab in these layers"),
    ):
        with pytest.raises(BrocaError, match=message):
            neurons_of(languages, layers)
    with pytest.raises(UsageError, match="'xx'"):
        neurons_of(["xx"])
    with pytest.raises(UsageError, match="at least one language"):
        neurons_of([])
    with pytest.raises(UsageError, match="give --neurons"):
        steer2edit_plan(qwen, direction, [0], languages=["qaa"])
    foreign = neuron_set({"qaa": torch.tensor([[0, 50]])}, {"qaa": torch.zeros(1)}, 3, 64, {})
    with pytest.raises(BrocaError, match=r"3 x 64 .*3 x 48"):
        steer2edit_plan(qwen, direction, [0], neurons=foreign)


def test_the_plan_weights_neurons_and_not_heads(qwen, direction):
    by_sign = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3)
    plan = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3, weigh="activity")
    (heads, neurons), (plain_heads, plain_neurons) = plan.edits, by_sign.edits
    assert torch.equal(heads.right, plain_heads.right)
    stored = load_file(qwen.checkpoint / "model.safetensors")
    weight = stored["model.layers.1.mlp.down_proj.weight"].double()
    vector, mean = direction.vectors["mlp_out"][1], direction.input_means["mlp_in"][1]
    expected, edited = naive(weight, vector, mean, 1, 0.3, 0.3, activity=True)
    assert neurons.components == tuple(expected["lambda"].nonzero()[:, 0].tolist())
    assert 0 < len(neurons.components) < len(plain_neurons.components)
    torch.testing.assert_close(neurons.apply(weight), edited, rtol=1e-6, atol=1e-6)
    assert neurons.notes["change_norm"] == pytest.approx(float((edited - weight).norm()), rel=1e-5)
    assert plan.metadata["settings"]["weigh"] == "activity"
    assert set(by_sign.metadata["settings"]) == {
        "layers", "heads_rho", "neurons_rho", "alpha", "strength", "neurons"
    }  # fmt: skip
    with pytest.raises(UsageError, match="neurons are off"):
        steer2edit_plan(qwen, direction, [1], 0.05, None, weigh="activity")
    heads_only = neuron_set({}, {}, 3, 48, {})
    with pytest.raises(UsageError, match="--neurons has no effect"):
        steer2edit_plan(qwen, direction, [1], 0.05, None, neurons=heads_only)
    with pytest.raises(UsageError, match="weighting 'size'"):
        steer2edit_plan(qwen, direction, [1], weigh="size")


def test_refuses_layers_and_directions_that_lack_something(qwen, direction):
    with pytest.raises(UsageError, match="layer 3"):
        steer2edit_plan(qwen, direction, [0, 3])
    bare = Direction("qaa", "qab", {"mlp_out": direction.vectors["mlp_out"]}, {}, {})
    with pytest.raises(UsageError, match="no mean at mlp_in"):
        steer2edit_plan(qwen, bare, [0], None, 0.3)
    means = Direction("qaa", "qab", {}, direction.input_means, {})
    with pytest.raises(UsageError, match="no vectors at attn_out"):
        steer2edit_plan(qwen, means, [0])


@pytest.fixture(scope="module")
def loaded_qwen(qwen):
    return load_model(str(qwen.checkpoint), device="cpu")


@pytest.mark.parametrize("weigh", ["sign", "activity"])
def test_the_edited_model_computes_what_a_hook_would(loaded_qwen, direction, weigh):
    # W_i' = (I + c_i v v^T) W_i: to the output, each component adds c_i (v . its output) v.
    plan = steer2edit_plan(loaded_qwen, direction, [0, 2], 0.05, 0.3, 0.3, weigh=weigh)
    ids = torch.tensor([[0, 5, 80, 33, 200, 7]])
    kept = {}

    def before(place):
        def read(values, _):
            kept[place] = values.double()

        return read

    def after(edit, module):
        width = 48 if edit.block == "attn" else 1
        unit = direction.vectors[f"{edit.block}_out"][edit.layer]
        unit = unit / unit.norm()

        def read(values, _):
            inputs, added = kept[edit.layer, edit.block], torch.zeros(values.shape).double()
            for component, c in zip(edit.components, edit.details["c"].tolist(), strict=True):
                columns = slice(component * width, (component + 1) * width)
                output = inputs[..., columns] @ module.weight[:, columns].double().T
                added += c * (output @ unit)[..., None] * unit
            return values + added.float()

        return read

    readers = {}
    for edit in plan.edits:
        layer = loaded_qwen.model.model.layers[edit.layer]
        module = layer.self_attn.o_proj if edit.block == "attn" else layer.mlp.down_proj
        readers[f"{edit.block}_in", edit.layer] = before((edit.layer, edit.block))
        readers[f"{edit.block}_out", edit.layer] = after(edit, module)
    with torch.no_grad():
        with site_hooks(loaded_qwen.anatomy, readers):
            expected = loaded_qwen.model(ids).logits
        with applied(loaded_qwen, plan):
            result = loaded_qwen.model(ids).logits
        assert (result - loaded_qwen.model(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_strength_scales_every_lambda(qwen, direction):
    once = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3)
    thrice = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3, strength=-3.0)
    for a, b in zip(once.edits, thrice.edits, strict=True):
        torch.testing.assert_close(b.left @ b.right.T, -3 * (a.left @ a.right.T))
        torch.testing.assert_close(b.details["lambda"], -3 * a.details["lambda"])
        torch.testing.assert_close(b.details["c"], -3 * a.details["c"])
        torch.testing.assert_close(b.details["g"], a.details["g"])
        assert b.notes["change_norm"] == pytest.approx(3 * a.notes["change_norm"])


def test_a_scaled_plan_is_the_plan_of_that_strength(qwen, direction):
    scaled = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3).scaled(-3.0)
    expected = steer2edit_plan(qwen, direction, [1], 0.05, 0.3, 0.3, strength=-3.0)
    assert scaled.metadata == expected.metadata
    for a, b in zip(scaled.edits, expected.edits, strict=True):
        torch.testing.assert_close(a.left @ a.right.T, b.left @ b.right.T)
        assert a.notes["change_norm"] == pytest.approx(b.notes["change_norm"])
        for name in ("g", "lambda", "c"):
            torch.testing.assert_close(a.details[name], b.details[name])


@pytest.mark.parametrize(("heads", "neurons", "left"), [(0.05, None, {"attn"}), (None, 0.3, {"mlp"})])
def test_a_class_without_rho_is_not_edited(qwen, direction, heads, neurons, left):
    plan = steer2edit_plan(qwen, direction, range(3), heads, neurons, 0.1)
    assert {edit.block for edit in plan.edits} == left


def test_refuses_a_plan_that_would_change_nothing(qwen, direction):
    with pytest.raises(UsageError, match="both off"):
        steer2edit_plan(qwen, direction, [0], None, None)
    with pytest.raises(BrocaError, match=r"rho \* alpha"):
        steer2edit_plan(qwen, direction, range(3), 2.0, 2.0, 0.9)
    with pytest.raises(BrocaError, match="strength 0"):
        steer2edit_plan(qwen, direction, range(3), strength=0.0)


@pytest.fixture(scope="module")
def uneven():
    """Texts of very different lengths, one longer than the model's context of 128 tokens."""
    texts = {language: tuple(models.sentences(language, 4, 3, (1, 9))) for language in models.LANGUAGES}
    texts["qaa"] = (*texts["qaa"], "", " ".join(models.sentences("qaa", 12, 4)))
    return Corpus(texts, "digest", "all")


def test_diffmean_is_the_mean_over_texts_of_token_means(llama, uneven):
    result = diffmean_direction(llama, uneven, "qac", "qaa")
    means = {}
    for language in ("qac", "qaa"):
        # A text longer than the context continues in another row.
        texts = []
        for text in uneven.texts[language]:
            tokens = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
            texts += [[0, *tokens[first : first + 127]] for first in range(0, len(tokens), 127)]
        sums = {}
        for ids in texts:
            _, layers = models.naive_llama(llama.model, ids)
            for layer, sites in enumerate(layers):
                for site, values in sites.items():
                    token_mean = sum(values[position].detach() for position in range(1, len(ids)))
                    token_mean = token_mean / (len(ids) - 1) / len(texts)
                    sums[site, layer] = sums.get((site, layer), 0) + token_mean
        means[language] = sums
    assert set(result.vectors) == {"attn_out", "mlp_out", "block_out"}
    assert set(result.input_means) == {"attn_in", "mlp_in"}
    for layer in range(3):
        for site, values in result.vectors.items():
            expected = means["qaa"][site, layer] - means["qac"][site, layer]
            torch.testing.assert_close(values[layer], expected, rtol=1e-3, atol=1e-4)
        for site, values in result.input_means.items():
            expected = (means["qaa"][site, layer] + means["qac"][site, layer]) / 2
            torch.testing.assert_close(values[layer], expected, rtol=1e-3, atol=1e-4)
    assert result.metadata["texts"] == {"qac": 4, "qaa": 6}
    assert result.metadata["read"]["qaa"]["texts"] == result.metadata["read"]["qaa"]["of"] == 5


def test_reversing_a_direction_changes_its_sign_only(llama, uneven):
    there, back = (diffmean_direction(llama, uneven, *pair) for pair in (("qaa", "qab"), ("qab", "qaa")))
    for site in there.vectors:
        torch.testing.assert_close(there.vectors[site], -back.vectors[site])
        assert there.vectors[site].abs().max() > 0.01
    for site in there.input_means:
        torch.testing.assert_close(there.input_means[site], back.input_means[site])


def test_direction_round_trip(llama, uneven, tmp_path):
    made = diffmean_direction(llama, uneven, "qaa", "qab")
    made.save(tmp_path / "direction.safetensors")
    read = load_direction(tmp_path / "direction.safetensors")
    assert (read.source, read.target) == ("qaa", "qab")
    for group in ("vectors", "input_means"):
        assert getattr(read, group).keys() == getattr(made, group).keys()
        for site, values in getattr(made, group).items():
            assert torch.equal(getattr(read, group)[site], values)
    assert read.metadata["fingerprint"] == llama.fingerprint


def test_diffmean_refuses_unknown_and_equal_languages(llama, uneven):
    with pytest.raises(UsageError, match="'xx'"):
        diffmean_direction(llama, uneven, "qaa", "xx")
    with pytest.raises(UsageError, match="both"):
        diffmean_direction(llama, uneven, "qaa", "qaa")
