"""Plans of the search against those that each method makes anew, and the search spaces."""

import random
from dataclasses import replace

import models
import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction
from editing.methods.bake import bake_plan
from editing.methods.baked_vector import Bake
from editing.methods.keyed import keyed_plan
from editing.methods.keyed_edit import Keyed, KeyedLearned
from editing.methods.keyed_search import KeyedSearch
from editing.methods.material import Material
from editing.methods.method import Knob
from editing.methods.output_norm import source_tokens
from editing.methods.steer2edit import Steer2Edit, steer2edit_plan
from editing.study.registry import METHODS, searched
from editing.study.search_space import spaces
from neurons.errors import NothingToChangeError, UsageError
from neurons.models.source import load_model
from neurons.text.batches import language_batches
from neurons.text.token_budget import KEYS


@pytest.fixture(scope="module")
def direction(llama, corpus):
    return diffmean_direction(llama, corpus, "qaa", "qab")


@pytest.fixture(scope="module")
def study(llama, corpus, direction):
    return Material(llama, corpus, "qaa", "qab", directions=(direction,))


def keyed(study, layers, heads, strength):
    return KeyedSearch(layers=layers, heads=heads, strength=strength).plan_for(study)


def change(edit):
    return edit.left.double() @ edit.right.double().T


def assert_same(plan, expected, notes=("change_norm", "weight_norm"), rel=1e-5):
    assert [(e.layer, e.block) for e in plan.edits] == [(e.layer, e.block) for e in expected.edits]
    for edit, other in zip(plan.edits, expected.edits, strict=True):
        torch.testing.assert_close(
            change(edit), change(other), rtol=rel, atol=rel * float(change(other).abs().max())
        )
        assert edit.components == other.components
        for name in notes:
            assert edit.notes[name] == pytest.approx(other.notes[name], rel=rel)
        assert set(edit.details) == set(other.details)
        for name, values in other.details.items():
            torch.testing.assert_close(edit.details[name], values, rtol=1e-5, atol=1e-9)
    for name in ("method", "fingerprint", "source", "target", "direction"):
        assert plan.metadata[name] == expected.metadata[name]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize(("heads", "blocks"), [(0.0, ("mlp",)), (0.5, ("attn", "mlp")), (1.0, ("attn",))])
def test_keys_make_the_keyed_plan(llama, corpus, direction, study, layers, heads, blocks):
    plan = keyed(study, layers, heads, 2.3)
    expected = keyed_plan(llama, corpus, direction, layers, 2.3, blocks=blocks)
    assert_same(plan, expected, ("change_norm", "weight_norm", "spread", "value_share"))
    settings = plan.metadata["settings"]
    assert settings.pop("heads") == heads
    assert settings == expected.metadata["settings"]
    assert plan.relative_change() == pytest.approx(expected.relative_change(), rel=1e-5)


def test_heads_get_their_fraction_of_the_strength(study):
    plan = keyed(study, (0, 1), 0.2, 3.0)
    for edit in plan.edits:
        whole = next(e for e in keyed(study, (edit.layer,), float(edit.block == "attn"), 1.0).edits)
        fraction = {"attn": 0.2, "mlp": 0.8}[edit.block] / 2
        torch.testing.assert_close(change(edit), change(whole) * 3 * fraction, rtol=1e-5, atol=1e-9)
        assert edit.notes["value_share"] == pytest.approx(fraction)
    assert sum(edit.notes["value_share"] for edit in plan.edits) == pytest.approx(1)


def study_of(model_type, directory, corpus):
    model = load_model(str(models.build_wrapper(directory, model_type)), device="cpu")
    vectors = torch.randn(model.anatomy.layers, 64, generator=torch.Generator().manual_seed(2)).double()
    direction = Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})
    return Material(model, corpus, "qaa", "qab", directions=(direction,))


