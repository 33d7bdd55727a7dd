"""CLAS in the weights against the published mixture of hidden states, computed by hooks."""

import math

import pytest
import torch

from editing.methods.clas import ClasEdit, clas_factors, classes_of_set, last_layers
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.scorers.clas import CLASSES
from neurons.scorers.registry import METHODS
from neurons.scorers.selection import select
from neurons.statistics.statistics import Statistics

LANGUAGES = ("qaa", "qab", "qac")
IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])


def random_statistics(fingerprint="", seed=0, layers=3, width=48):
    """Statistics of 5 texts in each language, with neurons of every class."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(layers, width, 3, generator=generator, dtype=torch.float64)
    return Statistics(
        LANGUAGES, torch.full((3,), 40), torch.full((3,), 5), {"mlp_in:text_mean": 5 * mean}, fingerprint
    )


def naive_classes(statistics):
    """(layer, neuron) -> (class, languages in which it is active), by loops."""
    mean = (statistics.moments["mlp_in:text_mean"] / 5).tolist()
    result = {}
    for layer, neurons in enumerate(mean):
        for neuron, values in enumerate(neurons):
            active = [k for k, value in zip(LANGUAGES, values, strict=True) if value > 0]
            name = {0: "dead", 1: "specific", len(LANGUAGES): "all-shared"}.get(len(active), "partial-shared")
            result[layer, neuron] = (name, active)
    return result


def set_of(statistics, selection=None, metadata=None):
    """The neuron set of the scorer clas."""
    method = METHODS["clas"]
    selected = method.selection.changed(kinds=("specific", "related", "general"))
    result = select(method().scores(statistics, 1.0), selection or selected)
    parts = [{k: getattr(of_language, name) for k, of_language in zip(LANGUAGES, result, strict=True)} for name in
             ("rows", "scores", "kinds")]  # fmt: skip
    layers, width = statistics.moments["mlp_in:text_mean"].shape[:2]
    return neuron_set(parts[0], parts[1], layers, width, metadata or {"method": "clas"}, parts[2])


def plan_of(loaded, classified, languages=None, layers=None, **settings):
    given = {"statistics" if isinstance(classified, Statistics) else "neurons": classified}
    return ClasEdit(**settings).plan_for(Material(loaded, languages=languages, layers=layers, **given))


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


def mixed_logits(loaded, statistics, layers, a, b, g, languages=LANGUAGES):
    """Logits with h' = (1 - a) h + a h2, h2 from the classes, neuron by neuron."""
    classes = naive_classes(statistics)

    def reader_of(layer):
        def read(values, _):
            steered = values.clone()
            for neuron in range(values.shape[-1]):
                name, active = classes[layer, neuron]
                if set(active) & set(languages):
                    louder = {"partial-shared": 1 + b, "specific": 1 - g}.get(name, 1.0)
                    h = values[..., neuron]
                    steered[..., neuron] = (1 - a) * h + a * (h * louder)
            return steered

        return read

    with site_hooks(loaded.anatomy, {("mlp_in", layer): reader_of(layer) for layer in layers}):
        return logits(loaded)


def test_published_factors():
    factors = clas_factors(torch.arange(4))
    expected = {"dead": 1.0, "specific": 0.8, "partial-shared": 1.4, "all-shared": 1.0}
    assert factors.tolist() == pytest.approx([expected[name] for name in CLASSES])
    assert clas_factors(torch.arange(4), -5.0, 0.1, 0.3).tolist() == pytest.approx([1, 2.5, 0.5, 1])


@pytest.mark.parametrize("kind", ["statistics", "neuron set"])
@pytest.mark.parametrize(
    ("a", "b", "g"), [(1.0, 0.4, 0.2), (-3.0, 0.4, 0.2), (2.0, 0.0, 0.7), (0.5, 0.9, 0.0)]
)
def test_equals_the_mixture_of_hidden_states(llama, kind, a, b, g):
    statistics = random_statistics(llama.fingerprint)
    classified = statistics if kind == "statistics" else set_of(statistics)
    plan = plan_of(llama, classified, layers=[0, 2], strength=a, shared_gain=b, specific_loss=g)
    expected = mixed_logits(llama, statistics, [0, 2], a, b, g)
    with applied(llama, plan):
        result = logits(llama)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result - logits(llama)).abs().max() > 0.01


def test_languages_restrict_to_neurons_that_are_active_in_them(llama):
    statistics = random_statistics()
    whole = plan_of(llama, statistics, layers=range(3))
    for classified in (statistics, set_of(statistics)):
        plan = plan_of(llama, classified, ["qab"], range(3))
        expected = {
            place
            for place, (name, active) in naive_classes(statistics).items()
            if name in ("specific", "partial-shared") and "qab" in active
        }
        result = {(edit.layer, neuron) for edit in plan.edits for neuron in edit.components}
        assert result == expected
        assert 0 < len(result) < whole.components
        assert plan.metadata["languages"] == ["qab"]
        with applied(llama, plan):
            after = logits(llama)
        mixed = mixed_logits(llama, statistics, range(3), 1.0, 0.4, 0.2, ["qab"])
        torch.testing.assert_close(after, mixed, rtol=1e-4, atol=1e-4)