@pytest.mark.parametrize(
    ("model_type", "blocks"), [("qwen3_5_text", ("attn", "mlp")), ("mixtral", ("attn",))]
)
def test_a_layer_with_one_module_has_its_whole_strength(tmp_path, corpus, model_type, blocks):
    study = study_of(model_type, tmp_path / "m", corpus)
    plan = keyed(study, (0, 1, 2, 3), 0.5, 2.3)
    expected = keyed_plan(study.loaded, corpus, study.direction, strength=2.3, blocks=blocks)
    assert_same(plan, expected, ("change_norm", "value_share"))
    assert plan.metadata["settings"]["blocks"] == expected.metadata["settings"]["blocks"]
    for edit in plan.edits:
        value = study.direction.vectors["block_out"][edit.layer] * 2.3 * edit.notes["value_share"]
        torch.testing.assert_close(edit.left[:, 0].double(), value, rtol=1e-5, atol=1e-6)
    for method in (Keyed, KeyedLearned):
        assert all({*method.of(study, s).blocks} <= {*blocks} for s in method.grid(study))


def test_through_a_norm_the_text_has_the_budget_of_the_keys(checkpoint_of, corpus, monkeypatch):
    read = []

    def batches(loaded, text, **options):
        read.append((text.languages, options["default"]))
        return language_batches(loaded, text, **options)

    monkeypatch.setattr("editing.methods.keyed_search.language_batches", batches)
    model = load_model(str(checkpoint_of("gemma2")), device="cpu", dtype="bfloat16")
    vectors = Direction("qaa", "qab", {"block_out": torch.ones(3, 64).double()}, {}, {"method": "diffmean"})
    study = Material(model, corpus, "qaa", "qab", directions=(vectors,))
    keyed(study, (0, 1, 2), 0.5, 0.7)
    assert read == [(("qaa",), KEYS.tokens)]
    kept = study._kept["through", 1, "mlp"].outputs
    tokens = source_tokens(model, 1, "mlp", study._kept["text of keys", "qaa"])
    assert kept.dtype == torch.bfloat16 and torch.equal(kept.double(), tokens.outputs)


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2"])
def test_through_a_norm_the_value_is_solved_anew_at_every_strength(checkpoint_of, corpus, architecture):
    model = load_model(str(checkpoint_of(architecture)), device="cpu")
    vectors = 0.05 * torch.randn(3, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction = Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})
    study = Material(model, corpus, "qaa", "qab", directions=(direction,))
    for strength in (0.7, 4.0):
        plan = keyed(study, (0, 1, 2), 0.5, strength)
        expected = keyed_plan(model, corpus, direction, strength=strength, blocks=("attn", "mlp"))
        assert_same(
            plan, expected, ("change_norm", "value_through_norm", "value_error", "value_share"), rel=1e-4
        )
    # The edit is not linear in the strength, so scaling would be wrong.
    weak, strong = (keyed(study, (0, 1, 2), 0.5, s) for s in (10.0, 40.0))
    assert any(
        float((change(b) - 4 * change(a)).norm()) > 0.01 * float(change(b).norm())
        for a, b in zip(weak.edits, strong.edits, strict=True)
    )


@pytest.mark.parametrize("seed", range(8))
def test_importances_make_the_plan_of_any_elastic_net(llama, direction, study, seed):
    def made():
        return Steer2Edit(heads_rho=heads, neurons_rho=neurons, alpha=alpha).plan_for(study)

    drawn = random.Random(seed)
    heads, neurons = (drawn.choice([None, drawn.uniform(0.02, 1)]) for _ in range(2))
    if heads is None and neurons is None:
        heads = 0.3
    alpha = drawn.uniform(0, 0.9)
    try:
        expected = steer2edit_plan(llama, direction, (0, 1, 2), heads, neurons, alpha)
    except NothingToChangeError:
        with pytest.raises(NothingToChangeError):
            made()
        return
    plan = made()
    assert_same(plan, expected)
    assert plan.metadata["settings"] == expected.metadata["settings"]


def test_importances_above_every_threshold_change_nothing(study):
    with pytest.raises(NothingToChangeError):
        Steer2Edit(heads_rho=1.5, alpha=0.9).plan_for(study)


def test_constant_keys_make_the_baked_plan(llama, corpus, direction, study):
    for layer, strength in ((1, 0.5), (2, 3.0), (1, 2.0)):
        vectors = {layer: direction.vectors["block_out"][layer]}
        plan, expected = (
            Bake(layer=layer, strength=strength).plan_for(study),
            bake_plan(llama, corpus, vectors, strength),
        )
        [edit], [other] = plan.edits, expected.edits
        torch.testing.assert_close(change(edit), change(other), rtol=1e-5, atol=1e-7)
        assert edit.notes["change_norm"] == pytest.approx(other.notes["change_norm"], rel=1e-5)
        assert plan.metadata["settings"] == expected.metadata["settings"]
        assert (plan.metadata["source"], plan.metadata["target"]) == ("qaa", "qab")


def test_expensive_parts_are_computed_once(llama, corpus, direction, monkeypatch):
    passes = []
    study = Material(llama, corpus, "qaa", "qab", directions=(direction,), progress=passes.append)
    by_method = spaces(study, ["keyed", "steer2edit", "bake"])
    assert not passes
    for space in by_method.values():
        for settings in space.known:
            space.make(settings)
    count = len(passes)
    assert count
    monkeypatch.setattr(
        "editing.plans.weights.Weights.read", lambda *_: pytest.fail("a weight was read again")
    )
    for space in by_method.values():
        for settings in space.known:
            space.make({**settings, **({"strength": 1.234} if "strength" in settings else {"alpha": 0.01})})
    assert len(passes) == count


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, corpus):
    """One expert a token, so that languages have experts of their own even in a random model."""
    made = models.build_checkpoint(
        tmp_path_factory.mktemp("mixture") / "m", "qwen3_moe", num_experts=8, num_experts_per_tok=1
    )
    return Material(load_model(str(made)), corpus, "qaa", "qab", layers=(0, 1, 2))


@pytest.mark.parametrize("name", searched())
def test_every_permanent_method_can_be_searched(study, mixture, name):
    study = mixture if name in ("keyed-experts", "steer-router") else study
    space = spaces(study, [name])[name]
    numbers = {k: 0.7 * knob.low + 0.3 * knob.high for k, knob in space.knobs.items() if not knob.words}
    other = {
        k: v if k not in numbers else round(numbers[k]) if space.knobs[k].whole else numbers[k]
        for k, v in space.known[0].items()
    }
    for settings in (*space.known, other):
        plan = space.make(settings)
        assert plan.metadata["fingerprint"] == study.loaded.fingerprint
    assert {method.name for method in METHODS if method.edited and method.permanent} == set(searched())


def test_every_known_setting_is_one_that_could_be_drawn(study):
    for space in spaces(study, list(searched())).values():
        assert space.known
        for settings in space.known:
            assert set(settings) == {name for name, knob in space.knobs.items() if knob.applies(settings)}
            for name, value in settings.items():
                knob = space.knobs[name]
                assert value in knob.words if knob.words else knob.low <= value <= knob.high


def test_layers_that_may_change(llama, corpus, direction):
    study = Material(llama, corpus, "qaa", "qab", directions=(direction,), layers=(2, 1))
    space = spaces(study, ["keyed"])["keyed"]
    # Three quarters of two layers are both, so no window is offered.
    assert space.knobs["layers"].words == ("all", "lower half")
    plan = space.make({"values": "means", "heads": 0.0, "layers": "lower half", "strength": 1.0})
    assert [edit.layer for edit in plan.edits] == [1]
    only = spaces(replace(study, layers=(1,)), ["steer2edit"])["steer2edit"]
    assert {edit.layer for edit in only.make(only.known[0]).edits} == {1}


def test_a_knob_of_a_word():
    knob = Knob(given=("edits", ("heads",)))
    assert knob.applies({"edits": "heads"})
    assert not knob.applies({"edits": "neurons"})
    assert Knob().applies({})


def test_refuses_methods_that_are_none(study):
    with pytest.raises(UsageError, match="'diffmean' cannot be searched: choose from keyed"):
        spaces(study, ["keyed", "diffmean"])
    for methods in ([], ["keyed", "keyed"]):
        with pytest.raises(UsageError, match="at least one, each once"):
            spaces(study, methods)