def test_the_plan_lists_its_changes(llama):
    statistics = random_statistics()
    classes = naive_classes(statistics)
    plan = plan_of(llama, statistics, layers=[1], strength=2.0)
    (edit,) = plan.edits
    factors = {"specific": 1 - 2 * 0.2, "partial-shared": 1 + 2 * 0.4}
    expected = {j: factors[classes[1, j][0]] for j in range(48) if classes[1, j][0] in factors}
    assert (edit.layer, edit.block, edit.components) == (1, "mlp", tuple(expected))
    assert edit.details["factor"].tolist() == pytest.approx(list(expected.values()))
    weight = llama.model.model.layers[1].mlp.down_proj.weight.double()
    squares = sum(
        float(value) ** 2 for j, factor in expected.items() for value in weight[:, j] * (factor - 1)
    )
    assert edit.notes["change_norm"] == pytest.approx(math.sqrt(squares))
    assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()))
    scaled = plan.metadata["settings"]["scaled"]
    assert scaled == {
        "partial-shared": sum(factor > 1 for factor in expected.values()),
        "specific": sum(factor < 1 for factor in expected.values()),
    }
    assert plan.metadata["languages"] == list(LANGUAGES)


def test_a_scaled_plan_is_the_plan_of_that_strength(llama):
    statistics = random_statistics()
    scaled, expected = plan_of(llama, statistics).scaled(-2.5), plan_of(llama, statistics, strength=-2.5)
    assert scaled.metadata == expected.metadata
    for a, b in zip(scaled.edits, expected.edits, strict=True):
        torch.testing.assert_close(a.column_scale, b.column_scale)
        torch.testing.assert_close(a.details["factor"], b.details["factor"])
        assert a.notes == pytest.approx(b.notes)


def test_the_last_quarter_of_the_layers_by_default(llama):
    assert [last_layers(n) for n in (1, 3, 8)] == [(0,), (2,), (6, 7)]
    assert last_layers(32) == tuple(range(24, 32))
    assert [edit.layer for edit in plan_of(llama, random_statistics()).edits] == [2]


def test_kinds_of_a_set_are_the_classes():
    statistics = random_statistics(seed=4)
    result = classes_of_set(set_of(statistics))
    for (layer, neuron), (name, _) in naive_classes(statistics).items():
        assert CLASSES[int(result[layer, neuron])] == name


def test_refuses_a_set_without_a_scaled_class(llama):
    statistics = random_statistics()
    specific = set_of(statistics, METHODS["clas"].selection)
    with pytest.raises(BrocaError, match="no partial-shared neuron in layers 2"):
        plan_of(llama, specific)
    plan = plan_of(llama, specific, shared_gain=0)
    assert plan.metadata["settings"]["scaled"]["partial-shared"] == 0
    shared = set_of(statistics, METHODS["clas"].selection.changed(kinds=("related",)))
    with pytest.raises(BrocaError, match="no specific neuron"):
        plan_of(llama, shared)
    assert plan_of(llama, shared, specific_loss=0).components > 0


def test_refuses_a_neuron_of_two_kinds():
    rows = torch.tensor([[1, 5]])
    mixed = neuron_set(
        {"qaa": rows, "qab": rows},
        {"qaa": torch.zeros(1), "qab": torch.zeros(1)},
        3,
        48,
        {},
        {"qaa": torch.tensor([0]), "qab": torch.tensor([1])},
    )
    with pytest.raises(BrocaError, match="neuron 5 of layer 1"):
        classes_of_set(mixed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "strength 0"),
        ({"strength": math.nan}, "strength nan"),
        ({"shared_gain": math.inf}, "the gain is inf"),
        ({"specific_loss": math.nan}, "the loss is nan"),
        ({"shared_gain": 0, "specific_loss": 0}, "gain and loss"),
        ({"layers": [3]}, "layer 3"),
        ({"languages": ["qaa", "xx"]}, "no language 'xx'"),
        ({"languages": []}, "at least one language"),
    ],
)
def test_refuses_settings_out_of_range(llama, settings, message):
    with pytest.raises(UsageError, match=message):
        plan_of(llama, random_statistics(), **settings)


def test_refuses_other_models(llama):
    with pytest.raises(BrocaError, match="0123"):
        plan_of(llama, random_statistics("0123"))
    with pytest.raises(BrocaError, match=r"3 x 50 .*3 x 48"):
        plan_of(llama, random_statistics(width=50))
    with pytest.raises(BrocaError, match=r"3 x 50 .*3 x 48"):
        plan_of(llama, set_of(random_statistics(width=50)))
    with pytest.raises(BrocaError, match="0123"):
        plan_of(llama, set_of(random_statistics(), metadata={"fingerprint": "0123"}))
    bare = Statistics(LANGUAGES, torch.ones(3), torch.ones(3), {}, "")
    with pytest.raises(UsageError, match="mlp_in:text_mean"):
        plan_of(llama, bare)
